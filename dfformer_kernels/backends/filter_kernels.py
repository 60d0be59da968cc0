"""The filter steps of backends that treat a global filter as a dynamic filter without logits."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor


def filter_kernels(
    forward: Callable[..., Tensor], backward: Callable[..., list[Tensor]]
) -> dict[str, Callable[..., Any]]:
    """The kernels of ``dynamic_filter``, ``global_filter`` and their backwards, by operator name.

    Args:
        forward: maps (x, logits, filters, scale, bias, softmax) to y. For a global filter, ``logits`` is None and
            ``filters`` is its weight.
        backward: maps (grad_y, x, logits, filters, scale, bias, needs, softmax) to gradients. ``needs`` has a flag for
            each of the five inputs.
    """

    def global_filter(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
        return forward(x, None, weight, scale, bias)

    def global_filter_backward(
        grad_y: Tensor, x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, needs: Sequence[bool]
    ) -> list[Tensor]:
        need_x, *others = needs
        return backward(grad_y, x, None, weight, scale, bias, (need_x, False, *others))

    return {
        "dynamic_filter": forward,
        "dynamic_filter_backward": backward,
        "global_filter": global_filter,
        "global_filter_backward": global_filter_backward,
    }
