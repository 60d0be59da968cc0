"""One kernel of csrc/cuda with its problem: compiled for this machine, run as a program, its outputs checked."""

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from cases import OPS, Case, Inputs, assert_within_bound, expected, make_grad, make_inputs
from paths import ROOT
from torch import Tensor

from dfformer_kernels.backend.cuda.layout import KernelSpec, Variant, compile_options, second_factor, slots_per_cta
from dfformer_kernels.tolerance import BOUND, gradient_errors

COMPILE = [
    os.environ.get("CXX", "g++"),
    "-std=c++20",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    *(f"-I{ROOT / folder}" for folder in ("csrc/fft", "csrc/cuda", "tests/native")),
]
STORAGE = {torch.float32: "float", torch.bfloat16: "BFloat16", torch.float16: "Float16"}
PAIRS, HALVES = 0, 1  # how rows are transformed
REGISTERS, UNROLLED, ROLLED = 0, 1, 2  # and columns


GRADIENTS = ("x", "logits", "filters", "star_relu")  # what the backward kernel can be asked for


@dataclass(frozen=True)
class Kernel:
    """A specialisation of both directions and the problem it runs on; F = 0 is the global filter."""

    H: int
    W: int
    C: int
    F: int
    channels_per_cta: int
    threads: int
    rows: int
    columns: int
    dtype: torch.dtype = torch.float32
    star_relu: bool = True
    B: int = 2
    spectra_in_shared: int = 2  # backward
    width: int = 1  # channels of a thread

    def __str__(self) -> str:
        return self.name

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        variant = f"channels_per_cta{self.channels_per_cta}x{self.threads}_rows{self.rows}_columns{self.columns}"
        flags = (
            "_star_relu" * self.star_relu
            + "_one_spectrum" * (self.spectra_in_shared == 1)
            + "_paired" * (self.width == 2)
        )
        return f"plane{self.H}x{self.W}_C{self.C}_F{self.F}_{variant}_{dtype}{flags}"

    def layout(self, backward: bool) -> str:
        numbers = (self.H, self.W, self.C, self.F, self.channels_per_cta, self.threads, self.rows, self.columns)
        flags = (self.star_relu, backward, self.spectra_in_shared if backward else 1, self.width)
        derived = (second_factor(self.H, self.columns), self.slots if self.F else 1)
        return ", ".join(str(int(number)) for number in (*numbers, *flags, *derived))

    @property
    def items_per_sample(self) -> int:
        return -(-self.C // self.channels_per_cta)

    @property
    def slots(self) -> int:
        return slots_per_cta(self.H * (self.W // 2 + 1), self.channels_per_cta, self.threads)

    @property
    def ctas(self) -> tuple[int, int]:
        """Of the forward kernel, and of the backward one: fewer than there are work items, so that CTAs add up."""
        items = self.B * self.items_per_sample
        return items, max(items - 1, 1) if self.F else self.items_per_sample

    @property
    def row_stride(self) -> int:
        K = self.W // 2 + 1
        if self.channels_per_cta >= 16:
            return K * self.channels_per_cta
        return (
            (K | 1) * self.channels_per_cta
            if self.rows == HALVES
            else K * self.channels_per_cta + self.channels_per_cta // 2
        )

    def shared_bytes(self, backward: bool) -> int:
        forward = 8 * self.H * self.row_stride
        sums = max(self.F, 2 if self.star_relu else 0)
        floats = self.F * self.channels_per_cta + sums * self.threads * self.width
        return self.spectra_in_shared * forward + 4 * floats if backward else forward

    def macros(self, backward: bool) -> list[str]:
        spec = KernelSpec(self.H, self.W, self.C, self.F, self.dtype, self.star_relu, backward)
        how = self.rows, self.columns, self.channels_per_cta, self.width, self.threads
        variant = Variant(*how, self.spectra_in_shared if backward else 1, 1, self.shared_bytes(backward))
        return [option for option in compile_options(spec, variant) if option.startswith("-D")]


@dataclass(frozen=True)
class Problem:
    """A kernel's inputs as bytes, and in float64 what is to come out."""

    inputs: Inputs
    grad_y: Tensor
    y: Tensor
    gradients: Inputs

    @staticmethod
    def of(kernel: Kernel) -> "Problem":
        name = "dynamic_filter" if kernel.F else "global_filter"
        op = OPS[name + "+star_relu" * kernel.star_relu]
        case = Case(kernel.B, kernel.H, kernel.W, kernel.C, kernel.F)
        inputs = make_inputs(op, case, kernel.dtype, parameter_dtype=torch.float32)
        grad_y = make_grad(op, inputs)
        return Problem(inputs, grad_y, *expected(op, inputs, grad_y))

    def file(self, backward: bool) -> bytes:
        order = ("x", "grad_y", "logits", "basis", "weight", "scale", "bias")
        tensors = {**self.inputs, **({"grad_y": self.grad_y} if backward else {})}
        return b"".join(_bytes(tensors[name]) for name in order if name in tensors)


def _bytes(t: Tensor) -> bytes:
    return t.detach().reshape(-1).view(torch.uint8).numpy().tobytes()


def compile_source(source: str, program: Path, *options: str) -> None:
    command = [*COMPILE, *options, str(ROOT / "tests/native" / source), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def execute(
    program: Sequence[object],
    kernel: Kernel,
    backward: bool,
    folder: Path,
    wanted: Sequence[str] = GRADIENTS,
    missing_barrier: int = -1,
    problem: Problem | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs a kernel on a problem, its own if none is given; the outputs are in the folder."""
    (folder / "inputs").write_bytes((problem or Problem.of(kernel)).file(backward))
    mask = sum(1 << GRADIENTS.index(name) for name in wanted)
    arguments = [kernel.B, kernel.ctas[backward], mask, missing_barrier, folder / "inputs", folder / "outputs"]
    return subprocess.run(list(map(str, [*program, *arguments])), capture_output=True, text=True, check=False)


def check_outputs(kernel: Kernel, backward: bool, folder: Path, wanted: Sequence[str] = GRADIENTS) -> None:
    problem = Problem.of(kernel)
    outputs = torch.from_numpy(np.fromfile(folder / "outputs", dtype=np.uint8))
    if backward:
        _check_gradients(kernel, problem.gradients, outputs, wanted)
    else:
        assert_within_bound("y", outputs.view(kernel.dtype).view(problem.y.shape), problem.y)


def _check_gradients(kernel: Kernel, exact: Inputs, outputs: Tensor, wanted: Sequence[str]) -> None:
    ctas = kernel.ctas[1]
    filters = "basis" if kernel.F else "weight"
    slots = ctas * kernel.slots if kernel.F else ctas // kernel.items_per_sample
    layout = {  # as the kernel writes them
        "x": (kernel.dtype, tuple(exact["x"].shape)),
        "logits": (torch.float32, (kernel.B, kernel.F, kernel.C)),
        "filters": (torch.float32, (slots, *exact[filters].shape)),
        "star_relu": (torch.float32, (ctas, 2 * kernel.star_relu)),
    }
    actual = {}
    for name in wanted:
        dtype, shape = layout[name]
        size = torch.Size(shape).numel() * dtype.itemsize
        actual[name], outputs = outputs[:size].view(dtype).view(shape), outputs[size:]
    assert not outputs.numel()

    if "x" in wanted:
        assert_within_bound("grad_x", actual["x"], exact["x"])
    pairs = []
    if "logits" in wanted and kernel.F:
        pairs.append((actual["logits"], exact["logits"]))
    if "filters" in wanted:
        pairs.append((actual["filters"].sum(0), exact[filters]))
    if "star_relu" in wanted and kernel.star_relu:
        pairs += zip(actual["star_relu"].sum(0), (exact["scale"], exact["bias"]), strict=True)
    errors = gradient_errors(*zip(*pairs, strict=True)) if pairs else []
    assert all(error <= BOUND[torch.float32] for error in errors), errors
