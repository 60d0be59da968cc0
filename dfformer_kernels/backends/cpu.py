"""The ``cpu`` backend: tensors in, calls of the compiled core out. Every check the core relies on is made here."""

import os
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dfformer_kernels.backends.filter_kernels import filter_kernels

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
    """Why nothing can run on this backend here; empty if the compiled core is there."""
    core, reason = _load()
    return [] if core else [reason]


def refusals(op: str, shape: tuple[int, ...]) -> list[str]:
    """Why the core cannot do ``op`` on x of this shape; empty if it can."""
    most = core().max_side
    if op.startswith("star_relu") or max(shape[1:3]) <= most:
        return []
    return [f"a side of the plane is longer than {most}"]


def core() -> ModuleType:
    """The compiled core; RuntimeError with the reason where it is absent."""
    module, reason = _load()
    if module is None:
        raise RuntimeError(reason)
    return module


def star_relu(x: Tensor, scale: Tensor, bias: Tensor, out: Tensor | None = None) -> Tensor:
    """``out``, contiguous, may be x itself."""
    x = x.contiguous()
    y = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    core().star_relu(
        _address(x), _address(y, x), x.numel(), _DTYPE_CODES[x.dtype], scale.item(), bias.item(), _threads()
    )
    return y


def star_relu_backward(
    grad_y: Tensor,
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    needs: Sequence[bool],
    out: Tensor | None = None,
) -> list[Tensor]:
    """``out``, for grad_x, may be grad_y itself if that is contiguous and has x's dtype."""
    need_x, need_scale, need_bias = needs
    x, grad_y = x.contiguous(), grad_y.to(x.dtype).contiguous()
    grad_x = (torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out) if need_x else None
    grad_scale, grad_bias = core().star_relu_backward(
        _address(grad_y, x),
        _address(x),
        _address(grad_x, x),
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


def _filter(x: Tensor, logits: Tensor | None, filters: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    problem = _FilterProblem(x, logits, filters, scale, bias)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    core().filter(*problem.arguments, *problem.addresses, _address(y, problem.x), _threads())
    return y


def _filter_backward(
    grad_y: Tensor,
    x: Tensor,
    logits: Tensor | None,
    filters: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    need_x, need_logits, need_filters, need_scale, need_bias = needs
    problem = _FilterProblem(x, logits, filters, scale, bias)
    grad_y = (grad_y if grad_y.dtype == x.dtype else grad_y.to(x.dtype)).contiguous()
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else None
    grad_logits = torch.empty_like(problem.logits) if problem.logits is not None and need_logits else None
    grad_filters = torch.empty_like(problem.filters) if need_filters else None
    grad_scale, grad_bias = core().filter_backward(
        *problem.arguments,
        _address(grad_y, problem.x),
        *problem.addresses,
        _address(grad_x, problem.x),
        _address(grad_logits, problem.logits),
        _address(grad_filters, problem.filters),
        need_scale or need_bias,
        _threads(),
    )
    gradients = [] if grad_x is None else [grad_x]
    if logits is not None and grad_logits is not None:
        gradients.append(grad_logits.to(logits.dtype))
    if grad_filters is not None:
        gradients.append(grad_filters)
    if scale is not None and need_scale:
        gradients.append(torch.full_like(scale, grad_scale))
    if bias is not None and need_bias:
        gradients.append(torch.full_like(bias, grad_bias))
    return gradients


class _FilterProblem:
    """A filter step's inputs as the core takes them: dense, parameters in the arithmetic dtype."""

    def __init__(
        self, x: Tensor, logits: Tensor | None, filters: Tensor, scale: Tensor | None, bias: Tensor | None
    ) -> None:
        self.x = x.contiguous()
        self.filters = filters.contiguous()
        if logits is not None and logits.dtype != filters.dtype:
            logits = logits.to(filters.dtype)
        self.logits = None if logits is None else logits.contiguous()
        F = 0 if logits is None else logits.shape[1]
        star_relu = None if scale is None or bias is None else (scale.item(), bias.item())
        self.arguments = ((*x.shape, F), _DTYPE_CODES[x.dtype], star_relu)
        self.addresses = (_address(self.x), _address(self.logits), _address(self.filters))


def filter_workspace_bytes(shape: Sequence[int], num_filters: int, dtype: torch.dtype, backward: bool = False) -> int:
    """Bytes a step on x of ``shape`` (B,H,W,C) allocates beside its tensors, with the threads torch uses now.

    ``num_filters`` is F, 0 for a global filter.
    """
    return core().filter_workspace((*shape, num_filters), _DTYPE_CODES[dtype], backward, _threads())


KERNELS: dict[str, Callable[..., Any]] = {
    "star_relu": star_relu,
    "star_relu_backward": star_relu_backward,
    **filter_kernels(_filter, _filter_backward),
}


def _threads() -> int:
    # OpenMP's pool does not survive a fork: a child that opened a parallel region would hang.
    return 1 if _in_forked_child else torch.get_num_threads()


def _address(t: Tensor | None, like: Tensor | None = None) -> int:
    """The address of a dense CPU tensor, of the dtype and size of ``like``; 0 for None. The last check before the core
    trusts a pointer."""
    if t is None:
        return 0
    like = t if like is None else like
    if not (t.is_cpu and t.is_contiguous() and t.dtype == like.dtype and t.numel() == like.numel()):
        raise RuntimeError(
            f"the compiled core takes contiguous CPU tensors of one dtype and shape, got {t.dtype} "
            f"{tuple(t.shape)} with strides {t.stride()} on {t.device} beside {like.dtype} {tuple(like.shape)}"
        )
    return t.data_ptr()
