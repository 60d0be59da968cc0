"""What the arguments of a model may be, in words and as a test."""

from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, NamedTuple


class Accepted(NamedTuple):
    """The values that an argument accepts."""

    words: str
    accepts: Callable[[Any], bool]


COUNT = Accepted("whole numbers from 1", lambda n: isinstance(n, Integral) and int(n) >= 1)
COUNT_OR_0 = Accepted("whole numbers from 0", lambda n: isinstance(n, Integral) and int(n) >= 0)
RATE = Accepted("probabilities from 0 to 1", lambda rate: isinstance(rate, Real) and 0 <= float(rate) <= 1)
SCALE = Accepted("numbers, None", lambda scale: scale is None or isinstance(scale, Real))
MODULE = Accepted("what makes a module when called", callable)


def check_arguments(accepted: Accepted, lists: bool = False, **arguments: Any) -> None:
    """Raises ValueError for an argument that is not ``accepted``, or with ``lists`` has a value that is not."""
    for name, value in arguments.items():
        values = value if lists and isinstance(value, list | tuple) else [value]
        if not values or not all(map(accepted.accepts, values)):
            raise ValueError(f"{name}: got {value!r}, accepted are {accepted.words}")
