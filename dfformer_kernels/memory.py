"""Allocating large CPU tensors without faulting in every page of them at every call."""

import ctypes
import mmap
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

# glibc keeps smaller blocks for the next call; one this large it maps afresh and gives back when it is freed, however
# often it is needed.
MAPPED_AFRESH = 32 * 2**20


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """An uninitialised contiguous tensor of ``shape`` with the dtype and device of ``like``, on huge pages where it
    would otherwise cost a page fault for every 4 KiB."""
    t = torch.empty(tuple(shape), dtype=like.dtype, device=like.device)
    if t.is_cpu and t.nbytes >= MAPPED_AFRESH and sys.platform == "linux":
        _advise_huge_pages(t)
    return t


def _advise_huge_pages(t: Tensor) -> None:
    # Only advice: where the kernel does not take it, nothing changes. Only whole pages of the tensor itself.
    first = -(-t.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (t.data_ptr() + t.nbytes - first) // mmap.PAGESIZE * mmap.PAGESIZE
    libc = ctypes.CDLL(None)
    libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)
