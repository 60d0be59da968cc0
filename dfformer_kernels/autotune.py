"""Measures which backend is fastest on a GPU, if ``DFFORMER_AUTOTUNE=1`` is set, and remembers the result.

A backend that runs out of memory is skipped, because another may need less.

A measurement holds for a class of problems whose batch sizes differ by less than a factor of 2. The winner is
kept in memory and in a file of the cache directory. The file names the versions it was measured with, so other versions
use other files.
"""

import hashlib
import json
import math
import statistics
import threading
from collections.abc import Callable, Mapping
from itertools import pairwise

import torch

from dfformer_kernels import disk_cache as disk
from dfformer_kernels.device import refuse_capture
from dfformer_kernels.problem import KernelBuildError, Problem
from dfformer_kernels.versions import version
from dfformer_kernels.warn_once import warn_once


class Gpu:
    """The parts of the choice that depend on the machine: timing and versions."""

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

    def versions(self) -> dict[str, str]:
        """The device and versions that a measurement may depend on."""
        versions = {name: version(name) for name in ("dfformer", "torch", "triton")}
        return versions | {"cuda": str(torch.version.cuda), "hip": str(torch.version.hip)}


class Autotuner:
    """The choices made so far. Any thread may ask for a choice; only one thread measures at a time."""

    def __init__(self, gpu: Gpu | None = None) -> None:
        self._gpu = gpu or Gpu()
        self._chosen: dict[Problem, str] = {}
        self._winners: dict[str, str] = {}  # by class of problems
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
            self._winners = self._read() | self._winners
            winner = next(iter(calls)) if len(calls) == 1 else self._winners.get(class_)
            if winner is None or winner not in calls:
                seconds = self._seconds(problem, calls)
                if not seconds:
                    return next(iter(calls))
                winner = min(seconds, key=lambda name: seconds[name])
                self._keep(class_, winner)
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

    def _keep(self, class_: str, winner: str) -> None:
        # Other processes may have written theirs in the meantime; this one stays with its own.
        self._winners = self._read() | self._winners | {class_: winner}
        content = {"versions": self._gpu.versions(), "winners": dict(sorted(self._winners.items()))}
        disk.write(self._file(), json.dumps(content, indent=1).encode())

    def forget(self, problem: Problem) -> None:
        """Forgets the choice for ``problem``, because the chosen backend failed to run it and is no candidate now."""
        with self._lock:
            self._chosen.pop(problem, None)

    def _class_of(self, problem: Problem) -> str:
        batch, *plane = problem.shape if "filter" in problem.op else (math.prod(problem.shape),)
        like_it = problem._replace(shape=(1 << (batch - 1).bit_length(), *plane), device_index=0)
        return f"{self._gpu.name(problem.device_index)}, {like_it}"

    def _read(self) -> dict[str, str]:
        """The choices in the file. Warns and returns none if no version of this class could have written the file."""
        name = self._file()
        data = disk.read(name)
        if data is None:
            return {}
        try:
            content = json.loads(data)
            winners = content["winners"]
            if content["versions"] != self._gpu.versions() or not all(isinstance(w, str) for w in winners.values()):
                raise ValueError("it is of other versions or has other content")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            path, reason = disk.directory() / name, f"{type(error).__name__}: {error}"
            warn_once(f"dfformer_kernels ignores {path}, which it cannot have written ({reason})")
            return {}
        return winners

    def _file(self) -> str:
        versions = json.dumps(self._gpu.versions(), sort_keys=True).encode()
        return f"autotune-{hashlib.sha256(versions).hexdigest()[:16]}.json"
