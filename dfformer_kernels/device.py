"""What the GPU backends share: they refuse to prepare anything during capture, and release unused memory."""

from collections.abc import Callable, Hashable
from typing import TypeVar

import torch

T = TypeVar("T")

_MOST_REMEMBERED = 1 << 14


def refuse_capture(what: str) -> None:
    """Raises RuntimeError while torch's current stream is being captured into a CUDA graph.

    ``what`` would first have to be compiled, loaded, planned or measured, which a capture does not allow.
    """
    if capturing():
        raise RuntimeError(
            f"{what} has not run yet and cannot be prepared while a CUDA graph is captured: call the operator once "
            "with the same shapes, dtypes and layouts before capturing"
        )


def capturing() -> bool:
    """Whether torch's current stream is being captured into a CUDA graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class Prepared:
    """What has run before, and can therefore be captured. The oldest entries are forgotten when there are very many."""

    def __init__(self) -> None:
        self._keys: dict[Hashable, None] = {}

    def is_new(self, key: Hashable, what: str) -> bool:
        """Whether ``key`` has not been added. During capture a new key raises RuntimeError, see `refuse_capture`."""
        if key in self._keys:
            return False
        refuse_capture(what)
        return True

    def add(self, key: Hashable) -> None:
        """Adds ``key``, after it has run."""
        if len(self._keys) >= _MOST_REMEMBERED:
            self._keys.pop(next(iter(self._keys)), None)
        self._keys[key] = None


def with_memory_released(call: Callable[[], T]) -> T:
    """``call()``. If it raises torch.OutOfMemoryError, it is called again after torch has released unused memory.

    The driver and the libraries do not allocate through torch, whose cache may hold all remaining memory.
    """
    try:
        return call()
    except torch.OutOfMemoryError:
        if capturing():  # nothing can be freed now
            raise
    torch.cuda.empty_cache()
    return call()
