"""The filter step's operators and StarReLU: public functions, custom ops, fakes and autograd.

Every operator maps ``x`` (and its parameters) to a ``y`` of x's shape, dtype and memory format. Its backward maps
``(grad_y, inputs, needs)`` to the needed gradients. So one function (`_define`) registers them all:

- ``torch.ops.dfformer.<name>`` and ``<name>_backward``: opaque to torch.compile and torch.export, with fakes;
- a ``torch.autograd.Function`` whose methods are also the custom op's autograd formula;
- autocast has no effect: the dtypes of the arguments decide, and arithmetic is float32 (float64 for float64 ``x``).

Only the inputs are saved for backward. Second derivatives, forward-mode derivatives and torch.func's transforms
evaluate the reference expression, on every backend.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dfformer_kernels import dft_matmul, reference
from dfformer_kernels.dispatch import is_named, kernel_for, overwriting_kernel, requested_backend
from dfformer_kernels.ops import checks
from dfformer_kernels.ops.registration import (
    is_in_a_mode,
    is_in_compiled_graph,
    is_under_functorch,
    needs_double_backward,
    refuse_tangents,
    register,
    register_gradient,
    without_autocast,
)
from dfformer_kernels.problem import empty_like, in_format, is_channels_first


def star_relu(
    x: Tensor, scale: Tensor, bias: Tensor, *, overwrite_x: bool = False, backend: str | None = None
) -> Tensor:
    """StarReLU, ``scale * relu(x)^2 + bias`` (MetaFormer Baselines for Vision, arXiv:2210.13452).

    Args:
        x: any shape; float32, float64, bfloat16 or float16.
        scale, bias: one element each, of any of these dtypes (float64 only with float64 ``x``).
        overwrite_x: see `dynamic_filter`.
        backend: a name from ``backends()``; if None, ``dfformer_kernels.dispatch`` describes how one is chosen.

    Returns:
        A tensor of x's shape and dtype, contiguous or, like x, in torch.channels_last. Only the three arguments are
        saved for backward.

    Raises:
        ValueError, TypeError: a bad argument, by name. RuntimeError: the requested backend cannot run this.
    """
    checks.check_tensors("star_relu", x=x, scale=scale, bias=bias)
    if is_in_compiled_graph() and not is_named(backend):
        # Inductor merges the expression with its neighbours, and writes the result over x if nothing else reads x.
        checks.check_star_relu(x, scale, bias)
        y = reference.star_relu(x, scale, bias)
        return y if is_channels_first(x) else y.contiguous()
    return _run("star_relu", backend, x, scale, bias, overwrite_x=overwrite_x)


def dynamic_filter(
    x: Tensor,
    logits: Tensor,
    basis: Tensor,
    star_relu: tuple[Tensor, Tensor] | None = None,
    *,
    normalization: str | None = "softmax",
    data_format: str = "channels_last",
    overwrite_x: bool = False,
    backend: str | None = None,
) -> Tensor:
    """The dynamic filter step ``irfft2(rfft2(u) * (softmax(logits) @ basis))``.

    It is section 3.2 of "FFT-based Dynamic Token Mixer for Vision". ``u = star_relu(x)`` if ``star_relu`` is given,
    otherwise ``u = x``.

    Args:
        x: (B,H,W,C), or (B,C,H,W) with ``data_format="channels_first"``; any strides; float32, float64, bfloat16 or
            float16.
        logits: (B,F,C), the routing logits for F >= 1 filters; any of these dtypes (float64 only with float64 ``x``).
        basis: (H,K,F,2), complex (H,K,F) or real (H,K,F), with K = W//2 + 1; float32, or float64 with float64 ``x``.
            With G groups of channels (G,H,K,F,2) or complex (G,H,K,F): the first C/G channels use the first basis.
            Groups are computed as one basis of G F filters.
        star_relu: StarReLU's ``(scale, bias)``, one element each, applied to ``x`` as it is read.
        normalization: ``"softmax"``, or None if ``logits`` already are the routing weights, e.g. after a tanh or a
            sigmoid.
        data_format: ``"channels_last"`` or ``"channels_first"``, of ``x`` and the result. No backend copies an ``x``
            that is contiguous in either format: the CPU core and ``cufft`` read and write both. ``torch.channels_last``
            memory counts as channels-last.
        overwrite_x: the result may take the memory of ``x``, whose contents are then lost, as in scipy.fft. It does so
            on a CPU, if no gradient is recorded, no mode of torch sees the call, and ``x`` is contiguous in one of the
            two formats and shares no memory with the other arguments.
        backend: a name from ``backends()``; if None, ``dfformer_kernels.dispatch`` describes how one is chosen.

    Returns:
        A tensor of x's shape and dtype. It has x's memory format if x is contiguous in one of the two. Transforms
        are orthonormal; arithmetic is float32 (float64 for float64 ``x``). Only the arguments are saved for backward.
        Gradients are bitwise the same from run to run.

    Raises:
        ValueError, TypeError: a bad argument, by name. RuntimeError: the requested backend cannot run this.
    """
    op = "dynamic_filter"
    checks.check_tensors(op, x=x, logits=logits, basis=basis)
    checks.check_choice(op, "normalization", normalization, ("softmax", None))
    softmax = normalization is not None
    basis = dft_matmul.as_pairs(basis)
    if basis.dim() == 3 and basis.shape[2:] == logits.shape[1:2]:  # real-valued
        basis = torch.stack((basis, torch.zeros_like(basis)), -1)
    if basis.dim() == 5:
        logits, basis = _ungrouped(logits, basis, -torch.inf if softmax else 0.0)
    options = () if softmax else (softmax,)
    parameters = (logits, basis, *_scalars(op, star_relu))
    return _in_either_format(
        op, data_format, x, lambda x: _run(op, backend, x, *parameters, options=options, overwrite_x=overwrite_x)
    )


def global_filter(
    x: Tensor,
    weight: Tensor,
    star_relu: tuple[Tensor, Tensor] | None = None,
    *,
    data_format: str = "channels_last",
    overwrite_x: bool = False,
    backend: str | None = None,
) -> Tensor:
    """The global filter step ``irfft2(rfft2(u) * weight)`` (GFNet, arXiv:2107.00645); ``u`` as in `dynamic_filter`.

    Args:
        x: (B,H,W,C), or (B,C,H,W) with ``data_format="channels_first"``; any strides; float32, float64, bfloat16 or
            float16.
        weight: (H,K,C,2) or complex (H,K,C), with K = W//2 + 1; or one weight for each sample, (B,H,K,C,2) or complex
            (B,H,K,C); float32, or float64 with float64 ``x``.
        star_relu: StarReLU's ``(scale, bias)``, one element each, applied to ``x`` as it is read.
        data_format, overwrite_x: as for `dynamic_filter`.
        backend: a name from ``backends()``; if None, ``dfformer_kernels.dispatch`` describes how one is chosen.

    Returns:
        A tensor of x's shape and dtype, with the memory format that `dynamic_filter` would return.

    Raises:
        ValueError, TypeError: a bad argument, by name. RuntimeError: the requested backend cannot run this.
    """
    op = "global_filter"
    checks.check_tensors(op, x=x, weight=weight)
    parameters = (dft_matmul.as_pairs(weight), *_scalars(op, star_relu))
    return _in_either_format(op, data_format, x, lambda x: _run(op, backend, x, *parameters, overwrite_x=overwrite_x))


def _scalars(op: str, star_relu: tuple[Tensor, Tensor] | None) -> tuple[Tensor | None, Tensor | None]:
    if star_relu is None:
        return None, None
    checks.check_pair(op, star_relu, "None or a pair (scale, bias) of tensors")
    scale, bias = star_relu
    checks.check_tensors(op, **{name: t for name, t in (("scale", scale), ("bias", bias)) if t is not None})
    return scale, bias


def _ungrouped(logits: Tensor, basis: Tensor, absent: float) -> tuple[Tensor, Tensor]:
    """One basis of the filters of all groups, and logits that are ``absent`` for the filters of other groups."""
    checks.check_groups("dynamic_filter", logits, basis)
    G, _, _, F, _ = basis.shape
    C, device = logits.shape[2], logits.device
    own = torch.arange(G * F, device=device)[:, None] // F == torch.arange(C, device=device) // (C // G)
    basis = basis.permute(1, 2, 0, 3, 4).flatten(2, 3)
    return logits.repeat(1, G, 1).masked_fill(~own, absent), basis


def _in_either_format(op: str, data_format: str, x: Tensor, step: Callable[[Tensor], Tensor]) -> Tensor:
    """``step`` of x in either format; the operator sees channels-first as strides only."""
    checks.check_choice(op, "data_format", data_format, ("channels_last", "channels_first"))
    if data_format == "channels_last":
        return step(x)
    checks.check_channels_first(op, x)
    return step(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _run(
    op: str, backend: str | None, x: Tensor, *others: Tensor | None, options: tuple[bool, ...] = (), overwrite_x: bool
) -> Tensor:
    tensors = (x, *others)
    backend = requested_backend(backend)
    if is_under_functorch(tensors):
        return _expression(reference.KERNELS, op, tensors, options)
    if dft_matmul.in_onnx_export():
        return _expression(dft_matmul.KERNELS, op, tensors, options)
    if overwrite_x and _can_overwrite(x, others):
        getattr(torch.ops.dfformer, f"{op}_")(*tensors, backend, *options)
        return x
    return getattr(torch.ops.dfformer, op)(*tensors, backend, *options)


def _can_overwrite(x: Tensor, others: Sequence[Tensor | None]) -> bool:
    if torch.compiler.is_exporting() or torch.jit.is_tracing() or not x.is_cpu or x.requires_grad:
        return False
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in others):
        return False
    if not torch.compiler.is_compiling():  # what follows, functionalization takes care of
        if is_in_a_mode() or x.is_neg() or (x.is_inference() and not torch.is_inference_mode_enabled()):
            return False
        if _may_share_memory(x, others):
            return False
    return _is_in_a_format(x)


def _may_share_memory(x: Tensor, others: Sequence[Tensor | None]) -> bool:
    try:
        first, *addresses = (t.untyped_storage().data_ptr() for t in (x, *others) if t is not None)
    except RuntimeError:  # a tensor has no memory, as torch's zeros in forward-mode derivatives
        return True
    return first in addresses


def _is_in_a_format(x: Tensor) -> bool:
    return x.is_contiguous() or is_channels_first(x)


def _expression(
    kernels: Mapping[str, Callable[..., Tensor]], op: str, tensors: Sequence[Any], options: Sequence[bool]
) -> Tensor:
    """An operator as an expression of torch's own, which every transform and tracer knows."""
    getattr(checks, f"check_{op}")(*tensors)
    with without_autocast(tensors[0].device):
        return kernels[op](*tensors, *options)


def _define(name: str, inputs: str, options: str = "") -> type[Any]:
    """Registers ``dfformer::<name>``, ``<name>_backward``, and ``<name>_``, which writes over x.

    Returns the autograd Function. ``inputs`` is the schema of the tensor arguments, ``x`` first. ``options`` is the
    schema of the flags, which have defaults; kernels take them after the tensors.
    """
    count = inputs.count("Tensor")
    _define_forward(name, inputs, options)
    _define_backward(name, inputs, options)
    MATMUL_DECOMPOSITIONS[getattr(torch.ops.dfformer, name).default] = lambda *args: _expression(
        dft_matmul.KERNELS, name, args[:count], args[count + 1 :]
    )
    function = _autograd_function(name, count)
    register_gradient(name, function)
    return function


def _define_forward(name: str, inputs: str, options: str) -> None:
    check, count = getattr(checks, f"check_{name}"), inputs.count("Tensor")

    def forward_impl(*args: Any) -> Tensor:
        tensors, backend, options = args[:count], args[count], args[count + 1 :]
        check(*tensors)
        refuse_tangents(name, tensors)
        kernel = kernel_for(name, backend, tensors, *options)
        x = tensors[0]
        if x.numel() == 0:
            return forward_fake(*args)
        with without_autocast(x.device):
            return in_format(kernel(*tensors, *options), is_channels_first(x))

    def forward_fake(*args: Any) -> Tensor:
        check(*args[:count])
        return empty_like(args[0])

    def overwriting_impl(*args: Any) -> None:
        tensors, backend, options = args[:count], args[count], args[count + 1 :]
        check(*tensors)
        refuse_tangents(name, tensors)
        x = tensors[0]
        writable = x.is_cpu and _is_in_a_format(x)
        kernel = overwriting_kernel(name, backend, tensors, *options) if writable else None
        if kernel is None:
            x.copy_(forward_impl(*args))
            return
        torch.autograd.graph.increment_version(x)  # a backward that needs the old values then raises
        if x.numel():
            with without_autocast(x.device):
                kernel(*tensors, *options)

    register(f"{name}({inputs}, str? backend{options}) -> Tensor", forward_impl, forward_fake)
    overwritten = inputs.replace("Tensor", "Tensor(a!)", 1)
    register(
        f"{name}_({overwritten}, str? backend{options}) -> ()", overwriting_impl, lambda *args: check(*args[:count])
    )


def _define_backward(name: str, inputs: str, options: str) -> None:
    backward_name = f"{name}_backward"
    check, count = getattr(checks, f"check_{name}"), inputs.count("Tensor")

    def backward_impl(*args: Any) -> list[Tensor]:
        grad_y, tensors, needs, backend, options = split(args)
        check_backward(grad_y, tensors, needs)
        refuse_tangents(backward_name, (grad_y, *tensors))
        kernel = kernel_for(backward_name, backend, tensors, *options)
        x = tensors[0]
        if x.numel() == 0:
            return [gradient.zero_() for gradient in backward_fake(*args)]
        with without_autocast(x.device):
            gradients = kernel(grad_y, *tensors, needs, *options)
        first = needs[0] and is_channels_first(x)
        return [in_format(gradient, first and i == 0) for i, gradient in enumerate(gradients)]

    def backward_fake(*args: Any) -> list[Tensor]:
        grad_y, tensors, needs, *_ = split(args)
        check_backward(grad_y, tensors, needs)
        x, *others = tensors
        contiguous = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in compress(others, needs[1:]))
        return [empty_like(x), *contiguous] if needs[0] else list(contiguous)

    def split(args: Sequence[Any]) -> tuple[Tensor, Sequence[Any], Sequence[bool], str | None, Sequence[bool]]:
        return args[0], args[1 : count + 1], args[count + 1], args[count + 2], args[count + 3 :]

    def check_backward(grad_y: Tensor, tensors: Sequence[Any], needs: Sequence[bool]) -> None:
        check(*tensors)
        checks.check_backward(backward_name, grad_y, tensors[0], needs, count)

    backward_schema = f"{backward_name}(Tensor grad_y, {inputs}, bool[] needs, str? backend{options}) -> Tensor[]"
    register(backward_schema, backward_impl, backward_fake)


def _autograd_function(name: str, count: int) -> type[Any]:
    """An operator and its gradient.

    ``apply`` takes the arguments of the operator in ``torch.ops.dfformer`` by position: x, its parameters, scale and
    bias or None; then the backend's name or None; then optionally its flags, such as ``softmax``. It raises as the
    operator's public function does.
    """
    forward_op = getattr(torch.ops.dfformer, name)
    backward_op = getattr(torch.ops.dfformer, f"{name}_backward")
    differentiable_backward = getattr(reference, f"{name}_backward")

    def forward(*args: Any) -> Tensor:
        return forward_op(*args)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.backend, *ctx.options = inputs[count:]
        ctx.save_for_backward(*inputs[:count])

    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:count])
        if needs_double_backward(grad_y, tensors):
            with without_autocast(grad_y.device):
                gradients: Sequence[Tensor] = differentiable_backward(grad_y, *tensors, needs, *ctx.options)
        else:
            gradients = backward_op(grad_y, *tensors, needs, ctx.backend, *ctx.options)
        remaining = iter(gradients)
        return (*(next(remaining) if need else None for need in needs), None, *(None for _ in ctx.options))

    methods = (forward, setup_context, backward)
    body = {method.__name__: staticmethod(method) for method in methods}
    class_name = f"{name.title().replace('_', '')}Function"  # its gradient's nodes in a graph are called after it
    return type(class_name, (torch.autograd.Function,), {"__doc__": _autograd_function.__doc__, **body})


# In the form that `torch.export.ExportedProgram.run_decompositions` takes.
MATMUL_DECOMPOSITIONS: dict[Any, Callable[..., Tensor]] = {}

StarReLUFunction = _define("star_relu", "Tensor x, Tensor scale, Tensor bias")
DynamicFilterFunction = _define(
    "dynamic_filter", "Tensor x, Tensor logits, Tensor basis, Tensor? scale, Tensor? bias", ", bool softmax=True"
)
"""The autograd Function of `dynamic_filter`; ``apply`` also takes the backend, a name or None, after the tensors."""
GlobalFilterFunction = _define("global_filter", "Tensor x, Tensor weight, Tensor? scale, Tensor? bias")


class MatmulTransforms(TorchFunctionMode):
    """In this context the operators transform with matrix products (`dfformer_kernels.dft_matmul`).

    A trace made inside contains only torch's own operators, on real tensors. ``MatmulTransforms()`` takes no arguments.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operator = getattr(func, "default", func)  # e.g. of torch.ops.dfformer.star_relu
        return MATMUL_DECOMPOSITIONS.get(operator, func)(*args, **(kwargs or {}))
