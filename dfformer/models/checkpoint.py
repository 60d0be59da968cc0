"""Checkpoints: reads official ``.pth`` and ``.safetensors`` files, writes ``.safetensors``, and never unpickles freely.

A file written by `save_checkpoint` also describes its model, so that `load_model` (and ``dfformer predict``) can
rebuild it. Nothing in a file is trusted; docs/security.md explains what that means.
"""

import argparse
import json
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import timm
import torch
from timm.models import clean_state_dict
from torch import Tensor, nn

from dfformer.models.description import is_ours, read_description, write_description
from dfformer.models.mismatch import Mismatch, causes, compare
from dfformer.utils.accepted import check_module
from dfformer.utils.io import replacing
from dfformer.utils.text import abbreviate, reason

# The keys under which training scripts store weights inside a checkpoint, averaged weights first.
_NESTED_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model")
_DESCRIPTION_KEY = "dfformer"
# What torch's error says about files that it does not read as data, and what they are.
_OTHER_FORMATS = {"TorchScript": "a TorchScript archive", "legacy .tar": "the .tar format of torch before 0.4"}
# The most elements by which a model may exceed its file, for filters of larger images: 1 GiB in float32.
_MAX_GROWTH = 2**28

Model = TypeVar("Model", bound=nn.Module)


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read, or does not fit the model."""


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict of a checkpoint file, and the description of its model by `save_checkpoint` ({} for other files).

    ``.pth`` files are read with ``weights_only=True``. The name prefixes of DDP and torch.compile are removed. The
    description has passed `dfformer.models.description.check_description`.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is truncated or unsafe, has no state dict, or its description is invalid.
    """
    path = _existing(path)
    content, description = _read_safetensors(path) if path.suffix == ".safetensors" else (read_pickle(path), {})
    if isinstance(content, dict):
        content = next((content[key] for key in _NESTED_KEYS if isinstance(content.get(key), dict)), content)
    if (
        not isinstance(content, dict)
        or not content
        or not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items())
    ):
        raise CheckpointError(f"{path}: holds no state dict (a mapping of names to tensors, or one under a key of "
                              f"{', '.join(_NESTED_KEYS)})")  # fmt: skip
    for name, tensor in content.items():
        _check_stored(path, name, tensor)
    blocks = sum(description.get("model_args", {}).get("depths", ()))
    if blocks > len(content):  # building so many takes seconds even on the meta device
        raise CheckpointError(
            f"{path}: model_args.depths: adds up to {blocks} blocks, the file has {len(content)} tensors"
        )
    return clean_state_dict(content), description


def _check_stored(path: Path, name: str, tensor: Tensor) -> None:
    """Raises CheckpointError for a tensor larger than its stored data: a small file must not become gigabytes."""
    strided = tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    if not strided or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise CheckpointError(f"{path}: {name!r} is not a strided tensor whose numbers are all in the file")


def read_task(path: str | Path) -> str:
    """The task that a checkpoint was trained for; "classify" if the file does not say."""
    path = _existing(path)
    return "classify" if path.suffix != ".safetensors" else _read_safetensors(path)[1].get("task", "classify")


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: {path} does not exist or is not a file")
    return path


def load_checkpoint(model: nn.Module, path: str | Path, strict: bool = True) -> Mismatch:
    """Loads a checkpoint file into ``model``.

    Filters stored for another image size are resized to the model's. If only the number of classes differs, the
    classifier's last layer (``head.fc2``) stays as initialised, as in timm.

    Args:
        model: a model of `dfformer`, on any device and of any dtype.
        path: see `read_checkpoint`.
        strict: raise unless everything else matches; if False, load what fits.

    Returns:
        What did not match.

    Raises:
        CheckpointError: the file cannot be read, or (strict) does not fit. The message has the likely cause, and up to
            ten names each of missing, unexpected and wrongly shaped tensors.
        TypeError: ``model`` is not a module.
    """
    check_module(model)
    state_dict, _ = read_checkpoint(path)
    return load_state(model, state_dict, path, strict)


def load_state(model: nn.Module, state_dict: dict[str, Tensor], path: str | Path, strict: bool = True) -> Mismatch:
    """`load_checkpoint` for a state dict that was already read from ``path``."""
    mismatch = must_fit(model, state_dict, path) if strict else compare(model, state_dict)
    left_out = {*mismatch.wrong_shape, *mismatch.wrong_type, *mismatch.reinitialised}
    model.load_state_dict({name: t for name, t in state_dict.items() if name not in left_out}, strict=False)
    return mismatch


def must_fit(model: nn.Module, state_dict: Mapping[str, Tensor], path: str | Path, exactly: bool = False) -> Mismatch:
    """Raises CheckpointError unless a state dict read from ``path`` can be loaded strictly; loads nothing.

    Args:
        exactly: also refuse filters for another image size, and a classifier for another number of classes.
    """
    mismatch = compare(model, state_dict, exactly)
    if any(refused := mismatch._replace(reinitialised=[])):
        cause = "".join(f" {cause};" for cause in causes(model.state_dict(), state_dict))
        raise CheckpointError(f"{path} does not fit this {type(model).__name__}:{cause}\n{refused}")
    return mismatch


def build_and_load(build: Callable[[], Model], state_dict: dict[str, Tensor], path: str | Path) -> Model:
    """The model that ``build`` creates, with the weights read from ``path``, in eval mode.

    It is first built without memory, on the meta device. So a file whose description does not fit its weights, or asks
    for a far larger model, is refused before anything is allocated.
    """
    try:
        with torch.device("meta"):
            outline = build()
    except NotImplementedError:  # a few encoders of older timm compute with tensors' values while they are built
        outline = build()
    except Exception as error:  # libraries raise anything for arguments that do not match
        raise CheckpointError(f"{path}: its model cannot be built: {reason(error)}") from error
    if must_fit(outline, state_dict, path).reinitialised:
        raise CheckpointError(f"{path}: num_classes: the checkpoint's classifier has another number of classes")
    elements = sum(tensor.numel() for tensor in outline.state_dict().values())
    if elements > sum(tensor.numel() for tensor in state_dict.values()) + _MAX_GROWTH:
        raise CheckpointError(f"{path}: img_size: the model would have {elements} elements, far more than the file")
    model = build()
    load_state(model, state_dict, path)
    return model.eval()


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
    """Writes ``model`` atomically as ``.safetensors``, with the description that `load_model` needs to rebuild it.

    The same content gives the same bytes.

    Args:
        model: the model or its state dict.
        architecture: the model's name for ``timm.create_model``.
        model_args: the other arguments that it was created with (JSON types).
        classes: names of the classes.
        data: entries for timm's pretrained_cfg: input_size, mean, std, interpolation, crop_pct, crop_mode.
        task: the task that it was trained for, see `dfformer.tasks.table`.
        more: other settings that the task needs to rebuild it (JSON types).

    Raises:
        ValueError: an argument, by name, that `read_checkpoint` would not accept, or a model optimised for inference.
    """
    if isinstance(model, nn.Module) and any(getattr(m, "serves_only", False) for m in model.modules()):
        raise ValueError("model: is optimised for inference; pass the one it was made from")
    description = {"architecture": architecture, "model_args": model_args or {}, "classes": classes, "data": data or {}}
    state_dict = model.state_dict() if isinstance(model, nn.Module) else model
    _write_safetensors(state_dict, path, description | {"task": task, **more})


def load_model(
    path: str | Path, architecture: str | None = None, **model_args: Any
) -> tuple[nn.Module, list[str] | None]:
    """Builds and loads the model of a checkpoint; returns it in eval mode, and its class names if the file has them.

    Args:
        path: see `read_checkpoint`.
        architecture: name for ``timm.create_model``. It is required unless `save_checkpoint` wrote the file for a model
            of this package, because a file may not choose among other packages' models.
        model_args: override the arguments that the file records, e.g. ``img_size``. They are passed on unchecked.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file cannot be read, is for another task, names no model or another package's, or its
            weights do not fit the model.
    """
    state_dict, description = read_checkpoint(path)
    if description.get("task", "classify") != "classify":
        raise CheckpointError(f"{path}: is a model for the task {description['task']}, not a classifier")
    name = architecture or own_architecture(path, description)
    arguments = {**description.get("model_args", {}), **model_args}
    if "num_classes" not in arguments and "head.fc2.weight" in state_dict:
        arguments["num_classes"] = state_dict["head.fc2.weight"].shape[0]
    data = description.get("data", {})
    model: Any = build_and_load(
        lambda: timm.create_model(name, pretrained_cfg_overlay=data, **arguments), state_dict, path
    )
    classes = description.get("classes")
    if classes and "num_classes" not in model_args and len(classes) != model.num_classes:
        raise CheckpointError(
            f"{path}: classes: expected {model.num_classes} names, as the model has, got {len(classes)}"
        )
    return model, classes


def chosen_model(
    checkpoint: Path | None, architecture: str | None, pretrained: bool, **model_args: Any
) -> tuple[nn.Module, list[str] | None]:
    """The model of ``--checkpoint``, ``--model`` and ``--pretrained`` in eval mode, and its class names if known.

    See `load_model` for a checkpoint. Without one, the weights are the authors' if ``pretrained``, else fresh. Raises
    ValueError if neither a checkpoint nor an architecture is given.
    """
    if checkpoint:
        return load_model(checkpoint, architecture, **model_args)
    if not architecture:
        raise ValueError("pass --checkpoint FILE or --model NAME")
    return timm.create_model(architecture, pretrained=pretrained, **model_args).eval(), None


def own_architecture(path: str | Path, description: Mapping[str, Any]) -> str:
    """The model of this package that a checkpoint is for; CheckpointError if the file names none."""
    name = description.get("architecture")
    if name is None:
        raise CheckpointError(
            f"{path}: does not say which model it is for; pass it, e.g. --model dfformer_s18, or "
            "architecture='dfformer_s18'"
        )
    if not is_ours(name):
        raise CheckpointError(
            f"{path}: architecture: expected one of dfformer's models, got {name!r}; if you trust this choice, "
            f"pass --model {name}, or architecture={name!r}"
        )
    return str(name)


def convert(source: str | Path, target: str | Path) -> int:
    """Writes the state dict of ``source`` as ``.safetensors``; returns the number of tensors."""
    if Path(target).suffix != ".safetensors":
        raise ValueError(f"target: expected a name ending in .safetensors, got {target}")
    state_dict, description = read_checkpoint(source)
    _write_safetensors(state_dict, target, description)
    return len(state_dict)


def read_pickle(path: Path) -> Any:
    """The content of a ``.pth`` or ``.pt`` file, read with ``weights_only=True``; CheckpointError if that fails."""
    _refuse_bomb(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm's training script stores its arguments
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged pickles raise anything
        unsafe = _unsafe_globals(path) if isinstance(error, pickle.UnpicklingError) else []
        if unsafe:
            raise CheckpointError(
                f"{path}: refused, because loading it would run code: it refers to {abbreviate(unsafe, 10)}"
            ) from None  # torch's own message explains how to load the file unsafely
        if other := next((kind for words, kind in _OTHER_FORMATS.items() if words in str(error)), None):
            raise CheckpointError(f"{path}: expected a state dict written by torch.save, got {other}") from None
        raise CheckpointError(f"{path}: is truncated or not a checkpoint ({reason(error)})") from None


def _unsafe_globals(path: Path) -> list[str]:
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # as above, and for unknown formats
        return []


def _refuse_bomb(path: Path) -> None:
    """Refuses compressed archives: they may unpack to any size, and torch.save does not compress."""
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except Exception:  # not a zip file, or one that torch will refuse too
        return
    if unpacked > path.stat().st_size:
        raise CheckpointError(f"{path}: is compressed, {unpacked} bytes from {path.stat().st_size}: not a checkpoint")


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, which stay in the file until they are used, and the description."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(_DESCRIPTION_KEY)
            description = {} if text is None else read_description(text)
            return {name: file.get_tensor(name) for name in file.keys()}, description  # noqa: SIM118 (not a mapping)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except Exception as error:  # its format, its tensors' types or the disk may be at fault
        raise CheckpointError(f"{path}: is truncated or not a safetensors file ({reason(error)})") from error


def _write_safetensors(state_dict: dict[str, Tensor], path: str | Path, description: dict[str, Any]) -> None:
    entries = {_DESCRIPTION_KEY: write_description(description)} if description else {}
    tensors = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in state_dict.items()
    }
    with replacing(path) as temporary:
        safetensors.torch.save_file(tensors, temporary, entries | {"format": "pt"})
        _sort_header(temporary)


def _sort_header(path: Path) -> None:
    """Sorts the header: safetensors writes metadata in random order, and equal checkpoints must be equal bytes."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        content = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(content) > size:
            raise AssertionError("a header in another order is not longer")
        file.seek(8)
        file.write(content.ljust(size))
