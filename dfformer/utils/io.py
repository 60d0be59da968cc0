"""Writes files completely or not at all: after a full disk, an error or a crash the old file is still there.

Also JSON and CSV without surprises.
"""

import csv
import io
import json
import math
import os
import secrets
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A new, empty file in the folder of ``path``, which replaces ``path`` when the block ends without an error.

    The new content is synced to the disk before the old file is replaced, whose permissions it keeps. A symbolic link
    is replaced itself, not its target. The folder is created if necessary.

    Raises:
        IsADirectoryError: ``path`` is a folder. OSError: the file cannot be written, the disk is full for example.
    """
    path = Path(path)
    if path.is_dir() and not path.is_symlink():
        raise IsADirectoryError(f"expected the name of a file, got the folder {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name[:40]}.{secrets.token_hex(4)}.partial")  # a name may have 255 bytes
    try:
        temporary.touch(exist_ok=False)
        like = path if path.is_file() and not path.is_symlink() else temporary
        mode = stat.S_IMODE(like.stat().st_mode)
        yield temporary
        _sync(temporary, os.O_RDWR)
        temporary.chmod(mode)
        temporary.replace(path)
        if os.name == "posix":  # elsewhere a folder cannot be opened
            with suppress(OSError):  # some network file systems do not support it; the file is already in place
                _sync(path.parent, os.O_RDONLY)
    finally:
        temporary.unlink(missing_ok=True)


def remove_partial(folder: Path) -> None:
    """Removes the temporary files of killed writers from ``folder``, in which no writer may be active."""
    for path in folder.glob(f".?*.{'[0-9a-f]' * 8}.partial"):
        path.unlink(missing_ok=True)


def write_atomically(path: str | Path, content: bytes | Callable[[IO[bytes]], Any]) -> None:
    """Writes ``content``, or what a function writes into a binary file, to ``path``; see `replacing`."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        content(file) if callable(content) else file.write(content)


def write_json(path: str | Path, content: Any) -> None:
    """Writes ``content`` as JSON; numbers that are not finite become null, which every parser accepts."""
    text = json.dumps(finite(content), indent=2, allow_nan=False) + "\n"
    write_atomically(path, text.encode())


def as_csv(columns: Iterable[str], rows: Iterable[Mapping[str, Any]]) -> bytes:
    """A table as CSV with a header; characters that are not Unicode, as in names of files, become escapes.

    Raises:
        ValueError: a row has a key that is no column.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode(errors="backslashreplace")


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """``object_pairs_hook`` of json: ValueError for an object with a key twice, of which json would keep the last."""
    content = dict(pairs)
    if len(content) < len(pairs):
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"{key[:60]!r}: is repeated")
    return content


def finite(content: Any) -> Any:
    """``content`` with None in place of numbers that are not finite, which strict JSON does not have."""
    if isinstance(content, dict):
        return {name: finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
