"""``dfformer predict``: classify image files, as a table and as JSON; and what that shares with other tasks."""

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dfformer.data.images import UNREADABLE
from dfformer.models.checkpoint import load_model

_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


class Prediction(NamedTuple):
    """The top classes of one image, best first: class name and probability, or what else a task gives each class."""

    path: str
    classes: list[str]
    probabilities: list[float]


OnError = Callable[[Path, Exception], None]
Run = Callable[[list[Path], int, OnError], list[Prediction]]


def predict(
    model: nn.Module,
    paths: Iterable[Path],
    classes: list[str],
    topk: int = 5,
    batch_size: int = 16,
    img_size: tuple[int, int] | None = None,
    workers: int = 0,
    on_error: OnError | None = None,
) -> list[Prediction]:
    """Classifies image files with ``model`` (in eval mode), prepared as its ``pretrained_cfg`` says.

    Args:
        classes: a name a class.
        topk: how many to return; at most all.
        img_size: (H, W) to evaluate at, instead of the model's.
        workers: processes that read images; 0 reads them in this one.
        on_error: called for a file that cannot be read, and the rest goes on; without it the error is raised.
    """
    config = resolve_model_data_config(model)
    if img_size is not None:
        config["input_size"] = (config["input_size"][0], *img_size)
    files = Files(list(paths), create_transform(**config, is_training=False), config["input_size"][0])
    loader = DataLoader(files, batch_size, num_workers=workers, collate_fn=list)
    predictions: list[Prediction] = []
    for batch in loader:
        for path, content in batch:
            if isinstance(content, Exception):
                if on_error is None:
                    raise content
                on_error(path, content)
        readable = [(path, content) for path, content in batch if isinstance(content, Tensor)]
        predictions += _predict_batch(model, readable, classes, topk) if readable else []
    return predictions


class Files(Dataset):
    """Image files as (path, image prepared for the model, or the error that reading it raised)."""

    def __init__(self, paths: list[Path], transform: Callable[[Any], Any], channels: int) -> None:
        self.paths, self.transform, self.mode = paths, transform, "L" if channels == 1 else "RGB"

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Path, Any]:
        path = self.paths[index]
        try:
            with Image.open(path) as image:
                return path, self.transform(image.convert(self.mode))
        except UNREADABLE as error:
            return path, error


def _predict_batch(
    model: nn.Module, batch: list[tuple[Path, Tensor]], classes: list[str], topk: int
) -> list[Prediction]:
    parameter = next(model.parameters())
    images = torch.stack([image for _, image in batch]).to(parameter.device, parameter.dtype)
    with torch.inference_mode():
        probabilities, indices = model(images).float().softmax(-1).topk(min(topk, len(classes)))
    return [
        Prediction(str(path), [classes[i] for i in index.tolist()], probability.tolist())
        for (path, _), index, probability in zip(batch, indices, probabilities, strict=True)
    ]


def predict_command(arguments: argparse.Namespace) -> int:
    """The command line's ``predict`` for classifiers."""
    model, classes = _load(arguments)
    topk, batch_size, img_size = arguments.topk, arguments.batch_size, arguments.img_size

    def run(paths: list[Path], workers: int, on_error: OnError) -> list[Prediction]:
        return predict(model, paths, classes, topk, batch_size, img_size, workers, on_error)

    return predict_files(arguments, run)


def predict_files(arguments: argparse.Namespace, run: Run, value: str = "probability") -> int:
    """What ``predict`` does for every task around ``run``, which is given paths, workers and what to call on errors.

    Returns 1 if any image failed, after all the others are done. ``value`` is the name in JSON of a class's number.
    """
    paths = list(image_files(arguments.inputs))
    if not paths:
        raise ValueError(f"no images in {', '.join(map(str, arguments.inputs))}")
    failed: dict[str, str] = {}

    def report(path: Path, error: Exception) -> None:
        failed[str(path)] = str(error)
        print(f"skipped {path}: {error}", file=sys.stderr)

    workers = min(arguments.workers, len(paths) // arguments.batch_size)  # for a few images none pays
    predictions = run(paths, workers, report)
    if predictions:
        print(_table(predictions))
    if arguments.json:
        _write_json(arguments.json, predictions, failed, value)
    if failed:
        print(f"{len(failed)} of {len(paths)} images could not be read", file=sys.stderr)
    return 1 if failed else 0


def check_names(paths: list[Path]) -> None:
    """Raises ValueError for images whose results would be files of the same name."""
    by_name: dict[str, Path] = {}
    for path in paths:
        other = by_name.setdefault(path.stem, path)
        if other is not path:
            raise ValueError(f"{other} and {path}: their results would have the same name; predict them one by one")


def _load(arguments: argparse.Namespace) -> tuple[nn.Module, list[str]]:
    overrides = {"img_size": arguments.img_size} if arguments.img_size else {}
    if arguments.checkpoint:
        model, classes = load_model(arguments.checkpoint, arguments.model, **overrides)
    elif arguments.pretrained and arguments.model:
        model, classes = timm.create_model(arguments.model, pretrained=True, **overrides).eval(), None
    else:
        raise ValueError("pass --checkpoint FILE, or --model NAME with --pretrained; untrained weights predict nothing")
    if arguments.classes:
        classes = arguments.classes.read_text(encoding="utf-8").split("\n")
        classes = classes[:-1] if classes[-1] == "" else classes
    num_classes: Any = model.num_classes
    classes = classes or _default_classes(num_classes)
    if len(classes) != num_classes:
        raise ValueError(f"--classes: got {len(classes)} names, the model has {num_classes} classes")
    return model.to(arguments.device), classes


def _default_classes(num_classes: int) -> list[str]:
    if num_classes == 1000:
        imagenet = ImageNetInfo()
        return [imagenet.index_to_description(i) for i in range(1000)]
    return [f"class {i}" for i in range(num_classes)]


def image_files(inputs: Iterable[Path]) -> Iterable[Path]:
    for path in inputs:
        if path.is_dir():
            yield from sorted(p for p in path.rglob("*") if p.suffix.lower() in _SUFFIXES)
        else:
            yield path


def _table(predictions: list[Prediction]) -> str:
    width = max((len(p.path) for p in predictions), default=0)
    return "\n".join(
        f"{p.path:<{width}}  "
        + "  ".join(
            f"{name} {100 * probability:.1f}%" for name, probability in zip(p.classes, p.probabilities, strict=True)
        )
        for p in predictions
    )


def _write_json(path: Path, predictions: list[Prediction], failed: dict[str, str], value: str) -> None:
    images = [
        {
            "path": p.path,
            "top": [{"class": c, value: q} for c, q in zip(p.classes, p.probabilities, strict=True)],
        }
        for p in predictions
    ]
    errors = [{"path": name, "error": error} for name, error in failed.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"predictions": images, "errors": errors}, indent=2) + "\n", encoding="utf-8")
