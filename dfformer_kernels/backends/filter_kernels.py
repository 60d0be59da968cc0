"""The filter steps of a backend for which a global filter is a dynamic one without logits."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor


def filter_kernels(
    forward: Callable[..., Tensor], backward: Callable[..., list[Tensor]]
) -> dict[str, Callable[..., Any]]:
    """The kernels of ``dynamic_filter``, ``global_filter`` and their backwards, by operator name.

    Args:
        forward: of (x, logits, filters, scale, bias, softmax), to y; for a global filter logits is None and its weight
            filters.
        backward: of (grad_y, x, logits, filters, scale, bias, needs, softmax), to the gradients that needs, a flag for
            each of the five inputs, asks for.
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
