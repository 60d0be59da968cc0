"""Reads the forward of somebody's module as a graph (torch.fx) and runs it on trial inputs at the same time.

Every node's value is known while the graph is being read, so that branches and assertions on shapes follow the trial
inputs; a branch on a tensor's values cannot be followed for all inputs and is refused. Modules below the traced one
stay calls of modules.
"""

import inspect
import operator
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn


class UnsupportedCopyError(Exception):
    """Why a module is left alone, as a clause that completes "left alone: "."""


class DifferentCopyError(UnsupportedCopyError):
    """The same of a module that does have both transforms, but computes something else than our step."""


class Trace(NamedTuple):
    """The graph of a module's forward, and the value of every node for the trial inputs."""

    graph: fx.Graph
    values: dict[fx.Node, Any]

    def ancestors(self, node: fx.Node) -> set[fx.Node]:
        """The nodes that ``node`` is computed from."""
        found: set[fx.Node] = set()
        waiting = list(node.all_input_nodes)
        while waiting:
            current = waiting.pop()
            if current not in found:
                found.add(current)
                waiting.extend(current.all_input_nodes)
        return found


def trace(module: nn.Module, inputs: Sequence[Any]) -> Trace:
    """Traces ``module``, which may be changed by it (buffers, attributes set in forward), on ``inputs``.

    Raises:
        UnsupportedCopyError: its forward cannot be written as a graph, or does more than compute a result.
    """
    before = dict(vars(module))
    tracer = _Tracer(module, inputs)
    try:
        with torch.no_grad():
            graph = tracer.trace(module)
    except UnsupportedCopyError:
        raise
    except Exception as error:  # whatever foreign code raises
        raise UnsupportedCopyError(f"its forward cannot be traced ({first_line(error)})") from error
    changed = [name for name, value in vars(module).items() if before.get(name, before) is not value]
    changed = [name for name in changed if not name.startswith("_tensor_constant")]
    if changed:
        raise UnsupportedCopyError(f"its forward sets self.{changed[0]}, which the replacement would not")
    return Trace(graph, tracer.run.env)


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


class _Tracer(fx.Tracer):
    def __init__(self, root: nn.Module, inputs: Sequence[Any]) -> None:
        super().__init__(autowrap_functions=_wrapped_functions())
        self.proxy_buffer_attributes = True
        self._evaluating = False
        self.run = fx.Interpreter(root, graph=fx.Graph())
        self.run.args_iter = iter(inputs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **options: Any) -> Any:
        if kind == "call_method" and target in ("item", "tolist", "numpy"):
            raise UnsupportedCopyError(f"its forward takes numbers out of tensors (.{target}())")
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **options)
        self._evaluating = True
        try:
            self.run.env[proxy.node] = self.run.run_node(proxy.node)
        finally:
            self._evaluating = False
        return proxy

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return forward(*args, **kwargs) if self._evaluating else super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self._evaluating else super().getattr(attr, attr_val, parameter_proxy_cache)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Known(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        return bool(_number(obj))

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        return iter([operator.getitem(obj, i) for i in range(len(_value(obj)))])


class _Known(fx.Proxy):
    """A node whose value for the trial inputs is known."""

    def __getattr__(self, k: str) -> Any:
        value = getattr(_value(self), k)
        if isinstance(value, str | bool | None):  # x.device.type for torch.autocast, x.is_cuda
            return value
        return (
            super().__getattr__(k)
            if callable(value)
            else self.tracer.create_proxy("call_function", getattr, (self, k), {})
        )

    def __len__(self) -> int:
        return len(_value(self))

    def __int__(self) -> int:
        return int(_number(self))

    __index__ = __int__

    def __float__(self) -> float:
        return float(_number(self))


def _value(proxy: fx.Proxy) -> Any:
    assert isinstance(proxy.tracer, _Tracer)
    return proxy.tracer.run.env[proxy.node]


def _number(proxy: fx.Proxy) -> Any:
    value = _value(proxy)
    if isinstance(value, Tensor):
        raise UnsupportedCopyError("its forward branches on the values of tensors")
    return value


def _wrapped_functions() -> tuple[Callable[..., Any], ...]:
    """Functions on tensors that look into their arguments' types and so must stay calls."""
    einops = sys.modules.get("einops")
    return () if einops is None else (einops.rearrange, einops.reduce, einops.repeat)


def length(of: Any) -> Any:
    """``len``, which Python wants to be a number while a graph is being read."""
    return of.tracer.create_proxy("call_function", len, (of,), {}) if isinstance(of, fx.Proxy) else len(of)


def inputs_of(module: nn.Module) -> tuple[list[str], dict[str, Any]]:
    """The names of forward's arguments: those it needs, and the optional ones with their defaults.

    Raises UnsupportedCopyError for a forward with ``*args``, or with arguments that can only be given by name.
    """
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    needed = [p.name for p in parameters if p.default is p.empty]
    if not needed or any(p.kind not in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters):
        raise UnsupportedCopyError("its forward does not say which inputs it takes")
    if len(needed) > len(_FORWARDS):
        raise UnsupportedCopyError(f"its forward takes {len(needed)} inputs")
    optional = {p.name: p.default for p in parameters if p.default is not p.empty}
    if any(not isinstance(default, int | float | str | None) for default in optional.values()):
        raise UnsupportedCopyError(f"its forward has optional inputs ({', '.join(optional)})")
    return needed, optional


# Forwards of so many inputs that leave another class's optional ones at their defaults.
_FORWARDS: dict[int, Callable[[type[nn.Module]], Callable[..., Any]]] = {
    1: lambda kind: lambda self, x: kind.forward(self, x),
    2: lambda kind: lambda self, x, y: kind.forward(self, x, y),
    3: lambda kind: lambda self, x, y, z: kind.forward(self, x, y, z),
}


def without_optional_inputs(module: nn.Module) -> None:
    """Makes ``module`` of a class whose forward takes only the inputs it needs, if it takes others now."""
    kind = type(module)
    needed, optional = inputs_of(module)
    if optional:
        module.__class__ = type(kind.__name__, (kind,), {"forward": _FORWARDS[len(needed)](kind)})


def with_function(module: nn.Module, name: str, function: Callable[..., Any]) -> None:
    """Makes ``module`` of a class whose methods see ``function`` under a global ``name`` they lack."""
    kind = type(module)
    methods: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        for key, method in vars(base).items():
            if isinstance(method, types.FunctionType) and name in method.__code__.co_names:
                namespace = {**method.__globals__, name: function}
                methods[key] = types.FunctionType(
                    method.__code__, namespace, key, method.__defaults__, method.__closure__
                )
                methods[key].__kwdefaults__ = method.__kwdefaults__
    module.__class__ = type(kind.__name__, (kind,), methods)
