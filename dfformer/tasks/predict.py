"""``dfformer predict``: classifies image files, as a table and as JSON; also the parts that other tasks share."""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from dfformer.tasks.results import is_result, plan_results
from dfformer.utils.io import write_json
from dfformer.utils.text import echo, printable


class Prediction(NamedTuple):
    """The top classes of an image, best first: names with probabilities, or with another value of the task."""

    path: str
    classes: list[str]
    probabilities: list[float]


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
        note: printed at the end.
    """

    prepare: Callable[[Any], Any]
    apply: Apply
    channels: int = 3
    batch_size: int = 1
    value: str = "probability"
    finish: Callable[[], None] = lambda: None
    note: str = ""


def predict(
    model: nn.Module,
    paths: Iterable[Path],
    classes: list[str],
    topk: int = 5,
    batch_size: int = 16,
    img_size: tuple[int, int] | None = None,
    workers: int = 0,
    on_error: Callable[[Path, Exception], None] | None = None,
    exif_orientation: bool = False,
) -> list[Prediction]:
    """Classifies image files with ``model`` (in eval mode), prepared as its ``pretrained_cfg`` says.

    Args:
        classes: the name of each class.
        topk: number of classes to return; limited to all classes.
        img_size: (H, W) to evaluate at, instead of the model's.
        workers: number of processes that read images; 0 reads them in this one.
        on_error: called for a file that fails, and prediction continues; without it a ValueError is raised.
        exif_orientation: apply images' EXIF orientation.
    """
    predictor = _classifier(model, classes, topk, batch_size, img_size)
    predictions: list[Prediction] = []
    for outcome, _ in _outcomes(list(paths), predictor, workers, exif_orientation):
        if isinstance(outcome, Prediction):
            predictions.append(outcome)
        elif on_error is None:
            raise ValueError(f"{outcome.path}: {outcome.error}")
        else:
            on_error(Path(outcome.path), ValueError(outcome.error))
    return predictions


def _classifier(
    model: nn.Module, classes: list[str], topk: int, batch_size: int, img_size: tuple[int, int] | None
) -> Predictor:
    if model.training:
        raise ValueError("model: is in training mode, accepted is eval mode: model.eval()")
    if topk < 1:
        raise ValueError(f"topk: got {topk}, accepted are numbers from 1 up")
    config = data_config(model, img_size)

    def apply(batch: list[File]) -> list[Prediction]:
        return _classify(model, batch, classes, topk)

    return Predictor(evaluation_transform(config), apply, config["input_size"][0], batch_size)


def _classify(model: nn.Module, batch: list[File], classes: list[str], topk: int) -> list[Prediction]:
    parameter = next(model.parameters())
    images = torch.stack([file.content for file in batch]).to(parameter.device, parameter.dtype)
    with torch.inference_mode():
        logits = logits_of(model, images).float()
    if len(classes) != logits.shape[1]:
        raise ValueError(f"classes: got {len(classes)} names, the model has {logits.shape[1]} classes")
    probabilities, indices = logits.softmax(-1).topk(min(topk, len(classes)))
    if not probabilities.isfinite().all():
        raise ValueError("the model's output is not finite")
    return [
        Prediction(str(file.path), [classes[i] for i in index.tolist()], probability.tolist())
        for file, index, probability in zip(batch, indices, probabilities, strict=True)
    ]


class Files(Dataset):
    """Image files as `File`, prepared by ``transform``."""

    def __init__(
        self, paths: list[Path], transform: Callable[[Any], Any], channels: int, exif_orientation: bool = False
    ) -> None:
        self.paths, self.transform, self.mode = paths, transform, image_mode(channels)
        self.exif_orientation = exif_orientation

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> File:
        path = self.paths[index]
        try:
            image = read_image(path, self.mode, exif_orientation=self.exif_orientation)
            return File(path, self.transform(image), orientation_of(image) != 1)
        except Exception as error:  # any error concerns this file alone
            return File(path, ValueError(_message(path, error)), False)  # not every error can be pickled


def _outcomes(
    paths: list[Path], predictor: Predictor, workers: int, exif_orientation: bool
) -> Iterator[tuple[Prediction | Failure, bool]]:
    """The outcome of each file, and whether an EXIF orientation was not applied."""
    files = Files(paths, predictor.prepare, predictor.channels, exif_orientation)
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


def predict_command(arguments: argparse.Namespace) -> int:
    """The command line's ``predict`` for classifiers."""
    model, classes = _load(arguments)
    predictor = _classifier(model, classes, arguments.topk, arguments.batch_size, arguments.img_size)
    return predict_files(arguments, find_inputs(arguments), predictor)


_FOR_CLASSIFIERS = ("crop_pct", "model", "model_args", "classes", "pretrained")


def refuse_arguments(arguments: argparse.Namespace, task: str) -> None:
    """Raises ValueError for given arguments that only classifiers use: other checkpoints contain these settings."""
    values = {name: getattr(arguments, name, None) for name in _FOR_CLASSIFIERS}
    given = [name for name, value in values.items() if value not in (None, {}) and value is not False]
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(
            f"{flags}: not for {task}, which uses whole images, and the model and classes of its checkpoint"
        )


class Inputs(NamedTuple):
    """The requested image files, and the folders that could not be listed."""

    paths: list[Path]
    unreadable: list[Failure]


def find_inputs(arguments: argparse.Namespace, output: Path | None = None) -> Inputs:
    """The images of ``arguments.inputs``, without earlier results in the folder ``output``.

    Raises:
        ValueError: there are no images, or ``arguments.json`` would replace one.
    """
    unreadable: list[Failure] = []

    def note(error: OSError) -> None:
        unreadable.append(Failure(str(error.filename), error.strerror or type(error).__name__))

    paths, given = image_files(arguments.inputs, note), set(arguments.inputs)
    if output is not None and output.is_dir():
        folder = real_path(output)
        paths = [p for p in paths if p in given or not real_path(p).is_relative_to(folder) or not is_result(p)]
    if not paths and not unreadable:
        raise ValueError(f"no images in {', '.join(map(printable, arguments.inputs))}")
    report = arguments.json
    if report and (report.is_dir() or real_path(report) in map(real_path, paths)):
        raise ValueError(f"--json: got {report}, which is a folder or one of the images; accepted is another file")
    return Inputs(paths, unreadable)


def predict_files(arguments: argparse.Namespace, inputs: Inputs, predictor: Predictor) -> int:
    """Runs ``predict`` for any task: writes the JSON first, then prints everything.

    Returns 1 if any image failed, after all others are done. If the run ends early, the JSON says so for each image
    that was not reached.
    """
    paths, option = inputs.paths, arguments.exif_orientation
    workers = min(arguments.workers, len(paths) // predictor.batch_size)  # none for a few images
    predictions: list[Prediction] = []
    failures, turned = list(inputs.unreadable), []
    try:
        for outcome, not_applied in _outcomes(paths, predictor, workers, option):
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
        unwritten = _write(arguments.json, predictor, predictions, failures)
    for failure in failures:
        echo(f"skipped {printable(failure.path)}: {printable(failure.error)}", file=sys.stderr)
    echo(*_table(predictions), *filter(None, [predictor.note]))
    if note := orientation_note(turned, "--exif-orientation"):
        echo(note, file=sys.stderr)
    if failures:
        echo(f"{len(failures)} of {len(paths) + len(inputs.unreadable)} images failed", file=sys.stderr)
    echo(*unwritten, file=sys.stderr)
    return 1 if failures or unwritten else 0


def predict_each(
    arguments: argparse.Namespace,
    inputs: Inputs,
    endings: Sequence[str],
    prepare: Callable[[Any], Any],
    apply: Callable[[Any, Path, Path], tuple[list[str], list[float]]],
    value: str,
    written: str,
    finish: Callable[[], None] = lambda: None,
) -> int:
    """`predict_files` one by one, with pictures in ``arguments.output``.

    Args:
        endings: of the pictures of an image.
        apply: maps a prepared image, its path, and the path of its pictures without ending to names and their values.
        prepare, value, finish: as for `Predictor`.
        written: a description of the pictures, for the last printed line.
    """
    stems = plan_results(inputs.paths, arguments.output, endings)

    def apply_to_one(batch: list[File]) -> list[Prediction]:
        [file] = batch
        return [Prediction(str(file.path), *apply(file.content, file.path, stems[file.path]))]

    note = f"{written}: {printable(arguments.output)}"
    return predict_files(arguments, inputs, Predictor(prepare, apply_to_one, value=value, finish=finish, note=note))


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


def _table(predictions: Sequence[Prediction]) -> list[str]:
    width = max((len(printable(p.path)) for p in predictions), default=0)
    return [
        f"{printable(p.path):<{width}}  "
        + "  ".join(
            f"{printable(name)} {100 * probability:.1f}%"
            for name, probability in zip(p.classes, p.probabilities, strict=True)
        )
        for p in predictions
    ]


def _write(
    report: Path | None, predictor: Predictor, predictions: list[Prediction], failures: list[Failure]
) -> list[str]:
    """Writes the files about all images together; returns those that could not be written, and why."""
    writing: list[Callable[[], None]] = [predictor.finish]
    if report is not None:
        content = _report(predictions, failures, predictor.value)
        writing.append(lambda: write_json(report, content))
    unwritten = []
    for write in writing:
        try:
            write()
        except OSError as error:
            unwritten.append(f"not written: {printable(error)}")
    return unwritten


def _report(predictions: list[Prediction], failures: list[Failure], value: str) -> dict[str, Any]:
    images = [
        {
            "path": p.path,
            "top": [{"class": c, value: q} for c, q in zip(p.classes, p.probabilities, strict=True)],
        }
        for p in predictions
    ]
    return {"predictions": images, "errors": [failure._asdict() for failure in failures]}
