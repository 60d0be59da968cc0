"""What every backend of a GPU does alike: it refuses to prepare anything during capture, and makes room in memory."""

from collections.abc import Callable, Hashable
from typing import TypeVar

import torch

T = TypeVar("T")

_MOST_REMEMBERED = 1 << 14


def refuse_capture(what: str) -> None:
    """Raises RuntimeError while torch's current stream is being captured into a CUDA graph: ``what`` would have to be
    compiled, loaded, planned or measured first, which a capture does not allow.
    """
    if _capturing():
        raise RuntimeError(
            f"{what} has not run yet and cannot be prepared while a CUDA graph is captured: call the operator once "
            "with the same shapes, dtypes and layouts before capturing"
        )


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class Prepared:
    """What has run and can therefore be captured. Of very many, the first ones are forgotten."""

    def __init__(self) -> None:
        self._keys: dict[Hashable, None] = {}

    def is_new(self, key: Hashable, what: str) -> bool:
        """Whether ``key`` has not been added; RuntimeError for such a one during capture, see `refuse_capture`."""
        if key in self._keys:
            return False
        refuse_capture(what)
        return True

    def add(self, key: Hashable) -> None:
        """After it has run."""
        if len(self._keys) >= _MOST_REMEMBERED:
            self._keys.pop(next(iter(self._keys)), None)
        self._keys[key] = None


def with_memory_released(call: Callable[[], T]) -> T:
    """``call()``; where it raises torch.OutOfMemoryError once more, after torch has given its unused device memory
    back. The driver and the libraries do not allocate through torch, whose cache may hold all that is left.
    """
    try:
        return call()
    except torch.OutOfMemoryError:
        if _capturing():  # nothing can be freed now
            raise
    torch.cuda.empty_cache()
    return call()
