"""The ``cpu`` backend: tensors in, calls of the compiled core out. Every check the core relies on is made here."""

import os
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

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


def core() -> ModuleType:
    """The compiled core; RuntimeError with the reason where it is absent."""
    module, reason = _load()
    if module is None:
        raise RuntimeError(reason)
    return module


def star_relu(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    core().star_relu(*_addresses(x, y), x.numel(), _DTYPE_CODES[x.dtype], float(scale), float(bias), _threads())
    return y


def star_relu_backward(grad_y: Tensor, x: Tensor, scale: Tensor, bias: Tensor, needs: Sequence[bool]) -> list[Tensor]:
    need_x, need_scale, need_bias = needs
    x, grad_y = x.contiguous(), grad_y.to(x.dtype).contiguous()
    grad_x = torch.empty_like(x) if need_x else None
    grad_scale, grad_bias = core().star_relu_backward(
        *_addresses(grad_y, x, grad_x), x.numel(), _DTYPE_CODES[x.dtype], float(scale), _threads()
    )
    gradients = [] if grad_x is None else [grad_x]
    if need_scale:
        gradients.append(torch.full_like(scale, grad_scale))
    if need_bias:
        gradients.append(torch.full_like(bias, grad_bias))
    return gradients


KERNELS: dict[str, Callable[..., Any]] = {"star_relu": star_relu, "star_relu_backward": star_relu_backward}


def _threads() -> int:
    # OpenMP's pool does not survive a fork: a child that opened a parallel region would hang.
    return 1 if _in_forked_child else torch.get_num_threads()


def _addresses(*tensors: Tensor | None) -> list[int]:
    """Addresses of dense CPU tensors of one dtype and size; the last check before the core trusts a pointer."""
    first = tensors[0]
    assert first is not None
    for t in tensors:
        if t is None:
            continue
        if not (t.device.type == "cpu" and t.is_contiguous() and t.dtype == first.dtype and t.shape == first.shape):
            raise RuntimeError(
                f"the compiled core takes contiguous CPU tensors of one dtype and shape, got {t.dtype} "
                f"{tuple(t.shape)} with strides {t.stride()} on {t.device} beside {first.dtype} {tuple(first.shape)}"
            )
    return [0 if t is None else t.data_ptr() for t in tensors]
