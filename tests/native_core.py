"""The compiled core in tests: guarded tensors, results and gradients, scripts of their own."""

import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import torch
from cases import OPS, Inputs, Op, assert_all_within_bound, expected, gradients, make_grad
from torch import Tensor

from dfformer_kernels import reference

X86 = platform.machine() == "x86_64"
ISAS = ["avx512", "avx2", "generic"] if X86 else ["neon"]
VECTOR_BYTES = {"avx512": 64, "avx2": 32, "generic": 16, "neon": 16}

CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
BITS = {torch.float32: torch.int32, torch.float64: torch.int64, torch.bfloat16: torch.int16, torch.float16: torch.int16}

USUAL_FORM = (True, False, False)  # softmax, one weight for all samples, channels-last

FILTERS = {name: op for name, op in OPS.items() if op.parameters}
DYNAMIC = OPS["dynamic_filter"]


def run(op: Op, inputs: Inputs, grad_y: Tensor) -> tuple[Tensor, Inputs]:
    """Result and gradients on the ``cpu`` backend."""
    y = op.public(inputs, "cpu")
    return y.detach(), gradients(y, inputs, grad_y)


def assert_run_within_bound(op: Op, inputs: Inputs) -> None:
    grad_y = make_grad(op, inputs)
    assert_all_within_bound(*run(op, inputs, grad_y), expected(op, inputs, grad_y))


def assert_joint_scalars_within_bound(op: Op, inputs: Inputs, grad_y: Tensor) -> None:
    """Compares grad_scale and grad_bias as one vector, for problems in which one of them may happen to cancel."""
    y, grads = run(op, inputs, grad_y)
    wanted_y, wanted = expected(op, inputs, grad_y)
    if op.scalars:
        grads["scalars"], wanted["scalars"] = (
            torch.cat([g.pop(n).view(1) for n in op.scalars]) for g in (grads, wanted)
        )
    assert_all_within_bound(y, grads, (wanted_y, wanted))


class Guarded:
    """A tensor in the middle of a larger one whose margins must not change."""

    MARGIN = 3  # elements, so that the tensor is aligned to nothing but its element

    def __init__(self, values: Tensor, margin: float) -> None:
        self.n = values.numel()
        edge = values.new_full((self.MARGIN,), margin)
        self.whole = torch.cat([edge, values.flatten(), edge])
        self.before = self.whole.clone()

    @property
    def address(self) -> int:
        return self.whole.data_ptr() + self.MARGIN * self.whole.itemsize

    @property
    def inside(self) -> Tensor:
        return self.whole[self.MARGIN : self.MARGIN + self.n]

    def assert_margins_untouched(self) -> None:
        after, before = (t.view(BITS[t.dtype]) for t in (self.whole, self.before))
        assert torch.equal(after[: self.MARGIN], before[: self.MARGIN])
        assert torch.equal(after[self.MARGIN + self.n :], before[self.MARGIN + self.n :])


def run_guarded(core: ModuleType, op: Op, inputs: Inputs, grad_y: Tensor) -> tuple[Tensor, Inputs]:
    """Result and gradients of the core, of unaligned tensors with NaN around inputs and a sentinel around results."""
    x, *parameters = (inputs[name].detach() for name in ("x", *op.parameters))
    arithmetic = reference.compute_dtype(x.dtype)
    logits = inputs.get("logits")
    scalars = [inputs[name].detach() for name in op.scalars]
    star_relu = tuple(float(t) for t in scalars) or None
    problem = (*x.shape, 0 if logits is None else logits.shape[1]), CODES[x.dtype], star_relu, USUAL_FORM, 2

    given = [Guarded(x, math.nan), *(Guarded(t.to(arithmetic), math.nan) for t in parameters)]
    addresses = [given[0].address, *([0] if logits is None else []), *(t.address for t in given[1:])]
    results = [Guarded(torch.full_like(g.inside, math.nan), 123.0) for g in given]
    y, grad = Guarded(torch.full_like(x, math.nan), 123.0), Guarded(grad_y, math.nan)
    grad_addresses = [results[0].address, *([0] if logits is None else []), *(t.address for t in results[1:])]
    core.filter(*problem, *addresses, y.address)
    sums = core.filter(*problem, *addresses, 0, grad.address, *grad_addresses, star_relu is not None)
    for written in (y, *results):
        written.assert_margins_untouched()
    grads = [r.inside.view(t.shape).to(t.dtype) for r, t in zip(results, (x, *parameters), strict=True)]
    grads += [torch.full_like(t, value) for t, value in zip(scalars, sums, strict=False)]
    return y.inside.view(x.shape), dict(zip(inputs, grads, strict=True))


def run_script(script: str, timeout: float = 120, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | environment,
        check=False,
    )


def assert_releases_the_gil(run: Callable[[], object]) -> None:
    """This thread reads the time in the middle half of a call, which it could not while the call held the GIL."""

    def call() -> tuple[float, float]:
        start = time.perf_counter()
        run()
        return start, time.perf_counter()

    def seen_during_a_call(pool: ThreadPoolExecutor) -> bool:
        running, times = pool.submit(call), []
        while not running.done():
            times.append(time.perf_counter())
        start, end = running.result()
        quarter = (end - start) / 4
        return any(start + quarter < t < end - quarter for t in times)

    with ThreadPoolExecutor(1) as pool:
        # In most calls: on a busy machine this thread may sleep through some.
        assert sum(seen_during_a_call(pool) for _ in range(10)) >= 5
