"""Linear layers through the library that is fast on this processor.

PyTorch's x86 builds compute float32 matrix products with MKL, which is slower than oneDNN on processors that are not
Intel's. PyTorch's public way to oneDNN is a 1x1 convolution of a channels-last view. On such a processor, a forward of
many rows is therefore that convolution, and so are gradients of very many. All other products are PyTorch's own.
"""

import platform
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

from dfformer_kernels.ops.registration import (
    is_in_compiled_graph,
    is_under_functorch,
    needs_double_backward,
    refuse_tangents,
    register,
    register_gradient,
    without_autocast,
)

_TENSORS = (Tensor, nn.Parameter)
# From this number of rows the convolution is faster, although it reorders the weight at every call. GFLOP/s of MKL and
# of the convolution, on two cores of an AMD EPYC (AVX-512): 49 rows 100, 60; 196 rows 145, 170; 784 rows 170, 173; 6272
# rows 157, 196.
MANY_ROWS = 128
# The same for gradients, whose weight is transposed as well. GFLOP/s of MKL and of oneDNN on two such cores, for x and
# for the weight: (512, 2048) with 1568 rows 181, 185 and 174, 130; (128, 512) with 6272 rows 172, 183 and 147, 178;
# (64, 256) with 25088 rows 147, 179 and 118, 153.
MANY_ROWS_BACKWARD = 4096


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
    broadcast = bias is not None and bias.shape != weight.shape[:1]  # F.linear accepts this, a convolution does not
    if broadcast or not prefers_convolution(x, weight) or is_under_functorch((x, weight, bias)):
        return F.linear(x, weight, bias)
    if is_in_compiled_graph():
        return torch.ops.dfformer.linear(x, weight, bias)
    return (_Convolution.apply if torch.is_grad_enabled() else _convolution)(x, weight, bias)


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
        many = has_many_gradient_rows(rows, weight) and not needs_double_backward(grad_y, (x, weight))
        return (
            grad_input(rows, weight, many).reshape(x.shape) if need_x else None,
            grad_weight(rows, x.reshape(-1, K), many) if need_weight else None,
            rows.sum(0) if need_bias else None,
        )


def grad_input(grad_y: Tensor, weight: Tensor, many: bool) -> Tensor:
    """``grad_y @ weight`` (M,K) of grad_y (M,N); ``many`` is `has_many_gradient_rows`.

    oneDNN's own gradient of a convolution for its input runs at a sixth of the rate of this forward.
    """
    return _convolution(grad_y, weight.t().contiguous(), None) if many else grad_y @ weight


def grad_weight(grad_y: Tensor, x: Tensor, many: bool) -> Tensor:
    """``grad_y.T @ x`` (N,K) of grad_y (M,N) and x (M,K); ``many`` is `has_many_gradient_rows`."""
    if not many:
        return grad_y.t() @ x
    return conv2d_weight(_image(x), (grad_y.shape[1], x.shape[1], 1, 1), _image(grad_y)).flatten(1)


class _Convolution(torch.autograd.Function):
    """Eager calls with gradients. The operator takes longer, and a Function with ``setup_context`` (30 us)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _convolution(x, weight, bias)

    backward = _Gradient.backward


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = F.conv2d(_image(x), weight[:, :, None, None], bias)  # (1,N,M,1)
    shape = (*x.shape[:-1], weight.shape[0])
    strides = [*accumulate(reversed(shape[1:]), mul, initial=1)][::-1]
    # Reshaped in place: with gradients, a caller could not write to a result that is a view.
    return y.contiguous(memory_format=torch.channels_last).as_strided_(shape, strides)


def _image(x: Tensor) -> Tensor:
    """``x`` (..., K) as (1,K,M,1), channels-last."""
    return x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    refuse_tangents("linear", (x, weight, bias))
    with without_autocast(x.device):
        return (_convolution if has_many_rows(x) else F.linear)(x, weight, bias)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(F.linear(x, weight, bias).shape)


# Compiled graphs contain this operator, because Inductor would multiply by MKL.
register("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _linear, _fake)
register_gradient("linear", _Gradient)


def prefers_convolution(x: Tensor, weight: Tensor) -> bool:
    """Whether ``linear`` computes these tensors as a convolution in oneDNN, outside of torch.func's transforms.

    Under torch.compile, which may not know the number of rows, the operator decides this last point at every call.
    """
    if not MKL_IS_SLOW or torch.compiler.is_exporting() or torch.jit.is_tracing():
        return False
    return (
        type(x) in _TENSORS
        and type(weight) in _TENSORS
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.layout == weight.layout == torch.strided
        and weight.dim() == 2
        and x.dim() > 0
        and x.shape[-1] == weight.shape[1] > 0
        and weight.shape[0] > 0
        and (is_in_compiled_graph() or has_many_rows(x))
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled("cpu")
    )


def has_many_rows(x: Tensor) -> bool:
    """Whether x (..., K) has so many rows that a convolution is faster than MKL."""
    return x.numel() >= MANY_ROWS * x.shape[-1]


def has_many_gradient_rows(grad_y: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN computes the gradients of ``linear`` for grad_y (M,N) and weight (N,K), and not MKL."""
    if torch.compiler.is_compiling() or len(grad_y) < MANY_ROWS_BACKWARD:
        return False
    return prefers_convolution(grad_y, weight.t())


def mkl_is_slow() -> bool:
    """Whether this is an x86 processor that is not Intel's, and this build of torch has oneDNN."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return x86 and torch.backends.mkldnn.is_available() and "GenuineIntel" not in _processor()


def _processor() -> str:
    try:  # Linux; the first processor is enough, and many take long to list
        with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as file:
            return file.read(4096)
    except OSError:
        return platform.processor()


MKL_IS_SLOW = mkl_is_slow()  # once, because Dynamo cannot trace it
