"""The one policy: which backend runs a problem, and every reason when none does.

Precedence: the ``backend=`` argument, then the ``use_backend`` context, then the environment variable
``DFFORMER_BACKEND``, then the first backend of the table that supports the problem.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dfformer_kernels import cpu, reference

Kernel = Callable[..., Any]  # (tensors) -> Tensor forward, (grad_y, tensors, needs) -> list[Tensor] backward


class Problem(NamedTuple):
    """What a backend needs to know to accept or refuse: operator name, device type, dtype and shape of ``x``."""

    op: str
    device: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Backend:
    """One way to run the operators; ``kernels`` maps operators' names to functions with the reference's signatures."""

    name: str
    device: str | None  # device type, None for any
    kernels: Mapping[str, Kernel]
    unavailable_reasons: Callable[[], list[str]]  # why it cannot run anything on this machine
    refusals: Callable[[str, tuple[int, ...]], list[str]] = lambda op, shape: []  # why it cannot do op on such an x

    def unsupported_reasons(self, problem: Problem) -> list[str]:
        """Why it cannot run ``problem``; empty if it can."""
        reasons = self.unavailable_reasons()
        if self.device not in (None, problem.device):
            reasons.append(f"it runs on {self.device}, x is on {problem.device}")
        if problem.op not in self.kernels:
            reasons.append(f"it has no {problem.op} kernel, only {', '.join(self.kernels)}")
        return reasons or self.refusals(problem.op, problem.shape)


TABLE: tuple[Backend, ...] = (
    Backend("cpu", "cpu", cpu.KERNELS, cpu.unavailable_reasons, cpu.refusals),
    Backend("torch", None, reference.KERNELS, list),
)
_BY_NAME = {backend.name: backend for backend in TABLE}

_forced: str | None = None


def backends() -> dict[str, list[str]]:
    """Every backend in order of preference, with the reasons it cannot run on this machine (empty: it can)."""
    return {backend.name: backend.unavailable_reasons() for backend in TABLE}


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs every operator in the block, and its backward whenever that happens, on the named backend.

    The choice is process-wide while the block is active. Raises ValueError for an unknown name; an operator the
    backend cannot run raises RuntimeError with every reason.
    """
    global _forced
    previous, _forced = _forced, checked_name("name", name)
    try:
        yield
    finally:
        _forced = previous


def requested_backend(backend: str | None) -> str | None:
    """The backend asked for by argument or context; None leaves it to the environment or the table."""
    return _forced if backend is None else backend


def by_name(name: str) -> Backend:
    """The backend of that name; ValueError if there is none."""
    return _BY_NAME[checked_name("name", name)]


def checked_name(argument: str, name: str) -> str:
    if name not in _BY_NAME:
        raise ValueError(f"{argument}: got {name!r}, accepted are {', '.join(map(repr, _BY_NAME))}")
    return name


def kernel_for(op: str, backend: str | None, x: Tensor) -> Kernel:
    """The kernel of ``op`` that runs ``x``: on ``backend``, or where that is None as the environment and table say.

    Raises ValueError for an unknown backend, RuntimeError with every reason if none can run this.
    """
    if backend is not None:
        checked_name("backend", backend)
    elif name := os.environ.get("DFFORMER_BACKEND"):
        backend = checked_name("DFFORMER_BACKEND", name)
    return select(Problem(op, x.device.type, x.dtype, tuple(x.shape)), backend).kernels[op]


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Autocast off inside, where it is on; entering ``torch.autocast`` when it is not would cost microseconds."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


@lru_cache(maxsize=1024)
def select(problem: Problem, name: str | None = None) -> Backend:
    """The backend that runs ``problem``: the named one, or the first of the table that supports it.

    Raises RuntimeError with every reason if there is none.
    """
    candidates = TABLE if name is None else (_BY_NAME[name],)
    refusals = {}
    for backend in candidates:
        reasons = backend.unsupported_reasons(problem)
        if not reasons:
            return backend
        refusals[backend.name] = reasons
        if name is None and backend.device == problem.device and backend.unavailable_reasons():
            _warn_unavailable(backend.name, "; ".join(backend.unavailable_reasons()))
    lines = [f"  {backend}: {'; '.join(reasons)}" for backend, reasons in refusals.items()]
    raise RuntimeError("\n".join([f"no backend can run {problem}:", *lines]))


@cache
def _warn_unavailable(name: str, reasons: str) -> None:
    warnings.warn(
        f"dfformer_kernels' {name!r} backend is not available and torch.fft is used instead, which is slower: "
        f"{reasons}. DFFORMER_BACKEND=torch silences this.",
        stacklevel=2,
    )
