"""The operators: public functions, custom ops, fakes and autograd, each defined once for all backends.

Every operator maps ``x`` (and its parameters) to a ``y`` of x's shape and dtype, and its backward maps
``(grad_y, inputs, needs)`` to the gradients that ``needs`` asks for, so one function (`_define`) registers them all:

- ``torch.ops.dfformer.<name>`` and ``<name>_backward``: opaque to torch.compile and torch.export, with fakes;
- a ``torch.autograd.Function`` whose methods are also the custom op's autograd formula;
- autocast: the dtypes of the arguments decide, arithmetic is float32 (float64 for float64 x) whatever autocast says.

Saved for backward: the inputs and nothing else. Second derivatives, forward-mode derivatives and torch.func's
transforms go through the reference expression, on any backend.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dfformer_kernels import reference
from dfformer_kernels.dispatch import kernel_for, requested_backend, without_autocast
from dfformer_kernels.ops import checks
from dfformer_kernels.ops.registration import (
    differentiate,
    is_differentiated,
    is_transformed,
    refuse_tangents,
    register,
)


def star_relu(x: Tensor, scale: Tensor, bias: Tensor, *, backend: str | None = None) -> Tensor:
    """StarReLU, ``scale * relu(x)^2 + bias`` (MetaFormer Baselines for Vision, arXiv:2210.13452).

    Args:
        x: any shape; float32, float64, bfloat16 or float16.
        scale, bias: one element each, of any of these dtypes (float64 only with float64 ``x``).
        backend: a name from ``backends()``; see ``dfformer_kernels.dispatch`` for what decides when it is None.

    Returns:
        A contiguous tensor of x's shape and dtype. Only the three arguments are saved for backward.

    Raises:
        ValueError, TypeError: a bad argument, by name. RuntimeError: the requested backend cannot run this.
    """
    checks.check_tensors("star_relu", x=x, scale=scale, bias=bias)
    return _call("star_relu", backend, x, scale, bias)


def dynamic_filter(
    x: Tensor,
    logits: Tensor,
    basis: Tensor,
    star_relu: tuple[Tensor, Tensor] | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """The dynamic filter step ``irfft2(rfft2(u) * (softmax(logits) @ basis))`` ("FFT-based Dynamic Token Mixer for
    Vision", section 3.2), with ``u = star_relu(x)`` where ``star_relu`` is given and ``u = x`` where not.

    Args:
        x: (B,H,W,C), any strides; float32, float64, bfloat16 or float16.
        logits: (B,F,C), routing before the softmax over F >= 1 filters; any of these dtypes (float64 only with
            float64 ``x``).
        basis: (H,K,F,2) or complex (H,K,F), K = W//2 + 1; float32, or float64 with float64 ``x``.
        star_relu: StarReLU's ``(scale, bias)``, one element each, applied to ``x`` on load.
        backend: a name from ``backends()``; see ``dfformer_kernels.dispatch`` for what decides when it is None.

    Returns:
        A contiguous (B,H,W,C) tensor of x's dtype. Transforms are orthonormal; arithmetic is float32 (float64 for
        float64 ``x``). Only the arguments are saved for backward. Gradients are the same bits from run to run.

    Raises:
        ValueError, TypeError: a bad argument, by name. RuntimeError: the requested backend cannot run this.
    """
    checks.check_tensors("dynamic_filter", x=x, logits=logits, basis=basis)
    scale, bias = _scalars("dynamic_filter", star_relu)
    return _call("dynamic_filter", backend, x, logits, _real(basis), scale, bias)


def global_filter(
    x: Tensor, weight: Tensor, star_relu: tuple[Tensor, Tensor] | None = None, *, backend: str | None = None
) -> Tensor:
    """The global filter step ``irfft2(rfft2(u) * weight)`` (GFNet, arXiv:2107.00645), ``u`` as for `dynamic_filter`.

    Args:
        x: (B,H,W,C), any strides; float32, float64, bfloat16 or float16.
        weight: (H,K,C,2) or complex (H,K,C), K = W//2 + 1; float32, or float64 with float64 ``x``.
        star_relu: StarReLU's ``(scale, bias)``, one element each, applied to ``x`` on load.
        backend: a name from ``backends()``; see ``dfformer_kernels.dispatch`` for what decides when it is None.

    Returns:
        A contiguous (B,H,W,C) tensor of x's dtype.

    Raises:
        ValueError, TypeError: a bad argument, by name. RuntimeError: the requested backend cannot run this.
    """
    checks.check_tensors("global_filter", x=x, weight=weight)
    scale, bias = _scalars("global_filter", star_relu)
    return _call("global_filter", backend, x, _real(weight), scale, bias)


def _scalars(op: str, star_relu: tuple[Tensor, Tensor] | None) -> tuple[Tensor | None, Tensor | None]:
    if star_relu is None:
        return None, None
    if not isinstance(star_relu, tuple | list) or len(star_relu) != 2:
        raise TypeError(f"{op}: star_relu must be None or a pair (scale, bias) of tensors, got {star_relu!r}")
    scale, bias = star_relu
    checks.check_tensors(op, **{name: t for name, t in (("scale", scale), ("bias", bias)) if t is not None})
    return scale, bias


def _real(filters: Tensor) -> Tensor:
    return torch.view_as_real(filters.resolve_conj()) if filters.is_complex() else filters


def _call(name: str, backend: str | None, *tensors: Tensor | None) -> Tensor:
    backend = requested_backend(backend)
    if is_transformed(tensors):
        CHECKS[name](*tensors)
        with without_autocast(tensors[0].device):  # type: ignore[union-attr] # x is there
            return getattr(reference, name)(*tensors)
    return getattr(torch.ops.dfformer, name)(*tensors, backend)


CHECKS: dict[str, Callable[..., None]] = {
    "star_relu": checks.check_star_relu,
    "dynamic_filter": checks.check_dynamic_filter,
    "global_filter": checks.check_global_filter,
}


def _define(name: str, inputs: str) -> type[Any]:
    """Registers ``dfformer::<name>`` and ``dfformer::<name>_backward`` and returns their autograd Function, whose
    ``apply`` takes the inputs in that order and the backend's name or None.

    ``inputs`` is the schema of the tensor arguments, ``x`` first.
    """
    backward_name = f"{name}_backward"
    check = CHECKS[name]

    def forward_impl(*args: Any) -> Tensor:
        *tensors, backend = args
        check(*tensors)
        refuse_tangents(name, tensors)
        kernel = kernel_for(name, backend, tensors)
        if tensors[0].numel() == 0:
            return forward_fake(*args)
        with without_autocast(tensors[0].device):
            return kernel(*tensors).contiguous()

    def forward_fake(*args: Any) -> Tensor:
        *tensors, _ = args
        check(*tensors)
        return torch.empty_like(tensors[0], memory_format=torch.contiguous_format)

    def backward_impl(*args: Any) -> list[Tensor]:
        grad_y, *tensors, needs, backend = args
        check_backward(grad_y, tensors, needs)
        refuse_tangents(backward_name, (grad_y, *tensors))
        kernel = kernel_for(backward_name, backend, tensors)
        if tensors[0].numel() == 0:
            return [gradient.zero_() for gradient in backward_fake(*args)]
        with without_autocast(tensors[0].device):
            return [gradient.contiguous() for gradient in kernel(grad_y, *tensors, needs)]

    def backward_fake(*args: Any) -> list[Tensor]:
        grad_y, *tensors, needs, _ = args
        check_backward(grad_y, tensors, needs)
        contiguous = torch.contiguous_format
        return [torch.empty_like(t, memory_format=contiguous) for t, need in zip(tensors, needs, strict=True) if need]

    def check_backward(grad_y: Tensor, tensors: list[Tensor], needs: list[bool]) -> None:
        check(*tensors)
        checks.check_grad_y(backward_name, grad_y, tensors[0])
        checks.check_needs(backward_name, needs, len(tensors))

    register(f"{name}({inputs}, str? backend) -> Tensor", forward_impl, forward_fake)
    backward_schema = f"{backward_name}(Tensor grad_y, {inputs}, bool[] needs, str? backend) -> Tensor[]"
    register(backward_schema, backward_impl, backward_fake)
    function = _autograd_function(name)
    differentiate(name, function)
    return function


def _autograd_function(name: str) -> type[Any]:
    forward_op = getattr(torch.ops.dfformer, name)
    backward_op = getattr(torch.ops.dfformer, f"{name}_backward")
    differentiable_backward = getattr(reference, f"{name}_backward")

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Tensor:
            return forward_op(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            *tensors, ctx.backend = inputs
            ctx.save_for_backward(*tensors)

        @staticmethod
        def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
            tensors = ctx.saved_tensors
            needs = list(ctx.needs_input_grad[: len(tensors)])
            if is_differentiated(grad_y, tensors):
                with without_autocast(grad_y.device):
                    gradients: Sequence[Tensor] = differentiable_backward(grad_y, *tensors, needs)
            else:
                gradients = backward_op(grad_y, *tensors, needs, ctx.backend)
            remaining = iter(gradients)
            return (*(next(remaining) if need else None for need in needs), None)

    return Function


StarReLUFunction = _define("star_relu", "Tensor x, Tensor scale, Tensor bias")
DynamicFilterFunction = _define("dynamic_filter", "Tensor x, Tensor logits, Tensor basis, Tensor? scale, Tensor? bias")
GlobalFilterFunction = _define("global_filter", "Tensor x, Tensor weight, Tensor? scale, Tensor? bias")
