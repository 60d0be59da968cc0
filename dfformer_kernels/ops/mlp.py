"""MetaFormer's MLP as one autograd Function that saves less than its three layers would."""

import math
from collections.abc import Callable, Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from dfformer_kernels.dispatch import requested_backend
from dfformer_kernels.ops import checks
from dfformer_kernels.ops.filter import star_relu as apply_star_relu
from dfformer_kernels.ops.linear import linear
from dfformer_kernels.ops.registration import is_under_functorch, needs_double_backward

# Without gradients, the CPU computes this much of the hidden activations at a time, so that they stay in a cache.
# DFFormer-S18 on 8 images of 224x224, two cores of an AMD EPYC: 395 ms with 1 MiB, 376 with 4, 370 with 8, 377 with 16,
# 384 without chunks; on one of 1024x1024 1142 with 8, 1213 without.
CHUNK_BYTES = 8 * 2**20

# Evaluated at import, because some supported versions of Dynamo cannot trace `is_autocast_available`.
_AUTOCAST_DEVICES = frozenset(d for d in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(d))


def mlp(
    x: Tensor, weight1: Tensor, star_relu: tuple[Tensor, Tensor], weight2: Tensor, *, backend: str | None = None
) -> Tensor:
    """``star_relu(x @ weight1.T) @ weight2.T``, MetaFormer's MLP.

    Args:
        x: (..., K), float32, float64, bfloat16 or float16.
        weight1: (hidden, K), of x's dtype; under autocast, of any dtype.
        weight2: (N, hidden), like ``weight1``.
        star_relu: StarReLU's ``(scale, bias)``, one element each.
        backend: of StarReLU, see `dfformer_kernels.star_relu`; the products are PyTorch's.

    Returns:
        (..., N). For backward it saves the arguments and the hidden activations before StarReLU, because StarReLU is
        cheaper to recompute than to store. On a CPU without gradients, hidden activations are computed and discarded a
        few rows at a time.

    Raises:
        ValueError, TypeError: a bad argument, by name. RuntimeError: the requested backend cannot run StarReLU here.
    """
    if not torch.compiler.is_compiling():  # there, StarReLU's own functions ask
        backend = requested_backend(backend)
    checks.check_pair("mlp", star_relu)
    scale, bias = star_relu
    checks.check_tensors("mlp", x=x, weight1=weight1, scale=scale, bias=bias, weight2=weight2)
    if dtype := autocast_dtype(x):
        x, weight1, weight2 = x.to(dtype), weight1.to(dtype), weight2.to(dtype)
    tensors = (x, weight1, scale, bias, weight2)
    checks.check_mlp(*tensors)
    if is_under_functorch(tensors):
        return _layers(*tensors, backend)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return MlpFunction.apply(*tensors, backend)
    if not x.is_cpu or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return _layers(*tensors, backend)
    return in_chunks(x, len(weight1), len(weight2), lambda rows: _layers(rows, *tensors[1:], backend))


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast would cast the arguments of ``F.linear`` to; None if it would not cast them."""
    device = x.device.type
    if x.dtype == torch.float64 or device not in _AUTOCAST_DEVICES or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def in_chunks(x: Tensor, hidden: int, N: int, layers: Callable[[Tensor], Tensor]) -> Tensor:
    """``layers(x)`` (...,N) of x (...,K), without gradients, with at most CHUNK_BYTES of hidden activations at a time.

    A row of x has ``hidden`` of them. The chunks are about equally long.
    """
    rows = _rows(x)
    count = -(-len(rows) * hidden * x.itemsize // CHUNK_BYTES)
    if count <= 1:
        return layers(x)
    y = x.new_empty(*x.shape[:-1], N)
    size = -(-len(rows) // count)
    for part, of_y in zip(rows.split(size), _rows(y).split(size), strict=True):
        of_y.copy_(layers(part))
    return y


class MlpFunction(torch.autograd.Function):
    """``mlp`` of checked tensors (x, weight1, scale, bias, weight2), with StarReLU's backend."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight1: Tensor, scale: Tensor, bias: Tensor, weight2: Tensor, backend: str | None
    ) -> Tensor:
        hidden = linear(x, weight1)
        ctx.save_for_backward(x, weight1, scale, bias, weight2, hidden)
        ctx.backend = backend
        return linear(apply_star_relu(hidden, scale, bias, backend=backend), weight2)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, hidden = ctx.saved_tensors
        needs = ctx.needs_input_grad[:5]
        if needs_double_backward(grad_y, tensors):
            again = torch.is_grad_enabled()
            with torch.enable_grad():
                wanted = list(compress(tensors, needs))
                y = _layers(*tensors, ctx.backend)  # type: ignore[call-arg] # saved_tensors has any length
                gradients = iter(torch.autograd.grad(y, wanted, grad_y, create_graph=again))
            return (*(next(gradients) if need else None for need in needs), None)
        return (*_gradients(grad_y, hidden, tensors, needs, ctx.backend), None)


def _layers(x: Tensor, weight1: Tensor, scale: Tensor, bias: Tensor, weight2: Tensor, backend: str | None) -> Tensor:
    return linear(apply_star_relu(linear(x, weight1), scale, bias, overwrite_x=True, backend=backend), weight2)


def _gradients(
    grad_y: Tensor, hidden: Tensor, tensors: Sequence[Tensor], needs: Sequence[bool], backend: str | None
) -> tuple[Tensor | None, ...]:
    """The gradients of ``tensors`` (x, weight1, scale, bias, weight2); None where one is not needed."""
    x, weight1, scale, bias, weight2 = tensors
    need_x, need_weight1, need_scale, need_bias, need_weight2 = needs
    grad_y, hidden = _rows(grad_y), _rows(hidden)
    requested = requested_backend(backend) if torch.compiler.is_compiling() else backend
    grad_x = grad_weight1 = grad_scale = grad_bias = grad_weight2 = None
    if need_weight2:
        grad_weight2 = grad_y.t() @ apply_star_relu(hidden, scale, bias, backend=backend)
    parts = [need_x or need_weight1, need_scale, need_bias]
    if any(parts):
        gradients = torch.ops.dfformer.star_relu_backward(
            linear(grad_y, weight2.t()), hidden, scale, bias, parts, requested
        )
        if parts[0]:
            grad_hidden, *gradients = gradients
            grad_x = linear(grad_hidden, weight1.t()).view(x.shape) if need_x else None
            grad_weight1 = grad_hidden.t() @ _rows(x) if need_weight1 else None
        remaining = iter(gradients)
        grad_scale, grad_bias = (next(remaining) if need else None for need in parts[1:])
    return grad_x, grad_weight1, grad_scale, grad_bias, grad_weight2


def _rows(t: Tensor) -> Tensor:
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])
