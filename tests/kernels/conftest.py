"""Tables of backends that tell what runs where."""

from collections.abc import Callable, Iterator

import pytest
from cases import counting

from dfformer_kernels import dispatch
from dfformer_kernels.dispatch import Backend
from dfformer_kernels.warn_once import warn_once


def clear_caches() -> None:
    dispatch.select.cache_clear()
    warn_once.cache_clear()


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Replaces the table of backends; nothing remembered from before, nothing remembered after."""

    def install_table(*table: Backend) -> None:
        monkeypatch.setattr(dispatch, "TABLE", table)
        monkeypatch.setattr(dispatch, "_BY_NAME", {backend.name: backend for backend in table})
        clear_caches()

    yield install_table
    clear_caches()


@pytest.fixture
def calls(install: Callable[..., None]) -> list[str]:
    """What ran where, with two backends that can run anything and one without a compiler or the right device."""
    calls: list[str] = []
    install(
        counting("first", calls), counting("second", calls), counting("broken", calls, "cuda", ("no driver", "no luck"))
    )
    return calls
