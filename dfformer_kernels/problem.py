"""What backends are asked: the problem an operator poses, the memory formats of x and y, and the error of a backend
that has no kernel for a problem after all.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class KernelBuildError(RuntimeError):
    """A kernel, or a plan of cuFFT, cannot be compiled or loaded; says which, and why. Another backend may do."""


class Problem(NamedTuple):
    """What a backend needs to know to accept or refuse: operator name, device type, dtype and shape of ``x``, F of a
    dynamic filter, whether StarReLU is part of it, device index, whether the routing is a softmax of the logits, and
    whether each sample has a weight of its own.
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
        """Of the operator's tensor arguments, x first, or those of its backward without grad_y; checked before."""
        x, second, *_ = tensors
        assert x is not None
        assert second is not None
        filters = second.shape[1] if op.startswith("dynamic_filter") else 0
        per_sample = op.startswith("global_filter") and second.dim() == 5
        return _problem(op, x.device, x.dtype, x.shape, filters, tensors[-1] is not None, softmax, per_sample)


@lru_cache(maxsize=1024)  # at every call: to find it takes half the time of making it
def _problem(
    op: str, device: torch.device, dtype: torch.dtype, shape: torch.Size, filters: int, star_relu: bool, *form: bool
) -> Problem:
    return Problem(op, device.type, dtype, tuple(shape), filters, star_relu, device.index or 0, *form)


# The two memory formats of x (B,H,W,C), which y and grad_x have as x has them.


def is_channels_first(x: Tensor) -> bool:
    """Whether x (B,H,W,C) lies in memory as (B,C,H,W) does, and not as a contiguous (B,H,W,C) too."""
    return x.dim() == 4 and not x.is_contiguous() and x.permute(0, 3, 1, 2).is_contiguous()


def in_format(t: Tensor, channels_first: bool) -> Tensor:
    """(B,H,W,C) in memory as (B,C,H,W) or (B,H,W,C), in t's memory where it is so there."""
    if channels_first:
        return not_a_view(t.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1))
    return t.contiguous()


def not_a_view(t: Tensor) -> Tensor:
    """A tensor of its own in t's memory: where there are gradients, torch lets nobody write into an operator's result
    that is a view.
    """
    return t.new_empty(0).set_(t.untyped_storage(), t.storage_offset(), t.shape, t.stride())


def empty_like(x: Tensor) -> Tensor:
    """Memory for a result of x's shape, dtype and format; contiguous where x has neither format."""
    format_ = torch.preserve_format if is_channels_first(x) else torch.contiguous_format
    return torch.empty_like(x, memory_format=format_)
