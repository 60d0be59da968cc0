"""What bench_op measures: problems, the providers that compute them, and the rows of results."""

import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from common import DTYPES, allocated_peak
from torch import Tensor

import dfformer_kernels
from dfformer_kernels import dispatch, reference
from dfformer_kernels.backend import cpu
from dfformer_kernels.ops.flops import filter_flops

F = 4
FORWARD, BOTH = "forward", "forward+backward"

# (stride of the plane, C) of DFFormer-S18's stages; sizes of square inputs; batches. C is the expanded width, on which
# filters work: twice the width of the blocks.
STAGES = ((4, 128), (8, 256), (16, 640), (32, 1024))
INPUTS = (224, 384, 512, 1024)
BATCHES = (1, 8)
# (B, H, W, C): odd, prime, power-of-two and rectangular planes.
OTHER_SHAPES = (
    (8, 13, 13, 64),
    (8, 31, 31, 64),
    (4, 45, 35, 64),
    (2, 60, 80, 64),
    (2, 127, 127, 64),
    (1, 251, 251, 32),
    (1, 512, 512, 16),
    (1, 1024, 64, 32),
)

# (operator, direction): transforms per channel, flops per half-spectrum frequency and channel.
FLOPS = {
    ("dynamic_filter", FORWARD): (2, 6 + 4 * F),
    ("dynamic_filter", BOTH): (5, 6 + 4 * F + 4 * F + 6 + 8 + 8 * F),
    ("global_filter", FORWARD): (2, 6),
    ("global_filter", BOTH): (5, 6 + 6 + 8 + 2),
}
TENSORS_MOVED = {FORWARD: 2, BOTH: 5}
OURS = ("cpu", "cuda", "cufft")
OPS = ("dynamic_filter", "global_filter")


class StepProblem(NamedTuple):
    """One operator on one x (B,H,W,C); ``stage`` is true for a plane of DFFormer's stages."""

    op: str
    dtype: torch.dtype
    shape: tuple[int, int, int, int]
    stage: bool

    def inputs(self, device: str) -> list[Tensor]:
        """x and the operator's parameters."""
        B, H, W, C = self.shape
        K, generator = W // 2 + 1, torch.Generator().manual_seed(0)

        def random(dtype: torch.dtype, *size: int) -> Tensor:
            return torch.randn(*size, generator=generator).to(device, dtype)

        x, of_filters = random(self.dtype, *self.shape), reference.compute_dtype(self.dtype)
        if self.op == "global_filter":
            return [x, random(of_filters, H, K, C, 2)]
        return [x, random(self.dtype, B, F, C), random(of_filters, H, K, F, 2)]

    def grad_y(self, device: str) -> Tensor:
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(1)).to(device, self.dtype)


class Setting(NamedTuple):
    """Threads, instruction set and device of a run; ``isa`` is "" if the compiled core is not used."""

    threads: int
    isa: str = ""
    device: str = "cpu"


Run = tuple[Setting, Callable[[], object]]


@dataclass(frozen=True)
class Provider:
    """One way to compute a step; ``run`` takes x and the operator's parameters."""

    name: str
    run: Callable[..., Tensor]
    setting: Setting
    differentiable: bool = True
    extra_memory: Callable[["Provider", StepProblem, list[Tensor]], int] | None = None
    supports: Callable[[StepProblem], bool] = lambda problem: True


@dataclass(frozen=True)
class Row:
    """One provider on one problem in one direction, as in op.csv."""

    op: str
    dtype: str
    stage: bool
    B: int
    H: int
    W: int
    C: int
    direction: str
    provider: str
    isa: str
    threads: int
    rounds: int
    ms: float  # median
    speedup: float  # torch's ms divided by this row's
    gflops: float  # GFLOP/s
    gbps: float  # GB/s
    copy_gbps: float  # of copy_ on a tensor like x
    gemm_gflops: float
    share_of_limit: float
    error: float  # largest relative error against float64, gradients included
    extra_bytes: int | None  # of a forward; None if it is not measured

    @property
    def shape(self) -> str:
        return f"{self.B}x{self.H}x{self.W}x{self.C}"

    @property
    def problem(self) -> tuple[str, str, str]:
        """What rows have in common that differ only in dtype or provider."""
        return self.op, self.direction, self.shape


def problems(op: str, quick: bool = False) -> list[StepProblem]:
    """All shapes in float32, and the stages of eight 224x224 inputs in all dtypes."""
    if quick:
        stages = {224: [(1, 56, 56, 64), (8, 14, 14, 320)]}
        others: Sequence[tuple[int, int, int, int]] = [(2, 31, 31, 64)]
    else:
        stages = {size: [(B, size // s, size // s, C) for B in BATCHES for s, C in STAGES] for size in INPUTS}
        others = OTHER_SHAPES
    # A shape's dtypes follow each other, because they are compared, and a machine's speed drifts.
    found = [
        StepProblem(op, dtype, shape, True)
        for size, shapes in stages.items()
        for shape in shapes
        for dtype in DTYPES.values()
        if (dtype == torch.float32 or quick or (size, shape[0]) == (224, 8)) and is_measured(size, shape)
    ]
    return found + [StepProblem(op, torch.float32, shape, False) for shape in others]


def is_measured(size: int, shape: tuple[int, int, int, int]) -> bool:
    """Whether a stage for inputs of ``size`` takes reasonable time and memory."""
    return (size, shape[0]) != (1024, 8) and math.prod(shape) <= 2**26


def flops(op: str, shape: Sequence[int], direction: str) -> int:
    return filter_flops(shape, *FLOPS[op, direction])


def moved_bytes(shape: Sequence[int], dtype: torch.dtype, direction: str) -> int:
    return TENSORS_MOVED[direction] * math.prod(shape) * dtype.itemsize


@contextmanager
def under(setting: Setting) -> Iterator[None]:
    """Uses the setting's threads and instruction set inside, and restores the previous ones."""
    threads, isa = torch.get_num_threads(), cpu.core().active_isa() if setting.isa else ""
    torch.set_num_threads(setting.threads)
    if isa:
        cpu.core().set_active_isa(setting.isa)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if isa:
            cpu.core().set_active_isa(isa)


# --- providers


def _workspace_bytes(provider: Provider, problem: StepProblem, inputs: list[Tensor]) -> int:
    num_filters = F if problem.op == "dynamic_filter" else 0
    with under(provider.setting):
        return cpu.filter_workspace_bytes(problem.shape, num_filters, problem.dtype)


def _allocated_peak(provider: Provider, problem: StepProblem, inputs: list[Tensor]) -> int:
    """The peak of the bytes that torch allocates during a forward, without y's."""
    outputs: list[Tensor] = []
    peak = allocated_peak(lambda: outputs.append(provider.run(*inputs)), provider.setting.device)
    return peak - outputs[0].nbytes


def available_providers(op: str, setting: Setting, quick: bool = False) -> list[Provider]:
    """The providers that can run ``op`` here; prints why each of the others cannot."""
    found: list[Provider] = []
    for name, make in PROVIDERS.items():
        try:
            if quick and make is _compiled:
                raise RuntimeError("compiling takes longer than --quick allows")
            found += make(op, setting)
        except (ImportError, RuntimeError) as error:
            print(f"{op}: {name} is left out: {error}")
    return found


def _torch(op: str, setting: Setting) -> list[Provider]:
    return [Provider("torch", getattr(reference, op), setting, extra_memory=_allocated_peak)]


def _compiled(op: str, setting: Setting) -> list[Provider]:
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        raise RuntimeError("there is no C++ compiler")
    run = torch.compile(getattr(reference, op), fullgraph=True, dynamic=False)
    run(*StepProblem(op, torch.float32, (1, 4, 4, 2), False).inputs(setting.device))
    return [Provider("torch.compile", run, setting, extra_memory=_allocated_peak)]


def _backend(name: str, op: str, setting: Setting) -> list[Provider]:
    if reasons := _unsupported_reasons(name, setting.device, StepProblem(op, torch.float32, (1, 1, 1, 1), False)):
        raise RuntimeError("; ".join(reasons))
    run = partial(getattr(dfformer_kernels, op), backend=name)
    if name != "cpu":
        return [
            Provider(
                name,
                run,
                setting,
                extra_memory=_allocated_peak,
                supports=lambda problem: not _unsupported_reasons(name, setting.device, problem),
            )
        ]
    threads, active = setting.threads, cpu.core().active_isa()
    settings = {"cpu": Setting(threads, active)}
    settings |= {f"cpu/{isa}": Setting(threads, isa) for isa in cpu.core().supported_isas() if isa != active}
    if threads > 1:
        settings["cpu/1 thread"] = Setting(1, active)
    return [Provider(name, run, setting, extra_memory=_workspace_bytes) for name, setting in settings.items()]


def _unsupported_reasons(backend: str, device: str, problem: StepProblem) -> list[str]:
    """Why a backend cannot run the forward step or its backward; empty if it can."""
    filters = F if problem.op == "dynamic_filter" else 0
    steps = [
        dispatch.Problem(op, device, problem.dtype, problem.shape, filters)
        for op in (problem.op, f"{problem.op}_backward")
    ]
    return [reason for step in steps for reason in dispatch.by_name(backend).unsupported_reasons(step)]


def _scipy(module: str, op: str, setting: Setting) -> list[Provider]:
    _require_cpu(setting)
    fft = import_module(module)
    options: dict[str, Any] = {"norm": "ortho", "workers": setting.threads}
    return [
        _pipeline(
            module.split(".")[0],
            lambda u: fft.rfft2(u, axes=(1, 2), **options),
            lambda Z, W: fft.irfft(fft.ifft(Z, axis=1, **options), n=W, axis=2, **options),
            setting,
        )
    ]


def _pyfftw(op: str, setting: Setting) -> list[Provider]:
    _require_cpu(setting)
    pyfftw = import_module("pyfftw")
    pyfftw.config.PLANNER_EFFORT = "FFTW_MEASURE"
    import_module("pyfftw.interfaces.cache").enable()
    import_module("pyfftw.interfaces.cache").set_keepalive_time(60)  # plans survive until their next round
    return _scipy("pyfftw.interfaces.scipy_fft", op, setting)


def _ducc0(op: str, setting: Setting) -> list[Provider]:
    _require_cpu(setting)
    fft = import_module("ducc0").fft
    options: dict[str, Any] = {"inorm": 1, "nthreads": setting.threads}

    def inverse(Z: Any, W: int) -> Any:
        Z = fft.c2c(Z, axes=(1,), forward=False, **options)
        return fft.c2r(Z, axes=(2,), lastsize=W, forward=False, **options)

    return [_pipeline("ducc0", lambda u: fft.r2c(u, axes=(1, 2), **options), inverse, setting)]


def _require_cpu(setting: Setting) -> None:
    if setting.device != "cpu":
        raise RuntimeError("it runs on a CPU")


def _pipeline(
    name: str, transform: Callable[[Any], Any], inverse: Callable[[Any, int], Any], setting: Setting
) -> Provider:
    """Transforms of NumPy arrays, (B,H,W,C) to (B,H,K,C) and back to width W, around a product in torch."""

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        u = x.to(reference.compute_dtype(x.dtype))
        *logits, filters = parameters
        M = torch.view_as_complex(filters)
        if logits:
            M = torch.einsum("bfc,hkf->bhkc", logits[0].to(u.dtype).softmax(1).to(M.dtype), M)
        Z = torch.from_numpy(transform(u.numpy())).mul_(M)
        return torch.from_numpy(inverse(Z.numpy(), x.shape[2])).to(x.dtype)

    return Provider(name, run, setting, differentiable=False)


PROVIDERS: dict[str, Callable[[str, Setting], list[Provider]]] = {
    "torch": _torch,
    **{name: partial(_backend, name) for name in dfformer_kernels.backends() if name != "torch"},
    "torch.compile": _compiled,
    "scipy": partial(_scipy, "scipy.fft"),
    "pyfftw": _pyfftw,
    "ducc0": _ducc0,
}
