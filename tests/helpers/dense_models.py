"""Small models for dense prediction, as checkpoints."""

from pathlib import Path
from typing import Any

import torch

from dfformer.models.checkpoint import save_checkpoint
from dfformer.tasks.detection import Detector
from dfformer.tasks.restorer import Restorer
from dfformer.tasks.segmentation import Segmenter

DENSE: dict[str, dict[str, Any]] = {
    "segment": {"decoder": {"decoder_pyramid_channels": 8}, "reduce_zero_label": False},
    "detect": {
        "detector": {"channels": 8, "anchor_scale": 2.0, "norm_groups": 0},
        "category_ids": [0, 1],
        "repair_boxes": False,
    },
    "restore": {
        "restorer": {"channels": 8, "stride": 2, "blocks": 1},
        "degradation": {"scale": 2, "blur": 0.0, "noise": 0.0},
    },
}


def dense_checkpoint(task: str, path: Path, architecture: str, arguments: dict[str, Any]) -> Path:
    pixels: dict[str, Any] = {"mean": [0.3] * 3, "std": [0.4] * 3}
    model: torch.nn.Module
    if task == "segment":
        model = Segmenter(architecture, arguments, 2, DENSE[task]["decoder"])
    elif task == "restore":
        model = Restorer(architecture, arguments, 2, **pixels, **DENSE[task]["restorer"])
    else:
        model = Detector(architecture, arguments, 2, (32, 48), **pixels, **DENSE[task]["detector"])
    data = {"input_size": [3, 32, 48], **pixels}
    classes = None if task == "restore" else ["one", "two"]
    save_checkpoint(model, path, architecture, arguments, classes, data, task=task, **DENSE[task])
    return path
