"""``dfformer demo``: the main job on real images without downloads.

1. Trains a small CDFFormer on scikit-learn's handwritten digits, and shows what its filters learned.
2. Runs DFFormer-S18 on scikit-learn's two photographs and compares the fused step with the eager baseline.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2.functional import normalize, pil_to_tensor, to_dtype, to_pil_image
from tqdm import tqdm

from dfformer.analysis import figures
from dfformer.analysis.output import Output
from dfformer.analysis.samples import Loaded, load_samples
from dfformer.analysis.show_filters import show_filters
from dfformer.cli.info import environment
from dfformer.data.images import DIGITS_MEAN, DIGITS_STD, Digits, load_digit_images
from dfformer.data.photographs import sklearn_photographs
from dfformer.models.checkpoint import load_model, save_checkpoint
from dfformer.models.spectral import DynamicFilter
from dfformer.utils.eager_baseline import eager_baseline
from dfformer.utils.io import write_json
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
    """Writes report.html, report.json, digits.safetensors, digits/*.png, pictures and tables into a folder."""
    start = time.perf_counter()
    effort = QUICK if arguments.quick else FULL
    output = Output(arguments.output, dpi=130)
    digits = load_digit_images(arguments.seed)
    trained, history = train(digits, effort.epochs, arguments.seed)
    accuracy = history["test_accuracy"][-1]
    if accuracy < effort.target:
        raise RuntimeError(f"the digits model got {accuracy:.2%} of the test set right, not {effort.target:.0%}")
    draw_digits(saved_and_reloaded(trained, digits, output.folder), digits, history, output)
    comparisons = compare_on_photos(effort.repetitions)
    draw_comparisons(comparisons, output)
    report = {
        "environment": environment(),
        "backends": {
            op: select(Problem(op, "cpu", torch.float32, (1, 56, 56, 128))).name
            for op in ("dynamic_filter", "star_relu")
        },
        "seed": arguments.seed,
        "quick": arguments.quick,
        "seconds": round(time.perf_counter() - start, 1),
        "digits": history,
        "photos": [c._asdict() for c in comparisons],
    }
    write_json(output.folder / "report.json", report)
    output.report("dfformer demo", explanation(report))
    print(f"digits: {accuracy:.2%} of {len(digits.test_y)} test images right; read {output.folder / 'report.html'}")
    return 0


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


def saved_and_reloaded(model: nn.Module, digits: Digits, output: Path) -> nn.Module:
    """Writes the checkpoint, and a test image of each digit; returns the model of the checkpoint."""
    path, folder = output / "digits.safetensors", output / "digits"
    data = {
        "input_size": (1, 32, 32),
        "mean": (DIGITS_MEAN,),
        "std": (DIGITS_STD,),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
    }
    save_checkpoint(model, path, ARCHITECTURE, MODEL_ARGS, [str(digit) for digit in range(10)], data)
    reloaded, _ = load_model(path)
    if not torch.equal(probabilities(reloaded, digits.test_x), probabilities(model, digits.test_x)):
        raise RuntimeError("the reloaded checkpoint's outputs differ")
    folder.mkdir(exist_ok=True)
    for digit in range(10):
        pixels = (255 * digits.test_x[digits.test_y == digit][0]).round().to(torch.uint8)
        to_pil_image(pixels).save(folder / f"{digit}.png")
    return reloaded


def draw_digits(model: nn.Module, digits: Digits, history: dict[str, list[float]], output: Output) -> None:
    """The pictures of the digits model, and of the filters that it makes for the images in ``digits/``."""
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
    samples = load_samples([output.folder / "digits" / f"{digit}.png" for digit in range(10)], {1})
    show_filters([Loaded("digits", model)], samples, output, "*")


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
        for contender, measured in zip(models, times, strict=True):
            start = time.perf_counter()
            inference(contender)
            measured.append(1e3 * (time.perf_counter() - start))
    eager, fused = (inference(contender) for contender in models)
    medians = [statistics.median(measured[1:]) for measured in times]  # the first run of each warms up
    kept = [saved_for_backward(contender, x) / 2**20 for contender in models]
    return Comparison(photo, x.shape[2], x.shape[3], relative_error(fused, eager), *medians, *kept)


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
