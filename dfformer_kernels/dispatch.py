"""The one policy: which backend runs a problem, and every reason when none does.

Precedence: the ``backend=`` argument, then the ``use_backend`` context, then the environment variable
``DFFORMER_BACKEND``. Where none of them names one: on a CPU the first backend of the table that supports the problem,
on a GPU the fastest of those that do, as measured once (`autotune`).
"""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dfformer_kernels import reference
from dfformer_kernels.autotune import Autotuner
from dfformer_kernels.backends import cpu
from dfformer_kernels.backends.cuda import launch as cuda
from dfformer_kernels.backends.cufft import passes as cufft

Kernel = Callable[..., Any]  # (tensors) -> Tensor forward, (grad_y, tensors, needs) -> list[Tensor] backward


class Problem(NamedTuple):
    """What a backend needs to know to accept or refuse: operator name, device type, dtype and shape of ``x``, F of a
    dynamic filter, whether StarReLU is part of it, device index.
    """

    op: str
    device: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    filters: int = 0
    star_relu: bool = False
    device_index: int = 0

    @staticmethod
    def of(op: str, tensors: Sequence[Tensor | None]) -> "Problem":
        """Of the operator's tensor arguments, x first, or those of its backward without grad_y; checked before."""
        x, logits, *_ = tensors
        assert x is not None
        filters = logits.shape[1] if logits is not None and op.startswith("dynamic_filter") else 0
        return _problem(op, x.device, x.dtype, x.shape, filters, tensors[-1] is not None)


@lru_cache(maxsize=1024)  # at every call: to find it takes half the time of making it
def _problem(
    op: str, device: torch.device, dtype: torch.dtype, shape: torch.Size, filters: int, star_relu: bool
) -> Problem:
    return Problem(op, device.type, dtype, tuple(shape), filters, star_relu, device.index or 0)


@dataclass(frozen=True)
class Backend:
    """One way to run the operators; ``kernels`` maps operators' names to functions with the reference's signatures."""

    name: str
    device: str | None  # device type, None for any
    kernels: Mapping[str, Kernel]
    unavailable_reasons: Callable[[], list[str]]  # why it cannot run anything on this machine
    # Why it cannot run this problem, which is on its device, though it runs others.
    refusals: Callable[[Problem], list[str]] = lambda problem: []
    # Whether it would run this problem now without compiling, loading or planning anything first.
    prepared: Callable[[Problem], bool] = lambda problem: True

    def unsupported_reasons(self, problem: Problem) -> list[str]:
        """Why it cannot run ``problem``; empty if it can."""
        reasons = self.unavailable_reasons()
        if self.device not in (None, problem.device):
            reasons.append(f"it runs on {self.device}, x is on {problem.device}")
        if problem.op not in self.kernels:
            reasons.append(f"it has no {problem.op} kernel, only {', '.join(self.kernels)}")
        return reasons or self.refusals(problem)


TABLE: tuple[Backend, ...] = (
    Backend("cpu", "cpu", cpu.KERNELS, cpu.unavailable_reasons, lambda p: cpu.refusals(p.op, p.shape)),
    Backend("cuda", "cuda", cuda.KERNELS, cuda.unavailable_reasons, cuda.refusals, cuda.prepared),
    Backend(
        *("cufft", "cuda", cufft.KERNELS, cufft.unavailable_reasons),
        refusals=lambda p: cufft.refusals(p.op, p.shape),
        prepared=lambda p: False,  # Triton compiles, and cuFFT plans, for what it has not seen
    ),
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


def kernel_for(op: str, backend: str | None, tensors: Sequence[Tensor | None]) -> Kernel:
    """The kernel of ``op`` that runs its ``tensors``, x first: on ``backend``, or if None as described above.

    Raises ValueError for an unknown backend, RuntimeError with every reason if none can run this.
    """
    backend = _from_environment() if backend is None else checked_name("backend", backend)
    problem = Problem.of(op, tensors)
    if backend is None and problem.device == "cuda":
        return autotuner.kernel(problem, candidates)
    return select(problem, backend).kernels[op]


def chosen(problem: Problem) -> Backend | None:
    """What runs ``problem`` where no argument or context names a backend; None while a GPU has yet to run it first."""
    name = _from_environment()
    if name is None and problem.device == "cuda":
        return autotuner.choice(problem)
    return select(problem, name)


def _from_environment() -> str | None:
    name = os.environ.get("DFFORMER_BACKEND")
    return checked_name("DFFORMER_BACKEND", name) if name else None


_NOTHING: AbstractContextManager[object] = nullcontext()


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Autocast off inside, where it is on; entering ``torch.autocast`` when it is not would cost microseconds."""
    if not torch._C._is_any_autocast_enabled():
        return _NOTHING
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return _NOTHING


@lru_cache(maxsize=1024)
def select(problem: Problem, name: str | None = None) -> Backend:
    """The backend that runs ``problem``: the named one, or the first of the table that supports it.

    Raises RuntimeError with every reason if there is none.
    """
    return candidates(problem, name)[0]


def candidates(problem: Problem, name: str | None = None) -> tuple[Backend, ...]:
    """All backends that support ``problem``, in order of preference; of those with that name where one is given.

    Raises RuntimeError with every reason if there are none. Backends of other devices are not asked, which could load
    their libraries, unless for that error.
    """
    asked = TABLE if name is None else (_BY_NAME[name],)
    here = [backend for backend in asked if backend.device in (None, problem.device)]
    supporting = tuple(backend for backend in here if not backend.unsupported_reasons(problem))
    if not supporting:
        lines = [f"  {backend.name}: {'; '.join(backend.unsupported_reasons(problem))}" for backend in asked]
        raise RuntimeError("\n".join([f"no backend can run {problem}:", *lines]))
    if supporting[0] is TABLE[-1] and name is None:
        for backend in here:
            if reasons := backend.unavailable_reasons():
                _warn_unavailable(backend.name, "; ".join(reasons))
    return supporting


autotuner = Autotuner()


@cache
def _warn_unavailable(name: str, reasons: str) -> None:
    warnings.warn(
        f"dfformer_kernels' {name!r} backend is not available and torch.fft is used instead, which is slower: "
        f"{reasons}. DFFORMER_BACKEND=torch silences this.",
        stacklevel=2,
    )
