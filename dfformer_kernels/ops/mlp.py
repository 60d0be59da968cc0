"""Pointwise projections, and the MLP around StarReLU, at the best rate the machine has.

On x86 CPUs float32 products are the compiled core's, with StarReLU where they are written; torch's own choice, MKL,
decides by the maker of the processor and has half its rate on an AMD CPU (docs/model_speed.md). Everything else goes
where ``F.linear`` sends it. On a CPU the MLP runs in chunks of rows whose hidden activations stay in cache.
"""

import math
import platform
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import compress
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dfformer_kernels import reference
from dfformer_kernels.backends import cpu
from dfformer_kernels.dispatch import kernel_for, requested_backend, without_autocast
from dfformer_kernels.ops import checks, memory
from dfformer_kernels.ops.filter import differentiate, register

# Hidden activations of an MLP's chunk: less than the caches of two cores, and enough rows for the products to run at
# full rate (docs/model_speed.md).
CHUNK_BYTES = 4 * 2**20

X86 = platform.machine().lower() in ("x86_64", "amd64")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear(x, weight, bias)``, on the compiled core where that is faster.

    Args:
        x: (..., K), any floating dtype. weight: (N, K), bias: (N,), of x's dtype; under autocast, of any.

    Returns:
        (..., N). Saves ``x`` and ``weight`` for backward.
    """
    if for_core(x):
        return torch.ops.dfformer.linear(x, weight, bias, requested_backend(None))
    return F.linear(x, weight, bias)


def mlp(x: Tensor, weight1: Tensor, star_relu: tuple[Tensor, Tensor], weight2: Tensor) -> Tensor:
    """``star_relu(x @ weight1.T) @ weight2.T``, MetaFormer's MLP.

    Args:
        x: (..., K), float32, float64, bfloat16 or float16.
        weight1: (hidden, K), weight2: (N, hidden), of x's dtype; under autocast, of any.
        star_relu: StarReLU's ``(scale, bias)``, one element each.

    Returns:
        (..., N). Saves its arguments and the hidden activations before StarReLU for backward: StarReLU costs less to
        compute again than to keep. Without a backward to come the hidden activations are never in memory as a whole.

    Raises:
        ValueError, TypeError: a bad argument, by name.
    """
    scale, bias = star_relu
    checks.check_tensors("mlp", x=x, weight1=weight1, scale=scale, bias=bias, weight2=weight2)
    if dtype := autocast_dtype(x):
        x, weight1, weight2 = x.to(dtype), weight1.to(dtype), weight2.to(dtype)
    return torch.ops.dfformer.mlp(x, weight1, scale, bias, weight2, requested_backend(None))


def for_core(x: Tensor) -> bool:
    """Whether products with x are the compiled core's where there is one. Elsewhere than on x86 the makers' libraries
    use units of the processor that it does not have."""
    return X86 and x.is_cpu and x.dtype == torch.float32 and not autocast_dtype(x)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast casts the arguments of ``F.linear`` to; None where it leaves them."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(device):
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


# Products


def by_core(x: Tensor, backend: str | None) -> bool:
    """Whether the compiled core multiplies x, here and on this backend."""
    return for_core(x) and kernel_for("star_relu", backend, (x, x, x)) is cpu.star_relu


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str | None) -> Tensor:
    """``x @ weight.T + bias``; x (M, K), weight (N, K) contiguous or transposed."""
    return cpu.product(x, weight, bias) if by_core(x, backend) else F.linear(x, weight, bias)


def _weight_gradient(grad_y: Tensor, x: Tensor, backend: str | None) -> Tensor:
    """``grad_y.T @ x`` (N, K) of grad_y (M, N) and x (M, K)."""
    return cpu.weight_gradient(grad_y, x) if by_core(x, backend) else grad_y.t() @ x


# linear


def rows_of(x: Tensor) -> Tensor:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str | None) -> Tensor:
    checks.check_linear(x, weight, bias)
    y = _product(rows_of(x), weight, bias, backend)
    return y.view(*x.shape[:-1], weight.shape[0])


def _linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str | None) -> Tensor:
    checks.check_linear(x, weight, bias)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _linear_backward(grad_y: Tensor, x: Tensor, weight: Tensor, needs: list[bool], backend: str | None) -> list[Tensor]:
    checks.check_linear_backward(grad_y, x, weight, needs)
    need_x, need_weight, need_bias = needs
    grad_y, rows = rows_of(grad_y), rows_of(x)
    gradients = [_product(grad_y, weight.t(), None, backend).view(x.shape)] if need_x else []
    if need_weight:
        gradients.append(_weight_gradient(grad_y, rows, backend))
    if need_bias:
        gradients.append(grad_y.sum(0))
    return gradients


def _linear_backward_fake(
    grad_y: Tensor, x: Tensor, weight: Tensor, needs: list[bool], backend: str | None
) -> list[Tensor]:
    checks.check_linear_backward(grad_y, x, weight, needs)
    return [x.new_empty(shape) for shape in compress((x.shape, weight.shape, weight.shape[:1]), needs)]


class LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        ctx.save_for_backward(*args[:2])
        ctx.backend = args[-1]
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return torch.ops.dfformer.linear(*args)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:-1])
        if torch.is_grad_enabled():  # somebody will differentiate these gradients
            rows = rows_of(grad_y)
            all_of_them = (grad_y @ weight, rows.t() @ rows_of(x), rows.sum(0))
            gradients = compress(all_of_them, needs)
        else:
            gradients = iter(torch.ops.dfformer.linear_backward(grad_y, x, weight, needs, ctx.backend))
        return (*(next(gradients) if need else None for need in needs), None)


# mlp


def _mlp(
    x: Tensor, weight1: Tensor, scale: Tensor, bias: Tensor, weight2: Tensor, backend: str | None, keep: bool = False
) -> tuple[Tensor, Tensor]:
    """The MLP of x (..., K), and, if they are to be kept, the hidden activations before StarReLU, as rows."""
    checks.check_mlp(x, weight1, scale, bias, weight2)
    if keep and x.is_cpu:
        memory.keep_freed()
    y, hidden = _mlp_of_rows(rows_of(x), weight1, scale, bias, weight2, backend, keep)
    return y.view(*x.shape[:-1], weight2.shape[0]), hidden


def _mlp_of_rows(
    x: Tensor, weight1: Tensor, scale: Tensor, bias: Tensor, weight2: Tensor, backend: str | None, keep: bool
) -> tuple[Tensor, Tensor]:
    if by_core(x, backend):
        return cpu.mlp(x, weight1, scale, bias, weight2, keep=keep)
    if not x.is_cpu:  # all rows at once, and nothing in place
        h = F.linear(x, weight1)
        return F.linear(star_relu_(h, scale, bias, backend), weight2), h if keep else h.new_empty(0, h.shape[1])
    x = x.contiguous()
    y = cpu.empty((x.shape[0], weight2.shape[0]), x)
    hidden = cpu.empty((x.shape[0] if keep else 0, weight1.shape[0]), x)
    for rows in chunks(x, weight1.shape[0]):
        h = F.linear(x[rows], weight1)
        if keep:
            hidden[rows] = h
        y[rows] = F.linear(star_relu_(h, scale, bias, backend), weight2)
    return y, hidden


def _mlp_fake(
    x: Tensor, weight1: Tensor, scale: Tensor, bias: Tensor, weight2: Tensor, backend: str | None, keep: bool = False
) -> tuple[Tensor, Tensor]:
    checks.check_mlp(x, weight1, scale, bias, weight2)
    *batch, _ = x.shape
    return x.new_empty((*batch, weight2.shape[0])), x.new_empty((math.prod(batch) if keep else 0, weight1.shape[0]))


def _mlp_backward(
    grad_y: Tensor,
    hidden: Tensor,
    x: Tensor,
    weight1: Tensor,
    scale: Tensor,
    bias: Tensor,
    weight2: Tensor,
    needs: list[bool],
    backend: str | None,
) -> list[Tensor]:
    checks.check_mlp_backward(grad_y, hidden, x, weight1, scale, bias, weight2, needs)
    shape, grad_y, x, hidden = x.shape, rows_of(grad_y).contiguous(), rows_of(x).contiguous(), hidden.contiguous()
    need_x, need_weight1, need_scale, need_bias, need_weight2 = needs
    need_h = need_x or need_weight1
    in_parts = x.is_cpu
    grad_x = cpu.empty(x.shape if need_x and in_parts else (0,), x)
    sums = [_Sum(t) for t in (weight1, scale, bias, weight2)]
    sum_weight1, *sum_scalars, sum_weight2 = sums
    for rows in chunks(x, weight1.shape[0]):
        h, gy = hidden[rows], grad_y[rows]
        if need_weight2:
            activated = kernel_for("star_relu", backend, (h, scale, bias))(h, scale, bias)
            sum_weight2 += _weight_gradient(gy, activated, backend)
        if not (need_h or need_scale or need_bias):
            continue
        wanted = [need_h, need_scale, need_bias]
        grads = _star_relu_backward_(_product(gy, weight2.t(), None, backend), h, scale, bias, wanted, backend)
        for total, grad in zip(compress(sum_scalars, wanted[1:]), grads[need_h:], strict=True):
            total += grad
        if need_weight1:
            sum_weight1 += _weight_gradient(grads[0], x[rows], backend)
        if need_x and in_parts:
            grad_x[rows] = _product(grads[0], weight1.t(), None, backend)
        elif need_x:
            grad_x = _product(grads[0], weight1.t(), None, backend)
    gradients = [total.value() for total in compress(sums, needs[1:])]
    return [grad_x.view(shape), *gradients] if need_x else gradients


def _mlp_backward_fake(grad_y: Tensor, hidden: Tensor, *args: Any) -> list[Tensor]:
    *tensors, needs, _ = args
    checks.check_mlp_backward(grad_y, hidden, *args[:-1])
    return [t.new_empty(t.shape) for t in compress(tensors, needs)]


def star_relu_(h: Tensor, scale: Tensor, bias: Tensor, backend: str | None = None) -> Tensor:
    """StarReLU, on a CPU in h's place: half the memory for the caches to hold."""
    kernel = kernel_for("star_relu", backend, (h, scale, bias))
    return kernel(h, scale, bias, out=h) if kernel is cpu.star_relu else kernel(h, scale, bias)


def _star_relu_backward_(
    grad_y: Tensor, h: Tensor, scale: Tensor, bias: Tensor, needs: list[bool], backend: str | None
) -> list[Tensor]:
    """StarReLU's gradients, on a CPU that of h in grad_y's place."""
    kernel = kernel_for("star_relu_backward", backend, (h, scale, bias))
    out = {"out": grad_y} if kernel is cpu.star_relu_backward else {}
    return kernel(grad_y, h, scale, bias, needs, **out)


class _Sum:
    """A gradient, summed over chunks in their order; that of a narrow dtype in float32."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._sum: Tensor | None = None

    def __iadd__(self, term: Tensor) -> "_Sum":
        if self._sum is None:
            self._sum = term.to(reference.compute_dtype(term.dtype))
        else:
            self._sum += term
        return self

    def value(self) -> Tensor:
        return torch.zeros_like(self._like) if self._sum is None else self._sum.to(self._like.dtype)


def chunks(x: Tensor, hidden: int) -> Iterator[slice]:
    """Rows of x (M, K) to run an MLP with so many hidden channels on at a time: about equally many, all of them on
    other devices than a CPU."""
    M = x.shape[0]
    if not x.is_cpu:
        return iter([slice(0, M)])
    count = max(-(-M * hidden * x.itemsize // CHUNK_BYTES), 1)
    size = max(-(-M // count), 1)
    return (slice(start, min(start + size, M)) for start in range(0, M, size))


class MlpFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *tensors, ctx.backend = args
        with torch._C._AutoDispatchBelowADInplaceOrView():
            y, hidden = torch.ops.dfformer.mlp_keeping_hidden(*args)
        ctx.save_for_backward(*tensors, hidden)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, hidden = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:-1])
        if torch.is_grad_enabled():  # somebody will differentiate these gradients
            gradients = iter(_mlp_differentiable_backward(grad_y, tensors, needs))
        else:
            gradients = iter(torch.ops.dfformer.mlp_backward(grad_y, hidden, *tensors, needs, ctx.backend))
        return (*(next(gradients) if need else None for need in needs), None)


def _mlp_differentiable_backward(grad_y: Tensor, tensors: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor]:
    x, weight1, scale, bias, weight2 = tensors
    need_x, need_weight1, need_scale, need_bias, need_weight2 = needs
    shape, grad_y, x = x.shape, rows_of(grad_y), rows_of(x)
    h = x @ weight1.t()
    wanted = (need_x or need_weight1, need_scale, need_bias)
    grads = iter(reference.star_relu_backward(grad_y @ weight2, h, scale, bias, wanted))
    grad_h = next(grads) if wanted[0] else h
    gradients = [(grad_h @ weight1).view(shape)] if need_x else []
    if need_weight1:
        gradients.append(grad_h.t() @ x)
    gradients += grads
    if need_weight2:
        gradients.append(grad_y.t() @ reference.star_relu(h, scale, bias))
    return gradients


_MLP = "Tensor x, Tensor weight1, Tensor scale, Tensor bias, Tensor weight2"


def _register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    def in_the_dtypes_given(*args: Any) -> Any:
        with without_autocast(args[0].device):
            return implementation(*args)

    register(schema, in_the_dtypes_given, fake)


_register("linear(Tensor x, Tensor weight, Tensor? bias, str? backend) -> Tensor", _linear, _linear_fake)
_register(
    "linear_backward(Tensor grad_y, Tensor x, Tensor weight, bool[] needs, str? backend) -> Tensor[]",
    _linear_backward,
    _linear_backward_fake,
)
differentiate("linear", LinearFunction)

_register(f"mlp({_MLP}, str? backend) -> Tensor", lambda *args: _mlp(*args)[0], lambda *args: _mlp_fake(*args)[0])
_register(
    f"mlp_keeping_hidden({_MLP}, str? backend) -> (Tensor, Tensor)",
    partial(_mlp, keep=True),
    partial(_mlp_fake, keep=True),
)
_register(
    f"mlp_backward(Tensor grad_y, Tensor hidden, {_MLP}, bool[] needs, str? backend) -> Tensor[]",
    _mlp_backward,
    _mlp_backward_fake,
)
differentiate("mlp", MlpFunction)
