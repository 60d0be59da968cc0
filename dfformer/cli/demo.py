"""``dfformer demo``: the main job on real images without downloads.

1. Trains a small CDFFormer on scikit-learn's handwritten digits, and shows what its filters learned.
2. Runs DFFormer-S18 on scikit-learn's two photographs and compares the fused step with the eager baseline.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from dfformer.analysis import figures
from dfformer.analysis.metrics import capture, mix, most_different, routing, spectral_layers, stored_filters
from dfformer.analysis.output import Output
from dfformer.cli.info import environment
from dfformer.data.images import DIGITS_MEAN, DIGITS_STD, Digits, load_digit_images
from dfformer.models.checkpoint import load_model, save_checkpoint
from dfformer.models.spectral import DynamicFilter
from dfformer.utils.eager_baseline import eager_baseline
from dfformer.utils.profile import saved_for_backward
from dfformer_kernels.dispatch import Problem, select
from dfformer_kernels.tolerance import relative_error

ARCHITECTURE = "cdfformer_s18"
# Two stages of convolutions on 15x15 planes, two of dynamic filters on 15x15 and 8x8: large enough to look at.
MODEL_ARGS: dict[str, Any] = {
    "depths": (1, 1, 2, 1),
    "dims": (16, 24, 40, 64),
    "strides": (2, 1, 1, 2),
    "img_size": 32,
    "in_chans": 1,
    "num_classes": 10,
}
SHOWN_LAYER = "stages.2.0.token_mixer"
BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY = 64, 3e-3, 0.05


class Effort(NamedTuple):
    """The length of a run, and the test accuracy that it must reach."""

    epochs: int
    target: float
    repetitions: int


FULL, QUICK = Effort(14, 0.97, 5), Effort(8, 0.90, 2)


class Comparison(NamedTuple):
    """The fused step against the eager baseline, on one photograph at one size."""

    photograph: str
    height: int
    width: int
    difference: float  # of the logits, relative
    eager_ms: float  # an inference, median
    fused_ms: float
    eager_mib: float  # kept for backward by one training forward
    fused_mib: float


def demo_command(arguments: argparse.Namespace) -> int:
    """The command line's ``demo``."""
    run_demo(arguments.output, seed=arguments.seed, quick=arguments.quick)
    return 0


def run_demo(folder: Path, seed: int = 0, quick: bool = False) -> None:
    """Writes report.html, report.json, digits.safetensors, digits/*.png and the pictures into ``folder``."""
    start = time.perf_counter()
    effort = QUICK if quick else FULL
    output = Output(folder, dpi=130)
    digits = load_digit_images(seed)
    model, history = train(digits, effort.epochs, seed)
    accuracy = history["test_accuracy"][-1]
    if accuracy < effort.target:
        raise RuntimeError(f"the digits model got {accuracy:.2%} of the test set right, not {effort.target:.0%}")
    reload_error = save_and_reload(model, digits, folder)
    draw_digits(model, digits, history, output)
    comparisons = compare_on_photos(effort.repetitions)
    draw_comparisons(comparisons, output)
    report = {
        "environment": environment(),
        "backends": {
            op: select(Problem(op, "cpu", torch.float32, (1, 56, 56, 128))).name
            for op in ("dynamic_filter", "star_relu")
        },
        "seed": seed,
        "quick": quick,
        "seconds": round(time.perf_counter() - start, 1),
        "digits": {**history, "reload_difference": reload_error},
        "photos": [c._asdict() for c in comparisons],
    }
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    output.report("dfformer demo", explanation(report))
    print(f"digits: {accuracy:.2%} of {len(digits.test_y)} test images right; read {folder / 'report.html'}")


def train(digits: Digits, epochs: int, seed: int) -> tuple[nn.Module, dict[str, list[float]]]:
    """AdamW with a one-cycle schedule on randomly shifted images; returns the model in eval mode and its history."""
    torch.manual_seed(seed)
    model = timm.create_model(ARCHITECTURE, drop_path_rate=0.05, **MODEL_ARGS)
    for module in model.modules():
        if isinstance(module, DynamicFilter):
            # The usual initialisation (0.02) leaves the routing uniform for tens of epochs; this run has a dozen.
            routing: Any = module.reweight
            nn.init.kaiming_normal_(routing.fc1.weight)
            nn.init.kaiming_normal_(routing.fc2.weight)
    optimizer = create_optimizer_v2(model, "adamw", lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    steps = -(-len(digits.train_x) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, epochs * steps, pct_start=0.2)
    history: dict[str, list[float]] = {"loss": [], "train_accuracy": [], "test_accuracy": []}
    with tqdm(total=epochs * steps, desc="training", unit="step") as bar:
        for _ in range(epochs):
            model.train()
            losses, right = [], 0
            for index in torch.randperm(len(digits.train_x)).split(BATCH_SIZE):
                logits = model(normalise(shift(digits.train_x[index])))
                loss = F.cross_entropy(logits, digits.train_y[index], label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
                right += int((logits.argmax(1) == digits.train_y[index]).sum())
                bar.update()
            accuracy = float((probabilities(model, digits.test_x).argmax(1) == digits.test_y).float().mean())
            history["loss"].append(statistics.mean(losses))
            history["train_accuracy"].append(right / len(digits.train_x))
            history["test_accuracy"].append(accuracy)
            bar.set_postfix(loss=f"{losses[-1]:.3f}", test=f"{accuracy:.1%}")
    return model.eval(), history


def shift(images: Tensor, most: int = 2) -> Tensor:
    """Each image shifted by up to ``most`` pixels in both directions, filled with zeros."""
    N, _, H, W = images.shape
    padded = F.pad(images, (most,) * 4)
    dy, dx = torch.randint(2 * most + 1, (2, N))
    return torch.stack([padded[n, :, dy[n] : dy[n] + H, dx[n] : dx[n] + W] for n in range(N)])


def normalise(images: Tensor) -> Tensor:
    return (images - DIGITS_MEAN) / DIGITS_STD


def probabilities(model: nn.Module, images: Tensor) -> Tensor:
    """(N,10) class probabilities, in eval mode."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(normalise(batch)).softmax(1) for batch in images.split(256)])


def save_and_reload(model: nn.Module, digits: Digits, output: Path) -> float:
    """Writes the checkpoint, and some test images for ``dfformer predict``.

    Returns the largest difference of the reloaded model's outputs, which must be 0."""
    path = output / "digits.safetensors"
    names = [str(digit) for digit in range(10)]
    data = {
        "input_size": (1, 32, 32),
        "mean": (DIGITS_MEAN,),
        "std": (DIGITS_STD,),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
    }
    save_checkpoint(model, path, ARCHITECTURE, MODEL_ARGS, names, data)
    reloaded, _ = load_model(path)
    difference = (probabilities(reloaded, digits.test_x) - probabilities(model, digits.test_x)).abs().max().item()
    if difference != 0:
        raise RuntimeError(f"the reloaded checkpoint's outputs differ by {difference}")
    folder = output / "digits"
    folder.mkdir(exist_ok=True)
    for n in range(10):
        pixels = (255 * digits.test_x[n, 0]).round().to(torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / f"{n}_is_{digits.test_y[n]}.png")
    return difference


def draw_digits(model: nn.Module, digits: Digits, history: dict[str, list[float]], output: Output) -> None:
    """The four pictures of the digits model, and its filters."""
    confidence, predicted = probabilities(model, digits.test_x).max(1)
    wrong = predicted != digits.test_y
    order = torch.cat([torch.nonzero(wrong).flatten(), torch.nonzero(~wrong).flatten()])[:50]
    title = (
        f"{int(wrong.sum())} mistakes (first) in {len(wrong)} test images: {1 - wrong.float().mean().item():.1%} right"
    )
    grid = figures.predictions_grid(
        digits.test_x[order, 0],
        [str(i) for i in digits.test_y[order].tolist()],
        [str(i) for i in predicted[order].tolist()],
        confidence[order].tolist(),
        title,
    )
    output.figure("predictions", grid)
    curve = figures.learning_curve(history["loss"], history["train_accuracy"], history["test_accuracy"])
    output.figure("learning_curve", curve)
    shown = torch.stack([digits.test_x[digits.test_y == digit][0] for digit in range(10)])
    layers: dict[str, Any] = spectral_layers(model)
    inputs = capture(model, layers, normalise(shown), inputs=True)
    found = {
        name: (stored_filters(layer, layer.size), routing(layer, inputs[name]), layer.size)
        for name, layer in layers.items()
    }
    output.filters({f"a {digit}": image for digit, image in enumerate(shown)}, found)
    basis, shares, (_, width) = found[SHOWN_LAYER]
    names = [f"filter {f}" for f in range(basis.shape[2])]
    learned = figures.filter_basis(basis, width, names, f"Learned filter basis of {SHOWN_LAYER}")
    output.figure("filter_basis", learned)
    filters = mix(shares, basis)
    channels = most_different(filters, 4)
    mixed = figures.mixed_filters(
        list(shown[:, 0].numpy()),
        [str(digit) for digit in range(10)],
        filters[..., channels],
        channels,
        width,
        f"The filter each image makes for itself in {SHOWN_LAYER}: the 4 channels that differ most",
    )
    output.figure("mixed_filters", mixed)


def compare_on_photos(repetitions: int) -> list[Comparison]:
    """Compares DFFormer-S18, with fresh weights, on both photographs at 224 and at full size."""
    model = timm.create_model("dfformer_s18").eval()
    photos = load_sample_images()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    comparisons = []
    for name, pixels in zip(photos.filenames, photos.images, strict=True):
        image = torch.tensor(np.array(pixels), dtype=torch.float32).permute(2, 0, 1)[None] / 255
        image = (image - mean) / std
        small = F.interpolate(image, size=(224, 224), mode="bicubic", antialias=True)
        comparisons += [compare(model, Path(name).stem, x, repetitions) for x in (small, image)]
    return comparisons


def compare(model: nn.Module, photo: str, x: Tensor, repetitions: int) -> Comparison:
    """The difference, the time of an inference (medians of interleaved runs) and the memory of a training forward."""
    models = (eager_baseline(model), model)

    def inference(model: nn.Module) -> Tensor:
        with torch.inference_mode():
            return model(x)

    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repetitions + 1):
        for contender, measured in zip(models, times, strict=True):
            measured.append(milliseconds(partial(inference, contender)))
    eager, fused = (inference(contender) for contender in models)
    medians = [statistics.median(measured[1:]) for measured in times]  # the first run of each warms up
    kept = [saved_for_backward(contender, x) / 2**20 for contender in models]
    return Comparison(photo, x.shape[2], x.shape[3], relative_error(fused, eager), *medians, *kept)


def milliseconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def draw_comparisons(comparisons: list[Comparison], output: Output) -> None:
    """Draws memory and time as a pair of bars for each photograph and size, and writes a table."""
    labels = [f"{c.photograph}\n{c.height}x{c.width}" for c in comparisons]
    for name, eager, fused, unit, title in (
        ("memory", "eager_mib", "fused_mib", "MiB an image", "kept for backward by one training forward"),
        ("time", "eager_ms", "fused_ms", "ms (median)", "inference, one image"),
    ):
        rows = [(label, getattr(c, eager), getattr(c, fused)) for label, c in zip(labels, comparisons, strict=True)]
        bars = figures.comparison_bars(rows, ("eager baseline", "dfformer"), unit, f"DFFormer-S18: {title}")
        output.figure(name, bars)
    output.table("photographs", Comparison._fields, comparisons)


def explanation(report: dict[str, Any]) -> list[str]:
    """The paragraphs of the report."""
    machine, chosen, digits = (report[key] for key in ("environment", "backends", "digits"))
    return [
        f"Digits: a CDFFormer with {sum(MODEL_ARGS['depths'])} blocks, trained for {len(digits['loss'])} epochs, "
        f"classified {digits['test_accuracy'][-1]:.2%} of the test images correctly. Its checkpoint was reloaded and "
        "gave identical outputs. Try it: dfformer predict --checkpoint digits.safetensors digits/",
        "Photographs: the eager baseline is the authors' formulation of DFFormer-S18, with the filter step, StarReLU "
        f"and projections as separate torch operations. dfformer ran the filter step on its {chosen['dynamic_filter']} "
        f"backend and StarReLU on {chosen['star_relu']}. The weights are fresh, which affects neither time nor memory.",
        f"{machine['machine']}; cpu kernels: {machine['cpu kernels']}; torch {machine['torch']}, "
        f"timm {machine['timm']}; seed {report['seed']}; {report['seconds']:.0f} s in all"
        f"{' (quick)' if report['quick'] else ''}.",
    ]
