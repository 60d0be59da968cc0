"""What backends are asked: the problem an operator poses, and the error of one that has no kernel for it after all."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class KernelBuildError(RuntimeError):
    """A kernel, or a plan of cuFFT, cannot be compiled or loaded; says which, and why. Another backend may do."""


class Problem(NamedTuple):
    """What a backend needs to know to accept or refuse: operator name, device type, dtype and shape of ``x``, F of a
    dynamic filter, whether StarReLU is part of it, device index.
    """

    op: str
    device: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    filters: int = 0
    star_relu: bool = False
    device_index: int = 0

    @staticmethod
    def of(op: str, tensors: Sequence[Tensor | None]) -> "Problem":
        """Of the operator's tensor arguments, x first, or those of its backward without grad_y; checked before."""
        x, logits, *_ = tensors
        assert x is not None
        filters = logits.shape[1] if logits is not None and op.startswith("dynamic_filter") else 0
        return _problem(op, x.device, x.dtype, x.shape, filters, tensors[-1] is not None)


@lru_cache(maxsize=1024)  # at every call: to find it takes half the time of making it
def _problem(
    op: str, device: torch.device, dtype: torch.dtype, shape: torch.Size, filters: int, star_relu: bool
) -> Problem:
    return Problem(op, device.type, dtype, tuple(shape), filters, star_relu, device.index or 0)
