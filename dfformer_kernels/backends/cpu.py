"""The ``cpu`` backend: checks tensors and passes their addresses to the compiled core."""

import os
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dfformer_kernels.backends.filter_kernels import filter_kernels
from dfformer_kernels.problem import Problem, is_channels_first
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
    x = x.contiguous()
    y = _empty_like(x)
    code, n = _DTYPE_CODES[x.dtype], x.numel()
    core().star_relu(_pointer("x", x), _pointer("y", y, x), n, code, scale.item(), bias.item(), _threads())
    return y


def star_relu_backward(grad_y: Tensor, x: Tensor, scale: Tensor, bias: Tensor, needs: Sequence[bool]) -> list[Tensor]:
    need_x, need_scale, need_bias = needs
    x, grad_y = x.contiguous(), grad_y.to(x.dtype).contiguous()
    grad_x = _empty_like(x) if need_x else None
    grad_scale, grad_bias = core().star_relu_backward(
        _pointer("grad_y", grad_y, x),
        _pointer("x", x),
        _pointer("grad_x", grad_x, x),
        x.numel(),
        _DTYPE_CODES[x.dtype],
        scale.item(),
        _threads(),
    )
    gradients = [] if grad_x is None else [grad_x]
    if need_scale:
        gradients.append(torch.full_like(scale, grad_scale))
    if need_bias:
        gradients.append(torch.full_like(bias, grad_bias))
    return gradients


class _FilterStep:
    """The inputs of a filter step in the form that the core takes: contiguous, parameters in the arithmetic dtype."""

    def __init__(
        self,
        x: Tensor,
        logits: Tensor | None,
        filters: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        softmax: bool = True,
    ) -> None:
        arithmetic = compute_dtype(x.dtype)
        self._channels_first = is_channels_first(x)
        self.x = self.planes(x)
        self.logits = None if logits is None else logits.to(arithmetic).contiguous()
        self.filters = filters.to(arithmetic).contiguous()
        B, H, W, C = x.shape
        F = 0 if logits is None else logits.shape[1]
        star_relu = None if scale is None or bias is None else (scale.item(), bias.item())
        per_sample = filters.dim() == 5
        form = (softmax, per_sample, self._channels_first)
        self.form = () if form == (True, False, False) else (form,)  # the core's default
        self.problem = ((B, H, W, C, F), _DTYPE_CODES[x.dtype], star_relu)
        expected = (*(B,) * per_sample, H, W // 2 + 1, F or C, 2)
        if filters.shape != expected or (logits is not None and logits.shape != (B, F, C)):
            raise RuntimeError(
                f"filters, logits: got {tuple(filters.shape)} and {None if logits is None else tuple(logits.shape)}, "
                f"accepted beside x {tuple(x.shape)} are (H,K,F,2) and (B,F,C), or (H,K,C,2), (B,H,K,C,2) and None"
            )
        self.inputs = (_pointer("x", self.x), _pointer("logits", self.logits), _pointer("filters", self.filters))

    def planes(self, t: Tensor) -> Tensor:
        """``t`` (B,H,W,C) in the core's form: contiguous, as (B,C,H,W) if x is channels-first in memory."""
        return (t.permute(0, 3, 1, 2) if self._channels_first else t).contiguous()

    def result(self, planes: Tensor) -> Tensor:
        """The core's result as (B,H,W,C)."""
        return planes.permute(0, 2, 3, 1) if self._channels_first else planes


def _filter(
    x: Tensor,
    logits: Tensor | None,
    filters: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    softmax: bool = True,
) -> Tensor:
    step = _FilterStep(x, logits, filters, scale, bias, softmax)
    y = _empty_like(step.x)
    core().filter(*step.problem, *step.inputs, _pointer("y", y, step.x), _threads(), *step.form)
    return step.result(y)


def _filter_backward(
    grad_y: Tensor,
    x: Tensor,
    logits: Tensor | None,
    filters: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    needs: Sequence[bool],
    softmax: bool = True,
) -> list[Tensor]:
    need_x, need_logits, need_filters, need_scale, need_bias = needs
    step = _FilterStep(x, logits, filters, scale, bias, softmax)
    grad_y = step.planes(grad_y.to(x.dtype))
    grad_x = _empty_like(step.x) if need_x else None
    grad_logits = _empty_like(step.logits) if step.logits is not None and need_logits else None
    grad_filters = _empty_like(step.filters) if need_filters else None
    grad_scale, grad_bias = core().filter_backward(
        *step.problem,
        _pointer("grad_y", grad_y, step.x),
        *step.inputs,
        _pointer("grad_x", grad_x, step.x),
        _pointer("grad_logits", grad_logits, step.logits),
        _pointer("grad_filters", grad_filters, step.filters),
        need_scale or need_bias,
        _threads(),
        *step.form,
    )
    gradients = [] if grad_x is None else [step.result(grad_x)]
    if logits is not None and grad_logits is not None:
        gradients.append(grad_logits.to(logits.dtype))
    if grad_filters is not None:
        gradients.append(grad_filters.to(filters.dtype))
    if scale is not None and need_scale:
        gradients.append(torch.full_like(scale, grad_scale))
    if bias is not None and need_bias:
        gradients.append(torch.full_like(bias, grad_bias))
    return gradients


def filter_workspace_bytes(shape: Sequence[int], num_filters: int, dtype: torch.dtype, backward: bool = False) -> int:
    """Bytes of workspace that a filter step on x of ``shape`` (B,H,W,C) allocates.

    They depend on torch's current number of threads. ``num_filters`` is F, or 0 for a global filter.
    """
    return core().filter_workspace((*shape, num_filters), _DTYPE_CODES[dtype], backward, _threads())


KERNELS: dict[str, Callable[..., Any]] = {
    "star_relu": star_relu,
    "star_relu_backward": star_relu_backward,
    **filter_kernels(_filter, _filter_backward),
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
            f"{name}: got {t.dtype} {tuple(t.shape)} with strides {t.stride()} on {t.device}, accepted is a contiguous "
            f"{like.dtype} CPU tensor of {like.numel()} elements"
        )
    return t.data_ptr()
