"""Object detection with torchvision's RetinaNet on any encoder of timm: training, evaluation and prediction."""

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torchvision.ops import box_convert, nms
from torchvision.transforms import v2

from dfformer.data import images as image_data
from dfformer.data.boxes import DetectionTensors, Target, open_box_dataset, with_ids
from dfformer.data.files import real_path
from dfformer.models.description import DETECTOR
from dfformer.tasks.base import DenseTask, load_dense
from dfformer.tasks.detector import Detector
from dfformer.tasks.evaluate import Measured, Timed, at_each_size, batches, dataset_spec, own_size
from dfformer.tasks.predict import File, Predictor, Top
from dfformer.tasks.results import result_names, result_paths, write_results
from dfformer.utils.device import DistContext
from dfformer.utils.extras import extra
from dfformer.utils.io import write_atomically

with extra("dense"):
    import pycocotools  # noqa: F401 (torchmetrics would only report it missing after an epoch)
    from torchmetrics.detection import MeanAveragePrecision

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dfformer.train.config import TrainConfig

_MIN_SCORE = 0.3  # of boxes that are drawn
_MEASURES = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large")

Batch = tuple[list[Tensor], list[Target]]


def _detector(description: dict[str, Any]) -> Detector:
    images = description["data"]
    data = (len(description["classes"]), own_size(description), images["mean"], images["std"])
    return Detector(description["architecture"], description["model_args"], *data, **description["detector"])


def load_detector(path: str | Path) -> tuple[Detector, dict[str, Any]]:
    """The model of a detection checkpoint, in eval mode, and the file's description of it.

    The description has ``architecture`` and ``model_args`` of the encoder, ``classes`` (names), ``category_ids``
    (COCO's), ``data`` (mean, std and input_size, whose last two numbers limit the shorter and the longer side),
    ``detector`` (channels, anchor_scale, norm_groups) and ``repair_boxes`` (whether its data needed repairs).
    """
    return load_dense(path, "detect", _detector)


def _on(device: torch.device, images: list[Tensor]) -> list[Tensor]:
    return [image.to(device, non_blocking=True).float() / 255 for image in images]


def detect(model: nn.Module, images: Iterable[Tensor], device: torch.device) -> list[Target]:
    """Boxes, labels and scores of images uint8 (3,H,W), best first, on the CPU.

    Each image goes through the model alone, because padding to the size of others would change the result.
    """
    with torch.inference_mode():
        found = [model(_on(device, [image]))[0] for image in images]
    return [{name: values.cpu() for name, values in objects.items()} for objects in found]


def average_precision(
    model: nn.Module, batches: Iterable[Batch], context: DistContext, by_class: bool = False
) -> dict[str, Any]:
    """COCO's metrics over all processes, by torchmetrics' names; a metric without any objects is NaN.

    Images whose target is None do not count. The model is left in eval mode.
    """
    model.eval()
    found = [(detect(model, images, context.device), targets) for images, targets in batches]
    pairs = [pair for batch in found for pair in zip(*batch, strict=True) if pair[1] is not None]
    parts: list[Any] = [pairs]
    if context.world > 1:
        parts = [None] * context.world
        distributed.all_gather_object(parts, pairs)
    metric = MeanAveragePrecision(class_metrics=by_class, sync_on_compute=False)
    for objects, truth in (pair for each in zip_longest(*parts) for pair in each if pair):
        metric.update([objects], [truth])
    measures = {name: torch.where(value == -1, torch.nan, value) for name, value in metric.compute().items()}
    # Without dimensions for a single class.
    return {name: value.flatten().tolist() if "class" in name else value.item() for name, value in measures.items()}


class Detection(DenseTask):
    """Images with boxes around objects; focal loss and L1; COCO's mean average precision."""

    metric = "map"
    build = staticmethod(_detector)

    def __init__(self, config: "TrainConfig", context: DistContext) -> None:
        given = config.data
        train_set, val_set = (
            open_box_dataset(given.spec(training), config.detect.repair_boxes, training) for training in (True, False)
        )
        if config.detect.norm_groups and config.detect.channels % config.detect.norm_groups:
            raise ValueError(
                f"detect.norm_groups: expected a divisor of detect.channels={config.detect.channels}, "
                f"got {config.detect.norm_groups}"
            )
        if given.size[0] > given.size[1]:
            raise ValueError(
                f"data.img_size: for detection, expected [limit of the shorter side, limit of the longer side], "
                f"got {given.img_size}"
            )
        self.categories = train_set.categories
        where = f"{given.root}, split {given.val_split}"
        expected = with_ids(self.categories)
        image_data.check_same_classes(with_ids(val_set.categories), expected, where, f"split {given.train_split}")
        samples, whole = DetectionTensors(train_set, config.detect.hflip), DetectionTensors(val_set)
        super().__init__(config, context, samples, whole, list(train_set.categories.values()))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        images, targets = batch
        device = self.context.device
        moved = [{name: t.to(device, non_blocking=True) for name, t in target.items()} for target in targets]
        losses: dict[str, Tensor] = model(_on(device, images), moved)
        return torch.stack(list(losses.values())).sum()

    def validate(self, model: nn.Module) -> dict[str, float]:
        measures = average_precision(model, self.validation_loader(), self.context)
        return {name: measures[name] for name in _MEASURES[:3]}  # the others are NaN if there are no such objects

    def own_description(self) -> dict[str, Any]:
        own = {"category_ids": list(self.categories), "repair_boxes": self.config.detect.repair_boxes}
        detector = {name: getattr(self.config.detect, name) for name in DETECTOR}
        return {**super().own_description(), **own, "detector": detector}

    def picture(self, model: nn.Module) -> "Figure":
        from dfformer.analysis.dense_figures import detections

        images, truths = zip(*(self.whole.images[n] for n in self.shown), strict=True)
        found = detect(model, map(v2.functional.pil_to_tensor, images), self.context.device)
        confident_ones = [confident(objects, _MIN_SCORE) for objects in found]
        title = f"{self.config.model.name}: the first {len(images)} validation images"
        rows = {"truth": truths, f"found, score {_MIN_SCORE:g} and up": _as_arrays(confident_ones)}
        return detections([np.asarray(image) for image in images], rows, self.classes, title)


def confident(objects: Target, min_score: float) -> Target:
    """The detections of an image to show, best first; of overlapping boxes only the best, over all classes."""
    kept = nms(objects["boxes"], objects["scores"], iou_threshold=0.5)
    kept = kept[objects["scores"][kept] >= min_score]
    return {name: values[kept] for name, values in objects.items()}


def _as_arrays(found: list[Target]) -> list[dict[str, np.ndarray]]:
    return [{name: values.numpy() for name, values in objects.items()} for objects in found]


def evaluate(checkpoint: Path, arguments: argparse.Namespace) -> Iterator[Measured]:
    """``dfformer eval`` of a detection checkpoint."""
    model, description = load_detector(checkpoint)
    context, classes = DistContext(torch.device(arguments.device)), description["classes"]
    dataset = open_box_dataset(dataset_spec(arguments, own_size(description)), description["repair_boxes"])
    own = with_ids(dict(zip(description["category_ids"], classes, strict=True)))
    image_data.check_same_classes(own, with_ids(dataset.categories), checkpoint, "the data")

    def measure(timed: Timed, size: tuple[int, int]) -> Any:
        shorter, longer = sorted(size)
        model.set_img_size(shorter, longer)
        bar = batches(DetectionTensors(dataset), arguments, f"{checkpoint.name} {shorter}x{longer}")
        measures = average_precision(timed, bar, context, by_class=True)
        each = dict(zip(measures["classes"], measures["map_per_class"], strict=True))
        by_class = {f"map {name}": each.get(n, float("nan")) for n, name in enumerate(classes)}
        columns = {"shorter_side": shorter, "longer_side": longer}
        return columns, {name: measures[name] for name in _MEASURES}, by_class

    return at_each_size(model, description, dataset, arguments, measure)


def predictor(arguments: argparse.Namespace, paths: list[Path]) -> Predictor:
    """``dfformer predict`` for a detection checkpoint: pictures, and detections.json in COCO's format."""
    from dfformer.analysis.dense_figures import detections

    min_score = _MIN_SCORE if arguments.min_score is None else arguments.min_score
    if not 0 <= min_score <= 1:
        raise ValueError(f"--min-score: expected a number from 0 to 1, got {min_score}")
    report = arguments.output / "detections.json"
    if arguments.json and real_path(arguments.json) == real_path(report):
        raise ValueError(f"--json: expected another file than that of all boxes, got {arguments.json}")
    model, description = load_detector(arguments.checkpoint)
    device, classes = torch.device(arguments.device), description["classes"]
    model.to(device).set_img_size(*(sorted(arguments.img_size or own_size(description))))
    stems, ids = result_paths(paths, arguments.output, [".png"], report.name), _image_ids(paths)
    results: list[dict[str, Any]] = []

    def apply(batch: list[File]) -> list[Top]:
        [(path, image, *_)] = batch
        [objects] = detect(model, [image], device)
        shown = confident(objects, min_score)
        row = {f"score {min_score:g} and up": _as_arrays([shown])}
        figure = detections([image.permute(1, 2, 0).numpy()], row, classes, stems[path].name)
        write_results(stems[path], {".png": figure})
        results.extend(_coco_results(ids[path], objects, description["category_ids"]))
        labels, scores = (shown[name][: arguments.topk].tolist() for name in ("labels", "scores"))
        return [[(classes[label], score) for label, score in zip(labels, scores, strict=True)]]

    def finish() -> None:
        write_atomically(report, json.dumps(results).encode())

    written = "pictures, and detections.json in COCO's format"
    return Predictor(v2.functional.pil_to_tensor, apply, value="score", finish=finish, written=written)


def _image_ids(paths: list[Path]) -> dict[Path, int | str]:
    """A unique id for each image: the number if its name is one, as in COCO's own files, else the name."""
    names = result_names(paths)
    numbers = {name: int(name) for name in names if name.isascii() and name.isdecimal()}
    count = Counter(numbers.values())  # 7 and 007 are the same number
    ids = [numbers[name] if count[numbers.get(name, -1)] == 1 else name for name in names]
    return dict(zip(paths, ids, strict=True))


def _coco_results(image: int | str, objects: Target, category_ids: list[int]) -> list[dict[str, Any]]:
    boxes = box_convert(objects["boxes"].double(), "xyxy", "xywh")
    rows = zip(objects["labels"].tolist(), boxes.tolist(), objects["scores"].tolist(), strict=True)
    return [
        {"image_id": image, "category_id": category_ids[label], "bbox": box, "score": score}
        for label, box, score in rows
    ]
