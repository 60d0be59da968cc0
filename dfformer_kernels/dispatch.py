"""Decides which backend runs a problem, and collects all unsupported reasons if none can.

The ``backend=`` argument takes precedence, then the innermost ``use_backend`` context, then the environment variable
``DFFORMER_BACKEND``. Naming a backend disables the search. If none is named, the first backend of the table that
supports the problem runs it, or, on a GPU with ``DFFORMER_AUTOTUNE=1``, the fastest that supports it (`autotune`).

Operators in compiled code read the variable when they run. But `star_relu` outside of a filter step is no operator in a
graph that was compiled before a backend was named, and setting the variable later does not change that: set it before.

On a GPU, a kernel may fail to compile or load (`KernelBuildError`). Then the next backend runs the problem, with a
warning that gives the reason, unless the backend was named. A measurement also skips a backend that runs out of memory.
All other errors propagate.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from dfformer_kernels.autotune import Autotuner
from dfformer_kernels.backend import cpu, torch_fft
from dfformer_kernels.backend.cuda import launch as cuda
from dfformer_kernels.backend.cufft import passes as cufft
from dfformer_kernels.problem import KernelBuildError, Problem
from dfformer_kernels.warn_once import warn_once

Kernel = Callable[..., Any]  # (tensors) -> Tensor forward, (grad_y, tensors, needs) -> list[Tensor] backward


@dataclass(frozen=True)
class Backend:
    """A way to run the operators.

    ``kernels`` maps operators' names to functions with the reference's signatures, and a name with "_" added to one
    that writes its result over x.
    """

    name: str
    device: str | None  # device type, None for any
    kernels: Mapping[str, Kernel]
    unavailable_reasons: Callable[[], list[str]]  # why it cannot run anything on this machine
    # Why its kernels cannot run this problem, although it is on its device.
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
    """Every backend in order of preference, with the reasons why it cannot run on this machine; empty if it can."""
    return {backend.name: list(backend.unavailable_reasons()) for backend in TABLE}


def instruction_sets() -> tuple[str, list[str]]:
    """The compiled core's active instruction set, and all that this machine runs; empty if the core is absent."""
    return ("", []) if cpu.unavailable_reasons() else (cpu.core().active_isa(), cpu.core().supported_isas())


def by_name(name: str) -> Backend:
    """The backend of that name; ValueError if there is none."""
    return _BY_NAME[checked_name("name", name)]


def checked_name(argument: str, name: object) -> str:
    if not isinstance(name, str) or name not in _BY_NAME:
        raise ValueError(f"{argument}: expected one of {', '.join(map(repr, _BY_NAME))}, got {name!r}")
    return name


# Which backend is named


@dataclass(eq=False)
class _Choice:
    backend: str
    is_open: bool = True


# The `use_backend` contexts that are open here, outermost first. Generators and tasks that share or copy a context may
# close them in any order, and in other contexts.
_choices: ContextVar[tuple[_Choice, ...]] = ContextVar("dfformer_use_backend_choices", default=())
# The innermost one's backend, kept separately because compiled code is specialised on it.
_requested: ContextVar[str | None] = ContextVar("dfformer_use_backend", default=None)

# Stands for a name in code compiled by a Dynamo that cannot read context variables: the operator reads it instead.
_AT_RUN_TIME = "context"
_DYNAMO_READS_CONTEXT = TorchVersion(torch.__version__) >= "2.14"


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs every operator inside on the named backend, and its backward too, even if that runs later or elsewhere.

    The choice holds for the current context, i.e. for this thread or asyncio task, but not for others. A new thread
    starts without a choice; ``contextvars.copy_context().run`` passes it on. Code compiled with torch before 2.14 looks
    up the choice when it runs, and again for its backward. `linear` and `convolution` have no backends: PyTorch's own
    products run them.

    Args:
        name: one of ``backends()``.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: an operator inside cannot run on this backend; the message has all unsupported reasons.
    """
    choice = _Choice(checked_name("name", name))
    _set_choices((*_choices.get(), choice))
    try:
        yield
    finally:
        choice.is_open = False
        _forget_closed()


def _set_choices(choices: tuple[_Choice, ...]) -> None:
    _choices.set(choices)
    _requested.set(choices[-1].backend if choices else None)


def _forget_closed() -> None:
    choices = _choices.get()
    if not all(choice.is_open for choice in choices):
        _set_choices(tuple(choice for choice in choices if choice.is_open))


def requested_backend(backend: str | None) -> str | None:
    """The backend named by the argument or by `use_backend`, which an operator keeps for its backward.

    With None, the environment or the table decides when the operator runs.
    """
    if backend is not None:
        return checked_name("backend", backend)
    if torch.compiler.is_dynamo_compiling():
        return _requested.get() if _DYNAMO_READS_CONTEXT else _AT_RUN_TIME
    _forget_closed()
    return _requested.get()


def is_named(backend: str | None) -> bool:
    """Whether the argument, `use_backend` or the environment names a backend (when a graph is compiled)."""
    return requested_backend(backend) is not None or bool(os.environ.get("DFFORMER_BACKEND"))


def _named(requested: str | None) -> str | None:
    """The checked name of the backend, from `requested_backend` or else the environment; None if none is named."""
    if requested == _AT_RUN_TIME:
        requested = requested_backend(None)
    if requested is not None:
        return checked_name("backend", requested)
    name = os.environ.get("DFFORMER_BACKEND")
    return checked_name("DFFORMER_BACKEND", name) if name else None


# Which backend runs


def kernel_for(op: str, backend: str | None, tensors: Sequence[Tensor | None], *options: bool) -> Kernel:
    """The kernel that runs ``op`` on ``tensors``, x first, with ``options``.

    ``backend`` is what `requested_backend` returned. Raises ValueError for an unknown backend, and RuntimeError with
    all unsupported reasons if no backend can run this.
    """
    name, problem = _named(backend), Problem.of(op, tensors, *options)
    if name is None and problem.device == "cuda":
        return partial(_run_on_gpu, problem)
    return select(problem, name).kernels[op]


def overwriting_kernel(op: str, backend: str | None, tensors: Sequence[Tensor | None], *options: bool) -> Kernel | None:
    """The kernel that writes the result of ``op`` over x on a CPU; None if the backend that runs ``op`` has none."""
    return select(Problem.of(op, tensors, *options), _named(backend)).kernels.get(f"{op}_")


@lru_cache(maxsize=1024)
def select(problem: Problem, name: str | None = None) -> Backend:
    """The backend that runs ``problem``: the named one, or the first of the table that supports it.

    Raises RuntimeError with all unsupported reasons if there is none.
    """
    return candidates(problem, name)[0]


def candidates(problem: Problem, name: str | None = None) -> tuple[Backend, ...]:
    """All backends that support ``problem``, in order of preference; only the one called ``name`` if it is given.

    Raises RuntimeError with all unsupported reasons if there are none. The reasons of backends of other devices
    are only read for that message, because this may load their libraries.
    """
    considered = TABLE if name is None else (_BY_NAME[name],)
    here = [backend for backend in considered if backend.device in (None, problem.device)]
    # A named backend tries again to build its kernel.
    supporting = [b for b in here if not b.unsupported_reasons(problem) and (name or not _build_error(b, problem))]
    if not supporting:
        lines = [
            f"  {b.name}: {'; '.join(b.unsupported_reasons(problem) or [_build_error(b, problem)])}" for b in considered
        ]
        raise RuntimeError("\n".join([f"no backend can run {problem}:", *lines]))
    if supporting[0] is TABLE[-1] and name is None:
        for backend in here:
            if reasons := backend.unavailable_reasons():
                warn_once(
                    f"dfformer_kernels' {backend.name!r} backend is not available and torch.fft is used instead, which "
                    f"is slower: {'; '.join(reasons)}. DFFORMER_BACKEND=torch silences this."
                )
    return tuple(supporting)


def _run_on_gpu(problem: Problem, *args: Any) -> Any:
    """Runs the operator on the first, or the fastest, candidate whose kernel can be built."""
    while True:
        backend = _fastest(problem, args) if _autotunes() else select(problem)
        try:
            return _run_or_rule_out(backend, problem, *args)
        except KernelBuildError:
            continue


def _autotunes() -> bool:
    value = os.environ.get("DFFORMER_AUTOTUNE", "")
    if value not in ("", "0", "1"):
        raise ValueError(f"DFFORMER_AUTOTUNE: expected '0' or '1', got {value!r}")
    return value == "1"


def _fastest(problem: Problem, args: Sequence[Any]) -> Backend:
    name = autotuner.choice(problem)
    if name is None:
        calls = {found.name: partial(_run_or_rule_out, found, problem, *args) for found in candidates(problem)}
        name = autotuner.measure(problem, calls)
    return _BY_NAME[name]


autotuner = Autotuner()

# Why backends cannot build their kernel for a problem of any batch size.
_build_errors: dict[tuple[str, Problem], str] = {}


def _build_error(backend: Backend, problem: Problem) -> str:
    return _build_errors.get((backend.name, _any_batch(problem)), "")


def _any_batch(problem: Problem) -> Problem:
    return problem._replace(shape=problem.shape[1:])


def _run_or_rule_out(backend: Backend, problem: Problem, *args: Any) -> Any:
    """Runs the operator. If the kernel cannot be built, the next backend runs such problems from now on."""
    try:
        return backend.kernels[problem.op](*args)
    except KernelBuildError as error:
        _build_errors[backend.name, _any_batch(problem)] = str(error)
        select.cache_clear()
        autotuner.forget(problem)
        warn_once(
            f"dfformer_kernels' {backend.name!r} backend cannot build its kernel and another backend is used instead, "
            f"which may be much slower: {error}. DFFORMER_BACKEND={backend.name} makes this an error."
        )
        raise
