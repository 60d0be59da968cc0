"""Keeping CPU tensors' memory from being faulted in, page by page, at every call."""

import ctypes
import mmap
import sys
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

# From this size on glibc's malloc maps every block afresh and gives it back when it is freed.
MAPPED_AFRESH = 32 * 2**20

# Below it, glibc gives back what exceeds twice the largest block that was ever mapped and freed, so that a model whose
# activations come and go would fault them in again at every layer. One block just under the limit, never touched,
# raises that to 64 MiB.
torch.empty(MAPPED_AFRESH - 2**16, dtype=torch.uint8)

# Parameters of glibc's mallopt.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_NEVER = -1


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """An uninitialised contiguous tensor of ``shape`` with the dtype and device of ``like``, on huge pages where it
    would be mapped afresh: one fault for 2 MiB instead of 512."""
    t = torch.empty(tuple(shape), dtype=like.dtype, device=like.device)
    if t.is_cpu and t.nbytes >= MAPPED_AFRESH and sys.platform == "linux":
        _advise_huge_pages(t)
    return t


@cache
def keep_freed() -> None:
    """From the first call on, glibc keeps what is freed, blocks above `MAPPED_AFRESH` too: what a training step's
    backward frees the next step's forward wants again. ``malloc_trim(0)`` gives it back."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:  # not every libc has it
        mallopt(_TRIM_THRESHOLD, _NEVER)
        mallopt(_MMAP_THRESHOLD, 2**31 - 1)


def _advise_huge_pages(t: Tensor) -> None:
    # Only advice: where the kernel does not take it, nothing changes. Only whole pages of the tensor itself.
    first = -(-t.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (t.data_ptr() + t.nbytes - first) // mmap.PAGESIZE * mmap.PAGESIZE
    libc = ctypes.CDLL(None)
    libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)
