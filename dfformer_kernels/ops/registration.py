"""Registers operators with torch.library, and decides when a call needs the reference expression instead.

An operator is opaque to torch.compile and torch.export. Public registration costs time: with it, and with the checks
below, a filter step on a 7x7 plane took 85 to 93 µs instead of 51 to 62 forward, and 541 to 555 instead of 387 to 403
with a backward (one thread of a busy Intel Xeon, alternating with a registration on torch's private dispatch keys).
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

LIBRARY = torch.library.Library("dfformer", "DEF")


def register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Defines the operator ``torch.ops.dfformer.<name>`` of this schema, with one implementation for all devices."""
    name = schema.partition("(")[0]
    # The result has the memory format of x, so compiled code must pass x with the strides it was traced with.
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dfformer::{name}", fake, lib=LIBRARY)


def register_gradient(name: str, function: Any) -> None:
    """Registers ``function``'s ``setup_context`` and ``backward`` as the operator's gradient."""
    torch.library.register_autograd(
        f"dfformer::{name}", function.backward, setup_context=function.setup_context, lib=LIBRARY
    )


def is_in_compiled_graph() -> bool:
    """Whether torch.compile traces the caller for Inductor, and not torch.export for other runtimes.

    In torch 2.10 and 2.11 it is always False, because there torch.compile says that it exports.
    """
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting()


def is_under_functorch(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a transform of torch.func is active, or one of ``tensors`` has a forward-mode tangent.

    Opaque operators silently drop tangents and have no batching rules. The caller then evaluates the reference
    expression, which supports both.
    """
    if torch._C._are_functorch_transforms_active():  # no public function tells, and Dynamo can trace this one
        return True
    return not torch.compiler.is_compiling() and _have_tangents(tensors)


def is_in_a_mode() -> bool:
    """Whether a mode sees calls of operators, and may keep their tensors."""
    return bool(torch._C._len_torch_function_stack()) or is_in_a_dispatch_mode()  # no public function tells


def is_in_a_dispatch_mode() -> bool:
    """Whether a mode sees what operators compute: it counts, traces, or decides what is recomputed."""
    return bool(torch._C._len_torch_dispatch_stack())  # no public function tells this either


def needs_double_backward(grad_y: Tensor, tensors: Iterable[Tensor | None]) -> bool:
    """Whether a backward must evaluate the reference expression.

    It must if its gradients are themselves differentiated, or batched
    (``torch.autograd.grad(..., is_grads_batched=True)``).
    """
    if torch.is_grad_enabled():
        return True
    if torch.compiler.is_compiling():
        return False
    # No public function tells this either.
    return torch._C._functorch.is_legacy_batchedtensor(grad_y) or is_under_functorch((grad_y, *tensors))


def refuse_tangents(name: str, tensors: Iterable[Tensor | None]) -> None:
    """Raises NotImplementedError if an operator, called through torch.ops, would lose a forward-mode tangent."""
    if _have_tangents(tensors):
        raise NotImplementedError(
            f"torch.ops.dfformer.{name} has no forward-mode derivative; call the function in dfformer_kernels instead"
        )


def _have_tangents(tensors: Iterable[Tensor | None]) -> bool:
    if forward_ad._current_level < 0:  # no level is open; cheaper than unpack_dual on each tensor
        return False
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


_NOTHING: AbstractContextManager[object] = nullcontext()


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Switches autocast off inside, if it is on; entering ``torch.autocast`` needlessly would cost microseconds."""
    # The meta device has no autocast, and asking for it raises.
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return _NOTHING
    return torch.autocast(device.type, enabled=False)
