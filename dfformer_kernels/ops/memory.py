"""What glibc's malloc does with a model's activations on a CPU, which come and go at every layer."""

import ctypes
import sys
from functools import cache

import torch

# From this size on glibc's malloc maps every block afresh and gives it back when it is freed; `cpu.empty` does not.
MAPPED_AFRESH = 32 * 2**20

# Below it, glibc gives back what exceeds twice the largest block that was ever mapped and freed, so that a model whose
# activations come and go would fault them in again at every layer. One block just under the limit, never touched,
# raises that to 64 MiB.
torch.empty(MAPPED_AFRESH - 2**16, dtype=torch.uint8)

# Parameters of glibc's mallopt.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_NEVER = -1

_keeps_freed = False


@cache
def keep_freed() -> None:
    """From the first call on, glibc keeps what is freed, blocks above `MAPPED_AFRESH` too: what a training step's
    backward frees the next step's forward wants again. ``malloc_trim(0)`` gives it back."""
    global _keeps_freed
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:  # not every libc has it
        mallopt(_TRIM_THRESHOLD, _NEVER)
        mallopt(_MMAP_THRESHOLD, 2**31 - 1)
        _keeps_freed = True


def keeps_freed() -> bool:
    return _keeps_freed
