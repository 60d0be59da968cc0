"""Measures which backend is fastest on a GPU, if ``DFFORMER_AUTOTUNE=1`` is set, and remembers the result.

A backend that runs out of memory is skipped, because another may need less.

A measurement holds for a class of problems whose batch sizes differ by less than a factor of 2, and until the process
ends. Another process measures again and may find another winner, whose results can differ in the last bits.
"""

import math
import statistics
import threading
from collections.abc import Callable, Mapping
from itertools import pairwise

import torch

from dfformer_kernels.device import refuse_capture
from dfformer_kernels.problem import KernelBuildError, Problem


class Gpu:
    """The parts of the choice that depend on the machine."""

    def name(self, device: int) -> str:
        return torch.cuda.get_device_name(device)

    def seconds(self, call: Callable[[], object], device: int) -> float:
        """The median time of ten calls, after one call to warm up."""
        with torch.cuda.device(device):
            call()
            events = [torch.cuda.Event(enable_timing=True) for _ in range(11)]
            events[0].record()
            for event in events[1:]:
                call()
                event.record()
            events[-1].synchronize()
            return statistics.median(a.elapsed_time(b) for a, b in pairwise(events)) / 1e3


class Autotuner:
    """The choices made so far. Any thread may ask for a choice; only one thread measures at a time."""

    def __init__(self, gpu: Gpu | None = None) -> None:
        self._gpu = gpu or Gpu()
        self._chosen: dict[Problem, str] = {}
        self._winners: dict[tuple[str, Problem], str] = {}  # by class of problems
        self._lock = threading.RLock()

    def choice(self, problem: Problem) -> str | None:
        """The name of the fastest backend for ``problem``; None until `measure` has found it."""
        return self._chosen.get(problem)

    def measure(self, problem: Problem, calls: Mapping[str, Callable[[], object]]) -> str:
        """The name of the fastest of ``calls``, which run ``problem`` on a GPU.

        ``calls`` are by backend, in order of preference. A backend that cannot build its kernel or runs out of memory
        is skipped. If no backend could be timed, the result is the first. Other errors propagate.

        Raises RuntimeError while a CUDA graph is captured.
        """
        refuse_capture(f"{problem.op} on {problem.shape}, whose fastest backend is to be measured,")
        with self._lock:
            if problem in self._chosen:
                return self._chosen[problem]
            class_ = self._class_of(problem)
            winner = next(iter(calls)) if len(calls) == 1 else self._winners.get(class_)
            if winner is None or winner not in calls:
                seconds = self._seconds(problem, calls)
                if not seconds:
                    return next(iter(calls))
                winner = min(seconds, key=lambda name: seconds[name])
                self._winners[class_] = winner
            self._chosen[problem] = winner
            return winner

    def _seconds(self, problem: Problem, calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        """The times of those ``calls`` that run."""
        seconds = {}
        for name, call in calls.items():
            try:
                seconds[name] = self._gpu.seconds(call, problem.device_index)
            except (KernelBuildError, torch.OutOfMemoryError):
                continue  # it may run when more memory is free
        return seconds

    def forget(self, problem: Problem) -> None:
        """Forgets the choice for ``problem``, because the chosen backend failed to run it and is no candidate now."""
        with self._lock:
            self._chosen.pop(problem, None)

    def _class_of(self, problem: Problem) -> tuple[str, Problem]:
        batch, *plane = problem.shape if "filter" in problem.op else (math.prod(problem.shape),)
        like_it = problem._replace(shape=(1 << (batch - 1).bit_length(), *plane), device_index=0)
        return self._gpu.name(problem.device_index), like_it
