"""Which backend is fastest on a GPU: measured once for a class of problems, then remembered.

Problems are of one class if they differ in the batch size by less than a factor of 2. The winner is kept in memory and
in a file of the cache directory that names the versions it was measured with; other versions use other files.
``DFFORMER_AUTOTUNE=0`` measures nothing and takes the first backend of the table that runs.

A backend that fails at its first call is dropped for that class with a warning that says why, and the next one runs.
"""

import hashlib
import json
import math
import os
import statistics
import threading
import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib import metadata
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from dfformer_kernels import disk_cache as disk

if TYPE_CHECKING:
    from dfformer_kernels.dispatch import Backend, Kernel, Problem


class Gpu:
    """What the choice depends on outside this package."""

    def name(self, device: int) -> str:
        return torch.cuda.get_device_name(device)

    def capturing(self) -> bool:
        """Whether a CUDA graph is being captured: nothing may be compiled, measured or waited for."""
        return torch.cuda.is_current_stream_capturing()

    def seconds(self, call: Callable[[], object], device: int) -> float:
        """The median time of ten calls, after one more."""
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
        """What a measurement may depend on."""
        versions = {name: _version(name) for name in ("dfformer", "torch", "triton")}
        return versions | {"cuda": str(torch.version.cuda), "hip": str(torch.version.hip)}


class Autotuner:
    """The choices made so far. Any thread may ask; one at a time measures."""

    def __init__(self, gpu: Gpu | None = None) -> None:
        self._gpu = gpu or Gpu()
        self._chosen: dict[tuple[Problem, bool], Backend] = {}
        self._winners: dict[str, str] | None = None  # by class; None until the file is read
        self._dropped: set[tuple[str, str]] = set()  # (class, backend)
        self._lock = threading.RLock()

    def kernel(self, problem: "Problem", candidates: Callable[["Problem"], Sequence["Backend"]]) -> "Kernel":
        """The function that runs ``problem``, which is on a GPU, on the fastest of ``candidates(problem)``.

        While a CUDA graph is captured, a problem that has not run before is run by the class's remembered winner if
        that is prepared, else by the first candidate that is: in the last resort ``torch``, which needs no preparation.
        """
        static = _is_static()
        chosen = self._chosen.get((problem, static))
        if chosen is not None:
            return chosen.kernels[problem.op]
        if self._gpu.capturing():
            return self._prepared(problem, candidates(problem), static).kernels[problem.op]
        return partial(self._first_call, problem, candidates(problem), static)

    def choice(self, problem: "Problem") -> "Backend | None":
        """What runs ``problem`` since its first call; None before that."""
        return self._chosen.get((problem, _is_static()))

    def _prepared(self, problem: "Problem", candidates: Sequence["Backend"], static: bool) -> "Backend":
        winner = None if static else (self._winners or {}).get(self._class_of(problem))
        ready = [backend for backend in candidates if backend.prepared(problem)]
        if not ready:
            names = ", ".join(backend.name for backend in candidates)
            raise RuntimeError(f"call the operator once before capturing a CUDA graph, to prepare one of {names}")
        return next((backend for backend in ready if backend.name == winner), ready[0])

    def _first_call(self, problem: "Problem", candidates: Sequence["Backend"], static: bool, *args: Any) -> Any:
        with self._lock:
            class_ = self._class_of(problem)
            alive = self._alive(class_, candidates)
            *others, last = alive if static else self._by_speed(problem, class_, alive, args)
            for backend in others:
                try:
                    result = backend.kernels[problem.op](*args)
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:
                    self._drop(class_, backend, error)
                else:
                    self._chosen[problem, static] = backend
                    return result
            result = last.kernels[problem.op](*args)  # whatever it raises is the caller's
            self._chosen[problem, static] = last
            return result

    def _by_speed(
        self, problem: "Problem", class_: str, candidates: Sequence["Backend"], args: Sequence[Any]
    ) -> Sequence["Backend"]:
        """The class's winner first, measured if it is not known; without those that fail."""
        winners = self._remembered()
        if len(candidates) > 1 and winners.get(class_) not in [backend.name for backend in candidates]:
            seconds = self._measured(problem, class_, candidates, args)
            if seconds:
                winners[class_] = min(seconds, key=lambda name: seconds[name])
                self._save()
        return sorted(self._alive(class_, candidates), key=lambda backend: backend.name != winners.get(class_))

    def _measured(
        self, problem: "Problem", class_: str, candidates: Sequence["Backend"], args: Sequence[Any]
    ) -> dict[str, float]:
        seconds = {}
        for backend in candidates:
            call = partial(backend.kernels[problem.op], *args)
            try:
                seconds[backend.name] = self._gpu.seconds(call, problem.device_index)
            except torch.OutOfMemoryError:
                continue  # another one needs less, and with more memory free this one runs
            except Exception as error:
                self._drop(class_, backend, error)
        return seconds

    def _alive(self, class_: str, candidates: Sequence["Backend"]) -> Sequence["Backend"]:
        """Those that have not failed; the last resort if all have, so that its error is seen."""
        alive = [backend for backend in candidates if (class_, backend.name) not in self._dropped]
        return alive or candidates[-1:]

    def _drop(self, class_: str, backend: "Backend", error: Exception) -> None:
        self._dropped.add((class_, backend.name))
        _warn_dropped(backend.name, f"{type(error).__name__}: {error}")

    def _class_of(self, problem: "Problem") -> str:
        batch, *plane = problem.shape if "filter" in problem.op else (math.prod(problem.shape),)
        size = "x".join(map(str, (1 << (batch - 1).bit_length(), *plane)))
        dtype = str(problem.dtype).removeprefix("torch.")
        parts = [self._gpu.name(problem.device_index), problem.op, size, f"F={problem.filters}", dtype]
        return ", ".join([*parts, "star_relu"] if problem.star_relu else parts)

    def _remembered(self) -> dict[str, str]:
        if self._winners is None:
            self._winners = self._read()
        return self._winners

    def _read(self) -> dict[str, str]:
        """What the file says; nothing, with a warning, if it is not one that `_save` could have written."""
        name = self._file()
        data = disk.read(name)
        if data is None:
            return {}
        try:
            content = json.loads(data)
            winners = dict(content["winners"])
            if content["versions"] != self._gpu.versions() or not all(isinstance(w, str) for w in winners.values()):
                raise ValueError("it is of other versions or has other content")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            _warn_corrupted(f"{disk.directory() / name}", f"{type(error).__name__}: {error}")
            return {}
        return winners

    def _save(self) -> None:
        """With what other processes have found in the meantime."""
        self._winners = self._read() | self._remembered()
        content = {"versions": self._gpu.versions(), "winners": dict(sorted(self._winners.items()))}
        disk.write(self._file(), json.dumps(content, indent=1).encode())

    def _file(self) -> str:
        versions = json.dumps(self._gpu.versions(), sort_keys=True).encode()
        return f"autotune-{hashlib.sha256(versions).hexdigest()[:16]}.json"


def _is_static() -> bool:
    return os.environ.get("DFFORMER_AUTOTUNE") == "0"


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "absent"


@cache
def _warn_dropped(backend: str, error: str) -> None:
    warnings.warn(
        f"dfformer_kernels' {backend!r} backend failed and another one is used instead: {error}", stacklevel=2
    )


@cache
def _warn_corrupted(path: str, error: str) -> None:
    warnings.warn(f"dfformer_kernels ignores {path}, which it cannot have written ({error})", stacklevel=2)
