"""Files kept from one process to the next: compiled kernels, and which backend was fastest.

They lie in ``DFFORMER_CACHE_DIR``, else ``$XDG_CACHE_HOME/dfformer``, else ``~/.cache/dfformer``. Any number of
processes may read and write at once: a file appears complete or not at all. Losing one costs time, never a result, so
a directory that cannot be written is a warning.
"""

import os
import tempfile
import warnings
from functools import cache
from pathlib import Path


def directory() -> Path:
    if chosen := os.environ.get("DFFORMER_CACHE_DIR"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dfformer"


def read(name: str) -> bytes | None:
    """What was last written under ``name``; None if nothing was, or it cannot be read."""
    try:
        return (directory() / name).read_bytes()
    except OSError:
        return None


def write(name: str, data: bytes) -> None:
    """Keeps ``data`` under ``name``, or warns once per directory that this is impossible."""
    folder = directory()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=f".{name}.")
    except OSError as error:
        _warn_unwritable(folder, str(error))
        return
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        Path(temporary).replace(folder / name)
    except OSError as error:  # the disk is full, say
        Path(temporary).unlink(missing_ok=True)
        _warn_unwritable(folder, str(error))


@cache
def _warn_unwritable(folder: Path, reason: str) -> None:
    warnings.warn(
        f"dfformer_kernels cannot keep files in {folder} ({reason}); kernels will be compiled and backends measured "
        "again in every process. DFFORMER_CACHE_DIR names another directory.",
        stacklevel=3,
    )
