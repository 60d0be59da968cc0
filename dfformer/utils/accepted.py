"""What arguments and settings may be, as a test and in words."""

from collections.abc import Callable
from math import inf
from numbers import Integral, Real
from typing import Any, NamedTuple

from torch import nn


class Kind(NamedTuple):
    """The values that an argument or a setting accepts, and their description for messages, after "expected"."""

    accepts: Callable[[Any], bool]
    words: str


def choice(*values: Any) -> Kind:
    """One of ``values``."""
    words = "one of " + ", ".join(map(repr, values))
    return Kind(lambda value: any(isinstance(value, type(v)) and value == v for v in values), words)


COUNT = Kind(lambda n: isinstance(n, Integral) and int(n) >= 1, "a whole number from 1 up")
COUNT_OR_0 = Kind(lambda n: isinstance(n, Integral) and int(n) >= 0, "a whole number from 0 up")
RATE = Kind(lambda rate: isinstance(rate, Real) and 0 <= float(rate) <= 1, "a probability from 0 to 1")
RATIO = Kind(lambda ratio: isinstance(ratio, Real) and 0 <= float(ratio) < inf, "a number from 0 up")
PLANE = Kind(
    lambda size: all(map(COUNT.accepts, size if isinstance(size, tuple | list) and len(size) == 2 else [size])),
    "a whole number from 1 up or a pair of them",
)
SCALE = Kind(lambda scale: scale is None or isinstance(scale, Real), "a number or None")
MODULE = Kind(callable, "a callable that returns a module")


def check_module(model: Any) -> None:
    """Raises TypeError for a ``model`` that is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def check_arguments(kind: Kind, lists: bool = False, **arguments: Any) -> None:
    """Raises ValueError for an argument that is not of ``kind``, or with ``lists`` has a value that is not."""
    for name, value in arguments.items():
        values = value if lists and isinstance(value, list | tuple) else [value]
        if not values or not all(map(kind.accepts, values)):
            raise ValueError(f"{name}: expected {kind.words}{' or a list of such' * lists}, got {value!r}")
