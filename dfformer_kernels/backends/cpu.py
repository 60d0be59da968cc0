"""The ``cpu`` backend: tensors in, calls of the compiled core out. Every check the core relies on is made here."""

import itertools
import math
import os
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dfformer_kernels.backends.filter_kernels import filter_kernels
from dfformer_kernels.ops import memory
from dfformer_kernels.ops.packing import is_kept, packed

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


# A block of the model needs four tensors; what its first ones lay in is wanted again by the next block's.
_TENSORS_UNTIL_OLD = 4
_count = itertools.count(1)


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """An uninitialised contiguous tensor of ``shape`` with the dtype and device of ``like``. On a CPU one of 32 MiB or
    more is a block of the core's, which keeps the last four that were freed for others of their size, until four to
    eight other tensors have come."""
    shape = tuple(shape)
    if like.is_cpu and _load()[0]:
        if next(_count) % _TENSORS_UNTIL_OLD == 0:
            core().free_old_blocks()
        if math.prod(shape) * like.itemsize >= memory.MAPPED_AFRESH and not memory.keeps_freed():
            return torch.from_dlpack(core().large_tensor(shape, _DTYPE_CODES[like.dtype]))
    if shape == like.shape:  # in half the time
        return torch.empty_like(like, memory_format=torch.contiguous_format)
    return torch.empty(shape, dtype=like.dtype, device=like.device)


def free_kept_blocks() -> None:
    """Gives the system back what is kept for large tensors to come (`empty`); it may also take it by itself."""
    if not unavailable_reasons():
        core().free_kept_blocks()


def star_relu(x: Tensor, scale: Tensor, bias: Tensor, out: Tensor | None = None) -> Tensor:
    """``out``, contiguous, may be x itself."""
    x = x.contiguous()
    y = empty(x.shape, x) if out is None else out
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
    grad_x = (empty(x.shape, x) if out is None else out) if need_x else None
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


def _pack(weight: Tensor) -> Tensor:
    """A float32 weight (N,K) as panels (panels,K,width); of no use under another instruction set."""
    weight = weight.contiguous()
    N, K = weight.shape
    width = core().panel_width()
    panels = weight.new_empty(-(-N // width), K, width)
    core().pack(N, K, _matrix(weight, N, K), _matrix(panels, *panels.shape), _threads())
    return panels


class _Weight:
    """A weight's sizes, and how and where it lies for the core."""

    def __init__(self, weight: Tensor, panels: bool) -> None:
        self.N, self.K = weight.shape
        if panels:
            width = core().panel_width()
            self.layout, self.stored = 2, packed(weight, _pack, width)
            self.address = _matrix(self.stored, -(-self.N // width), self.K, width)
            return
        self.layout = int(not weight.is_contiguous() and weight.t().is_contiguous())
        self.stored = weight.t() if self.layout else weight.contiguous()
        self.address = _matrix(self.stored, *((self.K, self.N) if self.layout else (self.N, self.K)))


class Norm(NamedTuple):
    """A layer norm of rows without bias: its weight (K,), if it has one, and what is added to the variance."""

    weight: Tensor | None
    eps: float

    def arguments(self, K: int) -> tuple[int, float]:
        return _vector(self.weight, K), self.eps


class Residual(NamedTuple):
    """What is added to a product (M,N): ``x`` (M,N), each column times its ``scale`` (N,) if there is one."""

    x: Tensor
    scale: Tensor | None

    def arguments(self, M: int, N: int) -> tuple[int, int]:
        return _matrix(self.x, M, N), _vector(self.scale, N)


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm: Norm | None = None,
    residual: Residual | None = None,
) -> Tensor:
    """``norm(x) @ weight.T + bias + residual`` (M,N) of float32 matrices: x (M,K), weight (N,K), bias (N,)."""
    x, w, bias = x.contiguous(), _Weight(weight, is_kept(weight)), None if bias is None else bias.contiguous()
    M = len(x)
    y = empty((M, w.N), x)
    core().product(
        (M, w.N, w.K),
        w.layout,
        _matrix(x, M, w.K),
        w.address,
        _vector(bias, w.N),
        _matrix(y, M, w.N),
        norm and norm.arguments(w.K),
        residual and residual.arguments(M, w.N),
        _threads(),
    )
    return y


def norm_mean(x: Tensor, norm: Norm) -> Tensor:
    """The mean of ``norm(x)`` (B,K) over the P rows of each sample; x (B,P,K) float32, not empty."""
    x = x.contiguous()
    B, P, K = x.shape
    y = x.new_empty(B, K)
    core().norm_mean((B, P, K), _matrix(x, B, P, K), norm.arguments(K), _matrix(y, B, K), _threads())
    return y


def weight_gradient(grad_y: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
    """``grad_y.T @ x`` (N,K) of float32 matrices: grad_y (M,N), x (M,K); added to ``out`` where that is given."""
    grad_y, x = grad_y.contiguous(), x.contiguous()
    (M, N), K = grad_y.shape, x.shape[1]
    grad = x.new_empty(N, K) if out is None else out
    core().weight_gradient(
        (M, N, K), _matrix(grad_y, M, N), _matrix(x, M, K), _matrix(grad, N, K), out is not None, _threads()
    )
    return grad


def mlp(
    x: Tensor,
    weight1: Tensor,
    scale: Tensor,
    bias: Tensor,
    weight2: Tensor,
    bias2: Tensor | None = None,
    keep: bool = False,
    norm: Norm | None = None,
    residual: Residual | None = None,
) -> tuple[Tensor, Tensor]:
    """``star_relu(norm(x) @ weight1.T) @ weight2.T + bias2 + residual`` (M,N) of float32 matrices, and, if it is to be
    kept, what StarReLU is applied to (M,hidden), else (0,hidden)."""
    x, bias2 = x.contiguous(), None if bias2 is None else bias2.contiguous()
    panels = is_kept(weight1) and is_kept(weight2)  # the core takes both in one layout
    w1, w2 = (_Weight(w if panels else w.contiguous(), panels) for w in (weight1, weight2))
    if w1.N != w2.K:
        raise RuntimeError(f"the compiled core takes weights that meet, got {weight1.shape} and {weight2.shape}")
    M, N, K, hidden = len(x), w2.N, w1.K, w1.N
    before = empty((M if keep else 0, hidden), x)
    y = empty((M, N), x)
    core().mlp(
        (M, N, K),
        hidden,
        w1.layout,
        _matrix(x, M, K),
        w1.address,
        scale.item(),
        bias.item(),
        w2.address,
        _vector(bias2, N),
        _matrix(before, M, hidden) if keep else 0,
        _matrix(y, M, N),
        norm and norm.arguments(K),
        residual and residual.arguments(M, N),
        _threads(),
    )
    return y, before


def _filter(x: Tensor, logits: Tensor | None, filters: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    problem = _FilterProblem(x, logits, filters, scale, bias)
    y = empty(x.shape, x)
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
    memory.keep_freed()
    need_x, need_logits, need_filters, need_scale, need_bias = needs
    problem = _FilterProblem(x, logits, filters, scale, bias)
    grad_y = (grad_y if grad_y.dtype == x.dtype else grad_y.to(x.dtype)).contiguous()
    grad_x = empty(x.shape, x) if need_x else None
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


def _matrix(t: Tensor, *shape: int) -> int:
    """The address of a dense float32 CPU tensor of that shape: the last check before the core trusts a pointer."""
    if not (t.is_cpu and t.is_contiguous() and t.dtype == torch.float32 and t.shape == shape):
        raise RuntimeError(
            f"the compiled core takes contiguous float32 CPU tensors, here of {shape}; got {t.dtype} {tuple(t.shape)} "
            f"with strides {t.stride()} on {t.device}"
        )
    return t.data_ptr()


def _vector(t: Tensor | None, n: int) -> int:
    return 0 if t is None else _matrix(t, n)


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
