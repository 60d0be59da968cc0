"""FLOP formulas of the operators, for ``torch.utils.flop_counter.FlopCounterMode``.

Importing this module registers them (``import dfformer`` does so). A multiply-add counts as 2. A real 2-D transform of
N points counts as 2.5 N log2 N per channel, the usual figure. Pointwise arithmetic outside of spectra counts as 0, as
in torch.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from dfformer_kernels.ops.linear import HAS_ONEDNN

Shape = Sequence[int]

# FLOPs for each half-spectrum frequency and channel
MIX = 4  # a complex number times a real weight, added to a sum; once for each filter of the basis
PRODUCT = 6  # of two complex numbers
WEIGHTED_PRODUCT = PRODUCT + 2  # times the number of columns of the full spectrum that it stands for
BATCH_SUM = 2


def filter_flops(x: Shape, transforms: int, spectral: int = 0) -> int:
    """FLOPs of ``transforms`` transforms of x (B,H,W,C), plus ``spectral`` per half-spectrum frequency and channel."""
    B, H, W, C = x
    N = max(H * W, 1)
    return round(B * C * (transforms * 2.5 * N * math.log2(N) + H * (W // 2 + 1) * spectral))


def _filter_backward(x: Shape, needs: Sequence[bool], mix: int) -> int:
    """FLOPs of ``grad_u = irfft2(conj(M) G)`` and of the filters' gradients, which are sums of ``P = D G conj(X)``."""
    need_x, *of_filters, need_scale, need_bias = needs
    need_u, need_filters = need_x or need_scale or need_bias, any(of_filters)
    spectral = need_u * (mix + PRODUCT) + need_filters * WEIGHTED_PRODUCT + sum(of_filters) * (mix or BATCH_SUM)
    return filter_flops(x, 1 + need_u + need_filters, spectral)


# Each formula takes its operator's arguments, with shapes for tensors, and ``out_shape``. Options with default values
# are not passed.
_OPS = torch.ops.dfformer


@register_flop_formula([_OPS.dynamic_filter, _OPS.dynamic_filter_])
def _dynamic_filter(x: Shape, logits: Shape, *_: Any, **out: Any) -> int:
    return filter_flops(x, 2, MIX * logits[1] + PRODUCT)


@register_flop_formula(_OPS.dynamic_filter_backward)
def _dynamic_filter_backward(grad_y: Shape, x: Shape, logits: Shape, *others: Any, **out: Any) -> int:
    return _filter_backward(x, others[3], MIX * logits[1])


@register_flop_formula([_OPS.global_filter, _OPS.global_filter_])
def _global_filter(x: Shape, *_: Any, **out: Any) -> int:
    return filter_flops(x, 2, PRODUCT)


@register_flop_formula(_OPS.global_filter_backward)
def _global_filter_backward(grad_y: Shape, x: Shape, *others: Any, **out: Any) -> int:
    return _filter_backward(x, others[3], 0)


@register_flop_formula(_OPS.convolution)
def _convolution(x: Shape, weight: Shape, *_: Any, out_shape: Shape) -> int:
    return 2 * math.prod(out_shape[:3]) * math.prod(weight)


@register_flop_formula([_OPS.linear, torch.ops.mkldnn._linear_pointwise] if HAS_ONEDNN else _OPS.linear)
def _linear(x: Shape, *_: Any, out_shape: Shape, **__: Any) -> int:
    return 2 * math.prod(out_shape) * x[-1]  # the weight may be packed


@register_flop_formula([_OPS.star_relu, _OPS.star_relu_, _OPS.star_relu_backward])
def _nothing(*_: Any, **out: Any) -> int:
    return 0
