"""``dfformer doctor``: every backend against the float64 reference, forward and backward, with times.

On a CPU a backend is checked and timed problem by problem. On a GPU everything is checked first; what passed is then
timed beside torch.fft, eager and under torch.compile, and the automatic choice is asked what it takes. All of that runs
in other processes: what crashes, hangs or breaks the device's context takes nothing else with it.
"""

import json
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from dfformer.cli.info import environment, print_environment
from dfformer_kernels import backends, dispatch, dynamic_filter, global_filter, reference, star_relu
from dfformer_kernels.autotune import Gpu
from dfformer_kernels.dispatch import Problem
from dfformer_kernels.tolerance import BOUND, gradient_errors, relative_error

Shape = tuple[int, int, int, int]  # (B, H, W, C)
Median = Callable[[Callable[[], object]], float]  # the milliseconds of a call

# Odd, prime, one-row and rectangular planes with channel counts that fill no vector.
QUICK_SHAPES: list[Shape] = [(2, 14, 14, 32), (2, 7, 7, 20), (1, 13, 9, 5), (2, 1, 6, 3), (1, 5, 1, 2)]
# (H, W, C) of DFFormer-S18's stages at 224: C is the expanded width.
STAGES = ((56, 56, 128), (28, 28, 256), (14, 14, 640), (7, 7, 1024))
F = 4
LIMIT_S = 300.0  # for one check, time or choice on a GPU, compiling included
FORWARD_TENSORS, BOTH_TENSORS = 2, 5  # like x, moved at least: x, y; x, y, then x, grad_y, grad_x

# Each takes its inputs in the order of the operator's schema.
OPERATORS: dict[str, Callable[..., Tensor]] = {
    "star_relu": star_relu,
    "dynamic_filter": lambda x, logits, basis, scale, bias, backend: dynamic_filter(
        x, logits, basis, (scale, bias), backend=backend
    ),
    "global_filter": lambda x, weight, scale, bias, backend: global_filter(x, weight, (scale, bias), backend=backend),
}


@dataclass(frozen=True)
class Device:
    """Where backends are examined, and on what beside `QUICK_SHAPES`."""

    type: str
    dtypes: tuple[torch.dtype, ...]
    large: tuple[Shape, ...]
    large_if_quick: tuple[Shape, ...]
    median_ms: Median
    checked_first: bool  # in processes of their own, and then what is large is timed

    def problems(self, quick: bool) -> list[Problem]:
        shapes = [*self._large(quick), *QUICK_SHAPES]
        return [self._problem(op, dtype, shape) for shape in shapes for dtype in self.dtypes for op in OPERATORS]

    def timed_problems(self, quick: bool) -> list[Problem]:
        dtypes = (torch.float32, torch.bfloat16)
        return [self._problem(op, dtype, shape) for shape in self._large(quick) for dtype in dtypes for op in OPERATORS]

    def _large(self, quick: bool) -> tuple[Shape, ...]:
        return self.large_if_quick if quick else self.large

    def _problem(self, op: str, dtype: torch.dtype, shape: Shape) -> Problem:
        return Problem(op, self.type, dtype, shape, F if op == "dynamic_filter" else 0, True)


def devices() -> list[Device]:
    """Those of this machine."""
    return [CPU, GPU] if torch.cuda.is_available() else [CPU]


class Check(NamedTuple):
    """One backend against float64 on one problem; the times are None where they are taken later."""

    backend: str
    device: str
    op: str
    dtype: str
    shape: str
    error_y: float = math.nan
    error_grad: float = math.nan  # the largest of all inputs'
    forward_ms: float | None = None
    both_ms: float | None = None
    failure: str = ""  # what is wrong, empty if nothing is


class Copy(NamedTuple):
    """What a copy that no cache holds reads and writes in a second."""

    device: str
    gbps: float = math.nan
    failure: str = ""


class Timing(NamedTuple):
    """One contestant on one problem; the shares are of the device's copy bandwidth."""

    contestant: str
    device: str
    op: str
    dtype: str
    shape: str
    forward_ms: float = math.nan
    forward_share: float = math.nan
    both_ms: float = math.nan
    both_share: float = math.nan
    failure: str = ""


class Choice(NamedTuple):
    """What runs a problem when nobody names a backend."""

    device: str
    op: str
    dtype: str
    shape: str
    forward: str = ""
    backward: str = ""
    failure: str = ""


Record = TypeVar("Record", Check, Copy, Timing, Choice)


@dataclass
class Findings:
    """Everything that is printed, and written for sending."""

    environment: Mapping[str, str]
    unavailable: dict[str, list[str]] = field(default_factory=dict)  # backend to reasons
    checks: list[Check] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    times: list[Timing] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)

    def failures(self) -> list[str]:
        """Of the backends: torch.compile is not one."""
        of_backends = [t for t in self.times if t.contestant in backends()]
        records: list[Check | Copy | Timing | Choice] = [*self.checks, *self.copies, *of_backends, *self.choices]
        return [record.failure for record in records if record.failure]

    def write(self, path: Path) -> None:
        parts = ("checks", "copies", "times", "choices")
        records = {name: [r._asdict() for r in getattr(self, name)] for name in parts}
        path.write_text(json.dumps(vars(self) | records | {"passed": not self.failures()}, indent=1), encoding="utf-8")


def examine(quick: bool = False, report: Path | None = None) -> bool:
    """Prints a line a check, time and choice; returns whether no backend failed.

    All of it is also written to ``report``, part after part: a crash leaves there what was found before.
    """
    findings = Findings(environment())
    accelerators = [device for device in devices() if device.checked_first]
    if accelerators:
        print_environment()
        print()
    _check_backends(findings, quick)
    for part in (_time_backends, _ask_choices):
        for device in accelerators:
            if report:
                findings.write(report)
            part(findings, device, quick)
    if report:
        findings.write(report)
    passed, failures = sum(not check.failure for check in findings.checks), findings.failures()
    print(f"{passed} of {len(findings.checks)} checks passed" + (f", {len(failures)} FAILED" if failures else ""))
    return not failures


# --- correctness


def _check_backends(findings: Findings, quick: bool) -> None:
    print(f"{'backend':<8}{'device':<8}{'operator':<16}{'dtype':<10}{'shape':<20}{'error y':>9}{'error grad':>12}"
          f"{'forward ms':>12}{'both ms':>10}")  # fmt: skip
    for name, reasons in backends().items():
        if reasons:
            findings.unavailable[name] = reasons
            print(f"{name:<8}not available: {'; '.join(reasons)}")
            continue
        for device in devices():
            for check in _checks(name, device, quick):
                findings.checks.append(check)
                _print_check(check)


def _checks(backend: str, device: Device, quick: bool) -> Iterator[Check]:
    problems = [p for p in device.problems(quick) if _supported(backend, p)]
    if not device.checked_first:
        yield from (check_backend(backend, problem, device.median_ms) for problem in problems)
        return
    with _Apart() as apart:
        for problem in problems:
            yield apart.run(Check(backend, *_words(problem)), check_backend, backend, problem)


def _supported(backend: str, problem: Problem) -> bool:
    """Forward and backward."""
    both = (problem, problem._replace(op=f"{problem.op}_backward"))
    return not any(dispatch.by_name(backend).unsupported_reasons(p) for p in both)


def check_backend(backend: str, problem: Problem, median_ms: Median | None = None) -> Check:
    """Compares y and all gradients with float64, and times them if there is a clock."""
    check = Check(backend, *_words(problem))
    try:
        inputs, grad_y = _inputs(problem)
        run = OPERATORS[problem.op]
        exact = [t.double() for t in inputs]
        _, judge = _steps(partial(run, backend="torch"), exact, grad_y.double())
        forward, both = _steps(partial(run, backend=backend), inputs, grad_y)
        (y, *grads), (expected_y, *expected_grads) = both(), judge()
        check = check._replace(
            error_y=relative_error(y, expected_y), error_grad=max(gradient_errors(grads, expected_grads))
        )
        if median_ms:
            check = check._replace(forward_ms=median_ms(forward), both_ms=median_ms(both))
    except Exception as error:
        return check._replace(failure=_named(error))
    bound = BOUND[problem.dtype]
    passed = check.error_y <= bound and check.error_grad <= bound  # NaN fails
    return check if passed else check._replace(failure=f"the bound is {bound:.1e}")


def _print_check(c: Check) -> None:
    times = "" if c.forward_ms is None or c.both_ms is None else f"{c.forward_ms:>12.3f}{c.both_ms:>10.3f}"
    print(f"{c.backend:<8}{c.device:<8}{c.op:<16}{c.dtype:<10}{c.shape:<20}{c.error_y:>9.1e}{c.error_grad:>12.1e}"
          f"{times}{_failed(c.failure)}", flush=True)  # fmt: skip


# --- times


def _time_backends(findings: Findings, device: Device, quick: bool) -> None:
    with _Apart() as apart:
        copy = apart.run(Copy(device.type), time_copy, device.type, device.median_ms)
        findings.copies.append(copy)
        print(f"\ntimes on {device.type}; shares of the copy bandwidth, {copy.gbps:.0f} GB/s, if {FORWARD_TENSORS} "
              f"tensors like x move forward (x, y) and {BOTH_TENSORS} in both (x, y, then x, grad_y, grad_x)"
              f"{_failed(copy.failure)}\n"
              f"{'contestant':<15}{'operator':<16}{'dtype':<10}{'shape':<20}{'forward ms':>12}{'share':>7}"
              f"{'both ms':>10}{'share':>7}")  # fmt: skip
        passed = {check[:5] for check in findings.checks if not check.failure}
        for problem in device.timed_problems(quick):
            names = [name for name in backends() if (name, *_words(problem)) in passed]
            for name in [*names, "torch.fft", *(["torch.compile"] if not quick else [])]:
                timing = Timing(name, *_words(problem))
                timing = apart.run(timing, time_contestant, name, problem, device.median_ms, copy.gbps)
                findings.times.append(timing)
                _print_timing(timing)


def time_copy(device: str, median_ms: Median) -> Copy:
    try:
        source = torch.zeros(2**28, dtype=torch.uint8, device=device)
        target = torch.zeros_like(source)
        return Copy(device, 2 * source.nbytes / median_ms(lambda: target.copy_(source)) / 1e6)
    except Exception as error:
        return Copy(device, failure=_named(error))


def time_contestant(contestant: str, problem: Problem, median_ms: Median, copy_gbps: float) -> Timing:
    """Of a backend, ``torch.fft`` or ``torch.compile``."""
    timing, bytes_per_ms = Timing(contestant, *_words(problem)), 1e6 * copy_gbps
    try:
        inputs, grad_y = _inputs(problem)
        forward_ms, both_ms = (median_ms(step) for step in _steps(_contestant(contestant, problem), inputs, grad_y))
    except Exception as error:
        return timing._replace(failure=_named(error))
    return timing._replace(
        forward_ms=forward_ms,
        forward_share=FORWARD_TENSORS * inputs[0].nbytes / bytes_per_ms / forward_ms,
        both_ms=both_ms,
        both_share=BOTH_TENSORS * inputs[0].nbytes / bytes_per_ms / both_ms,
    )


def _contestant(name: str, problem: Problem) -> Callable[..., Tensor]:
    judge = getattr(reference, problem.op)
    if name == "torch.fft":
        return judge
    if name == "torch.compile":
        torch._dynamo.reset()  # each problem is compiled for itself
        return torch.compile(judge, fullgraph=True, dynamic=False)
    return partial(OPERATORS[problem.op], backend=name)


def _print_timing(t: Timing) -> None:
    print(f"{t.contestant:<15}{t.op:<16}{t.dtype:<10}{t.shape:<20}{t.forward_ms:>12.3f}{t.forward_share:>7.0%}"
          f"{t.both_ms:>10.3f}{t.both_share:>7.0%}{_failed(t.failure)}", flush=True)  # fmt: skip


# --- the automatic choice


def _ask_choices(findings: Findings, device: Device, quick: bool) -> None:
    print(f"\nautomatic choice on {device.type}\n"
          f"{'operator':<16}{'dtype':<10}{'shape':<20}{'forward':<9}{'backward':<9}")  # fmt: skip
    with _Apart() as apart:
        for problem in device.timed_problems(quick):
            choice = apart.run(Choice(*_words(problem)), ask_choice, problem)
            findings.choices.append(choice)
            print(f"{choice.op:<16}{choice.dtype:<10}{choice.shape:<20}{choice.forward:<9}{choice.backward:<9}"
                  f"{_failed(choice.failure)}", flush=True)  # fmt: skip


def ask_choice(problem: Problem) -> Choice:
    choice = Choice(*_words(problem))
    try:
        inputs, grad_y = _inputs(problem)
        _, both = _steps(partial(OPERATORS[problem.op], backend=None), inputs, grad_y)
        both()
        taken = [dispatch.chosen(Problem.of(op, inputs)) for op in (problem.op, f"{problem.op}_backward")]
        return choice._replace(**{k: b.name for k, b in zip(("forward", "backward"), taken, strict=True) if b})
    except Exception as error:
        return choice._replace(failure=_named(error))


# --- shared by all parts


class _Apart(AbstractContextManager["_Apart"]):
    """Runs functions in another process; after a failure in a new one, for the device's context may be broken."""

    def __init__(self) -> None:
        self._process: multiprocessing.process.BaseProcess | None = None

    def run(self, nothing: Record, function: Callable[..., Record], *arguments: object) -> Record:
        """What the function returns; ``nothing`` with the reason if the process crashes or takes over `LIMIT_S`."""
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs,))
            self._process.start()
            theirs.close()  # so that a crash ends the pipe
        record = nothing
        try:
            self._pipe.send((function, arguments))
            if self._pipe.poll(LIMIT_S):
                record = self._pipe.recv()
            else:
                record = nothing._replace(failure=f"it hangs: no result after {LIMIT_S:g} s")
        except (EOFError, ConnectionError):
            record = nothing._replace(failure="its process crashed")
        if record.failure:
            self._end()
        return record

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process = None


def _serve(pipe: Connection) -> None:
    while True:
        function, arguments = pipe.recv()
        pipe.send(function(*arguments))


def _inputs(problem: Problem) -> tuple[list[Tensor], Tensor]:
    """The operator's inputs in the order of its schema, and a gradient of its result."""
    (B, H, W, C), dtype, device = problem.shape, problem.dtype, problem.device
    generator = torch.Generator().manual_seed(0)

    def random(*size: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(*size, generator=generator).to(device, of)

    exact = reference.compute_dtype(dtype)
    parameters = {
        "star_relu": list,
        "dynamic_filter": lambda: [random(B, F, C), random(H, W // 2 + 1, F, 2, of=exact)],
        "global_filter": lambda: [random(H, W // 2 + 1, C, 2, of=exact)],
    }
    scalars = [torch.tensor([value], dtype=exact, device=device) for value in (0.9, -0.3)]
    inputs = [random(B, H, W, C), *parameters[problem.op](), *scalars]
    grad_y = torch.rand(B, H, W, C, generator=generator).to(device, dtype)
    return inputs, grad_y


def _steps(
    run: Callable[..., Tensor], inputs: list[Tensor], grad_y: Tensor
) -> tuple[Callable[[], Tensor], Callable[[], list[Tensor]]]:
    """The forward step; and both, which returns y and the gradients of all inputs."""
    leaves = [t.detach().requires_grad_() for t in inputs]

    def both() -> list[Tensor]:
        y = run(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad_y)]

    return partial(run, *inputs), both


def _words(problem: Problem) -> tuple[str, str, str, str]:
    """Device, operator, dtype and shape."""
    dtype = str(problem.dtype).removeprefix("torch.")
    return problem.device, problem.op, dtype, "x".join(map(str, problem.shape))


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _failed(failure: str) -> str:
    return f"  FAILED: {failure.splitlines()[0]}" if failure else ""


def _cpu_median_ms(run: Callable[[], object]) -> float:
    times = []
    for _ in range(4):  # the first warms up
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def _gpu_median_ms(run: Callable[[], object]) -> float:
    try:
        do_bench = import_module("triton.testing").do_bench
    except ImportError:  # as on Windows
        return 1e3 * Gpu().seconds(run, torch.cuda.current_device())
    return do_bench(run, return_mode="median")


CPU = Device(
    "cpu",
    (torch.float32, torch.bfloat16),
    large=(*((2, *stage) for stage in STAGES), (1, 128, 96, 64)),
    large_if_quick=(),
    median_ms=_cpu_median_ms,
    checked_first=False,
)
GPU = Device(
    "cuda",
    (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    large=(*((32, *stage) for stage in STAGES), (8, 128, 96, 64)),
    large_if_quick=((32, *STAGES[2]),),
    median_ms=_gpu_median_ms,
    checked_first=True,
)
