"""Object detection: any encoder of timm with a RetinaNet of torchvision on it, trained, evaluated and applied."""

import argparse
import json
from collections.abc import Callable, Iterable
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import timm
import torch
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader

try:
    import pycocotools  # noqa: F401 (torchmetrics misses it only when it measures, after an epoch)
    from torchmetrics.detection import MeanAveragePrecision
except ImportError as error:
    raise RuntimeError(f"detection needs {error.name}: pip install 'dfformer[dense]'") from error
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import nms
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelP6P7
from torchvision.transforms import v2

from dfformer.data import images as image_data
from dfformer.data.boxes import Prepared, Target, check_same_categories, collate, open_boxed
from dfformer.models.checkpoint import CheckpointError, build_and_load, read_checkpoint
from dfformer.tasks.base import DenseTask, Place
from dfformer.tasks.evaluate import Timed, progress, write_csv
from dfformer.tasks.predict import Files, OnError, Prediction, check_names, predict_files
from dfformer.train.config import TrainConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STRIDES = (8, 16, 32, 64, 128)  # of the pyramid's maps; the first three are the encoder's
_MOST_FOUND = 100  # objects an image, COCO's number
_SHOWN = 6  # images in predictions.png
_SURE = 0.3  # score of what is drawn
_MEASURES = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large")

Batch = tuple[list[Tensor], list[Target]]
NormLayer = Callable[[int], nn.Module]


class Pyramid(nn.Module):
    """Images (B,3,H,W) to five maps of ``channels`` channels with strides 8 to 128, by name."""

    def __init__(self, encoder: str, encoder_args: dict[str, Any], channels: int, norm: NormLayer | None) -> None:
        super().__init__()
        self.encoder = timm.create_model(encoder, features_only=True, out_indices=(-3, -2, -1), **encoder_args)
        strides, widths = self.encoder.feature_info.reduction(), self.encoder.feature_info.channels()
        if tuple(strides) != _STRIDES[:3]:
            raise ValueError(f"model.name: the last maps of {encoder} have strides {strides}, accepted are 8, 16, 32")
        self.fpn = FeaturePyramidNetwork(widths, channels, LastLevelP6P7(widths[-1], channels), norm)
        self.out_channels = channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.encoder(images)
        if self.encoder.output_fmt == "NHWC":
            features = [feature.permute(0, 3, 1, 2) for feature in features]
        maps: dict[str, Tensor] = self.fpn({f"p{n}": feature for n, feature in enumerate(features, 3)})
        return maps


class _Float32Head(RetinaNetHead):
    """Whose outputs are float32 under autocast too: half a mantissa is too little for coordinates."""

    def forward(self, maps: list[Tensor]) -> dict[str, Tensor]:
        return {name: output.float() for name, output in super().forward(maps).items()}


class Detector(RetinaNet):
    """torchvision's RetinaNet on an encoder of timm: images, a list of (3,H,W) of 0 to 1, to losses or detections.

    Args:
        encoder: its name for ``timm.create_model``; its last three feature maps must have strides 8, 16 and 32.
        encoder_args: other arguments for it.
        classes: how many.
        img_size: most for the shorter and for the longer side, to which images are resized.
        mean, std: of the pixels.
        channels: of the pyramid and the head.
        anchor_scale: side of the smallest anchors, in strides of their map.
        norm_groups: of a group norm after each of the pyramid's and the head's convolutions; 0 for none.
    """

    def __init__(
        self,
        encoder: str,
        encoder_args: dict[str, Any],
        classes: int,
        img_size: tuple[int, int],
        mean: list[float],
        std: list[float],
        channels: int,
        anchor_scale: float,
        norm_groups: int,
    ) -> None:
        norm = partial(nn.GroupNorm, norm_groups) if norm_groups else None
        sides = [[anchor_scale * stride * 2 ** (third / 3) for third in range(3)] for stride in _STRIDES]
        anchors = AnchorGenerator(sides, [[0.5, 1.0, 2.0]] * len(sides))
        super().__init__(
            Pyramid(encoder, encoder_args, channels, norm),
            classes,
            image_mean=mean,
            image_std=std,
            anchor_generator=anchors,
            head=_Float32Head(channels, anchors.num_anchors_per_location()[0], classes, norm_layer=norm),
            detections_per_img=_MOST_FOUND,
        )
        self.set_img_size(*img_size)

    def set_img_size(self, shorter: int, longer: int) -> None:
        self.transform.min_size, self.transform.max_size = (shorter,), longer

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        encoder = self.backbone.encoder
        getattr(encoder, "model", encoder).set_grad_checkpointing(enable)


def load_detector(path: str | Path) -> tuple[Detector, dict[str, Any]]:
    """The model of a checkpoint of detection, in eval mode, and what the file says about it.

    That is: ``architecture`` and ``model_args`` of the encoder, ``classes`` (names) and ``category_ids`` (COCO's),
    ``data`` (input_size, whose last two are the most for the shorter and for the longer side, mean, std), ``detector``
    (channels, anchor_scale, norm_groups) and ``repair_boxes`` (whether its data needed that).
    """
    state_dict, about = read_checkpoint(path)
    if about.get("task") != "detect":
        raise CheckpointError(f"{path}: is not of detection, or does not say so")
    encoder, pixels = about["architecture"], about["data"]

    def build() -> Detector:
        size, classes = pixels["input_size"][1:], len(about["classes"])
        mean, std = pixels["mean"], pixels["std"]
        return Detector(encoder, about["model_args"], classes, size, mean, std, **about["detector"])

    return build_and_load(build, state_dict, path), about


def _on(device: torch.device, images: list[Tensor]) -> list[Tensor]:
    return [image.to(device, non_blocking=True).float() / 255 for image in images]


def detect(model: nn.Module, images: Iterable[Tensor], device: torch.device) -> list[Target]:
    """Boxes, labels and scores, best first, on the CPU, of images uint8 (3,H,W): each by itself, as padding to the size
    of others would change what is found."""
    with torch.inference_mode():
        found = [model(_on(device, [image]))[0] for image in images]
    return [{name: values.cpu() for name, values in objects.items()} for objects in found]


def average_precision(
    model: nn.Module, batches: Iterable[Batch], place: Place, by_class: bool = False
) -> dict[str, Any]:
    """COCO's measures over all processes, by torchmetrics' names; what there is no object for is NaN.

    Images whose target is None do not count. The model is left in eval mode.
    """
    model.eval()
    found = [(detect(model, images, place.device), targets) for images, targets in batches]
    pairs = [pair for batch in found for pair in zip(*batch, strict=True) if pair[1] is not None]
    parts: list[Any] = [pairs]
    if place.world > 1:
        parts = [None] * place.world
        distributed.all_gather_object(parts, pairs)
    metric = MeanAveragePrecision(class_metrics=by_class, sync_on_compute=False)
    for objects, truth in (pair for each in zip_longest(*parts) for pair in each if pair):
        metric.update([objects], [truth])
    measures = {name: torch.where(value == -1, torch.nan, value) for name, value in metric.compute().items()}
    return {name: value.tolist() for name, value in measures.items()}


class Detection(DenseTask):
    """Images with boxes around objects; focal loss and L1; COCO's mean average precision."""

    metric = "map"

    def __init__(self, config: TrainConfig, place: Place) -> None:
        given = config.data
        train_set, val_set = (
            open_boxed(given.dataset, given.root, split, given.size, count, config.detect.repair_boxes, training)
            for split, count, training in zip(
                (given.train_split, given.val_split), given.scenes, (True, False), strict=True
            )
        )
        if config.detect.norm_groups and config.detect.channels % config.detect.norm_groups:
            raise ValueError(
                f"detect.norm_groups: got {config.detect.norm_groups}, which does not divide "
                f"detect.channels={config.detect.channels}"
            )
        if given.size[0] > given.size[1]:
            raise ValueError(
                f"data.img_size: got {given.img_size}, accepted to detect are the limits of the shorter and of the "
                "longer side, in this order"
            )
        self.categories = train_set.categories
        where = f"{given.root}, split {given.val_split}"
        check_same_categories(val_set.categories, self.categories, where, f"split {given.train_split}")
        super().__init__(config, place, train_set, val_set)
        self.detector = {name: getattr(config.detect, name) for name in ("channels", "anchor_scale", "norm_groups")}

    def on_encoder(self, arguments: dict[str, Any]) -> Detector:
        name, size = self.config.model.name, self.config.data.size
        return Detector(name, arguments, len(self.categories), size, self.mean, self.std, **self.detector)

    def training_loader(self) -> DataLoader:
        prepared = Prepared(self.train_set, self.config.detect.hflip)
        pinned = self.place.device.type == "cuda"
        return image_data.training_loader(prepared, self.batches, self.config.data.workers, pinned, collate)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        images, targets = batch
        device = self.place.device
        moved = [{name: t.to(device, non_blocking=True) for name, t in target.items()} for target in targets]
        losses: dict[str, Tensor] = model(_on(device, images), moved)
        return torch.stack(list(losses.values())).sum()

    def validate(self, model: nn.Module) -> dict[str, float]:
        loader = _loader(self.val_set, self.config.data.workers, self.place)
        measures = average_precision(model, loader, self.place)
        return {name: measures[name] for name in _MEASURES[:3]}  # the others are NaN where there is no such object

    def export(self, weights: dict[str, Tensor], path: Path) -> None:
        self.save(
            weights,
            path,
            list(self.categories.values()),
            task="detect",
            category_ids=list(self.categories),
            detector=self.detector,
            repair_boxes=self.config.detect.repair_boxes,
        )

    def pictures(self, model: nn.Module) -> "dict[str, Figure]":
        from dfformer.analysis.figures import detections

        model.eval()
        shown = [self.val_set[index] for index in range(min(_SHOWN, len(self.val_set)))]
        images = [np.asarray(image) for image, _ in shown]
        truth = [{"boxes": objects.boxes, "labels": objects.labels} for _, objects in shown]
        pixels = (v2.functional.pil_to_tensor(image) for image, _ in shown)
        found = [_drawn(objects) for objects in detect(model, pixels, self.place.device)]
        title = f"{self.config.model.name}: the first {len(images)} validation images"
        rows = {"truth": truth, f"found, score {_SURE:g} and up": found}
        return {"predictions.png": detections(images, rows, list(self.categories.values()), title)}


def _no_target(target: Target) -> None:
    return None


def _loader(dataset: Any, workers: int, place: Place) -> DataLoader:
    pinned = place.device.type == "cuda"
    prepared = Prepared(dataset)
    return image_data.evaluation_loader(
        prepared, 1, workers, pinned, place.rank, place.world, collate, surplus=_no_target
    )


def _drawn(objects: Target) -> dict[str, np.ndarray]:
    """What is sure enough to be drawn: at one place the best of all classes."""
    kept = nms(objects["boxes"], objects["scores"], iou_threshold=0.5)
    kept = kept[objects["scores"][kept] >= _SURE]
    return {name: values[kept].numpy() for name, values in objects.items()}


def evaluate_command(arguments: argparse.Namespace) -> int:
    """The command line's ``eval`` for checkpoints of detection."""
    if arguments.crop_pct is not None or arguments.model is not None:
        raise ValueError("--crop-pct, --model: not for detection: whole images, and checkpoints say their model")
    rows: list[list[Any]] = []
    for checkpoint in arguments.checkpoints:
        model, about = load_detector(checkpoint)
        for shorter, longer in _sizes(about, arguments.img_size):
            model.set_img_size(shorter, longer)
            row = _evaluate(checkpoint, model, about, (shorter, longer), arguments)
            rows.append([str(checkpoint), about["architecture"], shorter, longer, arguments.amp, *row])
            measured = f"mAP {row[1]:.2%}  at IoU 0.5 {row[2]:.2%}  at 0.75 {row[3]:.2%}"
            print(f"{checkpoint}  {shorter}x{longer}  {row[0]} images  {measured}  {row[7]:.1f} images/s", flush=True)
            if arguments.csv:
                columns = ["checkpoint", "model", "shorter_side", "longer_side", "amp", "images", *_MEASURES]
                columns += ["images_per_second", *(f"map {name}" for name in about["classes"])]
                write_csv(arguments.csv, columns, rows)
    return 0


def _sizes(about: dict[str, Any], given: list[tuple[int, int]] | None) -> list[tuple[int, int]]:
    """The most for the shorter and for the longer side: as given, or as in training."""
    return [(min(size), max(size)) for size in given] if given else [tuple(about["data"]["input_size"][1:])]


def _evaluate(
    checkpoint: Path, model: nn.Module, about: dict[str, Any], size: tuple[int, int], arguments: argparse.Namespace
) -> list[Any]:
    """Number of images, _MEASURES, images a second and each class's mAP."""
    place = Place(torch.device(arguments.device))
    made = about["data"]["input_size"][1:]
    dataset = open_boxed(
        arguments.dataset, arguments.root, arguments.split, made, arguments.scenes, about["repair_boxes"]
    )
    expected = dict(zip(about["category_ids"], about["classes"], strict=True))
    check_same_categories(dataset.categories, expected, f"{arguments.root}, split {arguments.split}", str(checkpoint))
    dataset.check()
    timed = Timed(model.to(place.device), place.device, arguments.amp)
    loader = progress(_loader(dataset, arguments.workers, place), f"{checkpoint.name} {size[0]}x{size[1]}")
    measures = average_precision(timed, loader, place, by_class=True)
    each = dict(zip(measures["classes"], measures["map_per_class"], strict=True))
    by_class = [each.get(n, float("nan")) for n in range(len(expected))]
    return [len(dataset), *(measures[name] for name in _MEASURES), len(dataset) / timed.seconds, *by_class]


def predict_command(arguments: argparse.Namespace) -> int:
    """The command line's ``predict`` for a checkpoint of detection: pictures, and detections.json in COCO's format."""
    if arguments.model or arguments.classes or arguments.pretrained:
        raise ValueError("--model, --classes, --pretrained: a checkpoint of detection says its model and classes")
    model, about = load_detector(arguments.checkpoint)
    device = torch.device(arguments.device)
    model.to(device).set_img_size(*_sizes(about, arguments.img_size and [arguments.img_size])[0])

    def run(paths: list[Path], workers: int, on_error: OnError) -> list[Prediction]:
        check_names(paths)
        predictions, results = [], []
        arguments.output.mkdir(parents=True, exist_ok=True)
        for [(path, content)] in DataLoader(
            Files(paths, v2.functional.pil_to_tensor, 3), num_workers=workers, collate_fn=list
        ):
            if isinstance(content, Exception):
                on_error(path, content)
                continue
            [objects] = detect(model, [content], device)
            results += _coco_results(path, objects, about["category_ids"])
            _draw(arguments.output / f"{path.stem}.png", content, objects, about["classes"])
            names = [about["classes"][label] for label in objects["labels"][: arguments.topk].tolist()]
            predictions.append(Prediction(str(path), names, objects["scores"][: arguments.topk].tolist()))
        (arguments.output / "detections.json").write_text(json.dumps(results), encoding="utf-8")
        print(f"pictures, and detections.json in COCO's format: {arguments.output}")
        return predictions

    return predict_files(arguments, run, "score")


def _coco_results(path: Path, objects: Target, category_ids: list[int]) -> list[dict[str, Any]]:
    """In COCO's result format. COCO's own files are named by the number of the image; other names stay names."""
    image = int(path.stem) if path.stem.isdecimal() else path.stem
    rows = zip(*(objects[name].tolist() for name in ("boxes", "labels", "scores")), strict=True)
    return [
        {
            "image_id": image,
            "category_id": category_ids[label],
            "bbox": [left, top, right - left, bottom - top],
            "score": score,
        }
        for (left, top, right, bottom), label, score in rows
    ]


def _draw(path: Path, image: Tensor, objects: Target, classes: list[str]) -> None:
    from dfformer.analysis.figures import detections

    pixels = image.permute(1, 2, 0).numpy()
    detections([pixels], {f"score {_SURE:g} and up": [_drawn(objects)]}, classes, path.stem).savefig(path, dpi=110)
