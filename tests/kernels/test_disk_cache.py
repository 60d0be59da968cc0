"""Where files are kept from one process to the next, and what becomes of them on a full disk."""

import errno
from pathlib import Path

import pytest

from dfformer_kernels import disk_cache as cache


def test_a_full_disk_is_one_warning_and_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(file: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(file))

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.warns(UserWarning, match="No space left on device"):
        cache.write("name", b"data")
    cache.write("name", b"data")
    assert list(folder.iterdir()) == []
    assert cache.read("name") is None


def test_a_user_without_a_home_directory_is_one_warning(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", fail)
    for name in ("DFFORMER_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    with pytest.warns(UserWarning, match="cannot keep files in .* DFFORMER_CACHE_DIR names another directory"):
        cache.write("name", b"data")
    assert cache.read("name") is None


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"DFFORMER_CACHE_DIR": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/dfformer"),
        ({"XDG_CACHE_HOME": "", "HOME": "/c"}, "/c/.cache/dfformer"),
    ],
)
def test_where_files_are_kept(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str) -> None:
    monkeypatch.delenv("DFFORMER_CACHE_DIR", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache.directory() == Path(expected)
