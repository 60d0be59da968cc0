"""Files written whole or not at all."""

import errno
import json
import os
import stat
from pathlib import Path
from typing import IO, Any

import pytest

from dfformer.utils import io
from dfformer.utils.io import remove_partial, replacing, write_atomically, write_json


def put(content: bytes) -> Any:
    return lambda file: file.write(content)


def test_a_file_is_made_and_replaced_in_a_folder_that_is_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.bin"
    for content in (b"one", b"two"):
        write_atomically(path, put(content))
        assert path.read_bytes() == content
        assert [p.name for p in path.parent.iterdir()] == [path.name]


def full(*args: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def half(file: IO[bytes]) -> None:
    file.write(b"half")
    full()


def into_a_full_device(file: IO[bytes]) -> None:
    """The write stays in a buffer until the file is closed."""
    descriptor = os.open("/dev/full", os.O_WRONLY)
    os.dup2(descriptor, file.fileno())
    os.close(descriptor)
    file.write(b"new")


def interrupt(file: IO[bytes]) -> None:
    raise KeyboardInterrupt


# What is written, and the function that fails.
MOMENTS: dict[str, tuple[Any, tuple[Any, str] | None]] = {
    "writing": (half, None),
    "closing": (into_a_full_device, None),
    "syncing": (put(b"new"), (os, "fsync")),
    "renaming": (put(b"new"), (Path, "replace")),
    "interrupted": (interrupt, None),
}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("before", [None, b"old"])
def test_an_error_leaves_the_old_file_and_nothing_else(
    moment: str, before: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if moment == "closing" and not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    path = tmp_path / "file.bin"
    if before is not None:
        path.write_bytes(before)
    write, failing = MOMENTS[moment]
    if failing:
        monkeypatch.setattr(*failing, full)
    with pytest.raises(KeyboardInterrupt if moment == "interrupted" else OSError):
        write_atomically(path, write)
    assert [p.name for p in tmp_path.iterdir()] == ([] if before is None else [path.name])
    assert before is None or path.read_bytes() == before


def test_permissions_are_those_of_new_files_or_of_the_file_before(tmp_path: Path) -> None:
    path, usual = tmp_path / "file.bin", tmp_path / "usual"
    usual.touch()
    write_atomically(path, put(b"one"))
    assert path.stat().st_mode == usual.stat().st_mode
    path.chmod(0o440)
    write_atomically(path, put(b"two"))
    assert (path.read_bytes(), stat.S_IMODE(path.stat().st_mode)) == (b"two", 0o440)


@pytest.mark.parametrize("kind", ["file", "dangling", "loop", "folder"])
def test_a_symbolic_link_is_replaced_and_its_target_left_alone(kind: str, tmp_path: Path) -> None:
    other, link = tmp_path / "other", tmp_path / "link"
    if kind == "file":
        other.write_bytes(b"a photograph")
    elif kind == "folder":
        other.mkdir()
    link.symlink_to(link if kind == "loop" else other)
    write_atomically(link, put(b"new"))
    assert not link.is_symlink()
    assert link.read_bytes() == b"new"
    if kind == "file":
        assert other.read_bytes() == b"a photograph"
    elif kind == "folder":
        assert not list(other.iterdir())


def test_a_folder_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="expected the name of a file, got the folder "):
        write_atomically(tmp_path, put(b"new"))


def test_names_as_long_as_names_may_be(tmp_path: Path) -> None:
    for name in ("x" * 255, "\N{SNOWMAN}" * 85):
        write_atomically(tmp_path / name, put(b"new"))
        assert (tmp_path / name).read_bytes() == b"new"


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    with replacing(path) as one, replacing(path) as two:
        assert one != two
        one.write_bytes(b"one")
        two.write_bytes(b"two")
    assert path.read_bytes() == b"one", "the last to end"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_folder_that_cannot_be_synced_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network file systems refuse; the new file is in its place by then."""
    sync = io._sync

    def refuse_folders(path: Path, flags: int) -> None:
        if path.is_dir():
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(path, flags)

    monkeypatch.setattr(io, "_sync", refuse_folders)
    write_atomically(tmp_path / "file.bin", put(b"new"))
    assert (tmp_path / "file.bin").read_bytes() == b"new"


def test_json_has_no_numbers_that_json_does_not_know(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_json(path, {"scores": [1.5, float("nan"), (float("inf"), -float("inf"))], "name": "\udce9\n"})

    def refuse(name: str) -> None:
        raise AssertionError(name)

    content = json.loads(path.read_bytes(), parse_constant=refuse)
    assert content == {"scores": [1.5, None, [None, None]], "name": "\udce9\n"}


def test_what_killed_writers_left_is_removed(tmp_path: Path) -> None:
    """And nothing else, however similar its name."""
    kept = ["file.partial", ".hidden", ".a.partial", ".a.0123456789.partial", ".a.0123abcd.partial.txt"]
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / ".never"):
        raise KeyboardInterrupt
    for name in (*kept, ".a.0123abcd.partial", ".b.c.89abcdef.partial"):
        (tmp_path / name).touch()
    remove_partial(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(kept)
