"""Gives a module a rewritten forward: its class becomes a subclass that runs a graph for certain inputs.

The module stays the same object. Its parameters, buffers, submodules, attributes, hooks and other methods stay too.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, fx, nn

from dfformer_kernels.graph.trace import NotFusableError

# What the source of every graph may refer to without an import, such as torch and inf.
_BUILTINS = fx.Graph().python_code("self").globals
_AUTOCAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Program(NamedTuple):
    """A graph as Python source, which can be pickled.

    ``names`` are the globals of the source, and ``passed`` the inputs of forward that it takes. It is run if those in
    ``expected`` have these values of `key_of`, and those in ``ranks`` are floating-point tensors of so many dimensions.
    Those in ``batched`` may have any length.
    """

    source: str
    names: tuple[tuple[str, Any], ...]
    passed: tuple[str, ...]
    expected: tuple[tuple[str, Any], ...]
    batched: tuple[str, ...]
    ranks: tuple[tuple[str, int], ...]

    def fits(self, inputs: Mapping[str, Any]) -> bool:
        keys_fit = all(key_of(inputs[name], name in self.batched) == key for name, key in self.expected)
        return keys_fit and all(_has_rank(inputs[name], rank) for name, rank in self.ranks)

    def function(self) -> Callable[..., Any]:
        namespace = {**_BUILTINS, **dict(self.names)}
        exec(self.source, namespace)
        function: Callable[..., Any] = namespace["forward"]
        return function


def key_of(value: Any, is_batched: bool) -> tuple[Any, ...]:
    """What an input must share with the one that a graph was made for.

    The batch of a tensor may differ, and the dtype among those of autocast.
    """
    if isinstance(value, Tensor):
        dtype = None if value.dtype in _AUTOCAST_DTYPES else value.dtype
        return value.dim(), value.shape[is_batched:], dtype
    return type(value), value


def _has_rank(value: Any, rank: int) -> bool:
    """Whether ``value`` is a floating-point tensor of this rank, or what stands for one in a trace by torch.fx."""
    return not isinstance(value, Tensor) or (value.is_floating_point() and value.dim() == rank)


def batched_inputs(given: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the tensors that are as long as the first one, whose length is the batch size."""
    lengths = {name: len(value) for name, value in given.items() if isinstance(value, Tensor) and value.dim()}
    return tuple(name for name, length in lengths.items() if length == next(iter(lengths.values())))


class FusedModule(nn.Module):
    """The base of all classes with rewritten forwards; ``print(module.code)`` shows the graphs."""

    original_class: ClassVar[type[nn.Module]]
    fused_programs: ClassVar[tuple[Program, ...]]
    code: ClassVar[str]

    def restore(self) -> None:
        """Gives the module its original class back."""
        self.__class__ = self.original_class  # type: ignore[assignment]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(max(protocol, 2))
        if not is_fused_class(type(self)):
            return reduced
        rebuild, arguments, *rest = reduced
        return _rebuilt, (self.original_class, self.fused_programs, rebuild, arguments[1:]), *rest


def check_names(module: nn.Module) -> None:
    """Raises NotFusableError if ``module`` has something of a name that fused classes use."""
    for name in () if isinstance(module, FusedModule) else (*FusedModule.__annotations__, "restore"):
        if hasattr(module, name):
            raise NotFusableError(f"its attribute {name!r} clashes with one of the replacement's")


def _rebuilt(
    original: Any, programs: tuple[Program, ...], rebuild: Callable[..., nn.Module], arguments: tuple[Any, ...]
) -> nn.Module:
    module = rebuild(original, *arguments)
    module.__class__ = _fused_class(original, programs)
    return module


def is_fused_class(kind: type[nn.Module]) -> bool:
    """Whether `fused_class` made ``kind`` itself: classes derived from such a class do not count."""
    return "fused_programs" in vars(kind)


def fused_class(
    kind: Any,
    graph: fx.Graph,
    passed: tuple[str, ...],
    expected: Mapping[str, Any],
    ranks: tuple[tuple[str, int], ...] = (),
) -> type[FusedModule]:
    """A subclass of ``kind`` that runs ``graph`` if its inputs fit, otherwise what ``kind`` runs.

    The graph takes the inputs ``passed``. It is valid for values like those in ``expected``, and for floating-point
    tensors of these ``ranks`` and any size.
    """
    code = graph.python_code("self")
    names = tuple((name, value) for name, value in code.globals.items() if name not in _BUILTINS)
    batched = batched_inputs(expected)
    keys = tuple((name, key_of(value, name in batched)) for name, value in expected.items())
    program = Program(code.src, names, passed, keys, batched, ranks)
    if is_fused_class(kind):
        return _fused_class(kind.original_class, (program, *kind.fused_programs))
    return _fused_class(kind, (program,))


@functools.lru_cache(maxsize=1024)  # so that a copy of a module has the same class
def _fused_class(kind: Any, programs: tuple[Program, ...]) -> type[FusedModule]:
    original, signature = kind.forward, inspect.signature(kind.forward)
    names = dict(list(signature.parameters.items())[1:])
    defaults = {name: p.default for name, p in names.items() if p.default is not p.empty}
    choices = [(program, program.function()) for program in programs]

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        inputs = {**defaults, **given}
        if len(given) == len(args) + len(kwargs) and inputs.keys() == names.keys():
            for program, function in choices:
                if program.fits(inputs):
                    return function(self, *(inputs[name] for name in program.passed))
        return original(self, *args, **kwargs)

    forward.__signature__ = signature  # type: ignore[attr-defined] # inspect documents this
    code = "\n".join(program.source.strip() for program in programs)
    body = {"forward": forward, "original_class": kind, "fused_programs": programs, "code": code}
    return type(f"Fused{kind.__name__}", (FusedModule, kind), {**body, "__module__": kind.__module__})
