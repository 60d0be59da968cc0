"""Linear layers through the library that is fast on this processor.

PyTorch's x86 builds compute float32 matrix products with MKL, which is slower than oneDNN on processors that are not
Intel's. There, oneDNN computes all but small and thin products, by an operator that is private to PyTorch. The public
way to oneDNN, a 1x1 convolution of a channels-last view, reorders the weight at every call. Without it, DFFormer-S18
takes 0.89 of the time for one image of 224x224, and 0.93 for eight (two cores of an AMD EPYC).
"""

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfformer_kernels.ops.registration import (
    is_in_a_dispatch_mode,
    is_in_compiled_graph,
    is_under_functorch,
    needs_double_backward,
    refuse_tangents,
    register,
    register_gradient,
    without_autocast,
)

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
_TENSORS = (Tensor, nn.Parameter)
# From this number of multiplications on oneDNN is faster, although a call takes 13 us longer. GFLOP/s of MKL and of
# oneDNN, weights not in cache, on two cores of an AMD EPYC (AVX-512): 49 rows of 512 by 2048 97, 122; 196 rows of 320
# by 1280 135, 165; 1,568 rows 150, 174; 25,088 rows of 64 by 256 114, 149.
MANY_MULTIPLICATIONS = 2**20
PACKED_FOR_ROWS = 784  # products of any number of rows can use the packed weight


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear(x, weight, bias)``, on the fastest library for this processor.

    Args:
        x: (..., K), any floating dtype.
        weight: (N, K), of x's dtype; under autocast, of any dtype.
        bias: (N,), like ``weight``, or None.

    Returns:
        (..., N). Saves ``x`` and ``weight`` for backward.

    Raises:
        RuntimeError, TypeError: as ``F.linear``, for shapes, dtypes or devices that do not match, or no tensors.
    """
    if not prefers_onednn(x, weight, bias) or is_under_functorch((x, weight, bias)):
        return F.linear(x, weight, bias)
    if is_in_compiled_graph():
        return torch.ops.dfformer.linear(x, weight, bias)
    return (_Product.apply if torch.is_grad_enabled() else by_onednn)(x, weight, bias)


class _Gradient:
    """The gradient of ``linear``, whose inputs are (x, weight, bias)."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        N, K = weight.shape
        rows = grad_y.reshape(-1, N)
        product: Callable[..., Tensor] = torch.ops.dfformer.linear if is_in_compiled_graph() else linear
        if needs_double_backward(grad_y, (x, weight)):
            product = F.linear
        return (
            product(grad_y, weight.t(), None) if need_x else None,
            rows.t() @ x.reshape(-1, K) if need_weight else None,
            rows.sum(0) if need_bias else None,
        )


class _Product(torch.autograd.Function):
    """Eager calls with gradients. The operator takes longer, and a Function with ``setup_context`` (30 us)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return by_onednn(x, weight, bias)

    backward = _Gradient.backward


def by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear(x, weight, bias)`` by oneDNN, without a derivative; ``weight`` may be packed."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if weight.layout == torch.strided and not weight.is_contiguous():
        weight = weight if weight.t().is_contiguous() else weight.contiguous()  # transposed, in the gradient of x
    bias = None if bias is None else bias.contiguous()  # oneDNN would misread any other
    y = torch.ops.mkldnn._linear_pointwise.default(rows, weight, bias, "none", [], "")
    return y.resize_(*x.shape[:-1], len(weight))  # in place: with gradients, a caller could not write to a view


def pack_for_onednn(weight: Tensor) -> Tensor | None:
    """A copy of ``weight`` (N,K) in oneDNN's format, for ``by_onednn``; None where oneDNN has none for its dtype.

    Products of few rows take less time with it: 49 rows of 512 by 2048 231 instead of 193 GFLOP/s (two cores of an
    Intel Xeon).
    """
    if not weight.is_cpu or not HAS_ONEDNN:
        return None
    dtype = weight.dtype
    if dtype != torch.float32 and not (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return None
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACKED_FOR_ROWS)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    refuse_tangents("linear", (x, weight, bias))
    with without_autocast(x.device):
        return (by_onednn if prefers_onednn(x, weight, bias) else F.linear)(x, weight, bias)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(F.linear(x, weight, bias).shape)


# Compiled graphs contain this operator, because Inductor would multiply by MKL.
register("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _linear, _fake)
register_gradient("linear", _Gradient)


def prefers_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether ``linear`` computes these tensors by oneDNN, outside of torch.func's transforms.

    Under torch.compile, which may not know the number of rows, the operator decides about that at every call. A
    dispatch mode sees PyTorch's own operator, which has a derivative and which other tools know.
    """
    if not MKL_IS_SLOW or torch.compiler.is_exporting() or torch.jit.is_tracing():
        return False
    return (
        _is_usual(x)
        and _is_usual(weight)
        and weight.dim() == 2
        and x.dim() > 0
        and x.shape[-1] == weight.shape[1]
        and (bias is None or (_is_usual(bias) and bias.shape == weight.shape[:1]))
        and (is_in_compiled_graph() or (is_large(x, weight) and not is_in_a_dispatch_mode()))
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled("cpu")
    )


def is_large(x: Tensor, weight: Tensor) -> bool:
    """Whether a float32 product has enough work, and is not too thin, for oneDNN's longer call.

    In thin products, oneDNN takes up to twice as long: one row, fewer than 8 outputs, K of 1.
    """
    N, K = weight.shape
    return x.numel() * N >= MANY_MULTIPLICATIONS and x.numel() > K > 1 and N >= 8


def _is_usual(t: Tensor) -> bool:
    if type(t) not in _TENSORS or not t.is_cpu or t.dtype != torch.float32:
        return False
    return torch.compiler.is_compiling() or t.layout == torch.strided  # Dynamo has no layouts in a backward


def mkl_is_slow() -> bool:
    """Whether this is an x86 processor that is not Intel's, and this build of torch has oneDNN's linear layer."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return x86 and HAS_ONEDNN and "GenuineIntel" not in _processor()


def _processor() -> str:
    try:  # Linux; the first processor is enough, and many take long to list
        with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as file:
            return file.read(4096)
    except OSError:
        return platform.processor()


MKL_IS_SLOW = mkl_is_slow()  # once, because Dynamo cannot trace it
