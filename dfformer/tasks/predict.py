"""``dfformer predict`` as far as tasks share it: finds and reads image files, prints a table, and writes JSON."""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dfformer.data.files import (
    image_files,
    image_mode,
    opened,
    orientation_note,
    orientation_of,
    read_image,
    real_path,
)
from dfformer.tasks.results import is_result
from dfformer.utils.io import write_json
from dfformer.utils.text import echo, printable

Top = list[tuple[str, float]]  # names, best first, with their probabilities or another value of the task


class File(NamedTuple):
    """An image file: its content is first prepared for the model, then what is predicted, unless there is an error."""

    path: Path
    content: Any = None
    error: str = ""
    has_orientation: bool = False  # it has an EXIF orientation that was not applied


Apply = Callable[[list[File]], list[Top]]


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
            with opened(path) as file:
                image = read_image(file, self.mode, exif_orientation=self.exif_orientation)
                oriented = not self.exif_orientation and orientation_of(file) != 1
            return File(path, self.prepare(image), has_orientation=oriented)
        except Exception as error:  # any error concerns this file alone, and not every error can be pickled
            return File(path, error=_message(path, error))


def checked(output: Tensor) -> Tensor:
    """A model's output; ValueError if not all of it is finite."""
    if not output.isfinite().all():
        raise ValueError("the model's output is not finite")
    return output


def _outcomes(paths: list[Path], predictor: Predictor, workers: int, exif_orientation: bool) -> Iterator[File]:
    """Each file with its prediction."""
    files = Files(paths, predictor.prepare, image_mode(predictor.channels), exif_orientation)
    for batch in DataLoader(files, predictor.batch_size, num_workers=workers, collate_fn=list):
        predicted = iter(_guarded(predictor.apply, [file for file in batch if not file.error]))
        yield from (file if file.error else next(predicted) for file in batch)


def _guarded(apply: Apply, batch: list[File]) -> list[File]:
    """``apply`` of a batch; if it fails, of each image alone, so that a faulty image does not affect the others."""
    try:
        return [file._replace(content=top) for file, top in zip(batch, apply(batch), strict=True)] if batch else []
    except Exception as error:
        if len(batch) == 1:
            return [batch[0]._replace(content=None, error=_message(batch[0].path, error))]
        return [outcome for file in batch for outcome in _guarded(apply, [file])]


def _message(path: Path, error: BaseException) -> str:
    return (str(error) or type(error).__name__).removeprefix(f"{path}: ")


def find_inputs(arguments: argparse.Namespace, draws: bool) -> tuple[list[Path], list[File]]:
    """The images of ``arguments.inputs``, and the folders that could not be listed.

    If the task ``draws``, earlier results in the folder ``arguments.output`` are left out.

    Raises:
        ValueError: there are no images, or ``arguments.json`` would replace one.
    """
    unreadable: list[File] = []

    def note(error: OSError) -> None:
        unreadable.append(File(Path(str(error.filename)), error=error.strerror or type(error).__name__))

    paths, given = image_files(arguments.inputs, note), set(arguments.inputs)
    if draws and arguments.output.is_dir():
        folder = real_path(arguments.output)
        paths = [p for p in paths if p in given or not real_path(p).is_relative_to(folder) or not is_result(p)]
    if not paths and not unreadable:
        raise ValueError(f"no images in {', '.join(map(printable, arguments.inputs))}")
    report = arguments.json
    if report and (report.is_dir() or real_path(report) in map(real_path, paths)):
        raise ValueError(f"--json: expected a file that is not one of the images, got {report}")
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
    paths, unreadable = find_inputs(arguments, draws)
    predictor = predictor_of(arguments, paths)
    workers = min(arguments.workers, len(paths) // predictor.batch_size)  # none for a few images
    outcomes: list[File] = []
    try:
        for outcome in _outcomes(paths, predictor, workers, arguments.exif_orientation):
            outcomes.append(outcome)  # at once, so that those before an error are kept
    except BaseException as error:
        why = f"not reached: {type(error).__name__} {error}".strip()
        outcomes += [File(path, error=why) for path in paths[len(outcomes) :]]
        raise
    finally:
        predicted = [file for file in outcomes if not file.error]
        failed = unreadable + [file for file in outcomes if file.error]
        unwritten = _unwritten(predictor.finish)
        if arguments.json:
            report = _report(predicted, failed, predictor.value)
            unwritten += _unwritten(lambda: write_json(arguments.json, report))
    for file in failed:
        echo(f"skipped {printable(file.path)}: {printable(file.error)}", file=sys.stderr)
    echo(*_table(predicted))
    if predictor.written:
        echo(f"{predictor.written}: {printable(arguments.output)}")
    if note := orientation_note([file.has_orientation for file in outcomes]):
        echo(note, file=sys.stderr)
    if failed:
        echo(f"{len(failed)} of {len(unreadable + outcomes)} images failed", file=sys.stderr)
    echo(*unwritten, file=sys.stderr)
    return 1 if failed or unwritten else 0


def _table(predicted: list[File]) -> Iterator[str]:
    width = max((len(printable(file.path)) for file in predicted), default=0)
    for file in predicted:
        top = (f"{printable(name)} {100 * value:.1f}%" for name, value in file.content)
        yield "  ".join([f"{printable(file.path):<{width}}", *top])


def _unwritten(write: Callable[[], None]) -> list[str]:
    """Writes a file about all images together; returns why it could not be written, if so."""
    try:
        write()
    except OSError as error:
        return [f"not written: {printable(error)}"]
    return []


def _report(predicted: list[File], failed: list[File], value: str) -> dict[str, Any]:
    def top(file: File) -> list[dict[str, Any]]:
        return [{"class": name, value: number} for name, number in file.content]

    return {
        "predictions": [{"path": str(file.path), "top": top(file)} for file in predicted],
        "errors": [{"path": str(file.path), "error": file.error} for file in failed],
    }
