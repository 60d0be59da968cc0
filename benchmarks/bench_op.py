"""Times the filter steps, forward and forward+backward, against torch.fft and other FFT libraries.

    python benchmarks/bench_op.py [--quick] [--op dynamic_filter,global_filter] [--dtype float32] [--threads N]
                                  [--device cpu|cuda] [--allocator default|kept]

All contestants run interleaved, round by round, in one process, each for a while after one call that is not counted;
medians of single calls are reported, on a GPU those of triton.testing.do_bench, which empties its second-level cache
before every call. A result outside ``dfformer_kernels.tolerance`` of the float64 reference is an error, found before
anything is timed. Without StarReLU. ``--allocator kept`` measures in a sub-process that keeps freed memory, by
the recipe in docs/cpu_kernel.md; op.json says which allocator its times are of.

Contestants: every backend that can run here; ``cpu`` also on each instruction set and on one thread; ``torch``, the
reference called directly, is torch.fft as one would write it; the same under torch.compile; the same with the
transforms of scipy.fft, pyfftw and ducc0 (forward only, on a CPU).

What is counted, for x (B,H,W,C), N = HW, K = W//2 + 1:

- flops: B C (T 2.5 N log2 N + H K q). Forward: T = 2 transforms; q = 4F to mix the filter (0 for a global filter) + 6
  for the product. Forward and backward: T = 5 (x twice, as only inputs are saved, y, grad_y, grad_x); q = 6 + 4F
  forward, then 4F to mix again, 6 for grad_x's product, 8 for the weighted product P, and 8F for P's sums over channels
  and frequencies (2, its sum over the batch, for a global filter).
- bytes: 2 tensors like x forward (x, y), 5 forward and backward (x, y; x, grad_y, grad_x).
- limit: the larger of bytes / copy bandwidth (``copy_`` of a tensor like x in the same rounds, N threads) and
  flops / matrix product rate (the better of torch.mm and a 1x1 convolution, N threads; without TF32). The share of the
  limit is that time over the measured one.
- extra memory of a forward, beside its arguments and y: for ``cpu`` the workspace it asks for; for torch.fft and
  torch.compile the peak that torch's profiler sees allocated (not the transform library's own scratch); on a GPU the
  peak of torch's allocator.

Writes op.csv, op.json and op.png.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import ALLOCATORS, DTYPES, TIMERS, allocator, names, provenance, write_csv
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import dfformer_kernels
from dfformer_kernels import dispatch, reference
from dfformer_kernels.backends import cpu
from dfformer_kernels.tolerance import BOUND, gradient_errors, relative_error

F = 4
FORWARD, BOTH = "forward", "forward+backward"

# (stride of the plane, C) of DFFormer-S18's stages, at the sizes of square inputs, for the batches. C is what the
# filters work on: twice the width of the blocks.
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

# (operator, direction): transforms a channel, flops a kept frequency and channel.
FLOPS = {
    ("dynamic_filter", FORWARD): (2, 6 + 4 * F),
    ("dynamic_filter", BOTH): (5, 6 + 4 * F + 4 * F + 6 + 8 + 8 * F),
    ("global_filter", FORWARD): (2, 6),
    ("global_filter", BOTH): (5, 6 + 6 + 8 + 2),
}
TENSORS_MOVED = {FORWARD: 2, BOTH: 5}
OURS = ("cpu", "cuda", "cufft")
OPS = ("dynamic_filter", "global_filter")


class Budget(NamedTuple):
    """How long to measure: seconds for a problem and direction, seconds a sample lasts at least, rounds at least."""

    seconds: float
    sample: float
    rounds: int = 5


class Problem(NamedTuple):
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
    """What a contestant runs under; ``isa`` "" where the compiled core is not used."""

    threads: int
    isa: str = ""
    device: str = "cpu"


Run = tuple[Setting, Callable[[], object]]


@dataclass(frozen=True)
class Contestant:
    """One way to compute a step; ``run`` takes x and the operator's parameters."""

    name: str
    run: Callable[..., Tensor]
    setting: Setting
    differentiable: bool = True
    extra_memory: Callable[["Contestant", Problem, list[Tensor]], int] | None = None
    supports: Callable[[Problem], bool] = lambda problem: True


@dataclass(frozen=True)
class Row:
    """One contestant on one problem in one direction, as in op.csv."""

    op: str
    dtype: str
    stage: bool
    B: int
    H: int
    W: int
    C: int
    direction: str
    contestant: str
    isa: str
    threads: int
    rounds: int
    ms: float  # median
    speedup: float  # torch's ms over this
    gflops: float  # GFLOP/s
    gbps: float  # GB/s
    copy_gbps: float  # of copy_ on a tensor like x
    gemm_gflops: float
    share_of_limit: float
    error: float  # largest relative error against float64, gradients included
    extra_bytes: int | None  # of a forward; None where it is not measured

    @property
    def shape(self) -> str:
        return f"{self.B}x{self.H}x{self.W}x{self.C}"

    @property
    def problem(self) -> tuple[str, str, str]:
        """What two rows have in common that differ in dtype or contestant."""
        return self.op, self.direction, self.shape


class Summary(NamedTuple):
    """A ratio over problems of one of our backends."""

    contestant: str
    op: str
    direction: str
    quantity: str
    median: float
    minimum: float
    problems: int


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments(argv)
    if args.allocator != allocator():  # which a process chooses when it starts
        command = [sys.executable, __file__, *(sys.argv[1:] if argv is None else argv)]
        kept = {name: value for name, value in os.environ.items() if name not in ALLOCATORS["kept"]}
        subprocess.run(command, env=kept | ALLOCATORS[args.allocator], check=True)
        return
    torch.set_num_threads(args.threads)
    setting = Setting(args.threads, device=args.device)
    machine = describe_machine(setting)
    budget = Budget(0.2, 1e-3) if args.quick else Budget(1.5, 1e-2)
    rows: list[Row] = []
    for op in args.op:
        entrants = contestants(op, setting, args.quick)
        for problem in problems(op, args.quick):
            if problem.dtype in [DTYPES[name] for name in args.dtype]:
                rate = machine["gemm_gflops"][_name(reference.compute_dtype(problem.dtype))]
                try:
                    rows += _reported(measure(problem, entrants, rate, budget))
                except torch.OutOfMemoryError as error:
                    print(f"\n{problem} is left out: {error}")
    summary = summarize(rows)
    print_summary(summary)
    write(args.output, machine, rows, summary)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Times the filter steps against torch.fft and other FFT libraries.")
    parser.add_argument("--quick", action="store_true", help="a few shapes, less than a minute")
    parser.add_argument("--op", type=names(OPS), default=["dynamic_filter"], help=f"of {','.join(OPS)}")
    parser.add_argument("--dtype", type=names(list(DTYPES)), default=list(DTYPES), help=f"of {','.join(DTYPES)}")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--allocator", choices=list(ALLOCATORS), default=allocator(), help="what becomes of freed memory"
    )
    parser.add_argument("--output", type=Path, default=Path("build/bench_op"), help="folder for op.csv, .json, .png")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: got 'cuda', and torch finds no GPU")
    return args


def problems(op: str, quick: bool = False) -> list[Problem]:
    """Everything in float32, the stages of eight 224x224 inputs in all dtypes."""
    if quick:
        stages = {224: [(1, 56, 56, 64), (8, 14, 14, 320)]}
        others: Sequence[tuple[int, int, int, int]] = [(2, 31, 31, 64)]
    else:
        stages = {size: [(B, size // s, size // s, C) for B in BATCHES for s, C in STAGES] for size in INPUTS}
        others = OTHER_SHAPES
    # A shape's dtypes one after the other: they are compared with each other, and machines do not stay the same.
    found = [
        Problem(op, dtype, shape, True)
        for size, shapes in stages.items()
        for shape in shapes
        for dtype in DTYPES.values()
        if (dtype == torch.float32 or quick or (size, shape[0]) == (224, 8)) and is_measured(size, shape)
    ]
    return found + [Problem(op, torch.float32, shape, False) for shape in others]


def is_measured(size: int, shape: tuple[int, int, int, int]) -> bool:
    """Whether a stage of ``size`` inputs fits in a sensible time and memory."""
    return (size, shape[0]) != (1024, 8) and math.prod(shape) <= 2**26


def flops(op: str, shape: Sequence[int], direction: str) -> float:
    B, H, W, C = shape
    transforms, per_frequency = FLOPS[op, direction]
    return B * C * (transforms * 2.5 * H * W * math.log2(H * W) + H * (W // 2 + 1) * per_frequency)


def moved_bytes(shape: Sequence[int], dtype: torch.dtype, direction: str) -> int:
    return TENSORS_MOVED[direction] * math.prod(shape) * dtype.itemsize


# --- contestants


def contestants(op: str, setting: Setting, quick: bool = False) -> list[Contestant]:
    """Who runs ``op`` here; prints why another does not."""
    found: list[Contestant] = []
    for name, make in CONTESTANTS.items():
        try:
            if quick and make is _compiled:
                raise RuntimeError("compiling takes longer than --quick allows")
            found += make(op, setting)
        except (ImportError, RuntimeError) as error:
            print(f"{op}: {name} is left out: {error}")
    return found


def _torch(op: str, setting: Setting) -> list[Contestant]:
    return [Contestant("torch", getattr(reference, op), setting, extra_memory=_allocated_peak)]


def _compiled(op: str, setting: Setting) -> list[Contestant]:
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        raise RuntimeError("there is no C++ compiler")
    run = torch.compile(getattr(reference, op), fullgraph=True, dynamic=False)
    run(*Problem(op, torch.float32, (1, 4, 4, 2), False).inputs(setting.device))
    return [Contestant("torch.compile", run, setting, extra_memory=_allocated_peak)]


def _backend(name: str, op: str, setting: Setting) -> list[Contestant]:
    if reasons := _refusals(name, setting.device, Problem(op, torch.float32, (1, 1, 1, 1), False)):
        raise RuntimeError("; ".join(reasons))
    run = partial(getattr(dfformer_kernels, op), backend=name)
    if name != "cpu":
        return [
            Contestant(
                name,
                run,
                setting,
                extra_memory=_allocated_peak,
                supports=lambda problem: not _refusals(name, setting.device, problem),
            )
        ]
    threads, active = setting.threads, cpu.core().active_isa()
    settings = {"cpu": Setting(threads, active)}
    settings |= {f"cpu/{isa}": Setting(threads, isa) for isa in cpu.core().supported_isas() if isa != active}
    if threads > 1:
        settings["cpu/1 thread"] = Setting(1, active)
    return [Contestant(name, run, setting, extra_memory=_workspace) for name, setting in settings.items()]


def _refusals(backend: str, device: str, problem: Problem) -> list[str]:
    """Why a backend cannot do the forward step or its backward."""
    filters = F if problem.op == "dynamic_filter" else 0
    steps = [
        dispatch.Problem(op, device, problem.dtype, problem.shape, filters)
        for op in (problem.op, f"{problem.op}_backward")
    ]
    return [reason for step in steps for reason in dispatch.by_name(backend).unsupported_reasons(step)]


def _scipy(module: str, op: str, setting: Setting) -> list[Contestant]:
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


def _pyfftw(op: str, setting: Setting) -> list[Contestant]:
    _require_cpu(setting)
    pyfftw = import_module("pyfftw")
    pyfftw.config.PLANNER_EFFORT = "FFTW_MEASURE"
    import_module("pyfftw.interfaces.cache").enable()
    import_module("pyfftw.interfaces.cache").set_keepalive_time(60)  # plans survive until their next round
    return _scipy("pyfftw.interfaces.scipy_fft", op, setting)


def _ducc0(op: str, setting: Setting) -> list[Contestant]:
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
) -> Contestant:
    """Transforms of NumPy arrays, (B,H,W,C) to (B,H,K,C) and back to width W, around a product in torch."""

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        u = x.to(reference.compute_dtype(x.dtype))
        *logits, filters = parameters
        M = torch.view_as_complex(filters)
        if logits:
            M = torch.einsum("bfc,hkf->bhkc", logits[0].to(u.dtype).softmax(1).to(M.dtype), M)
        Z = torch.from_numpy(transform(u.numpy())).mul_(M)
        return torch.from_numpy(inverse(Z.numpy(), x.shape[2])).to(x.dtype)

    return Contestant(name, run, setting, differentiable=False)


CONTESTANTS: dict[str, Callable[[str, Setting], list[Contestant]]] = {
    "torch": _torch,
    **{name: partial(_backend, name) for name in dfformer_kernels.backends() if name != "torch"},
    "torch.compile": _compiled,
    "scipy": partial(_scipy, "scipy.fft"),
    "pyfftw": _pyfftw,
    "ducc0": _ducc0,
}


# --- measuring


def measure(problem: Problem, entrants: Sequence[Contestant], gemm_gflops: float, budget: Budget) -> list[Row]:
    """Checks every contestant on ``problem``, then times them; ValueError for a wrong result."""
    torch._dynamo.reset()  # each problem is compiled for itself
    entrants = [c for c in entrants if c.supports(problem)]
    forward = _measure(problem, FORWARD, entrants, gemm_gflops, budget)
    return forward + _measure(problem, BOTH, [c for c in entrants if c.differentiable], gemm_gflops, budget)


def _measure(
    problem: Problem, direction: str, entrants: Sequence[Contestant], gemm_gflops: float, budget: Budget
) -> list[Row]:
    setting = Setting(torch.get_num_threads(), device=entrants[0].setting.device)
    inputs, grad_y = problem.inputs(setting.device), problem.grad_y(setting.device)
    judge = getattr(reference, problem.op)
    expected = _step(judge, [t.double() for t in inputs], grad_y.double(), direction)()
    steps = [_step(c.run, inputs, grad_y, direction) for c in entrants]
    errors = [_checked_error(c, problem, step, expected) for c, step in zip(entrants, steps, strict=True)]
    like_x = torch.empty_like(inputs[0])
    runs: list[Run] = [(setting, lambda: like_x.copy_(inputs[0]))]
    runs += [(c.setting, step) for c, step in zip(entrants, steps, strict=True)]
    rounds, (copy_seconds, *seconds) = _median_seconds(runs, budget)

    copy_rate = 2 * like_x.nbytes / copy_seconds
    count = flops(problem.op, problem.shape, direction)
    nbytes = moved_bytes(problem.shape, problem.dtype, direction)
    limit = max(nbytes / copy_rate, count / (1e9 * gemm_gflops))
    of_torch = seconds[[c.name for c in entrants].index("torch")]
    return [
        Row(
            problem.op,
            _name(problem.dtype),
            problem.stage,
            *problem.shape,
            direction,
            c.name,
            c.setting.isa,
            c.setting.threads,
            rounds,
            ms=1e3 * t,
            speedup=of_torch / t,
            gflops=count / t / 1e9,
            gbps=nbytes / t / 1e9,
            copy_gbps=copy_rate / 1e9,
            gemm_gflops=gemm_gflops,
            share_of_limit=limit / t,
            error=error,
            extra_bytes=c.extra_memory(c, problem, inputs) if c.extra_memory and direction == FORWARD else None,
        )
        for c, error, t in zip(entrants, errors, seconds, strict=True)
    ]


def _step(
    run: Callable[..., Tensor], inputs: list[Tensor], grad_y: Tensor, direction: str
) -> Callable[[], list[Tensor]]:
    """Computes y, and in the direction ``BOTH`` the gradients of all inputs too."""
    if direction == FORWARD:
        return lambda: [run(*inputs)]
    leaves = [t.detach().requires_grad_() for t in inputs]

    def both() -> list[Tensor]:
        y = run(*leaves)
        return [y, *torch.autograd.grad(y, leaves, grad_y)]

    return both


def _checked_error(
    contestant: Contestant, problem: Problem, step: Callable[[], list[Tensor]], expected: list[Tensor]
) -> float:
    """The largest relative error of what ``step`` computes; ValueError if it is not within tolerance."""
    with _under(contestant.setting):
        y, *gradients = step()
    error = max(relative_error(y, expected[0]), *gradient_errors(gradients, expected[1:]), 0.0)
    if not error <= BOUND[problem.dtype]:  # so that NaN fails
        raise ValueError(
            f"{contestant.name} is wrong on {problem}: error {error:.1e}, bound {BOUND[problem.dtype]:.1e}"
        )
    return error


def _median_seconds(runs: Sequence[Run], budget: Budget) -> tuple[int, list[float]]:
    """The number of rounds, and the median time of each run, which runs for a while in every round."""
    once = [min(_seconds(*run, 0)) for run in runs]
    a_round = sum(t + max(t, budget.sample) for t in once)
    rounds = max(budget.rounds, int(budget.seconds / a_round))
    samples: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for of_run, run in zip(samples, runs, strict=True):
            of_run += _seconds(*run, budget.sample)
    return rounds, [statistics.median(of_run) for of_run in samples]


def _seconds(setting: Setting, run: Callable[[], object], sample: float) -> list[float]:
    """Times of consecutive calls that take ``sample`` seconds together, of one call at least.

    The call before them is not counted: it finds the caches as another contestant left them, and where a call is longer
    than a sample there would be no others.
    """
    with _under(setting):
        run()
        return TIMERS[setting.device](run, sample)


@contextmanager
def _under(setting: Setting) -> Iterator[None]:
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


def _workspace(contestant: Contestant, problem: Problem, inputs: list[Tensor]) -> int:
    num_filters = F if problem.op == "dynamic_filter" else 0
    with _under(contestant.setting):
        return cpu.filter_workspace_bytes(problem.shape, num_filters, problem.dtype)


def _allocated_peak(contestant: Contestant, problem: Problem, inputs: list[Tensor]) -> int:
    """The most bytes torch has allocated at once during a forward, less y's."""
    if contestant.setting.device == "cuda":
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        y = contestant.run(*inputs)
        return torch.cuda.max_memory_allocated() - held - y.nbytes
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        y = contestant.run(*inputs)
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak - y.nbytes


# --- the machine


def describe_machine(setting: Setting) -> dict[str, Any]:
    """What the times depend on, and the two rates they are compared with."""
    return provenance(setting.threads, setting.device, ("numpy", "scipy", "pyfftw", "ducc0")) | {
        "copy_gbps": copy_rate(setting),
        "gemm_gflops": {_name(dtype): gemm_rate(setting, dtype) for dtype in (torch.float32, torch.float64)},
    }


def copy_rate(setting: Setting, nbytes: int = 2**28) -> float:
    """GB/s of a copy that no cache holds, read and written bytes counted."""
    source = torch.ones(nbytes, dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    return 2 * nbytes / _median_time(setting, lambda: target.copy_(source)) / 1e9


def gemm_rate(setting: Setting, dtype: torch.dtype, n: int = 1536) -> float:
    """GFLOP/s of the better of a matrix product of size n and a 1x1 convolution."""
    random = partial(torch.randn, dtype=dtype, device=setting.device)
    a = random(n, n)
    image = random(8, 512, 28, 28).contiguous(memory_format=torch.channels_last)
    weight = random(512, 512, 1, 1)
    products = {
        2 * n**3: lambda: torch.mm(a, a),
        2 * image.numel() * 512: lambda: torch.nn.functional.conv2d(image, weight),
    }
    with torch.backends.cudnn.flags(
        enabled=True, allow_tf32=False
    ):  # the products of the filters are of full precision
        return max(count / _median_time(setting, run) / 1e9 for count, run in products.items())


def _median_time(setting: Setting, run: Callable[[], object]) -> float:
    return statistics.median(_seconds(setting, run, 0.25))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- reporting


def _reported(rows: list[Row]) -> list[Row]:
    """Prints the rows of a problem."""
    first = rows[0]
    print(f"\n{first.op} {first.dtype} {first.shape}{' (stage)' if first.stage else ''}")
    print(f"  {'direction':<18}{'contestant':<15}{'ms':>10}{'speed-up':>10}{'GFLOP/s':>9}{'GB/s':>8}{'limit':>7}"
          f"{'error':>9}{'extra MiB':>11}")  # fmt: skip
    for r in rows:
        extra = "" if r.extra_bytes is None else f"{r.extra_bytes / 2**20:.2f}"
        print(f"  {r.direction:<18}{r.contestant:<15}{r.ms:>10.3f}{r.speedup:>10.2f}{r.gflops:>9.1f}{r.gbps:>8.2f}"
              f"{r.share_of_limit:>7.0%}{r.error:>9.1e}{extra:>11}", flush=True)  # fmt: skip
    return rows


def summarize(rows: Sequence[Row]) -> list[Summary]:
    """Of our backends: speed-up over torch.fft, share of the limit, time ratios between dtypes, ISAs and threads."""
    return [summary for name in OURS for summary in _summary_of(name, rows)]


def _summary_of(name: str, rows: Sequence[Row]) -> list[Summary]:
    ours = [r for r in rows if r.contestant == name]
    single = [r for r in ours if r.dtype == "float32"]
    stages = [r for r in single if r.stage]

    def on(contestant: str) -> list[Row]:
        return [r for r in rows if r.contestant == contestant and r.dtype == "float32"]

    threads = max((r.threads for r in ours), default=0)
    quantities = {
        "times faster than torch.fft, stages": [(r, r.speedup) for r in stages],
        "times faster than torch.fft, all": [(r, r.speedup) for r in single],
        "share of the limit, stages": [(r, r.share_of_limit) for r in stages],
        "bfloat16 / float32 time": _time_ratios([r for r in ours if r.dtype == "bfloat16"], single),
        "AVX2 / AVX-512 time": _time_ratios(on(f"{name}/avx2"), [r for r in single if r.isa == "avx512"]),
    }
    for B in sorted({r.B for r in ours}):
        alone = [r for r in on(f"{name}/1 thread") if r.B == B]
        quantities[f"1 -> {threads} threads, batch {B}, times faster"] = _time_ratios(alone, single)
    return [
        Summary(name, op, direction, quantity, statistics.median(values), min(values), len(values))
        for op in OPS
        for quantity, pairs in quantities.items()
        for direction in (FORWARD, BOTH)
        if (values := [value for r, value in pairs if (r.op, r.direction) == (op, direction)])
    ]


def _time_ratios(over: Sequence[Row], under: Sequence[Row]) -> list[tuple[Row, float]]:
    """Times of ``over`` divided by those of ``under`` on the same problem, where both have it."""
    times = {r.problem: r.ms for r in under}
    return [(r, r.ms / times[r.problem]) for r in over if r.problem in times]


def print_summary(summary: Sequence[Summary]) -> None:
    print(f"\n{'summary':<8}{'':<40}{'operator':<16}{'direction':<18}{'median':>8}{'minimum':>9}{'problems':>10}")
    for s in summary:
        print(
            f"{s.contestant:<8}{s.quantity:<40}{s.op:<16}{s.direction:<18}{s.median:>8.2f}{s.minimum:>9.2f}{s.problems:>10}"
        )


def write(folder: Path, machine: dict[str, Any], rows: Sequence[Row], summary: Sequence[Summary]) -> None:
    """op.csv, op.json and op.png."""
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / "op.csv", [field.name for field in fields(Row)], [asdict(r) for r in rows])
    content = {"machine": machine, "summary": [s._asdict() for s in summary], "rows": [asdict(r) for r in rows]}
    (folder / "op.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    figure(machine, [r for r in rows if r.dtype == rows[0].dtype]).savefig(folder / "op.png", dpi=120)
    print(f"\nwritten: {folder}/op.csv, op.json, op.png")


COLOURS = {FORWARD: "#2c3e50", BOTH: "#c0392b"}
MARKERS = {"cpu": "o", "cuda": "o", "cufft": "^", "torch": "s"}
HATCHES = {"cpu": "", "cuda": "", "cufft": "///"}
ABOVE: dict[str, Any] = {"loc": "lower center", "bbox_to_anchor": (0.5, 1)}


def figure(machine: dict[str, Any], rows: Sequence[Row]) -> Figure:
    """Of the rows of one dtype: the speed-up of our backends over torch.fft by shape, and a roofline of all."""
    ours = [name for name in OURS if name in {r.contestant for r in rows}]
    shapes = list(dict.fromkeys((r.op, r.shape) for r in rows))
    picture = Figure(figsize=(13, max(5, 0.26 * len(shapes) + 1.5)), layout="constrained")
    left, right = picture.subplots(1, 2)
    _speedup_bars(left, shapes, ours, rows)
    _roofline(right, machine, ours, rows)
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    where = machine["machine" if machine["device"] == "cpu" else "gpu"]
    picture.suptitle(f"Filter step, {rows[0].dtype}, {where}", fontsize=11)
    return picture


def _speedup_bars(ax: Axes, shapes: list[tuple[str, str]], ours: Sequence[str], rows: Sequence[Row]) -> None:
    kinds = [(direction, name) for direction in COLOURS for name in ours]
    for i, (direction, name) in enumerate(kinds):
        drawn = [r for r in rows if (r.direction, r.contestant) == (direction, name)]
        position = [shapes.index((r.op, r.shape)) + 0.8 * ((i + 0.5) / len(kinds) - 0.5) for r in drawn]
        bars = ax.barh(
            position,
            [r.speedup for r in drawn],
            0.76 / len(kinds),
            color=COLOURS[direction],
            hatch=HATCHES[name],
            edgecolor="white",
            linewidth=0,
            label=direction if len(ours) == 1 else f"{name}, {direction}",
        )
        ax.bar_label(bars, fmt="%.1f", fontsize=7, padding=2)
    names = [shape if len({op for op, _ in shapes}) == 1 else f"{op} {shape}" for op, shape in shapes]
    ax.set_yticks(range(len(shapes)), names, fontsize=8)
    ax.invert_yaxis()
    ax.axvline(1, color="#7f8c8d", linewidth=1)
    ax.set(xlabel="times faster than torch.fft", ylabel="B x H x W x C")
    ax.legend(title=f"{' and '.join(ours)} against torch.fft", ncols=2, frameon=False, **ABOVE)


def _roofline(ax: Axes, machine: dict[str, Any], ours: Sequence[str], rows: Sequence[Row]) -> None:
    for name in (*ours, "torch"):
        for direction, colour in COLOURS.items():
            drawn = [r for r in rows if (r.contestant, r.direction) == (name, direction)]
            ax.scatter(
                [r.gflops / r.gbps for r in drawn],
                [r.gflops for r in drawn],
                s=24,
                marker=MARKERS[name],
                edgecolors=colour,
                facecolors=colour if name in ours else "none",
                label=f"{name}, {direction}",
            )
    peak, slow, fast = rows[0].gemm_gflops, machine["copy_gbps"], max(r.copy_gbps for r in rows)
    intensities = [r.gflops / r.gbps for r in rows]
    low, high = 0.5 * min(*intensities, peak / fast), 2 * max(*intensities, peak / slow)
    for bandwidth, style, where in ((slow, "-", "memory"), (fast, "--", "cache, the fastest measured")):
        label = f"copy in {where}: {bandwidth:.0f} GB/s"
        ax.plot([low, peak / bandwidth], [bandwidth * low, peak], style, color="#7f8c8d", label=label)
    ax.axhline(peak, color="#000000", linewidth=1, label=f"matrix product: {peak:.0f} GFLOP/s")
    ax.set(xscale="log", yscale="log", xlim=(low, high), xlabel="flop per byte (nominal)", ylabel="GFLOP/s (nominal)")
    ax.grid(alpha=0.3)
    ax.legend(title="roofline", ncols=2, frameon=False, fontsize=8, **ABOVE)


if __name__ == "__main__":
    # The profiler announces itself on stderr otherwise.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    main()
