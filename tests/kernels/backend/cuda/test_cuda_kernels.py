"""The CUDA kernels without a GPU: their phases emulated with every access watched, and the source itself in threads."""

import functools
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import require, require_compiler
from cuda_kernels import (
    COMPILE,
    HALVES,
    PAIRS,
    REGISTERS,
    ROLLED,
    STORAGE,
    UNROLLED,
    Kernel,
    Problem,
    check_outputs,
    compile_source,
    execute,
)
from extent import FULL, pairwise
from torch import Tensor

BF16, FP16 = torch.bfloat16, torch.float16
PRIMES = (17, 19, 23, 29)
KERNELS = [
    # the stages of the models, as a GPU runs them
    Kernel(7, 7, 40, 4, 32, 128, PAIRS, REGISTERS),
    Kernel(14, 14, 12, 4, 8, 64, PAIRS, REGISTERS),
    Kernel(14, 14, 16, 4, 16, 128, HALVES, ROLLED, BF16),
    Kernel(28, 28, 8, 4, 8, 128, HALVES, ROLLED),
    Kernel(56, 56, 6, 4, 4, 128, HALVES, ROLLED, B=1),
    # other images; where the factors of a column have twiddles between them, unrolled and rolled
    Kernel(12, 12, 8, 4, 8, 64, HALVES, REGISTERS, FP16),
    Kernel(16, 16, 8, 4, 8, 64, HALVES, UNROLLED, BF16),
    Kernel(64, 64, 4, 4, 4, 160, HALVES, ROLLED, B=1),
    # odd sides and large primes, rectangles
    Kernel(9, 15, 5, 4, 4, 32, PAIRS, ROLLED),
    Kernel(13, 11, 7, 4, 4, 32, PAIRS, REGISTERS),
    Kernel(11, 3, 7, 4, 4, 32, PAIRS, ROLLED),
    Kernel(6, 10, 17, 4, 16, 64, HALVES, UNROLLED),
    Kernel(10, 6, 3, 4, 2, 16, PAIRS, UNROLLED),
    # one row, one column, one pixel
    Kernel(1, 12, 3, 4, 2, 16, HALVES, REGISTERS),
    Kernel(12, 1, 3, 4, 2, 16, PAIRS, ROLLED),
    Kernel(1, 1, 5, 4, 4, 32, PAIRS, REGISTERS),
    Kernel(2, 2, 3, 4, 2, 32, HALVES, REGISTERS),
    # filters: 16-byte loads and 8-byte ones; fewer than there are StarReLU's scalars; the most
    Kernel(8, 8, 3, 1, 2, 32, PAIRS, REGISTERS),
    Kernel(8, 8, 3, 2, 2, 32, HALVES, REGISTERS, FP16),
    Kernel(7, 8, 3, 5, 2, 32, HALVES, REGISTERS, star_relu=False),
    Kernel(8, 5, 3, 16, 2, 32, PAIRS, ROLLED),
    # a weight for every channel
    Kernel(14, 14, 12, 0, 8, 64, PAIRS, REGISTERS, B=3),
    Kernel(6, 10, 5, 0, 2, 32, HALVES, ROLLED, BF16, star_relu=False),
    # one group of channels, fewer than a line of 128 bytes has, and a number of pixels that no line's share divides
    Kernel(7, 7, 8, 4, 8, 32, PAIRS, REGISTERS),
    # two channels per thread: both ways of rows and columns, fewer channels than a CTA has, a weight for every channel
    Kernel(7, 7, 40, 4, 32, 64, PAIRS, REGISTERS, width=2),
    Kernel(14, 14, 16, 4, 16, 64, HALVES, REGISTERS, BF16, width=2),
    Kernel(12, 6, 6, 5, 8, 32, HALVES, ROLLED, FP16, star_relu=False, width=2),
    Kernel(6, 5, 6, 0, 4, 32, PAIRS, REGISTERS, width=2, B=3),
    Kernel(9, 7, 6, 3, 4, 32, PAIRS, ROLLED, width=2, spectra_in_shared=1),
    # one spectrum in shared memory: long and short columns, twiddles, F from 0 to 16
    Kernel(24, 24, 6, 4, 4, 128, HALVES, ROLLED, spectra_in_shared=1),
    Kernel(9, 7, 5, 3, 2, 32, PAIRS, ROLLED, BF16, spectra_in_shared=1),
    Kernel(7, 8, 3, 16, 2, 32, HALVES, REGISTERS, star_relu=False, spectra_in_shared=1),
    Kernel(16, 6, 5, 0, 2, 32, HALVES, ROLLED, spectra_in_shared=1, B=3),
]
if FULL:
    KERNELS += [
        Kernel(24, 24, 8, 4, 8, 128, HALVES, ROLLED, star_relu=False),
        Kernel(32, 32, 6, 4, 4, 128, PAIRS, UNROLLED, B=1),
        Kernel(48, 48, 2, 4, 2, 64, HALVES, UNROLLED, B=1),
    ]
    SIDES = (3, 4, 5, 11, 13, 18, 20, 21, 22, 25, 26, 27, 35, 36, 39, 40, 44, 49, 50, 52, 60, 63, 72, 80, 96, 112, 128)
    KERNELS += [Kernel(side, side, 2, 4, 2, 128, PAIRS, ROLLED, B=1) for side in SIDES]
    KERNELS += [
        Kernel(side, 2 * (29 - side), 3, 3, 2, 64, HALVES, UNROLLED, B=1) for side in range(2, 28) if side not in PRIMES
    ]


DIRECTIONS = pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])


Emulator = Callable[[Kernel], Path]
TOGETHER = 8


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    """Compiles a kernel's phases, and its neighbours' in KERNELS, into one program, once, as fast as possible.

    Not all of KERNELS at once: where processes share out the tests, each compiles about what it runs.
    """
    require_compiler()
    folder = tmp_path_factory.mktemp("emulator")

    @functools.cache
    def program(part: int) -> Path:
        runs = " ".join(
            f"RUN({kernel.name}_{direction}, {STORAGE[kernel.dtype]}, {direction}, {kernel.layout(bool(backward))})"
            for kernel in KERNELS[part * TOGETHER : (part + 1) * TOGETHER]
            for backward, direction in enumerate(("forward", "backward"))
        )
        path = folder / f"emulate_cuda_{part}"
        compile_source(
            "emulate_cuda.cpp", path, "-O0", "-DFFT_INLINE=inline", "-DUNROLLED_BODY=", f"-DSPECIALISATIONS={runs}"
        )
        return path

    return lambda kernel: program(KERNELS.index(kernel) // TOGETHER)


def _emulate(emulator: Emulator, kernel: Kernel, backward: bool, folder: Path, **options: Any) -> dict[str, int]:
    """What the emulator reports of one kernel."""
    name = f"{kernel.name}_{'backward' if backward else 'forward'}"
    done = execute([emulator(kernel), name], kernel, backward, folder, **options)
    assert done.returncode == 0, done.stderr
    words = done.stdout.split()
    return dict(zip(words[::2], map(int, words[1::2]), strict=True))


@DIRECTIONS
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_emulated(kernel: Kernel, backward: bool, emulator: Emulator, tmp_path: Path) -> None:
    """Right, without races or stray accesses; every pixel is moved once, in full sectors, without bank conflicts."""
    report = _emulate(emulator, kernel, backward, tmp_path)
    check_outputs(kernel, backward, tmp_path)
    assert {name: report[name] for name in ("races", "outside", "unwritten") if report[name]} == {}

    # forward reads and writes once; backward reads both tensors, and x again where StarReLU's derivative needs it
    size = kernel.B * kernel.H * kernel.W * kernel.C * kernel.dtype.itemsize
    assert report["loaded"] == size * (1 + backward * (1 + kernel.star_relu))
    assert report["stored"] == size

    # every sector of the next sample once, shared out among CTAs, where lines of 128 bytes hold whole CTAs' runs
    run = kernel.channels_per_cta * kernel.dtype.itemsize
    if not backward and kernel.C * kernel.dtype.itemsize % 128 == 0 and 128 % min(run, 128) == 0:
        assert report["asked"] == report["different"] == size * (kernel.B - 1) // kernel.B // 32

    # where one spectrum fits, X is written and read, and so is P where a basis' gradient adds up over channels
    spectra = 8 * kernel.H * (kernel.W // 2 + 1) * kernel.channels_per_cta * kernel.B * kernel.items_per_sample
    one_spectrum = backward and kernel.spectra_in_shared == 1
    assert report["kept"] == one_spectrum * (4 if kernel.F else 2) * spectra

    # a warp's request: a run of channels for each of 32 / channels_per_cta pixels, and one more sector where it begins
    # anywhere
    run = -(-kernel.channels_per_cta * kernel.dtype.itemsize // 32) + (kernel.C * kernel.dtype.itemsize % 32 != 0)
    assert report["sectors"] <= report["requests"] * 32 * kernel.width // kernel.channels_per_cta * run

    # no bank conflicts, but a few where rows are padded (a gradient's sum over channels goes from one to the next) or
    # threads of a warp diverge (channels beyond C)
    padded = kernel.row_stride > (kernel.W // 2 + 1) * kernel.channels_per_cta
    bound = 1.2 if padded or kernel.C % kernel.channels_per_cta else 1.01
    assert report["wavefronts"] <= bound * report["least_wavefronts"]


DYNAMIC = next(kernel for kernel in KERNELS if kernel.F == 4 and kernel.H == 6)
GLOBAL = next(kernel for kernel in KERNELS if kernel.F == 0)
WANTED = [("x",), ("filters",), ("star_relu",), ("x", "filters"), ("logits", "star_relu")]


@pytest.mark.parametrize("wanted", WANTED, ids=str)
@pytest.mark.parametrize("kernel", [DYNAMIC, GLOBAL], ids=["dynamic", "global"])
def test_only_wanted_gradients(kernel: Kernel, wanted: tuple[str, ...], emulator: Emulator, tmp_path: Path) -> None:
    report = _emulate(emulator, kernel, True, tmp_path, wanted=wanted)
    assert not report["outside"], report
    check_outputs(kernel, True, tmp_path, wanted)


@DIRECTIONS
def test_channels_keep_to_themselves(backward: bool, emulator: Emulator, tmp_path: Path) -> None:
    """A channel that holds an infinity is lost; the others of its CTA do not notice."""
    plain = _pixels_out(emulator, DYNAMIC, backward, tmp_path, lambda x: None)
    spoilt = _pixels_out(emulator, DYNAMIC, backward, tmp_path, lambda x: x[0, 2, 3, 1].fill_(float("inf")))
    others = torch.arange(DYNAMIC.C) != 1
    assert not spoilt[0, ..., 1].isfinite().all()
    assert torch.equal(spoilt[..., others], plain[..., others])
    assert torch.equal(spoilt[1:], plain[1:])


def _pixels_out(
    emulator: Emulator, kernel: Kernel, backward: bool, folder: Path, change: Callable[[Tensor], Any]
) -> Tensor:
    """y or grad_x after ``change`` was made to x or grad_y."""
    problem = Problem.of(kernel)
    with torch.no_grad():
        change(problem.grad_y if backward else problem.inputs["x"])
    _emulate(emulator, kernel, backward, folder, problem=problem)
    outputs = torch.from_numpy(np.fromfile(folder / "outputs", dtype=np.uint8))
    return outputs[: problem.y.numel() * kernel.dtype.itemsize].view(kernel.dtype).view(problem.y.shape)


BARRIERS = [(False, 0), (False, 1), (True, 0), (True, 1)]
ONE_SPECTRUM = next(kernel for kernel in KERNELS if kernel.spectra_in_shared == 1)


@pytest.mark.parametrize(
    ("kernel", "backward", "barrier"),
    [(DYNAMIC, *which) for which in BARRIERS] + [(ONE_SPECTRUM, True, barrier) for barrier in range(4)],
    ids=lambda value: value.name if isinstance(value, Kernel) else None,
)
def test_the_emulator_sees_a_missing_barrier(
    kernel: Kernel, backward: bool, barrier: int, emulator: Emulator, tmp_path: Path
) -> None:
    assert _emulate(emulator, kernel, backward, tmp_path, missing_barrier=barrier)["races"]


# dynamic_filter.cu itself, in host threads. Small: a sanitizer makes a barrier of some threads slow.
THREADED = [
    Kernel(8, 6, 5, 4, 2, 8, HALVES, UNROLLED),
    Kernel(5, 7, 3, 3, 2, 8, PAIRS, REGISTERS, BF16),
    Kernel(6, 5, 3, 0, 2, 8, PAIRS, ROLLED, FP16),
    Kernel(8, 6, 5, 4, 2, 8, HALVES, UNROLLED, spectra_in_shared=1),
    Kernel(5, 6, 6, 2, 4, 8, HALVES, REGISTERS, BF16, width=2),
]


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Kernel, bool, str], Path]:
    """Compiles the source for one kernel, direction and sanitizer, once."""
    require_compiler()
    folder = tmp_path_factory.mktemp("shim")

    @functools.cache
    def works(sanitizer: str) -> bool:
        """Not with every kernel's address space, nor where its library is not installed."""
        source, path = folder / "empty.cpp", folder / f"empty_{sanitizer}"
        source.write_text("int main() {}")
        compiled = subprocess.run([COMPILE[0], f"-fsanitize={sanitizer}", source, "-o", path], capture_output=True)
        return compiled.returncode == 0 and subprocess.run([path], capture_output=True).returncode == 0

    @functools.cache
    def program(kernel: Kernel, backward: bool, sanitizer: str) -> Path:
        require("cpu", works(sanitizer), f"g++ -fsanitize={sanitizer} makes programs that do not run here")
        path = folder / f"{kernel.name}_{backward}_{sanitizer}"
        # as fast as possible, but for races: without optimisation one thread is done before the next has started
        options = [
            "-O1" if sanitizer == "thread" else "-O0",
            "-g1",
            "-pthread",
            f"-fsanitize={sanitizer}",
            *kernel.macros(backward),
        ]
        compile_source("run_cuda_shim.cpp", path, *options)
        return path

    return program


@pytest.mark.parametrize(**pairwise(kernel=THREADED, sanitizer=("address", "thread"), backward=(True, False)))
def test_source_in_threads(
    kernel: Kernel, sanitizer: str, backward: bool, shim: Callable[[Kernel, bool, str], Path], tmp_path: Path
) -> None:
    done = execute([shim(kernel, backward, sanitizer)], kernel, backward, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    check_outputs(kernel, backward, tmp_path)


def test_source_without_unwanted_gradients(shim: Callable[[Kernel, bool, str], Path], tmp_path: Path) -> None:
    done = execute([shim(THREADED[0], True, "address")], THREADED[0], True, tmp_path, wanted=("x",))
    assert (done.returncode, done.stderr) == (0, "")
    check_outputs(THREADED[0], True, tmp_path, ("x",))


@pytest.mark.parametrize(("backward", "barrier"), [*BARRIERS, (True, 2)])
def test_a_sanitizer_sees_a_missing_barrier(
    backward: bool, barrier: int, shim: Callable[[Kernel, bool, str], Path], tmp_path: Path
) -> None:
    """In the source too, whose last barrier keeps one item's spectra from the next."""
    done = execute([shim(THREADED[0], backward, "thread")], THREADED[0], backward, tmp_path, missing_barrier=barrier)
    assert "data race" in done.stderr
