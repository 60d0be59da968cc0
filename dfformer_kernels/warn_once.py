"""A warning that each process gives once."""

import warnings
from functools import cache


@cache
def warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)
