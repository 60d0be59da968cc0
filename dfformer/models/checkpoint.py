"""Checkpoints: official ``.pth`` and ``.safetensors`` in, ``.safetensors`` out, never a free unpickle.

A file written by `save_checkpoint` also says what model it is for, so that `load_model` (and ``dfformer predict``) can
rebuild it without being told.
"""

import argparse
import json
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import timm
import torch
from timm.models import clean_state_dict
from torch import Tensor, nn

from dfformer.models.spectral import SpectralFilter

# Where training scripts keep the weights inside a checkpoint, the averaged ones first.
_NESTED_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model")
_METADATA_KEY = "dfformer"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read, or does not fit the model."""


class Mismatch(NamedTuple):
    """How a state dict differs from a model: names, and for ``wrong_shape`` also both shapes."""

    missing: list[str]
    unexpected: list[str]
    wrong_shape: dict[str, str]
    reinitialised: list[str]  # the classifier, when the number of classes differs

    def __str__(self) -> str:
        parts = {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "wrongly shaped": [f"{name} ({shapes})" for name, shapes in self.wrong_shape.items()],
        }
        return "\n".join(f"{title} ({len(names)}): {', '.join(names)}" for title, names in parts.items() if names)


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict of a checkpoint file and what `save_checkpoint` said about the model ({} for other files).

    ``.pth`` files are read with ``weights_only=True``. DDP's and torch.compile's name prefixes are removed.

    Raises:
        FileNotFoundError; CheckpointError: truncated, unsafe, or no state dict in it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: {path} does not exist")
    content, metadata = _read_safetensors(path) if path.suffix == ".safetensors" else (read_pickle(path), {})
    if isinstance(content, dict):
        nested = next((content[key] for key in _NESTED_KEYS if isinstance(content.get(key), dict)), None)
        content = content if nested is None else nested
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError(f"{path}: holds no state dict (a mapping of names to tensors, or one under a key of "
                              f"{', '.join(_NESTED_KEYS)})")  # fmt: skip
    return clean_state_dict(content), metadata


def read_task(path: str | Path) -> str:
    """The task a checkpoint says it is for; classify for files that do not say."""
    if Path(path).suffix != ".safetensors" or not Path(path).is_file():
        return "classify"
    with _opened(Path(path)) as file:
        return _metadata(file).get("task", "classify")


def load_checkpoint(model: nn.Module, path: str | Path, strict: bool = True) -> Mismatch:
    """Loads a checkpoint file into ``model``.

    Filters stored for another image size are resized to the model's. When only the number of classes differs, the
    classifier's last layer (``head.fc2``) stays as initialised, timm's rule.

    Args:
        model: of `dfformer`; any device and dtype.
        path: see `read_checkpoint`.
        strict: raise unless everything else matches; if False, load what fits.

    Returns:
        What did not match.

    Raises:
        CheckpointError: the file cannot be read, or (strict) names every missing, unexpected and wrongly shaped tensor.
    """
    state_dict, _ = read_checkpoint(path)
    return load_state(model, state_dict, path, strict)


def load_state(model: nn.Module, state_dict: dict[str, Tensor], path: str | Path, strict: bool = True) -> Mismatch:
    """`load_checkpoint` of what was read from ``path`` before."""
    mismatch = compare(model, state_dict)
    if strict and (mismatch.missing or mismatch.unexpected or mismatch.wrong_shape):
        raise CheckpointError(f"{path} does not fit this {type(model).__name__}:\n{mismatch}")
    left_out = {*mismatch.wrong_shape, *mismatch.reinitialised}
    model.load_state_dict({name: t for name, t in state_dict.items() if name not in left_out}, strict=False)
    return mismatch


def compare(model: nn.Module, state_dict: dict[str, Tensor]) -> Mismatch:
    """How ``state_dict`` differs from ``model``, by the rules of `load_checkpoint`."""
    own = model.state_dict()
    filters = {
        f"{prefix}.complex_weights".lstrip("."): module
        for prefix, module in model.named_modules()
        if isinstance(module, SpectralFilter)
    }
    wrong = {
        name
        for name in own.keys() & state_dict.keys()
        if own[name].shape != state_dict[name].shape
        and not (name in filters and filters[name].accepts(state_dict[name]))
    }
    classifier = getattr(model, "pretrained_cfg", {}).get("classifier", "head.fc2")
    reinitialised = {f"{classifier}.weight", f"{classifier}.bias"}
    if (
        not reinitialised <= wrong
        or own[f"{classifier}.weight"].shape[1] != state_dict[f"{classifier}.weight"].shape[1]
    ):
        reinitialised = set()
    return Mismatch(
        missing=sorted(own.keys() - state_dict.keys()),
        unexpected=sorted(state_dict.keys() - own.keys()),
        wrong_shape={
            name: f"checkpoint {tuple(state_dict[name].shape)}, model {tuple(own[name].shape)}"
            for name in sorted(wrong - reinitialised)
        },
        reinitialised=sorted(reinitialised),
    )


def save_checkpoint(
    model: nn.Module | dict[str, Tensor],
    path: str | Path,
    architecture: str,
    model_args: dict[str, Any] | None = None,
    classes: list[str] | None = None,
    data: dict[str, Any] | None = None,
    task: str = "classify",
    **more: Any,
) -> None:
    """Writes ``model`` as ``.safetensors``, atomically, with what `load_model` needs to rebuild it.

    Args:
        model: or its state dict.
        architecture: its name for ``timm.create_model``.
        model_args: the other arguments it was created with (JSON types).
        classes: names of the classes.
        data: entries for timm's pretrained_cfg: input_size, mean, std, interpolation, crop_pct.
        task: what it was trained for, see `dfformer.tasks.table`.
        more: what else the task needs to rebuild it (JSON types).
    """
    metadata = {"architecture": architecture, "model_args": model_args or {}, "classes": classes, "data": data or {}}
    metadata |= {"task": task, **more}
    state_dict = model.state_dict() if isinstance(model, nn.Module) else model
    _write_safetensors(state_dict, path, {_METADATA_KEY: json.dumps(metadata)})


def load_model(
    path: str | Path, architecture: str | None = None, **model_args: Any
) -> tuple[nn.Module, list[str] | None]:
    """The model a checkpoint is for, loaded, in eval mode, and its classes' names if the file has them.

    Args:
        path: see `read_checkpoint`.
        architecture: name for ``timm.create_model``; required unless the file was written by `save_checkpoint`.
        model_args: override the arguments the file records, e.g. ``img_size``.
    """
    state_dict, metadata = read_checkpoint(path)
    if metadata.get("task", "classify") != "classify":
        raise CheckpointError(f"{path}: is a model for the task {metadata['task']}, not a classifier")
    architecture = architecture or metadata.get("architecture")
    if architecture is None:
        raise CheckpointError(f"{path}: does not say which model it is for; pass the architecture, e.g. dfformer_s18")
    arguments = {**metadata.get("model_args", {}), **model_args}
    if "num_classes" not in arguments and "head.fc2.weight" in state_dict:
        arguments["num_classes"] = state_dict["head.fc2.weight"].shape[0]
    model = timm.create_model(architecture, pretrained_cfg_overlay=metadata.get("data", {}), **arguments)
    load_state(model, state_dict, path)
    return model.eval(), metadata.get("classes")


def convert(source: str | Path, target: str | Path) -> int:
    """Writes the state dict of ``source`` as ``.safetensors``; returns the number of tensors."""
    if Path(target).suffix != ".safetensors":
        raise ValueError(f"target: got {target}, accepted is a name ending in .safetensors")
    state_dict, metadata = read_checkpoint(source)
    _write_safetensors(state_dict, target, {_METADATA_KEY: json.dumps(metadata)} if metadata else {})
    return len(state_dict)


def read_pickle(path: Path) -> Any:
    """The content of a ``.pth`` or ``.pt`` file, read with ``weights_only=True``; CheckpointError if that fails."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm's training script stores its arguments
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        try:
            unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        except (RuntimeError, OSError, ValueError, pickle.UnpicklingError):
            unsafe = []
        if unsafe:
            raise CheckpointError(
                f"{path}: refused, because loading it would run code: it refers to {', '.join(unsafe)}"
            ) from error
        raise CheckpointError(f"{path}: is not a checkpoint ({_first_line(error)})") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: is truncated or not a checkpoint ({_first_line(error)})") from error


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, _metadata(file)  # noqa: SIM118 (not a mapping)


def _metadata(file: Any) -> dict[str, Any]:
    return json.loads((file.metadata() or {}).get(_METADATA_KEY, "{}"))


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            yield file
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: is truncated or not a safetensors file ({_first_line(error)})") from error


def _write_safetensors(state_dict: dict[str, Tensor], path: str | Path, metadata: dict[str, str]) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.detach().cpu().clone().contiguous() for name, t in state_dict.items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        safetensors.torch.save_file(tensors, temporary, {"format": "pt", **metadata})
        temporary.chmod(mode)  # that of other new files: safetensors makes them their owner's alone
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
