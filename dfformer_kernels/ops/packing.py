"""Weights that do not change, kept in the layout products want them in.

Kept beside the weight, not in its place: graphs, pickles and gradients hold the weight itself, and whatever multiplies
by it in the end finds the layout here.
"""

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor

# By the weight's id, which is looked up in a tenth of the time its weak reference takes: what the layout was made
# from, and the layout; None until a product wants one.
_kept: dict[int, tuple[tuple[Any, ...], Tensor] | None] = {}


def keep_packed(weight: Tensor) -> None:
    """From now on products with this weight (N,K) keep the layout they want, which takes its memory once more, for as
    long as it lives."""
    if id(weight) not in _kept and not weight.is_inference():  # which would not tell that it changed
        _kept[id(weight)] = None
        weakref.finalize(weight, _kept.pop, id(weight), None).atexit = False


def is_kept(weight: Tensor) -> bool:
    return id(weight) in _kept


def packed(weight: Tensor, pack: Callable[[Tensor], Tensor], *kind: object) -> Tensor:
    """``pack(weight)`` of a weight that is kept; made again if the weight has changed, or for another ``kind``."""
    # Setting `weight.data` changes no version, and a view of the same memory has the same address.
    made_from = (weight.data_ptr(), weight._version, weight.dtype, weight.shape, weight.stride(), *kind)
    kept = _kept[id(weight)]
    if kept is None or kept[0] != made_from:
        _kept[id(weight)] = kept = made_from, pack(weight)
    return kept[1]
