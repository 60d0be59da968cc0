"""Which variant of the kernels a problem gets on a chip, what is refused, and what the compiler makes of it.

The long list of compilations runs with DFFORMER_TEST_FULL=1.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import gpu_resources
import pytest
import torch
from cases import CASES
from extent import pairwise

from dfformer_kernels.backend.cuda import launch as cuda
from dfformer_kernels.backend.cuda import layout, nvrtc
from dfformer_kernels.backend.cuda.layout import CHIPS, Chip, KernelSpec, choose_variant
from dfformer_kernels.backend.cuda.sources import cuda_sources

H100, RTX_4090 = CHIPS["sm_90"], CHIPS["sm_89"]


SPECTRA_IN_SHARED = [1, 2, 7, 9, 12, 13, 14, 15, 16, 24, 28, 32, 33, 48, 56, 64, 96, 128]


# Choosing variants


def family() -> list[tuple[KernelSpec, Chip]]:
    return list(product(gpu_resources.specs(), CHIPS.values()))


def all_specs() -> Iterator[KernelSpec]:
    axes = {"F": (0, 1, 4, 16), "dtype": tuple(layout.STORAGE), "star_relu": (False, True), "backward": (False, True)}
    for H, W, others in product(SPECTRA_IN_SHARED, SPECTRA_IN_SHARED, pairwise(**axes)["argvalues"]):
        yield KernelSpec(H, W, 20, *others.values)


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: chip.arch)
def test_variants_keep_the_kernels_and_the_chips_limits(chip: Chip) -> None:
    chosen = 0
    for spec in all_specs():
        variant = choose_variant(spec, chip)
        assert (variant is None) == bool(layout.unsupported_reasons(spec, chip))
        if variant is None:
            continue
        chosen += 1
        assert variant.channels_per_cta in (2, 4, 8, 16, 32)
        assert variant.threads % 32 == variant.threads % (variant.channels_per_cta // variant.width) == 0
        assert variant.width == 1 or (variant.width == 2 and spec.C % 2 == 0 and variant.channels_per_cta >= 16)
        assert 32 <= variant.threads <= 512
        assert variant.rows == 0 or spec.W % 2 == 0
        assert variant.shared_bytes <= chip.shared_per_cta
        assert 1 <= variant.min_ctas <= chip.ctas_per_multiprocessor
        assert variant.min_ctas * variant.threads <= chip.threads_per_multiprocessor
        assert variant.min_ctas * (variant.shared_bytes + 1024) <= chip.shared_per_multiprocessor
    assert chosen > 2000


@pytest.mark.parametrize(
    ("spec", "chip", "channels", "threads", "ctas"),
    [
        # 4 columns, two channels a thread: the most channels make two warps
        (KernelSpec(7, 7, 1024, 4, torch.float32, True, False), H100, 32, 64, 8),
        # 8 channels of float32 fill a sector; two CTAs of 104 kB fit an H100, not a 4090
        (KernelSpec(56, 56, 128, 4, torch.float32, True, False), H100, 8, 256, 2),
        (KernelSpec(56, 56, 128, 4, torch.float32, True, False), RTX_4090, 4, 256, 1),
        # 16 channels of bfloat16 do; one CTA of 203 kB is better than two with half of a sector
        (KernelSpec(56, 56, 128, 4, torch.bfloat16, True, False), H100, 16, 480, 1),
        # one CTA of 66 kB is all that fits
        (KernelSpec(128, 128, 128, 4, torch.float32, True, False), H100, 2, 160, 1),
        # and one of 133 kB, for two half spectra, one after the other
        (KernelSpec(128, 128, 128, 4, torch.float32, True, True), H100, 2, 160, 1),
        # which is alone, with twice the threads
        (KernelSpec(96, 96, 128, 4, torch.float32, True, True), RTX_4090, 2, 256, 1),
        # 64 bytes of a pixel's channels, where two such CTAs fit
        (KernelSpec(28, 28, 256, 4, torch.float32, True, False), H100, 16, 256, 4),
        (KernelSpec(28, 28, 256, 4, torch.float32, True, False), RTX_4090, 8, 128, 3),
        # no more channels than there are; an odd number of them takes registers for addresses
        (KernelSpec(7, 7, 3, 4, torch.float32, True, False), H100, 4, 32, 24),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "",
)
def test_variants_by_hand(spec: KernelSpec, chip: Chip, channels: int, threads: int, ctas: int) -> None:
    variant = choose_variant(spec, chip)
    assert variant is not None
    assert (variant.channels_per_cta, variant.threads, variant.min_ctas) == (channels, threads, ctas)


def test_the_models_planes_fit() -> None:
    """Up to 64x64 everywhere; beyond that as far as the half spectra of two channels fit a chip's shared memory."""
    refused = {(spec.H, spec.backward, chip.arch) for spec, chip in family() if choose_variant(spec, chip) is None}
    small = {"sm_86", "sm_89", "sm_120"}
    assert {key for key in refused if key[0] <= 64} == set()
    assert {key for key in refused if key[0] == 96} == set()
    assert {key for key in refused if key[0] == 128} == {(128, b, arch) for b in (False, True) for arch in small}
    assert {key for key in refused if key[0] == 256} == {(256, b, arch) for b in (False, True) for arch in CHIPS}


def test_resident_ctas_by_hand() -> None:
    # 128 registers of 256 threads are half of the registers; 104 kB and 1 kB of the system's twice are less than 228
    assert H100.resident_ctas(256, 128, 103936) == 2
    assert H100.resident_ctas(256, 129, 1000) == 1  # rounded up to 136
    assert H100.resident_ctas(32, 32, 0) == 32  # CTAs
    assert H100.resident_ctas(1024, 16, 0) == 2  # threads
    assert RTX_4090.resident_ctas(1024, 16, 0) == 1
    assert H100.resident_ctas(33, 255, 0) == 4  # two warps of 256 registers a thread
    assert H100.resident_ctas(224, 96, 0) == 2  # a quarter of the registers has room for 5 warps, of 7 in a CTA
    assert H100.resident_ctas(32, 32, 233472 // 3) == 2  # shared memory


NO_REGISTERS = "do not fit the 255 registers of a thread"
NO_SHARED_MEMORY = "do not fit the 227 KiB of shared memory that a CTA has on sm_90"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"H": 13 * 11}, None),
        ({"dtype": torch.float64}, "it computes in float32, x is float64"),
        ({"F": 16}, None),
        ({"F": 17}, "it mixes at most 16 filters, there are 17"),
        ({"H": 34}, "H = 34 has a prime factor above 13"),
        ({"W": 19}, "W = 19 has a prime factor above 13"),
        ({"H": 288, "W": 208}, f"half spectra of two channels of 288x208 planes {NO_SHARED_MEMORY}"),
        ({"W": 1024}, f"rows of W = 1024 {NO_REGISTERS}"),
        ({"H": 128, "W": 128, "backward": True}, None),
        ({"W": 77, "backward": True}, None),
        ({"W": 81, "backward": True}, f"rows of W = 81 {NO_REGISTERS}"),
        ({"W": 162, "backward": True}, f"rows of W = 162 {NO_REGISTERS}"),
        ({"H": 480, "W": 54, "backward": True}, None),
        ({"C": 2**31 // 196 + 1}, "a sample has 2^31 elements or more"),
    ],
)
def test_unsupported_reasons(changes: dict[str, Any], reason: str | None) -> None:
    spec = replace(KernelSpec(14, 14, 640, 4, torch.float32, True, False), **changes)
    assert layout.unsupported_reasons(spec, H100) == ([] if reason is None else [reason])


# What the compiler makes of them

# Both ways of rows and of columns in each direction, odd F, an odd plane, a rectangle, a weight per channel, fewer
# channels than a CTA has.
QUICK = [
    (KernelSpec(7, 7, 1024, 4, torch.float32, True, False), "sm_90"),
    (KernelSpec(28, 28, 256, 4, torch.bfloat16, True, False), "sm_80"),
    (KernelSpec(14, 14, 640, 4, torch.float32, True, True), "sm_120"),
    (KernelSpec(7, 7, 1024, 4, torch.float16, False, True), "sm_86"),
    (KernelSpec(24, 30, 5, 0, torch.float32, False, True), "sm_100"),
    (KernelSpec(9, 15, 20, 5, torch.float32, False, True), "sm_89"),
    (KernelSpec(12, 12, 6, 16, torch.bfloat16, True, False), "sm_80"),
    (KernelSpec(7, 8, 6, 0, torch.float32, True, True), "sm_90"),
    # few channels, of an odd number or two per thread: what takes most registers for its size
    (KernelSpec(14, 14, 8, 4, torch.float32, True, False), "sm_90"),
    (KernelSpec(8, 5, 6, 5, torch.float16, False, True), "sm_90"),
    (KernelSpec(12, 5, 3, 4, torch.float32, True, False), "sm_90"),
    (KernelSpec(8, 6, 17, 4, torch.float32, True, True), "sm_90"),
]


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(("spec", "arch"), QUICK, ids=str)
def test_a_specialisation_compiles_without_spills(spec: KernelSpec, arch: str) -> None:
    """The kernel asserts that it lays out shared memory as `choose_variant` has it."""
    row = gpu_resources.cuda_row(spec, CHIPS[arch])
    assert row.spill_bytes == 0
    variant = choose_variant(spec, CHIPS[arch])
    assert variant is not None
    assert row.ctas_per_sm is not None
    assert row.ctas_per_sm >= variant.min_ctas


@pytest.mark.usefixtures("compiler")
def test_the_kernel_checks_the_shared_memory_it_is_given() -> None:
    spec, _ = QUICK[0]
    variant = choose_variant(spec, H100)
    assert variant is not None
    wrong = replace(variant, shared_bytes=variant.shared_bytes + 8)
    with pytest.raises(RuntimeError, match="the caller computes shared memory as Layout does"):
        nvrtc.compile_cubin(cuda_sources(), layout.compile_options(spec, wrong), "sm_90")


def test_the_committed_table_is_complete_and_clean() -> None:
    rows = [row for row in gpu_resources.read() if row["backend"] == "cuda"]
    problem = ("kernel", "target", "H", "W", "dtype", "direction")
    recorded = {tuple(row[name] for name in problem): row for row in rows}
    assert len(recorded) == len(rows) == len(family())
    for spec, chip in family():
        direction = gpu_resources.DIRECTIONS[spec.backward]
        dtype = str(spec.dtype).removeprefix("torch.")
        row = recorded[f"filter_{direction}, C={spec.C}", chip.arch, str(spec.H), str(spec.W), dtype, direction]
        variant = choose_variant(spec, chip)
        assert row["dispatched"] == str(variant is not None)
        if variant is None:
            continue
        assert row["spill_bytes"] == "0", row
        assert row["smem_bytes"] == str(variant.shared_bytes), row
        ctas = chip.resident_ctas(variant.threads, int(row["regs"]), variant.shared_bytes)
        assert row["ctas_per_sm"] == str(ctas), row
        assert ctas >= variant.min_ctas, row


@pytest.mark.usefixtures("compiler")
@pytest.mark.slow
@pytest.mark.parametrize("arch", CHIPS)
def test_the_committed_table_is_what_the_compiler_says(arch: str, tmp_path: Path) -> None:
    gpu_resources.write([gpu_resources.cuda_row(spec, CHIPS[arch]) for spec in gpu_resources.specs()], tmp_path / "csv")
    committed = [row for row in gpu_resources.read() if (row["backend"], row["target"]) == ("cuda", arch)]
    assert gpu_resources.read(tmp_path / "csv") == committed


@pytest.mark.usefixtures("compiler")
@pytest.mark.slow
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: chip.arch)
def test_the_operator_tests_planes_compile_without_spills(chip: Chip, backward: bool) -> None:
    for case, per_channel in product(CASES, (False, True)):
        spec = KernelSpec(case.H, case.W, case.C, 0 if per_channel else case.F, torch.float32, True, backward)
        if not layout.unsupported_reasons(spec, chip):
            assert gpu_resources.cuda_row(spec, chip).spill_bytes == 0, spec


@pytest.mark.gpu
def test_the_chip_at_hand_is_as_in_the_table() -> None:
    chip = cuda.chip_of(0)
    known = CHIPS.get(chip.arch)
    if known is None:
        pytest.skip(f"{chip.arch} is not in the table")
    assert replace(chip, multiprocessors=known.multiprocessors) == known
