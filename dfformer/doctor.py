"""``dfformer doctor``: every available backend against the float64 reference, forward and backward, with times."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dfformer_kernels import backends, dispatch, dynamic_filter, global_filter, star_relu
from dfformer_kernels.tolerance import BOUND, gradient_errors, relative_error

# (B, H, W, C): the stages of DFFormer-S18 at 224 (C is the expanded width), then odd, prime, one-row and rectangular
# planes with channel counts that fill no vector.
QUICK_SHAPES = [(2, 14, 14, 32), (2, 7, 7, 20), (1, 13, 9, 5), (2, 1, 6, 3), (1, 5, 1, 2)]
SHAPES = [(2, 56, 56, 128), (2, 28, 28, 256), (2, 14, 14, 640), (2, 7, 7, 1024), (1, 128, 96, 64), *QUICK_SHAPES]
F = 4


class Case(NamedTuple):
    """One operator on one shape, dtype and device: its inputs, and the function of them."""

    op: str
    run: Callable[..., Tensor]
    inputs: list[Tensor]


def examine(quick: bool = False) -> bool:
    """Prints a line a backend, operator, dtype and shape; returns whether every result was within tolerance."""
    failures = checks = 0
    print(f"{'backend':<8}{'device':<8}{'operator':<16}{'dtype':<10}{'shape':<20}{'error y':>9}{'error grad':>12}"
          f"{'forward ms':>12}{'both ms':>10}")  # fmt: skip
    for name, reasons in backends().items():
        if reasons:
            print(f"{name:<8}not available: {'; '.join(reasons)}")
            continue
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            for shape in QUICK_SHAPES if quick else SHAPES:
                for dtype in (torch.float32, torch.bfloat16):
                    for case in _cases(shape, dtype, device):
                        if not _supported(dispatch.by_name(name), case.op, device, dtype, shape):
                            continue
                        checks += 1
                        failures += not _examine_case(name, device, shape, dtype, case)
    print(f"{checks - failures} of {checks} checks passed" + (f", {failures} FAILED" if failures else ""))
    return failures == 0


def _supported(backend: dispatch.Backend, op: str, device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    """Forward and backward."""
    filters = F if op == "dynamic_filter" else 0
    problems = [dispatch.Problem(name, device, dtype, shape, filters, True) for name in (op, f"{op}_backward")]
    return not any(backend.unsupported_reasons(problem) for problem in problems)


def _examine_case(backend: str, device: str, shape: tuple[int, ...], dtype: torch.dtype, case: Case) -> bool:
    bound = BOUND[dtype]
    expected_y, expected_grads = _run(case.run, [t.double() for t in case.inputs], "torch")
    y, grads = _run(case.run, case.inputs, backend)
    error_y = relative_error(y, expected_y)
    error_grad = max(gradient_errors(grads, expected_grads))
    inputs = [t.detach() for t in case.inputs]
    forward = _median_ms(lambda: case.run(*inputs, backend=backend), device)
    both = _median_ms(lambda: _run(case.run, case.inputs, backend), device)
    passed = error_y <= bound and error_grad <= bound  # NaN fails
    print(f"{backend:<8}{device:<8}{case.op:<16}{str(dtype).removeprefix('torch.'):<10}"
          f"{'x'.join(map(str, shape)):<20}{error_y:>9.1e}{error_grad:>12.1e}{forward:>12.3f}{both:>10.3f}"
          f"{'' if passed else f'  FAILED: the bound is {bound:.1e}'}")  # fmt: skip
    return passed


def _run(run: Callable[..., Tensor], inputs: list[Tensor], backend: str) -> tuple[Tensor, list[Tensor]]:
    """``y`` and the gradients of all inputs for a fixed ``grad_y``."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    y = run(*leaves, backend=backend)
    generator = torch.Generator().manual_seed(1)
    grad_y = torch.rand(y.shape, generator=generator).to(inputs[0].device, torch.bfloat16).to(y.dtype)
    return y.detach(), list(torch.autograd.grad(y, leaves, grad_y))


def _cases(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> list[Case]:
    B, H, W, C = shape
    generator = torch.Generator().manual_seed(0)

    def random(*size: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(*size, generator=generator).to(device, of)

    x, scalars = random(B, H, W, C), [torch.tensor([0.9], device=device), torch.tensor([-0.3], device=device)]
    basis = random(H, W // 2 + 1, F, 2, of=torch.float32)
    weight = random(H, W // 2 + 1, C, 2, of=torch.float32)
    return [
        Case("star_relu", star_relu, [x, *scalars]),
        Case(
            "dynamic_filter",
            lambda x, logits, basis, scale, bias, backend: dynamic_filter(
                x, logits, basis, (scale, bias), backend=backend
            ),
            [x, random(B, F, C), basis, *scalars],
        ),
        Case(
            "global_filter",
            lambda x, weight, scale, bias, backend: global_filter(x, weight, (scale, bias), backend=backend),
            [x, weight, *scalars],
        ),
    ]


def _median_ms(run: Callable[[], object], device: str) -> float:
    times = []
    for _ in range(4):  # the first warms up
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])
