"""One training of one model by the common recipe, and its measurements."""

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from accuracy.images import SCALES, SIZE, VIEWS, Images, load
from accuracy.models import CHANGES, MODELS
from dfformer.models.filter_resize import RULES
from dfformer.models.spectral import SpectralFilter

RECIPE: dict[str, Any] = {
    "epochs": {"digits": 14, "mnist": 3, "photographs": 7},
    "batch": 32,
    "optimizer": "AdamW",
    "lr": 3e-3,
    "weight_decay": 0.05,
    "schedule": "one cycle: linear warm-up over a tenth of the steps, then a cosine to 0",
    "label_smoothing": 0.1,
    "augmentation": "random windows: shifts by 3 pixels for digits, anywhere in the half for photographs",
}
PART = 320  # evenly spread test images for tests during training and at other sizes
LOOKS = 8  # tests during a training, including one at its end


class Case(NamedTuple):
    images: str
    model: str
    seed: int


@dataclass(frozen=True)
class Result:
    """The result of one training. Accuracies are in percent."""

    images: str
    model: str
    seed: int
    parameters: int
    mflops: float  # of a forward of one image; a multiply-add counts as 2
    seconds: float  # processor time of one thread, for training alone
    accuracy: float  # on all test images
    curve: list[list[float]]  # after each epoch: seconds of training, accuracy on PART images
    sizes: dict[str, float]  # on these images at other sizes, by "view scale rule"; models without filters have no rule


def train(case: Case, brief: bool) -> Result:
    """With ``brief``, one epoch on few images, to test the benchmark itself."""
    images = load(case.images)
    if brief:
        images = images._replace(
            sources=images.sources[:64],
            labels=images.labels[:64],
            test=images.test[:20],
            test_labels=images.test_labels[:20],
        )
    torch.manual_seed(case.seed)
    build = {**MODELS, **CHANGES}[case.model]
    model = build(images.in_chans, load(case.images).classes)
    mflops = flops(model, images) / 1e6
    spread = torch.linspace(0, len(images.test) - 1, min(PART, len(images.test))).long()
    part = images._replace(test=images.test[spread], test_labels=images.test_labels[spread])
    curve = _fit(model, part, 1 if brief else RECIPE["epochs"][case.images], case.seed)
    return Result(
        **case._asdict(),
        parameters=sum(p.numel() for p in model.parameters()),
        mflops=mflops,
        seconds=curve[-1][1],
        accuracy=accuracy(model, images.view("finer", 1.0), images.test_labels),
        curve=curve,
        sizes=_at_other_sizes(model, part),
    )


def flops(model: nn.Module, images: Images) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, images.in_chans, SIZE, SIZE))
    return counter.get_total_flops()


def _fit(model: nn.Module, images: Images, epochs: int, seed: int) -> list[list[float]]:
    generator = torch.Generator().manual_seed(seed)
    steps = -(-len(images.sources) // RECIPE["batch"])
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": RECIPE["weight_decay"]}, {"params": others, "weight_decay": 0.0}],
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RECIPE["lr"], total_steps=epochs * steps, pct_start=0.1, cycle_momentum=False
    )
    loss = nn.CrossEntropyLoss(label_smoothing=RECIPE["label_smoothing"])
    curve: list[list[float]] = []
    start, spent = time.process_time(), 0.0
    for step, index in enumerate(_batches(images, epochs, generator), 1):
        model.train()
        optimizer.zero_grad()
        loss(model(images.batch(index, generator)), images.labels[index]).backward()
        optimizer.step()
        schedule.step()
        if step * LOOKS // (epochs * steps) > len(curve):
            spent += time.process_time() - start
            curve.append([step / steps, spent, accuracy(model, images.view("finer", 1.0), images.test_labels)])
            start = time.process_time()
    return curve


def _batches(images: Images, epochs: int, generator: torch.Generator) -> Iterator[Tensor]:
    for _ in range(epochs):
        yield from torch.randperm(len(images.sources), generator=generator).split(RECIPE["batch"])


@torch.inference_mode()
def accuracy(model: nn.Module, x: Tensor, labels: Tensor) -> float:
    """The percentage of images that ``model`` classifies correctly."""
    model.eval()
    right = [model(part).argmax(1) == y for part, y in zip(x.split(100), labels.split(100), strict=True)]
    return 100 * torch.cat(right).float().mean().item()


def _at_other_sizes(model: nn.Module, images: Images) -> dict[str, float]:
    filters = [m for m in model.modules() if isinstance(m, SpectralFilter)]
    found: dict[str, float] = {}
    for rule, view, scale in itertools.product(RULES if filters else ("",), VIEWS, SCALES):
        for mixer in filters:
            mixer.resize = rule
        if scale != 1:
            found[f"{view} {scale:g} {rule}".strip()] = accuracy(model, images.view(view, scale), images.test_labels)
    return found
