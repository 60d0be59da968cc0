"""The rule for reading a module's parameters without calling it: it must make no difference.

A fused step computes what several modules would. It may do so only for modules whose call does nothing but run their
class's own forward. If a module has anything else (a hook, an adapter, a parametrisation, a patched forward, a
quantised or offloaded weight), the step calls the module.
"""

from typing import Any, TypeGuard, TypeVar

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as torch_module

from dfformer_kernels.graph.toolkit import has_hooks

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_NATIVE = (Tensor, nn.Parameter, nn.Buffer, FakeTensor)
_FORWARDS: dict[type[nn.Module], Any] = {}


def _original(name: str, kind: type[nn.Module]) -> Any:
    """A method of a class; None if another was put in its place before this module was imported."""
    method = getattr(kind, name)
    return method if getattr(method, "__globals__", {}).get("__name__") == kind.__module__ else None


_CALL, _CALL_IMPL = (_original(name, nn.Module) for name in ("__call__", "_call_impl"))


def fusible(kind: type[ModuleT]) -> type[ModuleT]:
    """Class decorator: records this class's ``forward`` for fused steps, so that a patched one is noticed."""
    _FORWARDS[kind] = _original("forward", kind)
    return kind


for _kind in (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.Identity, DropPath):
    fusible(_kind)


_RETURNING_NEW: set[type[nn.Module]] = {nn.Linear}


def returning_new(kind: type[ModuleT]) -> type[ModuleT]:
    """Class decorator: as `fusible`, of a class whose ``forward`` returns a tensor that nothing else holds."""
    _RETURNING_NEW.add(kind)
    return fusible(kind)


def returns_new(module: nn.Module, x: Any) -> bool:
    """Whether nothing but the caller will hold what ``module(x)`` returns. It must be asked before the call."""
    return type(module) in _RETURNING_NEW and is_exact(module, type(module), x)


def is_exact(module: nn.Module, kind: type[ModuleT], x: Any) -> TypeGuard[ModuleT]:
    """Whether a fused step may compute ``module(x)`` from the module's own parameters. See `unsupported_reasons`."""
    return not unsupported_reasons(module, kind, x)


def unsupported_reasons(module: nn.Module, kind: type[nn.Module], x: Any = None) -> list[str]:
    """Why a fused step must call ``module`` instead of reading its parameters; empty if it may read them.

    Args:
        kind: the class whose forward the step knows.
        x: the input that the module is about to be called with; None to check only the module.
    """
    reasons = []
    if type(module) is not kind:
        reasons.append(f"it is a {type(module).__qualname__}, not a {kind.__qualname__}")
    elif (
        "forward" in module.__dict__
        or "_call_impl" in module.__dict__
        or kind.forward is not _FORWARDS.get(kind, kind.forward)
    ):
        reasons.append("its forward was replaced")
    # Hooks on what is saved or loaded matter only where a module is replaced.
    if _has_call_hooks(module) or (x is None and has_hooks(module)):
        reasons.append("it has hooks")
    if kind.__call__ is not _CALL or kind._call_impl is not _CALL_IMPL or torch.jit.is_tracing():
        reasons.append("it is being traced")
    elif x is not None and not _is_native(x):
        reasons.append(f"its input is a {type(x).__qualname__}")
    device = x.device if isinstance(x, Tensor) else None
    for tensors in (module._parameters, module._buffers):
        for name, t in tensors.items():
            if t is not None and not (_is_native(t) and (device is None or t.device == device)):
                reasons.append(f"its {name} is a {type(t).__qualname__} on {t.device}")
    return reasons


def has_foreign_forward(module: nn.Module) -> bool:
    """Whether a module's forward is in Python and not torch's own, which only calls operators through other modules."""
    if isinstance(module, torch.jit.ScriptModule):
        return False
    return not str(type(module).forward.__module__).startswith("torch.")  # which a class without one has, too


def _has_call_hooks(module: nn.Module) -> bool:
    """Whether hooks, its own or global ones, could see or change the inputs and outputs of this module."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or torch_module._has_any_global_hook()
    )


def _is_native(t: Any) -> bool:
    """Whether ``t`` is a strided tensor of torch's own types, or a fake one in an export."""
    return type(t) in _NATIVE and t.layout == torch.strided and not t.is_quantized
