"""The files a training run can go on from: written whole or not at all, the newest readable one is taken."""

import hashlib
import io
import sys
from pathlib import Path
from typing import IO, Any

import torch

from dfformer.models.checkpoint import CheckpointError, read_pickle
from dfformer.utils.io import write_atomically

_PATTERN = "checkpoint-*.pt"


def save_state(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Writes the checkpoint of ``step`` and removes all but the ``keep`` latest."""
    path = folder / f"checkpoint-{step:08d}.pt"
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getbuffer()

    def write(file: IO[bytes]) -> None:
        file.write(content)
        file.write(_digest(content))  # torch.load passes over what follows the archive, and would not see a flipped bit

    write_atomically(path, write)
    for old in checkpoints(folder)[:-keep]:
        old.unlink()
    return path


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in a run's folder, the latest last."""
    return sorted(folder.glob(_PATTERN))


def _digest(content: bytes | memoryview) -> bytes:
    return hashlib.sha256(content).digest()


def _is_whole(path: Path) -> bool:
    content = memoryview(path.read_bytes())
    return len(content) > 32 and _digest(content[:-32]) == content[-32:]


def load_latest_state(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The latest readable checkpoint, passing over damaged ones with a message; None where there is none at all.

    Raises:
        CheckpointError: there are checkpoints, all damaged.
    """
    found = checkpoints(folder)
    for path in reversed(found):
        if _is_whole(path):
            return path, read_pickle(path)
        print(f"passed over a damaged checkpoint: {path}", file=sys.stderr)
    if found:
        raise CheckpointError(f"{folder}: none of its {len(found)} checkpoints can be read")
    return None
