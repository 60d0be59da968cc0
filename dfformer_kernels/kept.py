"""Constant tensors, such as the matrices of a transform, that are made once and kept in the process."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

TensorsT = TypeVar("TensorsT", bound=tuple[Tensor, ...])


def kept(most: int) -> Callable[[Callable[..., TensorsT]], Callable[..., TensorsT]]:
    """Decorates a function that makes tensors: keeps the results of ``most`` calls, then forgets them all.

    The tensors are constants of a trace, and work in training even if they were made in inference mode. If some are
    not exactly torch.Tensor, the result is not kept: fake tensors, or those of a tracer or of
    torch.func.functionalize, would reach calls that compute.
    """

    def decorator(make: Callable[..., TensorsT]) -> Callable[..., TensorsT]:
        results: dict[tuple[object, ...], TensorsT] = {}

        @functools.wraps(make)
        def get(*key: object) -> TensorsT:
            found = results.get(key)
            if found is not None:
                return found
            with torch.inference_mode(False), _untraced():
                made = make(*key)
            if all(type(t) is Tensor and not torch._is_functional_tensor(t) for t in made):
                if len(results) >= most:
                    results.clear()
                results[key] = made
            return made

        return get

    return decorator


@contextmanager
def _untraced() -> Iterator[None]:
    """Keeps the code inside out of a graph that torch.jit.trace may be recording: it compares a second trace."""
    if not torch.jit.is_tracing():
        yield
        return
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined] # absent from torch's stubs
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]
