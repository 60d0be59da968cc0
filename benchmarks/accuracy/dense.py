"""The same comparison where places count: digits on photographs, segmented and detected by this package's training.

The encoders have equal depth, width and norms, and the same decoder. They differ only in their token mixers.
"""

import contextlib
import io
import json
import tempfile
import time
from typing import Any

import timm
import torch
from timm.models import register_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from accuracy.models import SHAPE
from accuracy.training import Case, Result
from dfformer.data.images import seed_everything
from dfformer.models.layers import SepConv
from dfformer.tasks.table import task_part
from dfformer.train.config import parse
from dfformer.train.engine import Engine
from dfformer.utils.device import DistContext

SIDE = 64  # of the images, in pixels
# What differs from the recipes segment_digits and detect_digits of this package: models and images are smaller.
_SHARED: dict[str, Any] = {
    "model.args": SHAPE,
    "data.img_size": SIDE,
    "data.mean": [0.485, 0.456, 0.406],
    "data.std": [0.229, 0.224, 0.225],
    "data.workers": 0,
}
RECIPES: dict[str, dict[str, Any]] = {
    "segmentation": {
        "recipe": "segment_digits",
        **_SHARED,
        "data.synthetic_images": [2000, 100],
        "segment.decoder": {
            "decoder_pyramid_channels": 32,
            "decoder_segmentation_channels": 32,
            "decoder_dropout": 0.0,
        },
        "segment.scale": [1.0, 1.0],
        "optim.epochs": 6,
    },
    "detection": {
        "recipe": "detect_digits",
        **_SHARED,
        "data.synthetic_images": [1000, 100],
        "detect.channels": 32,
        "detect.norm_groups": 8,
        "optim.epochs": 5,
    },
}
LICENCE = (
    "Images made of scikit-learn's: one to four of load_digits (CC BY 4.0) on crops of china.jpg and flower.jpg "
    "(CC BY 2.0: danielbuechele, vultilion)"
)
MEASURES = {"segmentation": "mIoU", "detection": "mAP"}
MODELS = {"dfformer": "dfformer_s18", "cdfformer": "cdfformer_s18", "convformer": "convformer_for_maps"}
_BRIEF = {"data.synthetic_images": [16, 2], "optim.epochs": 1, "optim.warmup_epochs": 0}


@register_model
def convformer_for_maps(**arguments: Any) -> nn.Module:
    """ConvFormer with the norms that this package's encoders have for dense prediction, and timm's has not."""
    model: nn.Module = timm.create_model("cdfformer_s18", token_mixers=SepConv, fork_feat=True, **arguments)
    return model


class _Timed(Engine):
    """An engine that knows how many seconds of the processor its steps took; images are made in between."""

    seconds = 0.0

    def _train_step(self, batches: list[Any]) -> tuple[float, float]:
        start = time.process_time()
        result = super()._train_step(batches)
        self.seconds += time.process_time() - start
        return result

    def _validate(self) -> dict[str, float]:
        return {"seconds": self.seconds, **super()._validate()}


def train(case: Case, brief: bool) -> Result:
    """Like `accuracy.training.train`; the accuracies are percent of mean IoU, or of COCO's mean average precision."""
    settings = RECIPES[case.images] | {"model.name": MODELS[case.model], "seed": case.seed} | (_BRIEF if brief else {})
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        words = [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()]
        config, context = parse([*words, f"--output={folder}"]), DistContext(torch.device("cpu"))
        seed_everything(config.seed)
        task = task_part(config.task, "training")(config, context)
        task.samples.images, task.whole.images = _images(case.images, brief, task)
        engine = _Timed(config, task, context)
        history = engine.run()
    curve = [[row["epoch"], row["seconds"], 100 * row[task.metric]] for row in history]
    return Result(
        **case._asdict(),
        parameters=sum(p.numel() for p in engine.model.parameters()),
        mflops=_flops(engine.model, task) / 1e6,
        seconds=engine.seconds,
        accuracy=curve[-1][-1],
        curve=curve,
        sizes={},
    )


_MADE: dict[tuple[str, bool], tuple[list[Any], list[Any]]] = {}


def _images(name: str, brief: bool, task: Any) -> tuple[list[Any], list[Any]]:
    """The images for training and for testing, which are made once in a process."""
    if (name, brief) not in _MADE:
        _MADE[name, brief] = list(task.samples.images), list(task.whole.images)
    return _MADE[name, brief]


def _flops(model: nn.Module, task: Any) -> int:
    """Of an image forward."""
    image = torch.zeros(3, SIDE, SIDE)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()([image] if task.metric == "map" else image[None])
    return counter.get_total_flops()
