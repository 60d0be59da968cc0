"""A convolution that is opaque to Inductor's layout pass.

Inductor takes every 4-D tensor that a convolution depends on for (B,C,H,W), and on a CPU gives each of them that
layout's channels-last strides. For a (B,H,W,C) tensor, this makes H the last dimension in memory and adds two copies
around every layer (docs/model_speed.md). Inductor does not look into a custom operator.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dfformer_kernels.ops.mlp import autocast_dtype
from dfformer_kernels.ops.registration import (
    is_in_compiled_graph,
    refuse_tangents,
    register,
    register_gradient,
    without_autocast,
)
from dfformer_kernels.problem import not_a_view

Pair = Sequence[int]
_NEITHER_DILATED_NOR_TRANSPOSED = ((1, 1), False, (0, 0))  # the last is the padding of a transposed one's output


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | Pair | str = 0,
    dilation: int | Pair = 1,
    *,
    groups: int = 1,
) -> Tensor:
    """``F.conv2d(x, weight, bias, stride, padding, dilation, groups)``; under torch.compile, a custom operator.

    Args:
        x: (B,C,H,W), float32, float64, bfloat16 or float16. Channels-last memory is fastest, and is the memory format
            of the custom operator's result.
        weight: (N, C / groups, h, w), of x's dtype; under autocast, of any dtype.
        bias: (N,), like ``weight``, or None.
        stride, padding, dilation: one number, or one each along H and W. A dilation other than 1, a padding by name and
            an unbatched x (C,H,W) are torch's own operator under torch.compile, too.

    Returns:
        (B,N,H',W'). Saves ``x`` and ``weight`` for backward.

    Raises:
        RuntimeError: as ``F.conv2d``.
    """
    if not is_in_compiled_graph() or x.dim() != 4 or isinstance(padding, str) or tuple(_pair(dilation)) != (1, 1):
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    if dtype := autocast_dtype(x):
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    y = torch.ops.dfformer.convolution(x.permute(0, 2, 3, 1), weight, bias, _pair(stride), _pair(padding), groups)
    return y.permute(0, 3, 1, 2)


def _pair(value: int | Pair) -> Pair:
    return (value, value) if isinstance(value, int) else value


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, groups: int) -> Tensor:
    refuse_tangents("convolution", (x, weight, bias))
    with without_autocast(x.device):
        y = F.conv2d(x.contiguous().permute(0, 3, 1, 2), weight, bias, stride, padding, groups=groups)
    return not_a_view(y.permute(0, 2, 3, 1).contiguous())


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, groups: int) -> Tensor:
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, stride, padding, groups=groups)
    return x.new_empty(y.permute(0, 2, 3, 1).shape)


class _Gradient:
    """The gradient of the operator, whose inputs are (x, weight, bias, stride, padding, groups)."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, *ctx.sizes = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        stride, padding, groups = ctx.sizes
        settings = (stride, padding, *_NEITHER_DILATED_NOR_TRANSPOSED, groups)
        needs = list(ctx.needs_input_grad[:3])
        grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad_y.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2), weight, weight.shape[:1], *settings, needs
        )
        return grad_x.permute(0, 2, 3, 1) if needs[0] else None, grad_weight, grad_bias, None, None, None


register(
    "convolution(Tensor x, Tensor weight, Tensor? bias, SymInt[2] stride, SymInt[2] padding, SymInt groups) -> Tensor",
    _convolution,
    _fake,
)
register_gradient("convolution", _Gradient)
