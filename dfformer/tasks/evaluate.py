"""The parts that the evaluations of several tasks share."""

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from tqdm import tqdm

from dfformer.data.files import DatasetSpec, Samples
from dfformer.data.images import check_images, evaluation_loader
from dfformer.models.description import check_channels
from dfformer.utils.device import DistContext
from dfformer.utils.io import as_csv, write_atomically
from dfformer.utils.text import echo, printable


class Pixels:
    """Maps uint8 images (B,C,H,W) to normalised float32 images on ``device``, in channels-last memory."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        self.mean, self.std = (torch.tensor(values, device=device).view(1, -1, 1, 1) * 255 for values in (mean, std))

    def __call__(self, images: Tensor) -> Tensor:
        images = images.to(self.mean.device, non_blocking=True).float()
        return images.sub_(self.mean).div_(self.std).contiguous(memory_format=torch.channels_last)


def data_config(model: nn.Module, img_size: tuple[int, int] | None = None) -> dict[str, Any]:
    """How images for ``model`` are prepared, in timm's terms; ``img_size`` (H,W) replaces the model's own.

    Raises:
        ValueError: mean and std do not fit the number of channels.
    """
    config: dict[str, Any] = resolve_model_data_config(model)
    channels = config["input_size"][0]
    if img_size is not None:
        config["input_size"] = (channels, *img_size)
    check_channels(channels, config)
    return config


def autocast(device: torch.device, amp: str) -> AbstractContextManager[Any]:
    """Mixed precision in the dtype called ``amp``, or none."""
    return torch.autocast(device.type, dtype=getattr(torch, amp, None), enabled=amp != "none")


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """A classifier's output (B,classes), in its own dtype; ValueError if a model returns anything else."""
    output = model(images)
    if not isinstance(output, Tensor) or output.ndim != 2:
        got = tuple(output.shape) if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise ValueError(
            f"the model's output: expected logits (B,classes), got {got}: was it made with global_pool='', "
            "features_only or fork_feat?"
        )
    return output


def accuracy(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], pixels: Pixels, context: DistContext
) -> tuple[int, dict[str, float]]:
    """The number of images over all processes, and their top-1 and top-5 accuracy and mean cross entropy.

    Images labelled -1 do not count. The model is left in eval mode.
    """
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=pixels.mean.device)
    with torch.inference_mode():
        for images, labels in batches:
            labels = labels.to(sums.device, non_blocking=True)
            logits = logits_of(model, pixels(images)).float()
            right = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
            loss = nn.functional.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
            sums += torch.stack([right[:, 0].sum(), right.sum(), loss, (labels >= 0).sum()]).double()
    *totals, count = context.add_up(sums).tolist()
    return int(count), {n: total / count for n, total in zip(("top1", "top5", "loss"), totals, strict=True)}


class Measured(NamedTuple):
    """What ``eval`` measured of a checkpoint at one image size."""

    model: str
    size: dict[str, Any]  # the columns that say at which size
    images: int
    seconds: float  # of forward passes, without waiting for images
    measures: dict[str, float]
    by_class: dict[str, float] = {}  # noqa: RUF012 (never changed); not printed


def dataset_spec(arguments: argparse.Namespace, img_size: tuple[int, int]) -> DatasetSpec:
    """The dataset that ``eval``'s arguments name; synthetic images have the size ``img_size``."""
    named = (arguments.dataset, arguments.root, arguments.split)
    return DatasetSpec(*named, img_size, arguments.synthetic_images, arguments.exif_orientation)


def own_size(description: dict[str, Any]) -> tuple[int, int]:
    """The size (H,W) in a checkpoint's description."""
    H, W = description["data"]["input_size"][1:]
    return H, W


# Measures a model at a size: the columns that say at which, the measures, and those by class.
Measure = Callable[["Timed", tuple[int, int]], tuple[dict[str, Any], dict[str, float], dict[str, float]]]


def at_each_size(
    model: nn.Module, description: dict[str, Any], dataset: Any, arguments: argparse.Namespace, measure: Measure
) -> Iterator[Measured]:
    """Checks ``dataset``, and measures a dense model on it at each of ``arguments.img_size``, or at its own size."""
    check_images(dataset)
    for size in arguments.img_size or [own_size(description)]:
        timed = Timed(model, torch.device(arguments.device), arguments.amp)
        columns, measures, by_class = measure(timed, size)
        yield Measured(description["architecture"], columns, len(dataset), timed.seconds, measures, by_class)


def tabulate(arguments: argparse.Namespace, evaluate: Callable[[Path, argparse.Namespace], Iterable[Measured]]) -> int:
    """Prints a line for each measurement of each checkpoint, and writes them as rows to ``arguments.csv``.

    ``evaluate`` is the task's: it measures a checkpoint at each of ``arguments.img_size``, or at its own size.
    """
    rows: list[dict[str, Any]] = []
    for checkpoint in arguments.checkpoints:
        for found in evaluate(checkpoint, arguments):
            speed = found.images / found.seconds
            row = {"checkpoint": str(checkpoint), "model": found.model, **found.size, "amp": arguments.amp}
            row |= {"images": found.images, **found.measures, "images_per_second": speed}
            rows.append(row | found.by_class)
            if arguments.csv:  # after each, so that earlier results remain if the next one fails
                write_atomically(arguments.csv, as_csv(rows[-1], rows))
            shown = (f"{name} {v:.4g}" if isinstance(v, float) else f"{name} {printable(v)}" for name, v in row.items())
            echo("  ".join(shown))
    return 0


class Timed(nn.Module):
    """Moves a model to ``device``, and adds up the time spent in it."""

    def __init__(self, model: nn.Module, device: torch.device, amp: str) -> None:
        super().__init__()
        self.model, self.device, self.amp, self.seconds = model.to(device), device, amp, 0.0

    def forward(self, images: Tensor) -> Tensor:
        self._wait()
        start = time.perf_counter()
        with autocast(self.device, self.amp):
            logits: Tensor = self.model(images)
        self._wait()
        self.seconds += time.perf_counter() - start
        return logits

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def batches(samples: Samples, arguments: argparse.Namespace, name: str, batch_size: int = 1) -> Iterable[Any]:
    """``samples`` in batches, with a progress bar on a terminal."""
    loader = evaluation_loader(samples, arguments.workers, DistContext(torch.device(arguments.device)), batch_size)
    return tqdm(loader, desc=name, unit="batch", leave=False, disable=not sys.stderr.isatty())
