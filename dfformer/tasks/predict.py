"""``dfformer predict``: classifies image files, as a table and as JSON; also the parts that other tasks share."""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.data import ImageNetInfo
from torch import nn
from torch.utils.data import DataLoader, Dataset

from dfformer.data.files import (
    image_files,
    image_mode,
    orientation_note,
    orientation_of,
    read_class_names,
    read_image,
    real_path,
)
from dfformer.data.transforms import evaluation_transform
from dfformer.models.checkpoint import load_model
from dfformer.tasks.evaluate import data_config, logits_of
from dfformer.tasks.results import is_result
from dfformer.utils.io import write_json
from dfformer.utils.text import echo, printable


class Prediction(NamedTuple):
    """The top classes of an image, best first: names with probabilities, or with another value of the task."""

    path: str
    classes: list[str]
    values: list[float]


class Failure(NamedTuple):
    """An image without a prediction, and the reason."""

    path: str
    error: str


class File(NamedTuple):
    """An image file: its prepared content or the error, and whether an EXIF orientation was not applied."""

    path: Path
    content: Any
    turned: bool


Apply = Callable[[list[File]], list[Prediction]]


@dataclass
class Predictor:
    """What ``predict`` does for a task.

    Attributes:
        prepare: maps an image (PIL) to the input of ``apply``; runs in the processes that read images.
        apply: runs the model on a batch, draws and writes.
        channels: number of channels of the images, see `dfformer.data.files.image_mode`.
        batch_size: the most images in a batch for ``apply``.
        value: the name in JSON of the number of each class.
        finish: called once at the end, even after an error.
        written: a description of the pictures in ``--output``, for the last printed line.
    """

    prepare: Callable[[Any], Any]
    apply: Apply
    channels: int = 3
    batch_size: int = 1
    value: str = "probability"
    finish: Callable[[], None] = lambda: None
    written: str = ""


def predictor(arguments: argparse.Namespace, paths: list[Path]) -> Predictor:
    """``dfformer predict`` for classifiers."""
    model, classes = _load(arguments)
    config = data_config(model, arguments.img_size)

    def apply(batch: list[File]) -> list[Prediction]:
        return _classify(model, batch, classes, arguments.topk)

    return Predictor(evaluation_transform(config), apply, config["input_size"][0], arguments.batch_size)


def _classify(model: nn.Module, batch: list[File], classes: list[str], topk: int) -> list[Prediction]:
    parameter = next(model.parameters())
    images = torch.stack([file.content for file in batch]).to(parameter.device, parameter.dtype)
    with torch.inference_mode():
        logits = logits_of(model, images).float()
    probabilities, indices = logits.softmax(-1).topk(min(topk, len(classes)))
    if not probabilities.isfinite().all():
        raise ValueError("the model's output is not finite")
    return [
        Prediction(str(file.path), [classes[i] for i in index.tolist()], probability.tolist())
        for file, index, probability in zip(batch, indices, probabilities, strict=True)
    ]


@dataclass
class Files(Dataset):
    """Image files as `File`, converted to ``mode`` of PIL, then prepared."""

    paths: list[Path]
    prepare: Callable[[Any], Any]
    mode: str
    exif_orientation: bool

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> File:
        path = self.paths[index]
        try:
            image = read_image(path, self.mode, exif_orientation=self.exif_orientation)
            return File(path, self.prepare(image), orientation_of(image) != 1)
        except Exception as error:  # any error concerns this file alone
            return File(path, ValueError(_message(path, error)), False)  # not every error can be pickled


def _outcomes(
    paths: list[Path], predictor: Predictor, workers: int, exif_orientation: bool
) -> Iterator[tuple[Prediction | Failure, bool]]:
    """The outcome of each file, and whether an EXIF orientation was not applied."""
    files = Files(paths, predictor.prepare, image_mode(predictor.channels), exif_orientation)
    for batch in DataLoader(files, predictor.batch_size, num_workers=workers, collate_fn=list):
        readable = [file for file in batch if not isinstance(file.content, Exception)]
        applied = iter(_guarded(predictor.apply, readable))
        for file in batch:
            failed = isinstance(file.content, Exception)
            yield Failure(str(file.path), str(file.content)) if failed else next(applied), file.turned


def _guarded(apply: Apply, batch: list[File]) -> list[Prediction | Failure]:
    """``apply`` of a batch; if it fails, of each image alone, so that a faulty image does not affect the others."""
    try:
        return [*apply(batch)] if batch else []
    except Exception as error:
        if len(batch) == 1:
            return [Failure(str(batch[0].path), _message(batch[0].path, error))]
        return [outcome for file in batch for outcome in _guarded(apply, [file])]


def _message(path: Path, error: BaseException) -> str:
    return (str(error) or type(error).__name__).removeprefix(f"{path}: ")


def find_inputs(arguments: argparse.Namespace, draws: bool) -> tuple[list[Path], list[Failure]]:
    """The images of ``arguments.inputs``, and the folders that could not be listed.

    If the task ``draws``, earlier results in the folder ``arguments.output`` are left out.

    Raises:
        ValueError: there are no images, or ``arguments.json`` would replace one.
    """
    unreadable: list[Failure] = []

    def note(error: OSError) -> None:
        unreadable.append(Failure(str(error.filename), error.strerror or type(error).__name__))

    paths, given = image_files(arguments.inputs, note), set(arguments.inputs)
    if draws and arguments.output.is_dir():
        folder = real_path(arguments.output)
        paths = [p for p in paths if p in given or not real_path(p).is_relative_to(folder) or not is_result(p)]
    if not paths and not unreadable:
        raise ValueError(f"no images in {', '.join(map(printable, arguments.inputs))}")
    report = arguments.json
    if report and (report.is_dir() or real_path(report) in map(real_path, paths)):
        raise ValueError(f"--json: got {report}, which is a folder or one of the images; accepted is another file")
    return paths, unreadable


def predict_files(
    arguments: argparse.Namespace,
    predictor_of: Callable[[argparse.Namespace, list[Path]], Predictor],
    draws: bool,
) -> int:
    """The command line's ``predict`` for any task: writes the JSON first, then prints everything.

    ``predictor_of`` is the task's, and ``draws`` says whether it writes pictures. Returns 1 if any image failed, after
    all others are done. If the run ends early, the JSON says so for each image that was not reached.
    """
    paths, failures = find_inputs(arguments, draws)
    images = len(paths) + len(failures)
    predictor = predictor_of(arguments, paths)
    workers = min(arguments.workers, len(paths) // predictor.batch_size)  # none for a few images
    predictions: list[Prediction] = []
    turned: list[bool] = []
    try:
        for outcome, not_applied in _outcomes(paths, predictor, workers, arguments.exif_orientation):
            turned.append(not_applied)
            if isinstance(outcome, Prediction):
                predictions.append(outcome)
            else:
                failures.append(outcome)
    except BaseException as error:
        why = f"not reached: {type(error).__name__} {error}".strip()
        failures += [Failure(str(path), why) for path in paths[len(turned) :]]
        raise
    finally:
        unwritten = _unwritten(predictor.finish)
        if arguments.json:
            report = _report(predictions, failures, predictor.value)
            unwritten += _unwritten(lambda: write_json(arguments.json, report))
    for failure in failures:
        echo(f"skipped {printable(failure.path)}: {printable(failure.error)}", file=sys.stderr)
    echo(*_table(predictions))
    if predictor.written:
        echo(f"{predictor.written}: {printable(arguments.output)}")
    if note := orientation_note(turned, "--exif-orientation"):
        echo(note, file=sys.stderr)
    if failures:
        echo(f"{len(failures)} of {images} images failed", file=sys.stderr)
    echo(*unwritten, file=sys.stderr)
    return 1 if failures or unwritten else 0


def _load(arguments: argparse.Namespace) -> tuple[nn.Module, list[str]]:
    overrides = dict(arguments.model_args)
    if arguments.img_size:
        overrides["img_size"] = arguments.img_size
    if arguments.checkpoint:
        model, classes = load_model(arguments.checkpoint, arguments.model, **overrides)
    elif arguments.pretrained and arguments.model:
        model, classes = timm.create_model(arguments.model, pretrained=True, **overrides).eval(), None
    else:
        raise ValueError("pass --checkpoint FILE, or --model NAME with --pretrained; untrained weights predict nothing")
    if arguments.classes:
        classes = read_class_names(arguments.classes)
    num_classes: Any = model.num_classes
    if not num_classes:
        raise ValueError(f"{arguments.checkpoint or arguments.model}: num_classes is 0, the model has no classifier")
    classes = classes or _default_classes(num_classes)
    if len(classes) != num_classes:
        raise ValueError(f"--classes: got {len(classes)} names, the model has {num_classes} classes")
    return model.to(arguments.device), classes


def _default_classes(num_classes: int) -> list[str]:
    if num_classes == 1000:
        imagenet = ImageNetInfo()
        return [imagenet.index_to_description(i) for i in range(1000)]
    return [f"class {i}" for i in range(num_classes)]


def _table(predictions: list[Prediction]) -> Iterator[str]:
    width = max((len(printable(p.path)) for p in predictions), default=0)
    for p in predictions:
        top = (f"{printable(c)} {100 * value:.1f}%" for c, value in zip(p.classes, p.values, strict=True))
        yield "  ".join([f"{printable(p.path):<{width}}", *top])


def _unwritten(write: Callable[[], None]) -> list[str]:
    """Writes a file about all images together; returns why it could not be written, if so."""
    try:
        write()
    except OSError as error:
        return [f"not written: {printable(error)}"]
    return []


def _report(predictions: list[Prediction], failures: list[Failure], value: str) -> dict[str, Any]:
    images = [
        {"path": p.path, "top": [{"class": c, value: number} for c, number in zip(p.classes, p.values, strict=True)]}
        for p in predictions
    ]
    return {"predictions": images, "errors": [failure._asdict() for failure in failures]}
