"""The one policy: which backend runs a problem, and every reason when none does.

Precedence: the ``backend=`` argument, then the innermost ``use_backend`` block, then the environment variable
``DFFORMER_BACKEND``. Where none of them names one it is the first backend of the table that supports the problem; on a
GPU, with ``DFFORMER_AUTOTUNE=1``, the fastest of those that do (`autotune`).

On a GPU a kernel that cannot be compiled or loaded (`KernelBuildError`) makes way for the next backend, with a warning
that says why, unless its backend was named. Every other error is the caller's.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from dfformer_kernels.autotune import Autotuner
from dfformer_kernels.backends import cpu, torch_fft
from dfformer_kernels.backends.cuda import launch as cuda
from dfformer_kernels.backends.cufft import passes as cufft
from dfformer_kernels.problem import KernelBuildError, Problem

Kernel = Callable[..., Any]  # (tensors) -> Tensor forward, (grad_y, tensors, needs) -> list[Tensor] backward


@dataclass(frozen=True)
class Backend:
    """One way to run the operators; ``kernels`` maps operators' names to functions with the reference's signatures."""

    name: str
    device: str | None  # device type, None for any
    kernels: Mapping[str, Kernel]
    unavailable_reasons: Callable[[], list[str]]  # why it cannot run anything on this machine
    # Why its kernels cannot run this problem, which is on its device, though they run others.
    kernel_unsupported_reasons: Callable[[Problem], list[str]] = lambda problem: []

    def unsupported_reasons(self, problem: Problem) -> list[str]:
        """Why it cannot run ``problem``; empty if it can."""
        reasons = list(self.unavailable_reasons())
        if self.device not in (None, problem.device):
            reasons.append(f"it runs on {self.device}, x is on {problem.device}")
        if problem.op not in self.kernels:
            reasons.append(f"it has no {problem.op} kernel, only {', '.join(self.kernels)}")
        return reasons or self.kernel_unsupported_reasons(problem)


TABLE: tuple[Backend, ...] = (
    Backend("cpu", "cpu", cpu.KERNELS, cpu.unavailable_reasons, cpu.unsupported_reasons),
    Backend("cuda", "cuda", cuda.KERNELS, cuda.unavailable_reasons, cuda.unsupported_reasons),
    Backend("cufft", "cuda", cufft.KERNELS, cufft.unavailable_reasons, cufft.unsupported_reasons),
    Backend("torch", None, torch_fft.KERNELS, list),
)
_BY_NAME = {backend.name: backend for backend in TABLE}


def backends() -> dict[str, list[str]]:
    """Every backend in order of preference, with the reasons it cannot run on this machine (empty: it can)."""
    return {backend.name: list(backend.unavailable_reasons()) for backend in TABLE}


def by_name(name: str) -> Backend:
    """The backend of that name; ValueError if there is none."""
    return _BY_NAME[checked_name("name", name)]


def checked_name(argument: str, name: str) -> str:
    if name not in _BY_NAME:
        raise ValueError(f"{argument}: got {name!r}, accepted are {', '.join(map(repr, _BY_NAME))}")
    return name


# Which one is asked for


@dataclass(eq=False)
class _Block:
    backend: str
    is_open: bool = True


# The `use_backend` blocks of this context, outermost first. Generators and tasks that share or copy a context end them
# in any order, and in other contexts.
_blocks: ContextVar[tuple[_Block, ...]] = ContextVar("dfformer_use_backend_blocks", default=())
# The innermost one's backend, by itself: what compiled code is specialised on.
_requested: ContextVar[str | None] = ContextVar("dfformer_use_backend", default=None)

# In place of a name, in code compiled by a Dynamo that cannot read a context variable: the operator reads it.
_AT_RUN_TIME = "context"
_DYNAMO_READS_CONTEXT = TorchVersion(torch.__version__) >= "2.14"


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs every operator in the block, and its backward whenever and wherever that happens, on the named backend.

    The choice is the current context's: that of this thread or asyncio task, not of others. A new thread begins without
    one. ``contextvars.copy_context().run`` takes it along. Code compiled with torch before 2.14 looks the choice up
    when it runs, backward included.

    Raises ValueError for an unknown name; an operator the backend cannot run raises RuntimeError with every reason.
    """
    block = _Block(checked_name("name", name))
    _set_blocks((*_blocks.get(), block))
    try:
        yield
    finally:
        block.is_open = False
        _forget_closed_blocks()


def _set_blocks(blocks: tuple[_Block, ...]) -> None:
    _blocks.set(blocks)
    _requested.set(blocks[-1].backend if blocks else None)


def _forget_closed_blocks() -> None:
    blocks = _blocks.get()
    if not all(block.is_open for block in blocks):
        _set_blocks(tuple(block for block in blocks if block.is_open))


def requested_backend(backend: str | None) -> str | None:
    """The backend asked for by the argument or a `use_backend` block, which an operator keeps for its backward; None
    leaves it to the environment or the table when it runs.
    """
    if backend is not None:
        return backend
    if torch.compiler.is_dynamo_compiling():
        return _requested.get() if _DYNAMO_READS_CONTEXT else _AT_RUN_TIME
    _forget_closed_blocks()
    return _requested.get()


def _named(requested: str | None) -> str | None:
    """The backend's name, checked: of what `requested_backend` returned, else the environment's; None if there is
    none.
    """
    if requested == _AT_RUN_TIME:
        requested = requested_backend(None)
    if requested is not None:
        return checked_name("backend", requested)
    name = os.environ.get("DFFORMER_BACKEND")
    return checked_name("DFFORMER_BACKEND", name) if name else None


# Which one runs


def kernel_for(op: str, backend: str | None, tensors: Sequence[Tensor | None], *options: bool) -> Kernel:
    """The kernel of ``op`` that runs its ``tensors``, x first, with its ``options``, on ``backend`` as
    `requested_backend` returned it.

    Raises ValueError for an unknown backend, RuntimeError with every reason if none can run this.
    """
    name, problem = _named(backend), Problem.of(op, tensors, *options)
    if name is None and problem.device == "cuda":
        return partial(_run_on_gpu, problem)
    return select(problem, name).kernels[op]


def chosen(problem: Problem) -> Backend | None:
    """What runs ``problem`` where no argument or context names a backend; None while it has yet to be measured."""
    name = _named(None)
    if name is None and problem.device == "cuda" and _autotunes():
        name = autotuner.choice(problem)
        return None if name is None else by_name(name)
    return select(problem, name)


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
    # A backend that was named tries again to build its kernel.
    supporting = [b for b in here if not b.unsupported_reasons(problem) and (name or not _build_error(b, problem))]
    if not supporting:
        lines = [
            f"  {b.name}: {'; '.join(b.unsupported_reasons(problem) or [_build_error(b, problem)])}" for b in asked
        ]
        raise RuntimeError("\n".join([f"no backend can run {problem}:", *lines]))
    if supporting[0] is TABLE[-1] and name is None:
        for backend in here:
            if reasons := backend.unavailable_reasons():
                _warn_unavailable(backend.name, "; ".join(reasons))
    return tuple(supporting)


def _run_on_gpu(problem: Problem, *args: Any) -> Any:
    """The operator on the first candidate, or the fastest, whose kernel can be built."""
    while True:
        backend = _fastest(problem, args) if _autotunes() else select(problem)
        try:
            return backend.kernels[problem.op](*args)
        except KernelBuildError as error:
            _rule_out(backend.name, problem, error)


def _autotunes() -> bool:
    value = os.environ.get("DFFORMER_AUTOTUNE", "")
    if value not in ("", "0", "1"):
        raise ValueError(f"DFFORMER_AUTOTUNE: got {value!r}, accepted are '0' and '1'")
    return value == "1"


def _fastest(problem: Problem, args: Sequence[Any]) -> Backend:
    name = autotuner.choice(problem)
    if name is None:
        calls = {backend.name: partial(backend.kernels[problem.op], *args) for backend in candidates(problem)}
        name = autotuner.measure(problem, calls, lambda name, error: _rule_out(name, problem, error))
    return _BY_NAME[name]


autotuner = Autotuner()

# Why backends cannot build their kernel for a problem of any batch size.
_build_errors: dict[tuple[str, Problem], str] = {}


def _build_error(backend: Backend, problem: Problem) -> str:
    return _build_errors.get((backend.name, _any_batch(problem)), "")


def _any_batch(problem: Problem) -> Problem:
    return problem._replace(shape=problem.shape[1:])


def _rule_out(name: str, problem: Problem, error: KernelBuildError) -> None:
    """From now on the next backend runs such problems, in this process."""
    _build_errors[name, _any_batch(problem)] = str(error)
    select.cache_clear()
    autotuner.forget(problem)
    _warn_fallback(name, str(error))


@cache
def _warn_fallback(name: str, reason: str) -> None:
    warnings.warn(
        f"dfformer_kernels' {name!r} backend cannot build its kernel and another backend is used instead, which may be "
        f"much slower: {reason}. DFFORMER_BACKEND={name} makes this an error.",
        stacklevel=2,
    )


@cache
def _warn_unavailable(name: str, reasons: str) -> None:
    warnings.warn(
        f"dfformer_kernels' {name!r} backend is not available and torch.fft is used instead, which is slower: "
        f"{reasons}. DFFORMER_BACKEND=torch silences this.",
        stacklevel=2,
    )


_NOTHING: AbstractContextManager[object] = nullcontext()


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Autocast off inside, where it is on; entering ``torch.autocast`` when it is not would cost microseconds."""
    # The meta device has no autocast, and asking for it raises.
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return _NOTHING
    return torch.autocast(device.type, enabled=False)
