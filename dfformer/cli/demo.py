"""``dfformer demo``: the main job on real images without downloads.

1. Trains a small CDFFormer on scikit-learn's handwritten digits, and shows what its filters learned.
2. Runs DFFormer-S18 on scikit-learn's two photographs and compares the fused step with the authors' formulation.
"""

import argparse
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2.functional import normalize, pil_to_tensor, to_dtype

from dfformer.analysis import figures
from dfformer.analysis.output import Output
from dfformer.analysis.show_filters import show_filters
from dfformer.analysis.shown import ShownModel, shown_images
from dfformer.cli.info import environment
from dfformer.data.images import DigitImages
from dfformer.data.photographs import sklearn_photographs
from dfformer.data.transforms import evaluation_transform
from dfformer.models.checkpoint import load_model, save_checkpoint
from dfformer.models.spectral import DynamicFilter
from dfformer.tasks.evaluate import data_config
from dfformer.train.config import ModelConfig, parse
from dfformer.train.engine import train
from dfformer.utils.device import DistContext
from dfformer.utils.eager_baseline import eager_baseline
from dfformer.utils.io import write_atomically, write_json
from dfformer.utils.profile import saved_for_backward
from dfformer.utils.text import echo
from dfformer_kernels.dispatch import select
from dfformer_kernels.problem import Problem
from dfformer_kernels.tolerance import relative_error


class Effort(NamedTuple):
    """The length of a run, and the test accuracy that it must reach."""

    epochs: int
    target: float
    repetitions: int


FULL, QUICK = Effort(14, 0.97, 5), Effort(8, 0.90, 2)


class Comparison(NamedTuple):
    """The fused step against the authors' formulation, on one photograph at one size."""

    photograph: str
    height: int
    width: int
    difference: float  # of the logits, relative
    eager_ms: float  # an inference, median
    fused_ms: float
    eager_mib: float  # saved for backward by one training forward
    fused_mib: float


def demo_command(arguments: argparse.Namespace) -> int:
    """Writes report.html, report.json, digits.safetensors, digits/*.png, pictures and tables."""
    start = time.perf_counter()
    effort = QUICK if arguments.quick else FULL
    output = Output(arguments.output, dpi=130)
    history = train_on_digits(effort.epochs, arguments.seed, output.folder)
    accuracy = history[-1]["top1"]
    if accuracy < effort.target:
        right = f"{100 * accuracy:.2f} % of the test set right"
        raise RuntimeError(f"the digits model got {right}, not {100 * effort.target:.0f} %")
    draw_digits(history, output)
    comparisons = compare_on_photos(effort.repetitions)
    draw_comparisons(comparisons, output)
    ops = {op: Problem(op, "cpu", torch.float32, (1, 56, 56, 128)) for op in ("dynamic_filter", "star_relu")}
    report = {
        "environment": environment(),
        "backends": {op: select(problem).name for op, problem in ops.items()},
        "seed": arguments.seed,
        "quick": arguments.quick,
        "seconds": round(time.perf_counter() - start, 1),
        "digits": history,
        "photos": [c._asdict() for c in comparisons],
    }
    write_json(output.folder / "report.json", report)
    output.report("dfformer demo", explanation(report))
    echo(f"digits: {100 * accuracy:.2f} % of the test images right; read {output.folder / 'report.html'}")
    return 0


def train_on_digits(epochs: int, seed: int, folder: Path) -> list[dict[str, float]]:
    """Trains by the recipe ``digits`` in fewer epochs; writes digits.safetensors and returns the measures by epoch."""
    with TemporaryDirectory() as run:
        settings = {"output": run, "seed": seed, "device": "cpu"}
        settings |= {"optim.epochs": epochs, "optim.warmup_epochs": epochs / 5, "optim.ema_decay": 0}
        config = parse(["--recipe=digits", *(f"--{name}={value}" for name, value in settings.items())])
        config.model.checkpoint = f"{run}/start.safetensors"
        torch.manual_seed(seed)
        save_start(config.model)
        history = train(config, DistContext(torch.device("cpu")))
        write_atomically(folder / "digits.safetensors", Path(run, "last.safetensors").read_bytes())
    return history


def save_start(config: ModelConfig) -> None:
    """Writes the weights that training starts from, to ``config.checkpoint``.

    The usual initialisation of the routing (0.02) leaves it uniform for tens of epochs; this run has a dozen.
    """
    arguments = {**config.args, "num_classes": 10, "img_size": 32}
    model = timm.create_model(config.name, **arguments)
    for module in model.modules():
        if isinstance(module, DynamicFilter):
            routing: Any = module.reweight
            nn.init.kaiming_normal_(routing.fc1.weight)
            nn.init.kaiming_normal_(routing.fc2.weight)
    save_checkpoint(model, config.checkpoint or "", config.name, arguments)


def draw_digits(history: list[dict[str, float]], output: Output) -> None:
    """Writes a test image of each digit, and draws the trained model and the filters that it makes for these images."""
    model, _ = load_model(output.folder / "digits.safetensors")
    test, transform = DigitImages("val"), evaluation_transform(data_config(model))
    labels = torch.tensor(test.labels)
    with torch.inference_mode():
        logits = model(torch.stack([transform(test[index][0]) for index in range(len(test))]))
    confidence, predicted = logits.softmax(1).max(1)
    wrong = predicted != labels
    order = wrong.int().argsort(descending=True, stable=True)[:50]
    title = (
        f"{int(wrong.sum())} mistakes (first) in {len(wrong)} test images: {1 - wrong.float().mean().item():.1%} right"
    )
    grid = figures.predictions_grid(
        torch.from_numpy(test.images)[order],
        [test.classes[label] for label in labels[order]],
        [test.classes[label] for label in predicted[order]],
        confidence[order].tolist(),
    )
    output.figure("predictions", grid, title)
    losses, accuracies = ([row[name] for row in history] for name in ("train_loss", "top1"))
    output.figure("learning_curve", figures.learning_curve(losses, accuracies))
    paths = [output.folder / "digits" / f"{digit}.png" for digit in test.classes]
    paths[0].parent.mkdir(exist_ok=True)
    for digit, path in enumerate(paths):
        test[test.labels.index(digit)][0].save(path)
    show_filters([ShownModel("digits", model)], shown_images(paths, {1}), output, "*")


def compare_on_photos(repetitions: int) -> list[Comparison]:
    """Compares DFFormer-S18, with fresh weights, on both photographs at 224 and at full size."""
    model = timm.create_model("dfformer_s18").eval()
    comparisons = []
    for name, photograph in sklearn_photographs().items():
        pixels = to_dtype(pil_to_tensor(photograph), torch.float32, scale=True)
        image = normalize(pixels, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)[None]
        small = F.interpolate(image, size=(224, 224), mode="bicubic", antialias=True)
        comparisons += [compare(model, name, x, repetitions) for x in (small, image)]
    return comparisons


def compare(model: nn.Module, photo: str, x: Tensor, repetitions: int) -> Comparison:
    """The difference, the time of an inference (medians of interleaved runs) and the memory of a training forward."""
    models = (eager_baseline(model), model)

    def inference(model: nn.Module) -> Tensor:
        with torch.inference_mode():
            return model(x)

    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repetitions + 1):
        for provider, measured in zip(models, times, strict=True):
            start = time.perf_counter()
            inference(provider)
            measured.append(1e3 * (time.perf_counter() - start))
    eager, fused = (inference(provider) for provider in models)
    medians = [statistics.median(measured[1:]) for measured in times]  # the first run of each warms up
    saved = [saved_for_backward(provider, x) / 2**20 for provider in models]
    return Comparison(photo, x.shape[2], x.shape[3], relative_error(fused, eager), *medians, *saved)


def draw_comparisons(comparisons: list[Comparison], output: Output) -> None:
    """Draws a pair of bars for the memory at each size and for the time of each photograph, and writes a table."""
    # The memory depends on nothing but the size.
    memory = {f"{c.height}x{c.width}": (c.eager_mib, c.fused_mib) for c in comparisons}
    times = {f"{c.photograph}\n{c.height}x{c.width}": (c.eager_ms, c.fused_ms) for c in comparisons}
    for name, pairs, unit, title in (
        ("memory", memory, "MiB an image", "saved for backward by one training forward"),
        ("time", times, "ms (median)", "inference, one image"),
    ):
        rows = [(label, *pair) for label, pair in pairs.items()]
        bars = figures.comparison_bars(rows, ("authors' formulation", "dfformer"), unit, f"DFFormer-S18: {title}")
        output.figure(name, bars)
    output.table("photographs", Comparison._fields, comparisons)


def explanation(report: dict[str, Any]) -> list[str]:
    """The paragraphs of the report."""
    machine, chosen, digits = (report[key] for key in ("environment", "backends", "digits"))
    return [
        f"Digits: a small CDFFormer, trained for {len(digits)} epochs, classified {100 * digits[-1]['top1']:.2f} % of "
        "the test images correctly. Try it: dfformer predict --checkpoint digits.safetensors digits/",
        "The routing started with larger weights than the models' usual ones (Kaiming's instead of a standard "
        "deviation of 0.02). From those, a run this short leaves the routing uniform, and every image gets the same "
        "filters.",
        "Photographs: the authors' formulation of DFFormer-S18 has the filter step, StarReLU and projections as "
        f"separate torch operations. dfformer ran the filter step on its {chosen['dynamic_filter']} backend and "
        f"StarReLU on {chosen['star_relu']}. The weights are fresh, which affects neither time nor memory.",
        f"{machine['machine']}; cpu kernels: {machine['cpu kernels']}; torch {machine['torch']}, "
        f"timm {machine['timm']}; seed {report['seed']}; {report['seconds']:.0f} s in all"
        f"{' (quick)' if report['quick'] else ''}.",
    ]
