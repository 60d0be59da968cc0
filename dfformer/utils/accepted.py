"""What arguments and settings may be, as a test and in words."""

from collections.abc import Callable
from math import inf
from numbers import Integral, Real
from typing import Any, NamedTuple

from torch import nn


class Kind(NamedTuple):
    """The values that an argument or a setting accepts, and their description for messages."""

    accepts: Callable[[Any], bool]
    words: str


def choice(*values: Any) -> Kind:
    """One of ``values``."""
    words = ", ".join(map(repr, values))
    return Kind(lambda value: any(isinstance(value, type(v)) and value == v for v in values), words)


COUNT = Kind(lambda n: isinstance(n, Integral) and int(n) >= 1, "whole numbers from 1")
COUNT_OR_0 = Kind(lambda n: isinstance(n, Integral) and int(n) >= 0, "whole numbers from 0")
RATE = Kind(lambda rate: isinstance(rate, Real) and 0 <= float(rate) <= 1, "probabilities from 0 to 1")
RATIO = Kind(lambda ratio: isinstance(ratio, Real) and 0 <= float(ratio) < inf, "numbers from 0")
PLANE = Kind(
    lambda size: all(map(COUNT.accepts, size if isinstance(size, tuple | list) and len(size) == 2 else [size])),
    "whole numbers from 1 and pairs of them",
)
SCALE = Kind(lambda scale: scale is None or isinstance(scale, Real), "numbers, None")
MODULE = Kind(callable, "what makes a module when called")


def check_module(model: Any) -> None:
    """Raises TypeError for a ``model`` that is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, accepted is a torch.nn.Module")


def check_arguments(accepted: Kind, lists: bool = False, **arguments: Any) -> None:
    """Raises ValueError for an argument that is not ``accepted``, or with ``lists`` has a value that is not."""
    for name, value in arguments.items():
        values = value if lists and isinstance(value, list | tuple) else [value]
        if not values or not all(map(accepted.accepts, values)):
            raise ValueError(f"{name}: got {value!r}, accepted are {accepted.words}")
