"""The ``cpu`` backend: checks tensors and passes their addresses to the compiled core."""

import os
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dfformer_kernels.backend.filter_kernels import (
    FilterStep,
    Gradients,
    contiguous,
    filter_kernels,
    forward_kernels,
    needed,
)
from dfformer_kernels.problem import Problem, empty_like, is_channels_first
from dfformer_kernels.reference import compute_dtype

# The order of DType in csrc/dynamic_filter.h.
_DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

_in_forked_child = False


def _after_fork_in_child() -> None:
    global _in_forked_child
    _in_forked_child = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


@cache
def _load() -> tuple[ModuleType | None, str]:
    try:
        module = import_module("dfformer_kernels._C")
    except ImportError as error:
        return (
            None,
            f"the compiled core dfformer_kernels._C cannot be imported ({error}); reinstall with a C++ compiler",
        )
    if isa := os.environ.get("DFFORMER_CPU_ISA"):
        try:
            module.set_active_isa(isa)
        except ValueError as error:
            raise ValueError(f"DFFORMER_CPU_ISA: {error}") from None
    return module, ""


def unavailable_reasons() -> list[str]:
    """Why nothing can run on this backend here; empty if the compiled core is installed."""
    core, reason = _load()
    return [] if core else [reason]


def unsupported_reasons(problem: Problem) -> list[str]:
    """Why the core cannot run ``problem``; empty if it can."""
    most = core().max_side
    if problem.op.startswith("star_relu") or max(problem.shape[1:3]) <= most:
        return []
    return [f"H or W is greater than {most}"]


def core() -> ModuleType:
    """The compiled core; raises RuntimeError with the reason if it is not installed."""
    module, reason = _load()
    if module is None:
        raise RuntimeError(reason)
    return module


def star_relu(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    x = x if is_channels_first(x) else x.contiguous()
    y = empty_like(x)
    _star_relu_into(y, x, scale, bias)
    return y


def star_relu_(x: Tensor, scale: Tensor, bias: Tensor) -> None:
    _star_relu_into(x, x, scale, bias)


def _star_relu_into(y: Tensor, x: Tensor, scale: Tensor, bias: Tensor) -> None:
    if is_channels_first(x):
        y, x = y.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2)
    problem = x.numel(), _DTYPE_CODES[x.dtype], _threads(), scale.item(), bias.item()
    core().star_relu(*problem, _pointer("x", x), _pointer("y", y, x))


def star_relu_backward(grad_y: Tensor, x: Tensor, scale: Tensor, bias: Tensor, needs: Sequence[bool]) -> list[Tensor]:
    x, grad_y = x.contiguous(), contiguous(grad_y, x.dtype)
    grad_x = _empty_like(x) if needs[0] else None
    problem = x.numel(), _DTYPE_CODES[x.dtype], _threads(), scale.item(), bias.item()
    addresses = _pointer("x", x), 0, _pointer("grad_y", grad_y, x), _pointer("grad_x", grad_x, x)
    sums = core().star_relu(*problem, *addresses)
    return needed((grad_x, *_scalars(sums, scale, bias)), (x, scale, bias), needs)


class _Arguments:
    """A filter step in the form that the core takes: contiguous, parameters in the arithmetic dtype."""

    def __init__(self, step: FilterStep) -> None:
        x, logits, filters, scale, bias, softmax = step
        arithmetic = compute_dtype(x.dtype)
        self._channels_first, self._dtype = is_channels_first(x), x.dtype
        self.x = self.in_core_layout(x)
        self.logits = None if logits is None else contiguous(logits, arithmetic)
        self.filters = contiguous(filters, arithmetic)
        B, H, W, C = x.shape
        F = 0 if logits is None else logits.shape[1]
        star_relu = None if scale is None or bias is None else (scale.item(), bias.item())
        per_sample = filters.dim() == 5
        form = softmax, per_sample, self._channels_first
        expected = (*(B,) * per_sample, H, W // 2 + 1, F or C, 2)
        if filters.shape != expected or (logits is not None and logits.shape != (B, F, C)):
            raise RuntimeError(
                f"filters, logits: expected beside x {tuple(x.shape)} (H,K,F,2) and (B,F,C), or (H,K,C,2), (B,H,K,C,2) "
                f"and None, got {tuple(filters.shape)} and {None if logits is None else tuple(logits.shape)}"
            )
        problem = (B, H, W, C, F), _DTYPE_CODES[x.dtype], star_relu, form, _threads()
        inputs = _pointer("x", self.x), _pointer("logits", self.logits), _pointer("filters", self.filters)
        self.arguments = *problem, *inputs

    def in_core_layout(self, t: Tensor) -> Tensor:
        """``t`` (B,H,W,C) in the core's form: x's dtype, contiguous, as (B,C,H,W) if x is channels-first in memory."""
        return contiguous(t.permute(0, 3, 1, 2) if self._channels_first else t, self._dtype)

    def result(self, t: Tensor) -> Tensor:
        """The core's result as (B,H,W,C)."""
        return t.permute(0, 2, 3, 1) if self._channels_first else t


def _filter(step: FilterStep) -> Tensor:
    given = _Arguments(step)
    y = _empty_like(given.x)
    core().filter(*given.arguments, _pointer("y", y, given.x))
    return given.result(y)


def _filter_(step: FilterStep) -> None:
    """Writes the result over x: a tile's pixels are read before any of them is written."""
    given = _Arguments(step)
    core().filter(*given.arguments, _pointer("y", given.x))


def _filter_backward(grad_y: Tensor, step: FilterStep, needs: Sequence[bool]) -> Gradients:
    need_x, need_logits, need_filters, need_scale, need_bias = needs
    given = _Arguments(step)
    grad_y = given.in_core_layout(grad_y)
    grad_x = _empty_like(given.x) if need_x else None
    grad_logits = _empty_like(given.logits) if need_logits and given.logits is not None else None
    grad_filters = _empty_like(given.filters) if need_filters else None
    sums = core().filter(
        *given.arguments,
        0,  # y
        _pointer("grad_y", grad_y, given.x),
        _pointer("grad_x", grad_x, given.x),
        _pointer("grad_logits", grad_logits, given.logits),
        _pointer("grad_filters", grad_filters, given.filters),
        need_scale or need_bias,
    )
    scalars = _scalars(sums, step.scale, step.bias) if need_scale or need_bias else (None, None)
    return None if grad_x is None else given.result(grad_x), grad_logits, grad_filters, *scalars


def _scalars(sums: Sequence[float], scale: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of StarReLU's scale and bias, if there is one."""
    if scale is None or bias is None:
        return None, None
    return torch.full_like(scale, sums[0]), torch.full_like(bias, sums[1])


def filter_workspace_bytes(shape: Sequence[int], num_filters: int, dtype: torch.dtype, backward: bool = False) -> int:
    """Bytes of workspace that a filter step on x of ``shape`` (B,H,W,C) allocates.

    They depend on torch's current number of threads. ``num_filters`` is F, or 0 for a global filter.
    """
    problem = (*shape, num_filters), _DTYPE_CODES[dtype], (1.0, 0.0), (True, False, False), _threads()
    gradients = {"grad_y": 1, "grad_x": 1, "grad_logits": min(num_filters, 1), "grad_filters": 1, "need_scalars": True}
    return core().filter_workspace(*problem, 1, 1, 1, **(gradients if backward else {"y": 1}))  # no address is read


KERNELS: dict[str, Callable[..., Any]] = {
    "star_relu": star_relu,
    "star_relu_": star_relu_,
    "star_relu_backward": star_relu_backward,
    **filter_kernels(_filter, _filter_backward),
    **forward_kernels(_filter_, "_"),
}


def _empty_like(t: Tensor) -> Tensor:
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def _threads() -> int:
    # OpenMP's thread pool does not survive a fork: a child would hang at its first parallel region.
    return 1 if _in_forked_child else torch.get_num_threads()


def _pointer(name: str, t: Tensor | None, like: Tensor | None = None) -> int:
    """The address of a contiguous CPU tensor of the dtype and size of ``like``; 0 for None.

    This is the last check, because the core trusts addresses.
    """
    if t is None:
        return 0
    like = t if like is None else like
    if not (t.is_cpu and t.is_contiguous() and t.dtype == like.dtype and t.numel() == like.numel()):
        raise RuntimeError(
            f"{name}: expected a contiguous {like.dtype} CPU tensor of {like.numel()} elements, got {t.dtype} "
            f"{tuple(t.shape)} with strides {t.stride()} on {t.device}"
        )
    return t.data_ptr()
