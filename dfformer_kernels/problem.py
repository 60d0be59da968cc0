"""The problem that an operator poses to backends, the memory formats of x and y, and the error of a failed build."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class KernelBuildError(RuntimeError):
    """A kernel or a cuFFT plan cannot be compiled or loaded; the message says which, and why.

    Another backend may be able to run the problem.
    """


class Problem(NamedTuple):
    """What a backend needs to know to accept or refuse a problem.

    In order: operator name; device type, dtype and shape of ``x``; F of a dynamic filter; whether StarReLU is included;
    device index; whether the routing is a softmax of the logits; whether each sample has a weight of its own.
    """

    op: str
    device: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    filters: int = 0
    star_relu: bool = False
    device_index: int = 0
    softmax: bool = True
    weight_per_sample: bool = False

    @staticmethod
    def of(op: str, tensors: Sequence[Tensor | None], softmax: bool = True) -> "Problem":
        """The problem of an operator's checked tensor arguments, x first (for a backward, without grad_y)."""
        x, second, *_ = tensors
        assert x is not None
        assert second is not None
        filters = second.shape[1] if op.startswith("dynamic_filter") else 0
        per_sample = op.startswith("global_filter") and second.dim() == 5
        return _problem(op, x.device, x.dtype, x.shape, filters, tensors[-1] is not None, softmax, per_sample)


@lru_cache(maxsize=1024)  # used at every call: a look-up takes half as long as making it
def _problem(
    op: str, device: torch.device, dtype: torch.dtype, shape: torch.Size, filters: int, star_relu: bool, *form: bool
) -> Problem:
    return Problem(op, device.type, dtype, tuple(shape), filters, star_relu, device.index or 0, *form)


# The two memory formats of x (B,H,W,C). y and grad_x have the format of x.


def is_channels_first(x: Tensor) -> bool:
    """Whether x (B,H,W,C) is contiguous as (B,C,H,W), and not also as (B,H,W,C)."""
    return x.dim() == 4 and not x.is_contiguous() and x.permute(0, 3, 1, 2).is_contiguous()


def in_format(t: Tensor, channels_first: bool) -> Tensor:
    """``t`` (B,H,W,C), contiguous as (B,C,H,W) or as (B,H,W,C); copied only if it is not."""
    if channels_first:
        return not_a_view(t.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1))
    return t.contiguous()


def not_a_view(t: Tensor) -> Tensor:
    """A tensor that shares t's memory but is not a view.

    With gradients, torch does not let a caller write into an operator's result if it is a view.
    """
    return t.new_empty(0).set_(t.untyped_storage(), t.storage_offset(), t.shape, t.stride())


def empty_like(x: Tensor) -> Tensor:
    """An empty tensor with x's shape, dtype and memory format; contiguous if x has neither format."""
    format_ = torch.preserve_format if is_channels_first(x) else torch.contiguous_format
    return torch.empty_like(x, memory_format=format_)
