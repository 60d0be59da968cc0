"""The files that a training run resumes from: written atomically; the newest readable one is used."""

import errno
import hashlib
import io
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dfformer.models.checkpoint import CheckpointError, read_pickle
from dfformer.utils.io import remove_partial, write_atomically

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

_PATTERN = "checkpoint-*.pt"


_held: set[Path] = set()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Locks a run's folder for this process. The lock ends with the process, however that ends.

    It is a record lock, so forked worker processes do not inherit it. On a file system without locks there is only a
    warning.

    Raises:
        ValueError: another training uses the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    key = folder.resolve()
    if key in _held:
        raise ValueError(f"output: {folder} is in use by another training of this process")
    with (folder / ".lock").open("a+") as file:
        try:
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ValueError(f"output: {folder} is in use by another training; give another folder") from error
            print(f"{folder}: cannot be locked against a second training ({error.strerror})", file=sys.stderr)
        _held.add(key)
        remove_partial(folder)
        try:
            yield
        finally:
            _held.discard(key)
            if [entry.name for entry in folder.iterdir()] == [".lock"]:  # nothing was trained
                (folder / ".lock").unlink()
                folder.rmdir()


def save_state(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Writes the checkpoint of ``step`` and removes all but the ``keep`` latest."""
    path = folder / f"checkpoint-{step:08d}.pt"
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.write(_digest(buffer.getbuffer()))  # torch.load ignores what follows, and would not notice a flipped bit
    write_atomically(path, buffer.getvalue())
    for old in checkpoints(folder)[:-keep]:
        old.unlink()
    return path


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in a run's folder, the latest last."""
    return sorted(folder.glob(_PATTERN))


def weights(folder: Path) -> list[Path]:
    """The weights for use in a run's folder, as far as they are written."""
    return [path for path in (folder / "last.safetensors", folder / "best.safetensors") if path.exists()]


def _digest(content: bytes | memoryview) -> bytes:
    return hashlib.sha256(content).digest()


def _is_whole(path: Path) -> bool:
    content = memoryview(path.read_bytes())
    return len(content) > 32 and _digest(content[:-32]) == content[-32:]


def load_latest_state(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The latest readable checkpoint, skipping damaged ones with a message; None if there are no checkpoints.

    Raises:
        CheckpointError: there are checkpoints, all damaged.
    """
    found = checkpoints(folder)
    for path in reversed(found):
        if _is_whole(path):
            return path, _checked_state(path, read_pickle(path))
        print(f"skipped a damaged checkpoint: {path}", file=sys.stderr)
    if found:
        raise CheckpointError(f"{folder}: none of its {len(found)} checkpoints can be read")
    return None


def _checked_state(path: Path, state: Any) -> dict[str, Any]:
    """The state, with the types that `save_state` writes: a digest shows that a file is complete, not who wrote it."""
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: is not the state of a training run")
    for name, accepts in _STATE.items():
        if name not in state or not accepts(state[name]):
            raise CheckpointError(f"{path}: {name}: is missing, or not what a training run writes")
    return state


def optimizer_layout(state: dict[str, Any]) -> Any:
    """The structure of an optimizer's state: the names and shapes of each parameter's state, and the groups."""
    kept = {
        name: {key: getattr(value, "shape", ()) for key, value in of.items()} for name, of in state["state"].items()
    }
    return kept, [sorted(group["params"]) for group in state["param_groups"]]


def _is_number(value: Any) -> bool:
    return (type(value) in (int, float) and abs(value) < 2**63) or value != value  # a measure may be NaN


def _is_history(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(row, dict) and {"epoch", "step", "train_loss"} <= row.keys() and all(map(_is_number, row.values()))
        for row in value
    )


def _is_config(value: Any) -> bool:
    try:
        return isinstance(value, str) and isinstance(json.loads(value), dict)
    except (ValueError, RecursionError):
        return False


_STATE: dict[str, Callable[[Any], bool]] = {
    "state_dict": lambda value: isinstance(value, dict) and all(isinstance(t, torch.Tensor) for t in value.values()),
    "optimizer": lambda value: isinstance(value, dict),
    "scaler": lambda value: isinstance(value, dict),
    "step": lambda value: type(value) is int and 0 <= value < 2**63,
    "loss_sum": lambda value: type(value) is float and _is_number(value),
    "history": _is_history,
    "config": _is_config,
}
