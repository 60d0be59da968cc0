"""The ``cuda`` backend's host side without a GPU: what is compiled, kept, chosen, launched and refused.

The kernels themselves are tested in test_cuda_kernels.py. The long list of compilations runs with DFFORMER_TEST_FULL=1.
"""

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu_resources
import pytest
import torch
from cases import CASES, Case, Op, make_grad, make_inputs
from cases import OPS as ALL_OPS
from conftest import require, require_compiler
from extent import FULL
from paths import ROOT
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dfformer_kernels import device, dispatch, dynamic_filter, reference
from dfformer_kernels import disk_cache as cache
from dfformer_kernels.backends.cuda import launch as cuda
from dfformer_kernels.backends.cuda import layout, nvrtc
from dfformer_kernels.backends.cuda.layout import CHIPS, Chip, Step, choose_variant
from dfformer_kernels.backends.cuda.sources import cuda_sources
from dfformer_kernels.problem import KernelBuildError, Problem
from dfformer_kernels.tolerance import BOUND, gradient_errors, relative_error

OPS = {name: op for name, op in ALL_OPS.items() if op.name in cuda.KERNELS}
H100, RTX_4090 = CHIPS["sm_90"], CHIPS["sm_89"]
TINY = {"tiny.cu": '#include "tiny.h"\nextern "C" __global__ void tiny(float* x) { *x = VALUE + OFFSET; }'}
TINY["tiny.h"] = "#define OFFSET 1"
PLANES = [1, 2, 7, 9, 12, 13, 14, 15, 16, 24, 28, 32, 33, 48, 56, 64, 96, 128]


@pytest.fixture
def compiler() -> None:
    reasons = nvrtc.unavailable_reasons()
    require("cuda", not reasons, "; ".join(reasons))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache directory; nothing warned about or announced yet."""
    monkeypatch.setenv("DFFORMER_CACHE_DIR", str(tmp_path))
    cache._warn_unwritable.cache_clear()
    nvrtc._announce.cache_clear()
    return tmp_path


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Targets of what is compiled."""
    targets: list[str] = []
    real = nvrtc.compile_cubin

    def counted(*args: Any) -> tuple[bytes, str]:
        targets.append(args[2])
        return real(*args)

    monkeypatch.setattr(nvrtc, "compile_cubin", counted)
    return targets


# Compiling


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("arch", CHIPS)
def test_compiles_for_a_chip_that_is_not_there(arch: str) -> None:
    cubin, log = nvrtc.compile_cubin(TINY, ["-DVALUE=2", "--ptxas-options=-v"], arch)
    assert cubin.startswith(b"\x7fELF")
    assert f"'tiny' for '{arch}'" in log


@pytest.mark.usefixtures("compiler")
def test_an_empty_log_overwrites_no_shared_bytes() -> None:
    assert nvrtc.compile_cubin(TINY, ["-DVALUE=2"], "sm_90")[1] == ""
    assert [bytes([value])[0] for value in range(256)] == list(range(256))


@pytest.mark.usefixtures("compiler")
def test_a_mistake_raises_with_the_compilers_log() -> None:
    with pytest.raises(
        KernelBuildError, match=r"(?s)NVRTC_ERROR_COMPILATION for tiny\.cu on sm_90:\ntiny\.cu.*\"VALUE\" is undefined"
    ):
        nvrtc.compile_cubin(TINY, [], "sm_90")
    with pytest.raises(
        KernelBuildError, match=r"NVRTC_ERROR_INVALID_OPTION for tiny\.cu on sm_1:\n.*--gpu-architecture"
    ):
        nvrtc.compile_cubin(TINY, ["-DVALUE=2"], "sm_1")


def test_missing_bindings_are_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise ModuleNotFoundError("No module named 'cuda'")

    monkeypatch.setattr(nvrtc, "_nvrtc", missing)
    nvrtc.unavailable_reasons.cache_clear()
    (reason,) = nvrtc.unavailable_reasons()
    nvrtc.unavailable_reasons.cache_clear()
    assert reason == (
        "NVRTC cannot be reached through cuda-bindings (No module named 'cuda'); pip install cuda-bindings"
    )


# Keeping what was compiled


@pytest.mark.usefixtures("compiler")
def test_a_cubin_is_compiled_once_for_all_it_depends_on(
    folder: Path, compilations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    two = nvrtc.cached_cubin(TINY, ["-DVALUE=2"], "sm_90")
    assert nvrtc.cached_cubin(TINY, ["-DVALUE=2"], "sm_90") == two
    assert len(compilations) == 1
    header = TINY | {"tiny.h": "#define OFFSET 2"}
    for sources, options, arch in (
        (TINY, ["-DVALUE=3"], "sm_90"),
        (TINY, ["-DVALUE=2"], "sm_80"),
        (header, ["-DVALUE=2"], "sm_90"),
    ):
        assert nvrtc.cached_cubin(sources, options, arch) != two
    assert len(compilations) == 4
    monkeypatch.setattr(nvrtc, "version", lambda: (99, 0))
    nvrtc.cached_cubin(TINY, ["-DVALUE=2"], "sm_90")
    assert len(compilations) == len(list(folder.iterdir())) == 5


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    "damage",
    [lambda data: b"", lambda data: data[:20], lambda data: data[:-1], lambda data: data[:-1] + b"\xff"],
    ids=["empty", "short", "truncated", "flipped"],
)
def test_a_damaged_cubin_is_compiled_again(
    folder: Path, compilations: list[str], damage: Callable[[bytes], bytes]
) -> None:
    cubin = nvrtc.cached_cubin(TINY, ["-DVALUE=2"], "sm_90")
    (file,) = folder.iterdir()
    good = file.read_bytes()
    file.write_bytes(damage(good))
    assert nvrtc.cached_cubin(TINY, ["-DVALUE=2"], "sm_90") == cubin
    assert file.read_bytes() == good
    assert len(compilations) == 2


@pytest.mark.usefixtures("compiler", "folder")
def test_compiling_is_told_once(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    for value in (2, 3):
        nvrtc.cached_cubin(TINY, [f"-DVALUE={value}"], "sm_90")
    (record,) = caplog.records
    assert "compiles CUDA kernels" in record.message
    assert str(tmp_path) in record.message


@pytest.mark.usefixtures("compiler", "folder")
def test_a_folder_that_cannot_be_written_is_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Warnings are errors in this test run, so a second one would raise."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("DFFORMER_CACHE_DIR", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot keep files in .*file"):
        assert nvrtc.cached_cubin(TINY, ["-DVALUE=2"], "sm_90")
    assert nvrtc.cached_cubin(TINY, ["-DVALUE=3"], "sm_90")


def test_a_full_disk_is_one_warning_and_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.warns(UserWarning, match="No space left on device"):
        cache.write("name", b"data")
    cache.write("name", b"data")
    assert list(folder.iterdir()) == []
    assert cache.read("name") is None


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"DFFORMER_CACHE_DIR": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/dfformer"),
        ({"XDG_CACHE_HOME": "", "HOME": "/c"}, "/c/.cache/dfformer"),
    ],
)
def test_where_files_are_kept(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str) -> None:
    monkeypatch.delenv("DFFORMER_CACHE_DIR", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache.directory() == Path(expected)


@pytest.mark.usefixtures("compiler")
def test_processes_may_compile_the_same_at_once(folder: Path) -> None:
    script = (
        "import hashlib, sys; from dfformer_kernels.backends.cuda import nvrtc; sys.stdin.readline()\n"
        f"cubins = [nvrtc.cached_cubin({TINY!r}, [f'-DVALUE={{i}}'], 'sm_90') for i in range(9)]\n"
        "print(hashlib.sha256(b''.join(cubins)).hexdigest())"
    )
    run = [sys.executable, "-c", script]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [subprocess.Popen(run, text=True, **pipes) for _ in range(2)]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    assert len(list(folder.iterdir())) == 9


# Loading and launching


class Result(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NO_BINARY_FOR_GPU = 209
    CUDA_ERROR_ILLEGAL_ADDRESS = 700


class FakeDriver:
    """cuda.bindings.driver that records its calls and fails with ``error`` in the one named ``failing``."""

    def __init__(self, failing: str = "", error: Result = Result.CUDA_ERROR_NO_BINARY_FOR_GPU) -> None:
        self.failing, self.error, self.calls = failing, error, list[tuple[Any, ...]]()
        self.CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="shared")

    def __getattr__(self, name: str) -> Callable[..., tuple[Any, ...]]:
        def call(*args: Any) -> tuple[Any, ...]:
            if name == "cuLaunchKernel":
                *args_before, parameters, extra = args
                pointers = (ctypes.c_void_p * 3).from_address(parameters)
                args = (*args_before, [ctypes.c_int64.from_address(p or 0).value for p in pointers], extra)
            self.calls.append((name, *args))
            if name == self.failing:
                return (self.error, None)
            return (Result.CUDA_SUCCESS,) if "Set" in name or "Launch" in name else (Result.CUDA_SUCCESS, f"<{name}>")

        return call


def launch(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "_driver", lambda: driver)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=70 + device))
    kernel = nvrtc.load(b"cubin", "name", device=1, threads=96, shared_bytes=100_000)
    kernel.launch(2**31 - 1, 0, 2**62, -1)


def test_a_kernel_is_loaded_in_torchs_context_and_launched_on_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver()
    launch(driver, monkeypatch)
    assert driver.calls == [
        ("cuDeviceGet", 1),
        ("cuDevicePrimaryCtxRetain", "<cuDeviceGet>"),
        ("cuCtxSetCurrent", "<cuDevicePrimaryCtxRetain>"),
        ("cuModuleLoadData", b"cubin"),
        ("cuModuleGetFunction", "<cuModuleLoadData>", b"name"),
        ("cuFuncSetAttribute", "<cuModuleGetFunction>", "shared", 100_000),
        ("cuCtxSetCurrent", "<cuDevicePrimaryCtxRetain>"),
        ("cuLaunchKernel", "<cuModuleGetFunction>", 2**31 - 1, 1, 1, 96, 1, 1, 100_000, 71, [0, 2**62, -1], 0),
    ]


CALLS = (
    *("cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent"),
    *("cuModuleLoadData", "cuModuleGetFunction", "cuFuncSetAttribute"),
    "cuLaunchKernel",
)
LOADING = CALLS[3:6]


@pytest.mark.parametrize("call", CALLS)
def test_every_error_of_the_driver_is_raised_by_name(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """What is wrong with the kernel lets another backend run, and only that."""
    driver = FakeDriver(failing=call)
    with pytest.raises(RuntimeError, match=f"{call} returned CUDA_ERROR_NO_BINARY_FOR_GPU") as info:
        launch(driver, monkeypatch)
    assert type(info.value) is (KernelBuildError if call in LOADING else RuntimeError)
    assert driver.calls[-1][0] == call


@pytest.mark.parametrize("call", CALLS)
def test_an_earlier_kernels_error_is_not_taken_for_a_broken_kernel(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    with pytest.raises(RuntimeError, match=f"{call} returned CUDA_ERROR_ILLEGAL_ADDRESS") as info:
        launch(FakeDriver(call, Result.CUDA_ERROR_ILLEGAL_ADDRESS), monkeypatch)
    assert type(info.value) is RuntimeError


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("enough", [True, False], ids=["enough then", "too little"])
def test_memory_that_torch_holds_is_released_for_the_driver(
    monkeypatch: pytest.MonkeyPatch, call: str, enough: bool
) -> None:
    driver = FakeDriver(call, Result.CUDA_ERROR_OUT_OF_MEMORY)
    released: list[str] = []

    def release() -> None:
        released.append(call)
        driver.failing = "" if enough else call

    monkeypatch.setattr(torch.cuda, "empty_cache", release)
    error = pytest.raises(torch.OutOfMemoryError, match=f"{call} returned CUDA_ERROR_OUT_OF_MEMORY")
    with nullcontext() if enough else error:
        launch(driver, monkeypatch)
    assert released == [call]
    assert driver.calls[-1][0] == ("cuLaunchKernel" if enough else call)


def test_a_lack_of_the_hosts_memory_is_no_broken_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(name: str) -> tuple[Any, ...]:
        code = SimpleNamespace(name="NVRTC_ERROR_OUT_OF_MEMORY") if name == "nvrtcCompileProgram" else 0
        return (code,) if name == "nvrtcCompileProgram" else (code, 1)

    class Nvrtc:
        def __getattr__(self, name: str) -> Callable[..., Any]:
            return lambda *args: answer(name)

    monkeypatch.setattr(nvrtc, "_nvrtc", Nvrtc)
    monkeypatch.setattr(nvrtc, "_text_of", lambda program: "")
    with pytest.raises(MemoryError, match=r"NVRTC ran out of host memory for tiny\.cu"):
        nvrtc.compile_cubin(TINY, [], "sm_90")


@pytest.mark.usefixtures("compiler")
def test_the_real_bindings_take_what_is_passed_to_them() -> None:
    """They convert arguments before they look for the driver's library, which is missing here."""
    driver = pytest.importorskip("cuda.bindings.driver")
    if torch.cuda.is_available():
        return  # every GPU test launches kernels
    values = (ctypes.c_void_p * 1)()
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    for call in (
        lambda: driver.cuLaunchKernel(driver.CUfunction(0), 1, 1, 1, 32, 1, 1, 0, 77, ctypes.addressof(values), 0),
        lambda: driver.cuFuncSetAttribute(driver.CUfunction(0), attribute, 100_000),
        lambda: driver.cuModuleLoadData(b"cubin"),
    ):
        with pytest.raises(RuntimeError, match="driver"):
            call()


# Choosing variants


def family() -> list[tuple[Step, Chip]]:
    return list(product(gpu_resources.steps(), CHIPS.values()))


def all_steps() -> Iterator[Step]:
    for (H, W), F, dtype, star_relu, backward in product(
        product(PLANES, PLANES), (0, 1, 4, 16), layout.STORAGE, (False, True), (False, True)
    ):
        yield Step(H, W, 20, F, dtype, star_relu, backward)


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: chip.arch)
def test_variants_keep_the_kernels_and_the_chips_limits(chip: Chip) -> None:
    chosen = 0
    for step in all_steps():
        variant = choose_variant(step, chip)
        assert (variant is None) == bool(layout.unsupported_reasons(step, chip))
        if variant is None:
            continue
        chosen += 1
        assert variant.lanes in (2, 4, 8, 16, 32)
        assert variant.threads % 32 == variant.threads % variant.lanes == 0
        assert 32 <= variant.threads <= 512
        assert variant.rows == 0 or step.W % 2 == 0
        assert variant.shared_bytes <= chip.shared_per_block
        assert 1 <= variant.min_blocks <= chip.blocks_per_multiprocessor
        assert variant.min_blocks * variant.threads <= chip.threads_per_multiprocessor
        assert variant.min_blocks * (variant.shared_bytes + 1024) <= chip.shared_per_multiprocessor
    assert chosen > 2000


@pytest.mark.parametrize(
    ("step", "chip", "lanes", "threads", "blocks"),
    [
        # 7 columns' worth of 4 threads: more channels until there are four warps
        (Step(7, 7, 1024, 4, torch.float32, True, False), H100, 32, 128, 7),
        # 8 channels of float32 fill a sector; two blocks of 104 kB fit an H100, not a 4090
        (Step(56, 56, 128, 4, torch.float32, True, False), H100, 8, 256, 2),
        (Step(56, 56, 128, 4, torch.float32, True, False), RTX_4090, 2, 64, 3),
        # 16 channels of bfloat16 would; twice 203 kB fit nowhere
        (Step(56, 56, 128, 4, torch.bfloat16, True, False), H100, 8, 256, 2),
        # one block of 66 kB is all that fits
        (Step(128, 128, 128, 4, torch.float32, True, False), H100, 2, 160, 1),
        # and one of 133 kB, for two half spectra in turn
        (Step(128, 128, 128, 4, torch.float32, True, True), H100, 2, 160, 1),
        # which is alone, with twice the threads
        (Step(96, 96, 128, 4, torch.float32, True, True), RTX_4090, 2, 256, 1),
        # 64 bytes of a pixel's channels, where two such blocks fit
        (Step(28, 28, 256, 4, torch.float32, True, False), H100, 16, 256, 4),
        (Step(28, 28, 256, 4, torch.float32, True, False), RTX_4090, 8, 128, 3),
        # no more lanes than channels; an odd number of them takes registers for addresses
        (Step(7, 7, 3, 4, torch.float32, True, False), H100, 4, 32, 24),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "",
)
def test_variants_by_hand(step: Step, chip: Chip, lanes: int, threads: int, blocks: int) -> None:
    variant = choose_variant(step, chip)
    assert variant is not None
    assert (variant.lanes, variant.threads, variant.min_blocks) == (lanes, threads, blocks)


def test_the_models_planes_fit() -> None:
    """Up to 64x64 everywhere; beyond that as far as the half spectra of two channels fit a chip's shared memory."""
    refused = {(step.H, step.backward, chip.arch) for step, chip in family() if choose_variant(step, chip) is None}
    small = {"sm_86", "sm_89", "sm_120"}
    assert {key for key in refused if key[0] <= 64} == set()
    assert {key for key in refused if key[0] == 96} == set()
    assert {key for key in refused if key[0] == 128} == {(128, b, arch) for b in (False, True) for arch in small}
    assert {key for key in refused if key[0] == 256} == {(256, b, arch) for b in (False, True) for arch in CHIPS}


def test_resident_blocks_by_hand() -> None:
    # 128 registers of 256 threads are half of the registers; 104 kB and 1 kB of the system's twice are less than 228
    assert H100.resident_blocks(256, 128, 103936) == 2
    assert H100.resident_blocks(256, 129, 1000) == 1  # rounded up to 136
    assert H100.resident_blocks(32, 32, 0) == 32  # blocks
    assert H100.resident_blocks(1024, 16, 0) == 2  # threads
    assert RTX_4090.resident_blocks(1024, 16, 0) == 1
    assert H100.resident_blocks(33, 255, 0) == 4  # two warps of 256 registers a thread
    assert H100.resident_blocks(224, 96, 0) == 2  # a quarter of the registers has room for 5 warps, of 7 in a block
    assert H100.resident_blocks(32, 32, 233472 // 3) == 2  # shared memory


NO_REGISTERS = "do not fit the 255 registers of a thread"
NO_SHARED_MEMORY = "do not fit the 227 KiB of shared memory that a block has on sm_90"


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
    step = replace(Step(14, 14, 640, 4, torch.float32, True, False), **changes)
    assert layout.unsupported_reasons(step, H100) == ([] if reason is None else [reason])


# What the compiler makes of them

# Both ways of rows and of columns in each direction, odd F, an odd plane, a rectangle, a weight a channel, tail lanes.
QUICK = [
    (Step(7, 7, 1024, 4, torch.float32, True, False), "sm_90"),
    (Step(28, 28, 256, 4, torch.bfloat16, True, False), "sm_80"),
    (Step(14, 14, 640, 4, torch.float32, True, True), "sm_120"),
    (Step(7, 7, 1024, 4, torch.float16, False, True), "sm_86"),
    (Step(24, 30, 5, 0, torch.float32, False, True), "sm_100"),
    (Step(9, 15, 20, 5, torch.float32, False, True), "sm_89"),
]


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(("step", "arch"), QUICK, ids=str)
def test_a_specialisation_compiles_without_spills(step: Step, arch: str) -> None:
    """The kernel asserts that it lays out shared memory as `choose_variant` has it."""
    row = gpu_resources.cuda_row(step, CHIPS[arch])
    assert row.spill_bytes == 0
    variant = choose_variant(step, CHIPS[arch])
    assert variant is not None
    assert row.blocks_per_sm is not None
    assert row.blocks_per_sm >= variant.min_blocks


@pytest.mark.usefixtures("compiler")
def test_the_kernel_checks_the_shared_memory_it_is_given() -> None:
    step, _ = QUICK[0]
    variant = choose_variant(step, H100)
    assert variant is not None
    wrong = replace(variant, shared_bytes=variant.shared_bytes + 8)
    with pytest.raises(RuntimeError, match="the caller computes shared memory as Layout does"):
        nvrtc.compile_cubin(cuda_sources(), layout.compile_options(step, wrong), "sm_90")


def test_the_committed_table_is_complete_and_clean() -> None:
    rows = [row for row in gpu_resources.read() if row["backend"] == "cuda"]
    problem = ("kernel", "target", "H", "W", "dtype", "direction")
    recorded = {tuple(row[name] for name in problem): row for row in rows}
    assert len(recorded) == len(rows) == len(family())
    for step, chip in family():
        direction = gpu_resources.DIRECTIONS[step.backward]
        dtype = str(step.dtype).removeprefix("torch.")
        row = recorded[f"filter_{direction}, C={step.C}", chip.arch, str(step.H), str(step.W), dtype, direction]
        variant = choose_variant(step, chip)
        assert row["dispatched"] == str(variant is not None)
        if variant is None:
            continue
        assert row["spill_bytes"] == "0", row
        assert row["smem_bytes"] == str(variant.shared_bytes), row
        blocks = chip.resident_blocks(variant.threads, int(row["regs"]), variant.shared_bytes)
        assert row["blocks_per_sm"] == str(blocks), row
        assert blocks >= variant.min_blocks, row


@pytest.mark.usefixtures("compiler")
@pytest.mark.skipif(not FULL, reason="minutes; DFFORMER_TEST_FULL=1 runs it")
@pytest.mark.parametrize("arch", CHIPS)
def test_the_committed_table_is_what_the_compiler_says(arch: str, tmp_path: Path) -> None:
    gpu_resources.write([gpu_resources.cuda_row(step, CHIPS[arch]) for step in gpu_resources.steps()], tmp_path / "csv")
    committed = [row for row in gpu_resources.read() if (row["backend"], row["target"]) == ("cuda", arch)]
    assert gpu_resources.read(tmp_path / "csv") == committed


@pytest.mark.usefixtures("compiler")
@pytest.mark.skipif(not FULL, reason="minutes; DFFORMER_TEST_FULL=1 runs it")
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_the_operator_tests_planes_compile_without_spills(backward: bool) -> None:
    for case, per_channel in product(CASES, (False, True)):
        step = Step(case.H, case.W, case.C, 0 if per_channel else case.F, torch.float32, True, backward)
        if not layout.unsupported_reasons(step, H100):
            assert gpu_resources.cuda_row(step, H100).spill_bytes == 0, step


# The backend's functions, with the reference in place of the kernels


def at(address: int, dtype: torch.dtype, *shape: int) -> Tensor:
    """The tensor at an address of this process."""
    count = torch.Size(shape).numel() * dtype.itemsize
    return torch.frombuffer((ctypes.c_char * count).from_address(address), dtype=dtype).view(shape)


@dataclass
class FakeKernel:
    """Reads and writes what the kernels do, at the addresses it is given."""

    step: Step
    channel_blocks: int
    launched: list[tuple[int, ...]]

    def launch(self, blocks: int, *arguments: int) -> None:
        self.launched.append((blocks, *arguments))
        (self._backward if self.step.backward else self._forward)(blocks, *arguments)

    def _parameters(self, B: int, logits: int, filters: int, scale: int, bias: int) -> list[Tensor | None]:
        step = self.step
        assert bool(logits) == bool(step.F)
        assert bool(scale) == bool(bias) == step.star_relu
        assert filters % 16 == 0
        scalars = [at(p, torch.float32, 1) if p else None for p in (scale, bias)]
        if not step.F:
            return [at(filters, torch.float32, step.H, step.K, step.C, 2), *scalars]
        basis = at(filters, torch.float32, step.H, step.K, step.F, 2)
        return [at(logits, torch.float32, B, step.F, step.C), basis, *scalars]

    def _run(self, suffix: str) -> Callable[..., Any]:
        return reference.KERNELS[("dynamic_filter" if self.step.F else "global_filter") + suffix]

    def _forward(
        self, blocks: int, x: int, y: int, logits: int, filters: int, scale: int, bias: int, ahead: int
    ) -> None:
        B = blocks // self.channel_blocks
        shape = (self.step.dtype, B, self.step.H, self.step.W, self.step.C)
        assert (blocks % self.channel_blocks, ahead) == (0, 5)
        at(y, *shape).copy_(self._run("")(at(x, *shape), *self._parameters(B, logits, filters, scale, bias)))

    def _backward(
        self,
        blocks: int,
        grad_y: int,
        x: int,
        logits: int,
        filters: int,
        scale: int,
        bias: int,
        grad_x: int,
        grad_logits: int,
        filter_slots: int,
        star_relu_slots: int,
        spectra: int,
        B: int,
    ) -> None:
        step = self.step
        tensors = [at(p, step.dtype, B, step.H, step.W, step.C) for p in (grad_y, x)]
        parameters = self._parameters(B, logits, filters, scale, bias)
        names = ["x", "logits", "filters", "scale", "bias"] if step.F else ["x", "filters", "scale", "bias"]
        given = [True, *(p is not None for p in parameters)]
        gradients = self._run("_backward")(*tensors, *parameters, given)
        found = dict(
            zip([name for name, is_given in zip(names, given, strict=True) if is_given], gradients, strict=True)
        )
        assert blocks <= B * self.channel_blocks
        assert blocks % self.channel_blocks == 0 or step.F
        if grad_x:
            at(grad_x, step.dtype, *found["x"].shape).copy_(found["x"])
        if grad_logits:
            at(grad_logits, torch.float32, *found["logits"].shape).copy_(found["logits"])
        if filter_slots:
            slots = 2 * blocks if step.F else blocks // self.channel_blocks
            at(filter_slots, torch.float32, slots, *found["filters"].shape).copy_(found["filters"] / slots)
        if star_relu_slots:
            pair = torch.cat([found["scale"].reshape(1), found["bias"].reshape(1)])
            at(star_relu_slots, torch.float32, blocks, 2).copy_(pair / blocks)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The backend on CPU tensors, with fake kernels that run two channels a block and at most five blocks at once."""
    launched: list[tuple[int, ...]] = []

    def prepare(problem: Problem) -> cuda.Loaded:
        step = Step.of(problem)
        channel_blocks = -(-step.C // 2)
        kernel: Any = FakeKernel(step, channel_blocks, launched)
        return cuda.Loaded(kernel, channel_blocks, resident=5, spectrum=0, slots=2)

    monkeypatch.setattr(cuda, "prepare", prepare)
    monkeypatch.setattr(cuda, "_current", nullcontext)
    return launched


def compare_with_reference(op: Op, inputs: dict[str, Tensor], grad_y: Tensor) -> None:
    tensors = op.schema_order(inputs)
    present = [t for t in tensors if t is not None]
    exact = [None if t is None else t.double() for t in tensors]
    y = cuda.KERNELS[op.name](*tensors)
    assert y.dtype == grad_y.dtype
    assert relative_error(y, reference.KERNELS[op.name](*exact)) <= BOUND[y.dtype]
    backward, needs = f"{op.name}_backward", [t is not None for t in tensors]
    gradients = cuda.KERNELS[backward](grad_y, *tensors, needs)
    assert [(g.dtype, g.shape) for g in gradients] == [(t.dtype, t.shape) for t in present]
    wanted = reference.KERNELS[backward](grad_y.double(), *exact, needs)
    assert max(gradient_errors(gradients, wanted)) <= BOUND[y.dtype]


@pytest.mark.usefixtures("launched")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [Case(2, 4, 6, 3), Case(3, 5, 3, 12, F=3)], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_results_and_gradients_through_the_kernels_arguments(op: str, case: Case, dtype: torch.dtype) -> None:
    inputs = make_inputs(OPS[op], case, dtype, requires_grad=False)
    grad_y = make_grad(OPS[op], inputs)
    compare_with_reference(OPS[op], inputs, grad_y)
    strided = {name: torch.stack([t, t], dim=-1)[..., 0] for name, t in inputs.items()}
    compare_with_reference(OPS[op], strided, torch.stack([grad_y, grad_y], dim=-1)[..., 0])


def test_what_is_not_needed_is_not_asked_of_the_kernel(launched: list[tuple[int, ...]]) -> None:
    inputs = make_inputs(OPS["dynamic_filter+star_relu"], Case(2, 4, 6, 3), torch.float32, requires_grad=False)
    backward = partial(cuda.KERNELS["dynamic_filter_backward"], torch.ones(2, 4, 6, 3), *inputs.values())
    everything = backward([True] * 5)
    for needs in product((False, True), repeat=5):
        launched.clear()
        gradients = backward(needs)
        wanted = [gradient for gradient, need in zip(everything, needs, strict=True) if need]
        assert len(gradients) == len(wanted)
        assert all(torch.equal(a, b) for a, b in zip(gradients, wanted, strict=True))
        ((_, *arguments, _),) = launched
        need_x, need_logits, need_basis, need_scale, need_bias = needs
        assert [bool(p) for p in arguments[6:]] == [need_x, need_logits, need_basis, need_scale or need_bias, False]


class Launches(TorchDispatchMode):
    """What torch runs beside views and allocations, each a kernel on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in ("empty_like", "new_empty", "empty", "view", "unbind", "detach", "fill_"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def test_torch_launches_nothing_beside_the_kernel_but_sums_of_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel: Any = SimpleNamespace(launch=lambda *arguments: None)
    monkeypatch.setattr(cuda, "prepare", lambda problem: cuda.Loaded(kernel, 2, 5, 0, 1))
    monkeypatch.setattr(cuda, "_current", nullcontext)
    inputs = make_inputs(OPS["dynamic_filter+star_relu"], Case(2, 4, 6, 3), torch.float32, requires_grad=False)
    with torch.no_grad(), Launches() as forward:
        cuda.KERNELS["dynamic_filter"](*inputs.values())
    grad_y = torch.ones(2, 4, 6, 3)
    with torch.no_grad(), Launches() as backward:
        cuda.KERNELS["dynamic_filter_backward"](grad_y, *inputs.values(), [True] * 5)
    assert (forward.names, backward.names) == ([], ["sum", "sum"])


@pytest.mark.parametrize(
    ("B", "channel_blocks", "resident", "per_channel", "expected"),
    [
        (128, 16, 264, False, (264, 528)),
        (2, 16, 264, False, (32, 64)),
        (128, 16, 264, True, (256, 16)),
        (3, 16, 264, True, (48, 3)),
        (128, 300, 264, True, (300, 1)),
    ],
)
def test_the_backwards_blocks(
    B: int, channel_blocks: int, resident: int, per_channel: bool, expected: tuple[int, int]
) -> None:
    loaded = cuda.Loaded(Any, channel_blocks, resident, 0, 2)  # type: ignore[arg-type]
    assert loaded.launch_size(B, per_channel) == expected


def test_a_wrong_tensor_never_reaches_a_kernel() -> None:
    dense = torch.zeros(2, 3)
    device = dense.device
    assert cuda._addresses(device, torch.float32, dense, None) == [dense.data_ptr(), 0]
    for wrong in (dense.t(), dense.half(), dense.to("meta")):
        with pytest.raises(RuntimeError, match=r"the kernel takes contiguous torch\.float32 tensors on cpu, got"):
            cuda._addresses(device, torch.float32, dense, wrong)


# The backend's functions with the kernels' source, compiled for this machine instead of a GPU


class HostDriver(FakeDriver):
    """Loads libraries where the driver loads cubins; calls their ``launch`` where it launches kernels."""

    def cuModuleLoadData(self, path: bytes) -> tuple[Any, ...]:  # noqa: N802
        return (Result.CUDA_SUCCESS, ctypes.CDLL(path.decode()))

    def cuModuleGetFunction(self, module: ctypes.CDLL, name: bytes) -> tuple[Any, ...]:  # noqa: N802
        getattr(module, name.decode())  # the direction's kernel is there
        return (Result.CUDA_SUCCESS, module)

    def cuLaunchKernel(self, library: ctypes.CDLL, blocks: int, *rest: int) -> tuple[Any, ...]:  # noqa: N802
        *_, shared_bytes, stream, parameters, _ = rest
        assert stream == 7
        library.launch(blocks, shared_bytes, ctypes.c_void_p(parameters))
        return (Result.CUDA_SUCCESS,)


@pytest.fixture
def on_the_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A chip of one multiprocessor that runs two blocks: a block of the backward has several work items."""
    require_compiler()

    def compile_library(sources: object, options: list[str], arch: str) -> bytes:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.so"
        includes = [f"-I{ROOT / folder}" for folder in ("csrc/fft", "csrc/cuda", "tests/native")]
        macros = [option for option in options if option.startswith("-D")]
        command = [os.environ.get("CXX", "g++"), "-std=c++20", "-O1", "-shared", "-fPIC", *includes, *macros]
        source = ROOT / "tests/native/launch_cuda_shim.cpp"
        done = subprocess.run([*command, source, "-o", path], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return str(path).encode()

    small = replace(H100, multiprocessors=1, blocks_per_multiprocessor=2)
    driver = HostDriver()
    monkeypatch.setattr(nvrtc, "cached_cubin", compile_library)
    monkeypatch.setattr(nvrtc, "_driver", lambda: driver)
    monkeypatch.setattr(cuda, "chip_of", lambda device: small)
    monkeypatch.setattr(cuda, "_loaded", {})
    cuda.prepare.cache_clear()
    monkeypatch.setattr(cuda, "_current", nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    yield
    cuda.prepare.cache_clear()


ON_THE_HOST = [
    ("dynamic_filter+star_relu", Case(3, 7, 7, 40), torch.float32),
    ("dynamic_filter", Case(3, 5, 9, 40, F=3), torch.float16),
    ("global_filter+star_relu", Case(3, 10, 6, 40), torch.bfloat16),
]
if FULL:
    ON_THE_HOST += product(OPS, CASES, [torch.float32])


@pytest.mark.usefixtures("on_the_host")
@pytest.mark.parametrize("op", ["dynamic_filter+star_relu", "global_filter"])
def test_two_half_spectra_in_turn(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a chip whose shared memory has room for one."""
    chip = replace(cuda.chip_of(0), shared_per_block=1500)
    monkeypatch.setattr(cuda, "chip_of", lambda device: chip)
    case = Case(3, 8, 6, 5)
    variant = choose_variant(Step(case.H, case.W, case.C, case.F, torch.float32, True, True), chip)
    assert variant is not None
    assert (variant.planes, variant.shared_bytes) == (1, 8 * 8 * 5 * 2 + 4 * (4 * 2 + 4 * 32))
    inputs = make_inputs(OPS[op], case, torch.float32, requires_grad=False)
    compare_with_reference(OPS[op], inputs, make_grad(OPS[op], inputs))


@pytest.mark.usefixtures("on_the_host")
@pytest.mark.parametrize(("op", "case", "dtype"), ON_THE_HOST, ids=str)
def test_results_and_gradients_of_the_kernels_source(op: str, case: Case, dtype: torch.dtype) -> None:
    for backward in (False, True):
        step = Step(case.H, case.W, case.C, case.F if op.startswith("dynamic") else 0, dtype, True, backward)
        if reasons := layout.unsupported_reasons(step, H100):
            pytest.skip("; ".join(reasons))
    inputs = make_inputs(OPS[op], case, dtype, requires_grad=False)
    compare_with_reference(OPS[op], inputs, make_grad(OPS[op], inputs))


# Where it cannot run


@pytest.mark.parametrize(
    ("machine", "reason"),
    [
        ({"hip": "6.4"}, "its kernels are CUDA, torch is built for ROCm"),
        ({"cuda": None}, "torch is built without CUDA"),
        ({"available": False}, "no CUDA device"),
        ({"capabilities": [(7, 5), (6, 1)]}, "compute capability is 7.5, it needs 8.0"),
        ({"bindings": ("no bindings",)}, "no bindings"),
        ({"capabilities": [(7, 5), (9, 0)]}, None),
    ],
)
def test_why_it_is_not_available(monkeypatch: pytest.MonkeyPatch, machine: dict[str, Any], reason: str | None) -> None:
    monkeypatch.setattr(torch.version, "hip", machine.get("hip"))
    monkeypatch.setattr(torch.version, "cuda", machine.get("cuda", "13.0"))
    capabilities = machine.get("capabilities", [(9, 0)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: machine.get("available", True))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device])
    monkeypatch.setattr(nvrtc, "unavailable_reasons", lambda: machine.get("bindings", ()))
    assert cuda.unavailable_reasons() == ([] if reason is None else [reason])


def test_an_old_chip_beside_a_new_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: [(7, 5), (9, 0)][device])
    monkeypatch.setattr(cuda, "chip_of", lambda device: H100)
    problem = Problem("dynamic_filter_backward", "cuda", torch.float32, (8, 14, 14, 640), 4, True)
    assert cuda.unsupported_reasons(problem) == ["compute capability is 7.5, it needs 8.0"]
    assert cuda.unsupported_reasons(problem._replace(device_index=1)) == []
    assert cuda.unsupported_reasons(problem._replace(device_index=1, filters=17)) == [
        "it mixes at most 16 filters, there are 17"
    ]
    assert Step.of(problem) == Step(14, 14, 640, 4, torch.float32, star_relu=True, backward=True)


def test_a_kernel_is_not_loaded_into_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is loaded serves any batch size."""
    problem = Problem("dynamic_filter", "cuda", torch.float32, (8, 14, 14, 640), 4, True)
    monkeypatch.setattr(device, "_capturing", lambda: True)
    monkeypatch.setattr(cuda, "_loaded", {(Step.of(problem), 0): "loaded"})
    cuda.prepare.cache_clear()
    for B in (8, 1):
        assert cuda.prepare(problem._replace(shape=(B, 14, 14, 640))) == "loaded"
    for other in (problem._replace(filters=5), problem._replace(device_index=1)):
        with pytest.raises(RuntimeError, match=r"dynamic_filter on .* call the operator once .* before capturing"):
            cuda.prepare(other)
    cuda.prepare.cache_clear()


def test_forcing_it_without_a_gpu_says_why() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(RuntimeError, match=r"cuda: .*it runs on cuda, x is on cpu"):
        dynamic_filter(torch.ones(1, 4, 4, 2), torch.zeros(1, 3, 2), torch.ones(4, 3, 3, 2), backend="cuda")
    assert [name for name in dispatch.backends() if name in ("cpu", "cuda", "torch")] == ["cpu", "cuda", "torch"]


def test_the_cpu_path_does_not_ask_the_gpus_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    def touched() -> list[str]:
        raise AssertionError("this may load libraries")

    table = tuple(replace(b, unavailable_reasons=touched) if b.device == "cuda" else b for b in dispatch.TABLE)
    assert table != dispatch.TABLE
    monkeypatch.setattr(dispatch, "TABLE", table)
    dispatch.select.cache_clear()
    dynamic_filter(torch.ones(1, 4, 4, 2), torch.zeros(1, 3, 2), torch.ones(4, 3, 3, 2))
    dispatch.select.cache_clear()


@pytest.mark.gpu
def test_the_chip_at_hand_is_as_in_the_table() -> None:
    chip = cuda.chip_of(0)
    known = CHIPS.get(chip.arch)
    if known is None:
        pytest.skip(f"{chip.arch} is not in the table")
    assert replace(chip, multiprocessors=known.multiprocessors) == known
