"""The form of the filter steps that backends share: a global filter is a dynamic filter without logits."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class FilterStep(NamedTuple):
    """A filter step's inputs. ``filters`` is the basis, or without ``logits`` the weight of a global filter."""

    x: Tensor
    logits: Tensor | None
    filters: Tensor
    scale: Tensor | None
    bias: Tensor | None
    softmax: bool = True


# The gradients of (x, logits, filters, scale, bias), in any dtype; those that are not needed are ignored.
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def filter_kernels(
    forward: Callable[[FilterStep], Tensor], backward: Callable[[Tensor, FilterStep, Sequence[bool]], Gradients]
) -> dict[str, Callable[..., Any]]:
    """The kernels of ``dynamic_filter``, ``global_filter`` and their backwards, by operator name.

    Args:
        forward: maps a step to y.
        backward: maps (grad_y, step, needs) to gradients. ``needs`` has a flag for each of the step's tensors.
    """

    def dynamic_filter_backward(grad_y: Tensor, *args: Any) -> list[Tensor]:
        tensors, needs, options = args[:5], args[5], args[6:]
        return needed(backward(grad_y, FilterStep(*tensors, *options), needs), tensors, needs)

    def global_filter_backward(grad_y: Tensor, x: Tensor, *args: Any) -> list[Tensor]:
        *others, (need_x, *needs) = args
        return dynamic_filter_backward(grad_y, x, None, *others, (need_x, False, *needs))

    backwards = (dynamic_filter_backward, global_filter_backward)
    return forward_kernels(forward) | {kernel.__name__: kernel for kernel in backwards}


def forward_kernels(forward: Callable[[FilterStep], Any], suffix: str = "") -> dict[str, Callable[..., Any]]:
    """The kernels ``dynamic_filter`` and ``global_filter``, with ``suffix`` added to their names."""
    return {
        f"dynamic_filter{suffix}": lambda *step: forward(FilterStep(*step)),
        f"global_filter{suffix}": lambda x, *others: forward(FilterStep(x, None, *others)),
    }


def needed(gradients: Sequence[Tensor | None], tensors: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor]:
    """What an operator's backward returns: the needed gradients in order, with the dtypes and shapes of ``tensors``."""
    found = []
    for gradient, tensor, need in zip(gradients, tensors, needs, strict=True):
        if need and gradient is not None and tensor is not None:
            gradient = gradient if gradient.dtype == tensor.dtype else gradient.to(tensor.dtype)
            found.append(gradient if gradient.shape == tensor.shape else gradient.reshape(tensor.shape))
    return found


def contiguous(t: Tensor, dtype: torch.dtype) -> Tensor:
    """``t``, contiguous and of ``dtype``. A conversion that would do nothing is left out: it would cost time."""
    if t.dtype != dtype:
        t = t.to(dtype)
    return t if t.is_contiguous() else t.contiguous()
