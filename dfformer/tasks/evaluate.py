"""``dfformer eval``: top-1, top-5 and speed of checkpoints at any resolution, as a table and CSV."""

import argparse
import csv
import io
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from dfformer.data import images as image_data
from dfformer.data.transforms import evaluation_transform
from dfformer.models.checkpoint import load_model
from dfformer.utils.io import write_atomically
from dfformer.utils.text import abbreviate, echo, printable

Row = tuple[dict[str, Any], str]  # of ``eval``'s table: values by column, and the line to print
AMP_TYPES = {"none": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
        if min(img_size) < 1:
            raise ValueError(f"img_size: got {img_size}, accepted are numbers from 1 up")
        config["input_size"] = (channels, *img_size)
    check_pixel_statistics(config)
    return config


def check_pixel_statistics(config: dict[str, Any]) -> None:
    """Raises ValueError unless mean and std have one number per channel."""
    channels = config["input_size"][0]
    for name in ("mean", "std"):
        if len(config[name]) != channels:
            raise ValueError(
                f"data.{name}: got {tuple(config[name])}, accepted is a number for each of {channels} channels"
            )


def autocast(device: torch.device, amp: str) -> AbstractContextManager[Any]:
    """Mixed precision, by a name in AMP_TYPES."""
    dtype = AMP_TYPES[amp]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """A classifier's output (B,classes), in its own dtype; ValueError if a model returns anything else."""
    output = model(images)
    if not isinstance(output, Tensor) or output.ndim != 2:
        got = tuple(output.shape) if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise ValueError(
            f"the model puts out {got}, accepted are logits (B,classes): is it made with global_pool='', "
            "features_only or fork_feat?"
        )
    return output


def count_correct(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], pixels: Pixels) -> dict[str, Tensor]:
    """The number of correct images (top1, top5), the summed cross entropy (loss), and the number of images (images).

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
    return dict(zip(("top1", "top5", "loss", "images"), sums, strict=True))


class Result(NamedTuple):
    """A line of the table. Accuracies are fractions; seconds are of forward passes, without waiting for images."""

    checkpoint: str
    model: str
    height: int
    width: int
    crop_pct: float
    amp: str
    images: int
    top1: float
    top5: float
    loss: float
    images_per_second: float


def evaluate_command(arguments: argparse.Namespace) -> int:
    """The command line's ``eval``."""
    if arguments.batch_size < 1 or arguments.workers < 0:
        raise ValueError("--batch-size: accepted are numbers from 1 up; --workers: from 0 up")
    if arguments.crop_pct is not None and not 0 < arguments.crop_pct <= 1:
        raise ValueError(f"--crop-pct: got {arguments.crop_pct}, accepted are numbers above 0, up to 1")

    def measure(checkpoint: Path) -> Iterator[Row]:
        for img_size in arguments.img_size or [None]:
            result = evaluate(checkpoint, img_size, arguments)
            yield result._asdict(), _line(result)

    return tabulate(arguments, measure)


def tabulate(arguments: argparse.Namespace, measure: Callable[[Path], Iterable[Row]]) -> int:
    """Prints the lines that ``measure`` returns for each checkpoint, and writes the rows to ``arguments.csv``."""
    rows: list[dict[str, Any]] = []
    for checkpoint in arguments.checkpoints:
        for row, line in measure(checkpoint):
            rows.append(row)
            if arguments.csv:  # after each, so that earlier results remain if the next one fails
                write_csv(arguments.csv, list(row), [list(row.values()) for row in rows])
            echo(f"{printable(checkpoint)}  {line}")
    return 0


def evaluate(checkpoint: Path, img_size: tuple[int, int] | None, arguments: argparse.Namespace) -> Result:
    """Evaluates a checkpoint at an image size (H, W), or at the model's own."""
    device = torch.device(arguments.device)
    overrides = {**arguments.model_args, **({"img_size": img_size} if img_size else {})}
    model, classes = load_model(checkpoint, arguments.model, **overrides)
    model.to(device)
    config = data_config(model, img_size)
    if arguments.crop_pct:
        config["crop_pct"] = arguments.crop_pct
    dataset = image_data.open_dataset(
        arguments.dataset,
        arguments.root,
        arguments.split,
        config["input_size"][0],
        exif_orientation=arguments.exif_orientation,
    )
    _check_classes(classes, model, dataset, checkpoint)
    image_data.check_images(dataset)
    dataset.transform = evaluation_transform(config, as_uint8=True)
    loader = image_data.evaluation_loader(dataset, arguments.batch_size, arguments.workers, device.type == "cuda")
    timed = Timed(model, device, arguments.amp)
    sums = count_correct(
        timed, progress(loader, f"{checkpoint.name} {_size(config)}"), Pixels(config["mean"], config["std"], device)
    )
    images = int(sums["images"])
    return Result(
        checkpoint=str(checkpoint),
        model=model.pretrained_cfg.get("architecture", type(model).__name__),  # type: ignore[union-attr, operator]
        height=config["input_size"][1],
        width=config["input_size"][2],
        crop_pct=config["crop_pct"],
        amp=arguments.amp,
        images=images,
        top1=float(sums["top1"]) / images,
        top5=float(sums["top5"]) / images,
        loss=float(sums["loss"]) / images,
        images_per_second=images / timed.seconds,
    )


class Timed(nn.Module):
    """Wraps a model and adds up the time spent in it."""

    def __init__(self, model: nn.Module, device: torch.device, amp: str) -> None:
        super().__init__()
        self.model, self.device, self.amp, self.seconds = model, device, amp, 0.0

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


def _check_classes(classes: list[str] | None, model: Any, dataset: Any, checkpoint: Path) -> None:
    found = image_data.class_names(dataset)
    if found is None:
        return
    if classes is not None:
        check_classes_of_data(checkpoint, classes, found)
    if len(found) != model.num_classes:
        raise ValueError(f"{checkpoint}: has {model.num_classes} classes, the data {len(found)}")


def check_classes_of_data(checkpoint: Path, classes: list[str], found: list[str]) -> None:
    """Raises ValueError unless a checkpoint has the classes of the data, in the same order."""
    if classes != found:
        different = abbreviate(sorted(set(classes) ^ set(found)))
        raise ValueError(
            f"{checkpoint}: its {len(classes)} classes are not the data's {len(found)}; "
            f"only in one of them: {different or 'none, their order differs'}"
        )


def progress(loader: DataLoader, name: str) -> Iterable[Any]:
    """The batches of ``loader``, with a progress bar on a terminal."""
    return tqdm(loader, desc=name, unit="batch", leave=False, disable=not sys.stderr.isatty())


def _size(config: dict[str, Any]) -> str:
    return "{1}x{2}".format(*config["input_size"])


def _line(result: Result) -> str:
    size = f"{result.height}x{result.width}  crop {result.crop_pct:g}"
    return (
        f"{size}  {result.images} images  "
        f"top-1 {result.top1:.2%}  top-5 {result.top5:.2%}  {result.images_per_second:.1f} images/s"
    )


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Writes a table atomically; characters that are not Unicode become escapes."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(columns)
    writer.writerows(rows)
    write_atomically(path, lambda file: file.write(text.getvalue().encode(errors="backslashreplace")))
