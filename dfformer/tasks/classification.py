"""Image classification by any model of timm: training with timm's augmentation, evaluation and prediction."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch
from timm.data import ImageNetInfo, Mixup, resolve_data_config
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn
from torch.nn import functional as F

from dfformer.data import images as image_data
from dfformer.data.files import read_class_names
from dfformer.data.transforms import evaluation_transform, training_transform
from dfformer.models.checkpoint import chosen_model, load_checkpoint, load_model
from dfformer.models.description import is_ours
from dfformer.tasks.base import Task
from dfformer.tasks.evaluate import Measured, Pixels, Timed, accuracy, batches, data_config, dataset_spec, logits_of
from dfformer.tasks.predict import File, Predictor, Top, checked
from dfformer.utils.device import DistContext

if TYPE_CHECKING:
    from dfformer.train.config import TrainConfig

Batch = tuple[Tensor, Tensor]


class Classification(Task):
    """Images with one label each; cross entropy, mixup and cutmix; top-1 and top-5."""

    metric = "top1"
    samples: image_data.Images
    whole: image_data.Images

    def __init__(self, config: "TrainConfig", context: DistContext) -> None:
        given = config.data
        channels = config.model.args.get("in_chans", 3)
        train_set, val_set = (
            image_data.open_dataset(given.spec(training), channels, given.download) for training in (True, False)
        )
        where = f"{given.root}, split {given.val_split}"
        image_data.check_same_classes(val_set.classes, train_set.classes, where, "the training images")
        super().__init__(config, context, train_set, val_set, train_set.classes)
        self.model_args = {**config.model.args, **self._num_classes()}
        self.mix = self._mixup()

    def _num_classes(self) -> dict[str, int]:
        asked = self.config.model.args.get("num_classes")
        if self.classes is None:
            return {}
        if asked not in (None, len(self.classes)):
            raise ValueError(f"model.args.num_classes: got {asked}, the data has {len(self.classes)} classes")
        return {"num_classes": len(self.classes)}

    def _mixup(self) -> Mixup | None:
        augment = self.config.augment
        if not augment.mixup and not augment.cutmix:
            return None
        if self.batches.batch % 2:
            raise ValueError(
                f"optim.global_batch: leaves {self.batches.batch} images for each process and pass; mixup pairs them, "
                "so the number must be even"
            )
        return Mixup(
            mixup_alpha=augment.mixup,
            cutmix_alpha=augment.cutmix,
            label_smoothing=augment.smoothing,
            num_classes=self.model_args.get("num_classes", 1000),
        )

    def build_model(self) -> nn.Module:
        config = self.config
        img_size = config.data.size
        if "img_size" in self.model_args:
            raise ValueError("model.args.img_size: give it as data.img_size")
        # A model of a fixed size, such as a ViT, takes img_size; others lack the argument, and some a configuration.
        fixed = getattr(timm.get_pretrained_cfg(config.model.name), "fixed_input_size", False)
        if is_ours(config.model.name) or fixed:
            self.model_args["img_size"] = list(img_size)
        model = timm.create_model(config.model.name, **self.model_args)
        if config.model.checkpoint:
            load_checkpoint(model, config.model.checkpoint)
        self._prepare_images(model, img_size)
        return model

    def _prepare_images(self, model: nn.Module, img_size: tuple[int, int]) -> None:
        given, augment = self.config.data, self.config.augment
        overrides = {name: getattr(given, name) for name in ("mean", "std", "interpolation", "crop_pct")}
        channels = self.model_args.get("in_chans", 3)
        overrides = {"input_size": (channels, *img_size)} | {k: v for k, v in overrides.items() if v is not None}
        self.data_config = resolve_data_config(overrides, model=model)
        self.pixels = Pixels(self.data_config["mean"], self.data_config["std"], self.context.device)
        self.erase = RandomErasing(augment.re_prob, mode=augment.re_mode, device=self.context.device)
        self.whole.transform = evaluation_transform(self.data_config, as_uint8=True)
        names = ("scale", "ratio", "hflip", "color_jitter", "auto_augment", "interpolation")
        augmented = {"mean": self.data_config["mean"], **{name: getattr(augment, name) for name in names}}
        self.samples.transform = training_transform(self.data_config["input_size"], **augmented)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        images, labels = self.pixels(batch[0]), batch[1].to(self.context.device, non_blocking=True)
        if self.config.augment.re_prob:
            images = self.erase(images)
        if self.mix is not None:
            images, mixed = self.mix(images, labels)
            return F.cross_entropy(logits_of(model, images), mixed)
        return F.cross_entropy(logits_of(model, images), labels, label_smoothing=self.config.augment.smoothing)

    def validate(self, model: nn.Module) -> dict[str, float]:
        return accuracy(model, self.validation_loader(self.batches.batch), self.pixels, self.context)[1]

    def own_description(self) -> dict[str, Any]:
        names = ("input_size", "mean", "std", "interpolation", "crop_pct")
        return {"data": {name: self.data_config[name] for name in names}}


def evaluate(checkpoint: Path, arguments: argparse.Namespace) -> Iterator[Measured]:
    """``dfformer eval`` of a classifier: top-1 and top-5 accuracy and cross entropy."""
    if arguments.crop_pct is not None and not 0 < arguments.crop_pct <= 1:
        raise ValueError(f"--crop-pct: expected a number above 0, up to 1, got {arguments.crop_pct}")
    device = torch.device(arguments.device)
    for img_size in arguments.img_size or [None]:
        overrides = {**arguments.model_args, **({"img_size": img_size} if img_size else {})}
        model, classes = load_model(checkpoint, arguments.model, **overrides)
        config = data_config(model, img_size)
        config["crop_pct"] = arguments.crop_pct or config["crop_pct"]
        channels, H, W = config["input_size"]
        dataset = image_data.open_dataset(dataset_spec(arguments, (H, W)), channels)
        _check_classes(classes, model, dataset, checkpoint)
        image_data.check_images(dataset.images)
        dataset.transform = evaluation_transform(config, as_uint8=True)
        timed = Timed(model, device, arguments.amp)
        bar = batches(dataset, arguments, f"{checkpoint.name} {H}x{W}", arguments.batch_size)
        pixels = Pixels(config["mean"], config["std"], device)
        images, measures = accuracy(timed, bar, pixels, DistContext(device))
        yield Measured(
            model=model.pretrained_cfg.get("architecture", type(model).__name__),  # type: ignore[union-attr, operator]
            size={"height": H, "width": W, "crop_pct": config["crop_pct"]},
            images=images,
            seconds=timed.seconds,
            measures=measures,
        )


def _check_classes(classes: list[str] | None, model: Any, dataset: Any, checkpoint: Path) -> None:
    image_data.check_same_classes(classes, dataset.classes, checkpoint, "the data")
    if dataset.classes is not None and len(dataset.classes) != model.num_classes:
        raise ValueError(f"{checkpoint}: has {model.num_classes} classes, the data {len(dataset.classes)}")


def predictor(arguments: argparse.Namespace, paths: list[Path]) -> Predictor:
    """``dfformer predict`` for a classifier: the most probable classes."""
    model, classes = _load(arguments)
    config = data_config(model, arguments.img_size)
    parameter = next(model.parameters())

    def apply(batch: list[File]) -> list[Top]:
        images = torch.stack([file.content for file in batch]).to(parameter.device, parameter.dtype)
        with torch.inference_mode():
            logits = logits_of(model, images).float()
        probabilities, indices = checked(logits.softmax(-1)).topk(min(arguments.topk, len(classes)))
        named = [[classes[i] for i in index] for index in indices.tolist()]
        return [list(zip(*top, strict=True)) for top in zip(named, probabilities.tolist(), strict=True)]

    return Predictor(evaluation_transform(config), apply, config["input_size"][0], arguments.batch_size)


def _load(arguments: argparse.Namespace) -> tuple[nn.Module, list[str]]:
    overrides = dict(arguments.model_args)
    if arguments.img_size:
        overrides["img_size"] = arguments.img_size
    model, classes = chosen_model(arguments.checkpoint, arguments.model, arguments.pretrained, **overrides)
    if arguments.classes:
        classes = read_class_names(arguments.classes)
    num_classes: Any = model.num_classes
    if not num_classes:
        raise ValueError(f"{arguments.checkpoint or arguments.model}: num_classes is 0, the model has no classifier")
    classes = classes or _default_classes(num_classes)
    if len(classes) != num_classes:
        raise ValueError(f"--classes: got {len(classes)} names, the model has {num_classes} classes")
    return model.to(arguments.device), classes


def _default_classes(num_classes: int) -> list[str]:
    if num_classes == 1000:
        return list(ImageNetInfo().label_descriptions())
    return [f"class {i}" for i in range(num_classes)]
