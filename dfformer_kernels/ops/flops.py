"""FLOP formulas of the operators, for ``torch.utils.flop_counter.FlopCounterMode``.

Importing this module registers them (``import dfformer`` does so). A multiply-add counts as 2. A real 2-D transform of
N points counts as 2.5 N log2 N per channel, the usual figure. Pointwise arithmetic outside of spectra counts as 0, as
in torch.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from dfformer_kernels.ops.conv2d import output_plane

Shape = Sequence[int]

# FLOPs for each kept frequency and channel
MIX = 4  # a complex number times a real weight, added to a sum; once for each filter of the basis
PRODUCT = 6  # of two complex numbers
WEIGHTED_PRODUCT = PRODUCT + 2  # times the number of columns of the full spectrum that it stands for
BATCH_SUM = 2


def _filter(x: Shape, transforms: int, spectral: int) -> int:
    """FLOPs of ``transforms`` transforms of x (B,H,W,C), plus ``spectral`` for each kept frequency and channel."""
    B, H, W, C = x
    N = max(H * W, 1)
    return round(B * C * (transforms * 2.5 * N * math.log2(N) + H * (W // 2 + 1) * spectral))


def _filter_backward(x: Shape, need_u: bool, mix: int, need_filters: bool, sums: int) -> int:
    """FLOPs of ``grad_u = irfft2(conj(M) G)`` and of the filters' gradients, which are sums of ``P = D G conj(X)``."""
    return _filter(
        x,
        transforms=1 + need_u + need_filters,
        spectral=need_u * (mix + PRODUCT) + need_filters * (WEIGHTED_PRODUCT + sums),
    )


def _dynamic_filter(x: Shape, logits: Shape, *_: Any) -> int:
    return _filter(x, 2, MIX * logits[1] + PRODUCT)


def _dynamic_filter_backward(grad_y: Shape, x: Shape, logits: Shape, *others: Any) -> int:
    need_x, need_logits, need_basis, need_scale, need_bias = others[3]
    mix = MIX * logits[1]
    need_u, need_filters = need_x or need_scale or need_bias, need_logits or need_basis
    return _filter_backward(x, need_u, mix, need_filters, mix * (need_logits + need_basis))


def _global_filter(x: Shape, *_: Any) -> int:
    return _filter(x, 2, PRODUCT)


def _global_filter_backward(grad_y: Shape, x: Shape, *others: Any) -> int:
    need_x, need_weight, need_scale, need_bias = others[3]
    return _filter_backward(x, need_x or need_scale or need_bias, 0, need_weight, BATCH_SUM)


def _convolution(x: Shape, weight: Shape, bias: Shape | None, stride: Shape, padding: Shape, *_: Any) -> int:
    plane = output_plane(x[1:3], weight[2:], stride, padding)
    return 2 * x[0] * math.prod(plane) * math.prod(weight)


def _linear(x: Shape, weight: Shape, *_: Any) -> int:
    return 2 * math.prod(x) * weight[0]


def _nothing(*_: Any) -> int:
    return 0


# Each formula takes its operator's arguments, with shapes for tensors. Options with default values are not passed.
FORMULAS: dict[str, Callable[..., int]] = {
    "star_relu": _nothing,
    "star_relu_backward": _nothing,
    "dynamic_filter": _dynamic_filter,
    "dynamic_filter_backward": _dynamic_filter_backward,
    "global_filter": _global_filter,
    "global_filter_backward": _global_filter_backward,
    "convolution": _convolution,
    "linear": _linear,
}


def _register(name: str, formula: Callable[..., int]) -> None:
    def counted(*arguments: Any, out_shape: Any) -> int:
        return formula(*arguments)

    register_flop_formula(getattr(torch.ops.dfformer, name))(counted)


for _name, _formula in FORMULAS.items():
    _register(_name, _formula)
