"""``dfformer doctor``: every backend against the float64 reference, forward and backward.

Checks run in another process with a time limit. A check that crashes, hangs or breaks the device's context is reported,
and the next one runs in a new process. Speed is measured by benchmarks/.
"""

import argparse
import math
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, TimeoutError
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dfformer.cli.info import environment, print_environment
from dfformer.utils.io import write_json
from dfformer_kernels import backends, dispatch, dynamic_filter, global_filter, reference, star_relu
from dfformer_kernels.problem import Problem
from dfformer_kernels.tolerance import BOUND, gradient_errors, relative_error

# (B, H, W, C): odd, prime, one-row and rectangular planes, with channel counts that are no multiple of a vector.
QUICK_SHAPES = [(2, 14, 14, 32), (2, 7, 7, 20), (1, 13, 9, 5), (2, 1, 6, 3), (1, 5, 1, 2)]
# (H, W, C) of DFFormer-S18's stages at 224 (C is the expanded width), and a rectangle.
PLANES = ((56, 56, 128), (28, 28, 256), (14, 14, 640), (7, 7, 1024), (128, 96, 64))
F = 4
LIMIT_S = 300.0  # for one check, compiling included

# Their arguments are in the order of the operator's schema.
OPERATORS: dict[str, Callable[..., Tensor]] = {
    "star_relu": star_relu,
    "dynamic_filter": lambda x, logits, basis, scale, bias, backend: dynamic_filter(
        x, logits, basis, (scale, bias), backend=backend
    ),
    "global_filter": lambda x, weight, scale, bias, backend: global_filter(x, weight, (scale, bias), backend=backend),
}


# The devices to check: their dtypes, and the batch size of `PLANES`.
DEVICES = {
    "cpu": ((torch.float32, torch.bfloat16), 2),
    "cuda": ((torch.float32, torch.bfloat16, torch.float16, torch.float64), 32),
}


def problems(quick: bool) -> Iterator[Problem]:
    """Both directions of every operator on this machine's devices."""
    for device, (dtypes, batch) in DEVICES.items():
        if device == "cuda" and not torch.cuda.is_available():
            continue
        large = [(batch, *plane) for plane in PLANES]
        for shape, dtype, op in product([*([] if quick else large), *QUICK_SHAPES], dtypes, OPERATORS):
            yield Problem(op, device, dtype, shape, F if op == "dynamic_filter" else 0, True)


class Check(NamedTuple):
    """One backend against float64 on one problem."""

    backend: str
    device: str
    op: str
    dtype: str
    shape: str
    default: bool  # this backend runs the problem by default
    error_y: float
    error_grad: float  # the largest of all inputs'
    failure: str  # empty if the check passed


def doctor_command(arguments: argparse.Namespace) -> int:
    """Prints a line for each check, and writes all of them to ``arguments.json``; returns 0 if all passed."""
    unavailable: dict[str, list[str]] = {}
    checks: list[Check] = []

    def write() -> None:
        if arguments.json:
            passed = not any(check.failure for check in checks)
            content = {"environment": environment(), "unavailable": unavailable, "passed": passed}
            write_json(arguments.json, content | {"checks": [check._asdict() for check in checks]})

    write()  # a file that cannot be written is told before anything is checked
    print_environment()
    print(f"\n{'backend':<8}{'device':<8}{'operator':<16}{'dtype':<10}{'shape':<20}{'error y':>9}{'error grad':>12}")
    try:
        with Worker() as worker:
            for name, reasons in backends().items():
                if reasons:
                    unavailable[name] = reasons
                    print(f"{name:<8}not available: {'; '.join(reasons)}")
                    continue
                for problem in (p for p in problems(arguments.quick) if _supported(name, p)):
                    checks.append(_isolated_check(worker, name, problem))
                    _print_check(checks[-1])
    finally:
        write()
    failed = sum(bool(check.failure) for check in checks)
    print(f"{len(checks) - failed} of {len(checks)} checks passed" + f", {failed} FAILED" * (failed > 0))
    return 1 if failed else 0


def _supported(backend: str, problem: Problem) -> bool:
    """Whether a backend supports both directions of a problem."""
    both = (problem, problem._replace(op=f"{problem.op}_backward"))
    return not any(dispatch.by_name(backend).unsupported_reasons(p) for p in both)


def _isolated_check(worker: "Worker", backend: str, problem: Problem) -> Check:
    dtype, shape = str(problem.dtype).removeprefix("torch."), "x".join(map(str, problem.shape))
    default = dispatch.select(problem).name == backend
    try:
        outcome = worker.run(check_backend, backend, problem)
        if outcome[2] and math.isnan(outcome[0]):  # an error may have broken the device's context
            worker.end()
    except WorkerError as lost:
        outcome = math.nan, math.nan, str(lost)
    return Check(backend, problem.device, problem.op, dtype, shape, default, *outcome)


def check_backend(backend: str, problem: Problem) -> tuple[float, float, str]:
    """Compares y and all gradients with float64; returns the last three fields of `Check`."""
    run = OPERATORS[problem.op]
    try:
        inputs, grad_y = _inputs(problem)
        expected_y, *expected_grads = _both(
            partial(run, backend="torch"), [t.double() for t in inputs], grad_y.double()
        )
        y, *grads = _both(partial(run, backend=backend), inputs, grad_y)
        errors = relative_error(y, expected_y), max(gradient_errors(grads, expected_grads))
    except Exception as error:
        return math.nan, math.nan, f"{type(error).__name__}: {error}"
    bound = BOUND[problem.dtype]
    passed = max(errors) <= bound and not any(map(math.isnan, errors))
    return *errors, "" if passed else f"the bound is {bound:.1e}"


def _print_check(c: Check) -> None:
    last = f"  FAILED: {c.failure.splitlines()[0]}" if c.failure else "  default" * c.default
    print(
        f"{c.backend:<8}{c.device:<8}{c.op:<16}{c.dtype:<10}{c.shape:<20}{c.error_y:>9.1e}{c.error_grad:>12.1e}{last}",
        flush=True,
    )


class WorkerError(RuntimeError):
    """The process crashed, or did not return in time."""


class Worker(AbstractContextManager["Worker"]):
    """Runs functions in another process, one at a time. After a crash or a hang, it starts a new process."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None
        self._others = set(multiprocessing.active_children())

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Returns the function's result; raises WorkerError if its process crashes or takes more than `LIMIT_S`."""
        if self._pool is None:
            self._pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        future = self._pool.submit(function, *args)
        try:
            return future.result(LIMIT_S)
        except (BrokenProcessPool, TimeoutError) as error:
            self.end()
            crashed = isinstance(error, BrokenProcessPool)
            why = "its process crashed" if crashed else f"it hangs: no result after {LIMIT_S:g} s"
            raise WorkerError(why) from error

    def end(self) -> None:
        """Ends the process; the next function gets a new one."""
        for child in set(multiprocessing.active_children()) - self._others:
            child.kill()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def __exit__(self, *error: object) -> None:
        self.end()


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


def _both(run: Callable[..., Tensor], inputs: list[Tensor], grad_y: Tensor) -> list[Tensor]:
    """y and the gradients of all inputs."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    y = run(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad_y)]
