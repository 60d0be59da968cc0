"""Traces the forward of any module as a graph (torch.fx), and runs it on trial inputs at the same time.

Every node's value is known during the trace, so branches and assertions on shapes follow the trial inputs. A branch on
the values of a tensor is refused, because other inputs could take the other branch. Submodules remain calls of modules.
"""

import copy
import functools
import inspect
import itertools
import operator
import sys
import threading
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from dfformer_kernels.graph.vocabulary import is_tensor, name_of, value_of

# Held by a thread that tries and traces modules. While torch.fx traces, the calls of all modules in the process go
# through its tracer; two traces at once would leave them there for good. Trials also seed the process's random numbers.
ONE_AT_A_TIME = threading.RLock()
_OF_TORCH = frozenset(vars(nn.Module()))  # the attributes that every module has
_ORDERINGS = (operator.lt, operator.le, operator.gt, operator.ge)
# What Python code may ask of a tensor and branch on, because trials vary it.
_SIZES = {"shape", "size", "_length", "dim", "ndim", "numel", "is_floating_point", "is_complex"}


class NotFusableError(Exception):
    """A module or program is left alone; the message is the clause that completes "left alone: "."""


class DifferentFormulaError(NotFusableError):
    """A module or program is left alone that has both transforms, but does not compute our step."""


class Trace(NamedTuple):
    """The graph of a module's forward, with the value of every node for the trial inputs, and the numbers Python saw.

    The graph is valid for all inputs that lead to the same numbers. ``limits`` are the constants that branches on the
    order of a size and a constant had: at sizes beyond them the forward may do something else.
    """

    graph: fx.Graph
    seen: list[Any]
    limits: list[float]


def reached(start: Iterable[fx.Node], onward: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    """``start``, and all nodes that steps from a node to ``onward(node)`` reach from there."""
    found: set[fx.Node] = set()
    waiting = list(start)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting.extend(onward(node))
    return found


def ancestors(node: fx.Node) -> set[fx.Node]:
    """The nodes that ``node`` is computed from."""
    return reached(node.all_input_nodes, lambda n: n.all_input_nodes)


def common_graph(graphs: Iterable[tuple[str, fx.Graph, list[Any] | None]]) -> fx.Graph:
    """The graph that all of ``graphs`` are, up to the names of nodes.

    Each comes with the case that it was made for, and the numbers that Python saw, or None if others are expected.
    Raises DifferentFormulaError with the first case and call that differ, or if the graph holds tensors.
    """
    remaining = iter(graphs)
    _, first, numbers = next(remaining)
    if any(str(node.target).startswith("_tensor_constant") for node in first.nodes):
        raise DifferentFormulaError("its forward makes tensors that depend on no input")
    for case, graph, seen in remaining:
        for a, b in itertools.zip_longest(_calls(graph), _calls(first), fillvalue=("its end", "")):
            if a != b:
                raise DifferentFormulaError(f"{case} its forward does something else (at {a[0]})")
        if seen is not None and seen != numbers:
            raise DifferentFormulaError(f"{case} its forward's Python code computes with other numbers")
    return first


def _calls(graph: fx.Graph) -> list[tuple[str, str]]:
    number = {node: f"%{i}" for i, node in enumerate(graph.nodes)}
    calls = []
    for node in graph.nodes:
        name = node.op if node.op in ("placeholder", "output") else getattr(node.target, "__name__", node.target)
        calls.append((str(name), f"{node.op} {fx.map_arg((node.args, node.kwargs), number.__getitem__)}"))
    return calls


def trace(
    module: nn.Module, inputs: Sequence[Any], constants: Mapping[str, Any], through: Collection[nn.Module] = ()
) -> Trace:
    """Traces ``module``, prepared by `make_traceable`, on ``inputs``, and submodules in ``through`` with it.

    The graph has the values of ``constants`` for inputs of these names, and takes all others. This may change
    ``module``: its buffers, and attributes that its forward sets. The caller holds ``ONE_AT_A_TIME``.

    Raises:
        NotFusableError: its forward cannot be written as a graph, or does more than compute a result.
    """
    before = _attributes(module)
    tracer = _Tracer(module, inputs, constants, through)
    try:
        with torch.no_grad():
            graph = tracer.trace(module)
    except NotFusableError:
        raise
    except Exception as error:  # foreign code may raise anything
        raise NotFusableError(f"its forward cannot be traced ({first_line(error)})") from error
    for name, held in _attributes(module).items():
        if list(map(id, before.get(name, ()))) != list(map(id, held)) and not name.startswith("_tensor_constant"):
            raise NotFusableError(f"its forward changes self.{name}, which the replacement would not")
    # A dtype that no call takes may have been compared with ``is``.
    unused = [n for n in graph.nodes if isinstance(value_of(n), torch.dtype) and not n.users]
    return Trace(graph, [number for node in (*tracer.seen, *unused) for number in _numbers(node)], tracer.limits)


def _attributes(module: nn.Module) -> dict[str, list[Any]]:
    """The attributes of a module; lists, dicts and sets that are not torch's own are followed by what they hold."""
    found: dict[str, list[Any]] = {}
    for name, value in vars(module).items():
        found[name] = [value]
        if isinstance(value, list | dict | set) and name not in _OF_TORCH:
            found[name].extend(value.values() if isinstance(value, dict) else value)
    return found


def _numbers(node: fx.Node) -> list[Any]:
    """The numbers among a node's value and the values it is computed from; the search ends at tensors.

    Raises NotFusableError if they tell of a tensor something else than its sizes, which trials do not vary.
    """
    found, waiting = [], [(node, True)]
    while waiting:
        current, whole = waiting.pop()
        value, inputs = value_of(current), current.all_input_nodes
        if isinstance(value, Tensor):
            continue
        name = name_of(current).rpartition(".")[2]
        if any(map(is_tensor, inputs)) and name not in _SIZES:
            raise NotFusableError(f"its forward branches on {name} of a tensor")
        if isinstance(value, int | float):
            found.append(value)
        elif isinstance(value, tuple) and whole:
            found.extend(value)
        is_part = name == "getitem" and len(inputs) == 1
        waiting.extend((n, not is_part) for n in inputs)
    return found


def has_hooks(of: nn.Module | types.ModuleType) -> bool:
    """Whether a module has hooks, or torch.nn.modules.module has global ones."""
    return any(name.endswith("_hooks") and isinstance(hooks, dict) and hooks for name, hooks in vars(of).items())


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


class _Tracer(fx.Tracer):
    def __init__(
        self, root: nn.Module, inputs: Sequence[Any], constants: Mapping[str, Any], through: Collection[nn.Module]
    ) -> None:
        super().__init__(autowrap_functions=_wrapped_functions())
        self.proxy_buffer_attributes = True
        self._constants, self._through = constants, through
        self.seen: list[fx.Node] = []
        self.limits: list[float] = []
        self._evaluating = False
        self._thread = threading.get_ident()
        self.run = fx.Interpreter(root, graph=fx.Graph())
        self.run.args_iter = iter(inputs)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        names = inputs_of(self.root)
        given = {n: self.create_proxy("placeholder", n, (), {}) for n in names if n not in self._constants}
        return root_fn, [self.root, *({**self._constants, **given}[name] for name in names)]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m not in self._through

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **options: Any) -> Any:
        if kind == "call_method" and target in ("item", "tolist", "numpy"):
            raise NotFusableError(f"its forward takes numbers out of tensors (.{target}())")
        return super().create_proxy(kind, target, args, kwargs, *rest, **options)

    def create_node(self, kind: str, *rest: Any, **options: Any) -> fx.Node:
        node = super().create_node(kind, *rest, **options)
        if kind != "output":
            self._evaluating = True
            try:
                self.run.env[node] = node.meta["val"] = self.run.run_node(node)
            finally:
                self._evaluating = False
        return node

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return super().call_module(m, forward, args, kwargs) if self._records() else forward(*args, **kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return super().getattr(attr, attr_val, parameter_proxy_cache) if self._records() else attr_val

    def _records(self) -> bool:
        """Whether a call belongs to the trace, rather than to a node's evaluation or another thread."""
        return not self._evaluating and threading.get_ident() == self._thread

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Known(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        if obj.node.target in _ORDERINGS:
            self.limits.extend(a for a in obj.node.args if isinstance(a, int | float))
        return bool(_number(obj))

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        return iter([operator.getitem(obj, i) for i in range(len(_value(obj)))])


class _Known(fx.Proxy):
    """A node with a known value for the trial inputs."""

    def __getattr__(self, k: str) -> Any:
        value = getattr(_value(self), k)
        if isinstance(value, str | None):  # e.g. x.device.type for torch.autocast
            return value
        if callable(value):
            return super().__getattr__(k)
        proxy = self.tracer.create_proxy("call_function", getattr, (self, k), {})
        return _seen(proxy) if isinstance(value, bool) else proxy

    def __hash__(self) -> int:
        return object.__hash__(self) if isinstance(_value(self), Tensor) else hash(_seen(self))

    def __str__(self) -> str:
        return repr(self) if isinstance(_value(self), Tensor) else str(_seen(self))

    def __len__(self) -> int:
        return len(_seen(self))

    def __int__(self) -> int:
        return int(_number(self))

    __index__ = __int__

    def __float__(self) -> float:
        return float(_number(self))


def _value(proxy: fx.Proxy) -> Any:
    return value_of(proxy.node)


def _seen(proxy: fx.Proxy) -> Any:
    assert isinstance(proxy.tracer, _Tracer)
    proxy.tracer.seen.append(proxy.node)
    return _value(proxy)


def _number(proxy: fx.Proxy) -> Any:
    value = _seen(proxy)
    if isinstance(value, Tensor):
        raise NotFusableError("its forward branches on the values of tensors")
    return value


def _wrapped_functions() -> tuple[Callable[..., Any], ...]:
    """Functions that inspect the types of their arguments, so the graph must call them as a whole."""
    einops = sys.modules.get("einops")
    return () if einops is None else (einops.rearrange, einops.reduce, einops.repeat)


def called_whole(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` for traced code: a single call in the graph, rather than the calls that it makes."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        for argument in args:
            if isinstance(argument, fx.Proxy):
                return argument.tracer.create_proxy("call_function", wrapped, args, kwargs)
        return function(*args, **kwargs)

    return wrapped


@called_whole
def _length(of: Any) -> int:
    """``len`` for traced code, where Python's own would have to return an int."""
    return len(of)


def inputs_of(module: nn.Module) -> dict[str, Any]:
    """The inputs of the forward of a module's class and their defaults, which are `inspect.Parameter.empty` if needed.

    Raises NotFusableError if the module runs another forward, or one with ``*args`` or inputs by name only.
    """
    if "forward" in vars(module) or isinstance(module, torch.jit.ScriptModule):
        raise NotFusableError("its forward is not that of its class")
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    if not parameters or any(p.kind not in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters):
        raise NotFusableError("its forward takes no inputs, or some that are not named or only given by name")
    return {p.name: p.default for p in parameters}


def make_traceable(module: nn.Module) -> None:
    """Prepares ``module`` for `trace`: ``len`` of a tensor becomes a call in the graph, and what is tied is untied.

    Each name in the module gets a tensor or module of its own, because the graph refers to it by the name.
    """
    with_function(module, "len", _length)
    seen: set[int] = set()
    for name, child in list(module.named_modules(remove_duplicate=False)):
        if id(child) in seen:
            child = copy.deepcopy(child)
            module.set_submodule(name, child)
        seen.add(id(child))
        own = {"recurse": False, "remove_duplicate": False}
        for key, tensor in [*child.named_parameters(**own), *child.named_buffers(**own)]:
            if id(tensor) in seen:
                setattr(child, key, copy.deepcopy(tensor))
            seen.add(id(getattr(child, key)))


def with_function(module: nn.Module, name: str, function: Callable[..., Any]) -> None:
    """Gives ``module`` a subclass of its class whose methods see ``function`` as a global called ``name``."""
    kind = type(module)
    methods: dict[str, Any] = {}
    for key in dir(kind):
        method = inspect.getattr_static(kind, key)
        if isinstance(method, types.FunctionType) and name in method.__code__.co_names:
            namespace = {**method.__globals__, name: function}
            copied = types.FunctionType(method.__code__, namespace, key, method.__defaults__, method.__closure__)
            copied.__kwdefaults__ = method.__kwdefaults__
            vars(copied).update(vars(method))
            methods[key] = copied
    module.__class__ = type(kind.__name__, (kind,), methods)
