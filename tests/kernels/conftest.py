"""Tables of backends that tell what runs where, a cache directory, and the libraries that compute matrix products."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cases import counting

from dfformer_kernels import dispatch
from dfformer_kernels.dispatch import Backend
from dfformer_kernels.ops import linear
from dfformer_kernels.warn_once import warn_once


def clear_caches() -> None:
    dispatch.select.cache_clear()
    warn_once.cache_clear()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache directory; nothing warned about yet."""
    monkeypatch.setenv("DFFORMER_CACHE_DIR", str(tmp_path))
    warn_once.cache_clear()
    return tmp_path


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


@pytest.fixture(params=["mkl", "onednn"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What ordinary float32 products are, of any size, whoever made this processor."""
    if request.param == "onednn" and not linear.HAS_ONEDNN:
        pytest.skip("this build of torch has no oneDNN")
    monkeypatch.setattr(linear, "MKL_IS_SLOW", request.param == "onednn")
    monkeypatch.setattr(linear, "is_large", lambda x, weight: True)
    return request.param
