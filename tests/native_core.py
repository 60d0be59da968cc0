"""The compiled core in tests: fixtures, guarded tensors and scripts in a process of their own."""

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


BITS = {torch.float32: torch.int32, torch.float64: torch.int64, torch.bfloat16: torch.int16, torch.float16: torch.int16}


X86 = platform.machine() == "x86_64"


ISAS = ["avx512", "avx2", "generic"] if X86 else ["neon"]


class Guarded:
    """A tensor in the middle of a larger one whose margins must stay as they are."""

    MARGIN = 3  # elements: what begins there is aligned to nothing but its element

    def __init__(self, values: Tensor, margin: float) -> None:
        self.n = values.numel()
        edge = values.new_full((self.MARGIN,), margin)
        self.whole = torch.cat([edge, values.flatten(), edge])
        self.before = self.whole.clone()

    @property
    def address(self) -> int:
        return self.whole.data_ptr() + self.MARGIN * self.whole.itemsize

    @property
    def inside(self) -> Tensor:
        return self.whole[self.MARGIN : self.MARGIN + self.n]

    def assert_margins_untouched(self) -> None:
        after, before = (t.view(BITS[t.dtype]) for t in (self.whole, self.before))
        assert torch.equal(after[: self.MARGIN], before[: self.MARGIN])
        assert torch.equal(after[self.MARGIN + self.n :], before[self.MARGIN + self.n :])


def run_script(script: str, timeout: float = 120, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | environment,
        check=False,
    )


def assert_releases_the_gil(run: Callable[[], object]) -> None:
    """Were the GIL held, no time would be read in the middle half of a call."""

    def call() -> tuple[float, float]:
        start = time.perf_counter()
        run()
        return start, time.perf_counter()

    def seen_during_a_call(pool: ThreadPoolExecutor) -> bool:
        running, times = pool.submit(call), []
        while not running.done():
            times.append(time.perf_counter())
        start, end = running.result()
        quarter = (end - start) / 4
        return any(start + quarter < t < end - quarter for t in times)

    with ThreadPoolExecutor(1) as pool:
        # Not of every call: on a busy machine this thread may sleep through one, or the other begin late.
        assert sum(seen_during_a_call(pool) for _ in range(10)) >= 5
