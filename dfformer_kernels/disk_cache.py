"""Keeps compiled kernels from one process to the next.

The directory is ``DFFORMER_CACHE_DIR``, else ``$XDG_CACHE_HOME/dfformer``, else ``~/.cache/dfformer``. Any number of
processes may read and write at once: a file appears complete or not at all. A lost file costs time, but never changes
a result, so a directory that cannot be written only causes a warning.
"""

import os
import tempfile
from pathlib import Path

from dfformer_kernels.warn_once import warn_once


def directory() -> Path:
    if chosen := os.environ.get("DFFORMER_CACHE_DIR"):
        return Path(chosen)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dfformer"
    except RuntimeError:  # the user has no home directory
        return Path(os.devnull) / "dfformer"  # which cannot be written


def read(name: str) -> bytes | None:
    """The data last written under ``name``; None if there are none, or they cannot be read."""
    try:
        return (directory() / name).read_bytes()
    except OSError:
        return None


def write(name: str, data: bytes) -> None:
    """Writes ``data`` under ``name``; if that is impossible, warns once per directory."""
    folder = directory()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=f".{name}.") as temporary:
            file = Path(temporary) / name
            file.touch(mode=0o600)
            file.write_bytes(data)
            file.replace(folder / name)
    except OSError as error:  # e.g. the disk is full
        reason = error.strerror or error  # without the name of the temporary folder, another one each time
        warn_once(
            f"dfformer_kernels cannot keep files in {folder} ({reason}); kernels will be compiled again in "
            "every process. DFFORMER_CACHE_DIR names another directory."
        )
