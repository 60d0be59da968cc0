"""What is trained: a task knows its data, its model, its loss and its measure of success; the engine the rest."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import timm
import torch
from timm.data import Mixup, create_transform, resolve_data_config
from timm.data.random_erasing import RandomErasing
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from dfformer.data import images as image_data
from dfformer.models.checkpoint import load_checkpoint, save_checkpoint
from dfformer.models.registry import VARIANTS
from dfformer.tasks.evaluate import Pixels, count_correct
from dfformer.train.config import TrainConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Place:
    """Where this process is: its device, its rank and how many there are."""

    device: torch.device
    rank: int = 0
    world: int = 1

    def add_up(self, values: Tensor) -> Tensor:
        """``values`` of all processes added up, in place."""
        if self.world > 1:
            distributed.all_reduce(values)
        return values


class Task(Protocol):
    """What the engine asks of a task."""

    metric: str  # the measure in what `validate` returns, by which the best weights are chosen: larger is better
    batches: image_data.GlobalBatches

    def check(self) -> None:
        """Reads what can be wrong with the data, and raises ValueError naming it."""

    def build_model(self) -> nn.Module: ...

    def training_loader(self) -> DataLoader: ...

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The mean loss of a batch as its loader gave it. Draws what is random from the global generators."""

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Measures over all validation images, the same in all processes, each of which goes through its part."""

    def export(self, weights: dict[str, Tensor], path: Path) -> None:
        """Writes weights for use."""

    def pictures(self, model: nn.Module) -> "dict[str, Figure]":
        """By file name, what the trained model makes of some validation images. Called in all processes."""


def written_args(args: dict[str, Any]) -> dict[str, Any]:
    """Of a model's arguments those that a checkpoint of it says: the weights it started from are of no use then."""
    return {name: value for name, value in args.items() if name != "pretrained"}


def is_ours(name: str) -> bool:
    """Whether a model's name for timm is one of this package's."""
    return name.split(".")[0] in VARIANTS


def _batches(config: TrainConfig, place: Place, images: int) -> image_data.GlobalBatches:
    optim = config.optim
    return image_data.GlobalBatches(
        images, optim.global_batch, optim.accumulation, place.rank, place.world, config.seed
    )


class Classification:
    """Images with one label each; cross entropy, mixup and cutmix; top-1 and top-5."""

    metric = "top1"

    def __init__(self, config: TrainConfig, place: Place) -> None:
        self.config, self.place = config, place
        given = config.data
        channels = config.model.args.get("in_chans", 3)
        self.train_set, self.val_set = (
            image_data.open_dataset(given.dataset, given.root, split, channels, given.download)
            for split in (given.train_split, given.val_split)
        )
        image_data.check_same_classes(self.train_set, self.val_set, f"{given.root}, split {given.val_split}")
        self.classes = image_data.class_names(self.train_set)
        self.model_args = {**config.model.args, **self._num_classes()}
        self.batches = _batches(config, place, len(self.train_set))
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

    def check(self) -> None:
        if self.config.data.check_images:
            for dataset in (self.train_set, self.val_set):
                image_data.check_images(dataset)

    def build_model(self) -> nn.Module:
        config = self.config
        img_size = config.data.size
        if "img_size" in self.model_args:
            raise ValueError("model.args.img_size: give it as data.img_size")
        if is_ours(config.model.name):  # timm's MetaFormers take any size without being told
            self.model_args["img_size"] = list(img_size)
        model = timm.create_model(config.model.name, **self.model_args)
        if config.model.checkpoint:
            load_checkpoint(model, config.model.checkpoint)
        if config.model.grad_checkpointing:
            model.set_grad_checkpointing(True)
        self._prepare_images(model, img_size)
        return model

    def _prepare_images(self, model: nn.Module, img_size: tuple[int, int]) -> None:
        given, augment = self.config.data, self.config.augment
        overrides = {name: getattr(given, name) for name in ("mean", "std", "interpolation", "crop_pct")}
        channels = self.model_args.get("in_chans", 3)
        overrides = {"input_size": (channels, *img_size)} | {k: v for k, v in overrides.items() if v is not None}
        self.data_config = resolve_data_config(overrides, model=model)
        self.pixels = Pixels(self.data_config["mean"], self.data_config["std"], self.place.device)
        self.erase = RandomErasing(augment.re_prob, mode=augment.re_mode, device=self.place.device)
        self.val_set.transform = create_transform(**self.data_config, use_prefetcher=True)
        self.train_set.transform = create_transform(
            self.data_config["input_size"],
            is_training=True,
            scale=augment.scale,
            ratio=augment.ratio,
            hflip=augment.hflip,
            color_jitter=augment.color_jitter,
            auto_augment=augment.auto_augment,
            interpolation=augment.interpolation,
            mean=self.data_config["mean"],
            use_prefetcher=True,
        )

    def training_loader(self) -> DataLoader:
        pinned = self.place.device.type == "cuda"
        return image_data.training_loader(self.train_set, self.batches, self.config.data.workers, pinned)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        images, labels = self.pixels(batch[0]), batch[1].to(self.place.device, non_blocking=True)
        if self.config.augment.re_prob:
            images = self.erase(images)
        if self.mix is not None:
            images, mixed = self.mix(images, labels)
            return F.cross_entropy(model(images), mixed)
        return F.cross_entropy(model(images), labels, label_smoothing=self.config.augment.smoothing)

    def validate(self, model: nn.Module) -> dict[str, float]:
        loader = image_data.evaluation_loader(
            self.val_set,
            self.batches.batch,
            self.config.data.workers,
            self.place.device.type == "cuda",
            self.place.rank,
            self.place.world,
        )
        sums = count_correct(model, loader, self.pixels)
        values = self.place.add_up(torch.stack(list(sums.values()))).tolist()
        added = dict(zip(sums, values, strict=True))
        images = added.pop("images")
        return {name: value / images for name, value in added.items()}

    def export(self, weights: dict[str, Tensor], path: Path) -> None:
        kept = ("input_size", "mean", "std", "interpolation", "crop_pct")
        save_checkpoint(
            weights,
            path,
            self.config.model.name,
            written_args(self.model_args),
            self.classes,
            {name: self.data_config[name] for name in kept},
        )

    def pictures(self, model: nn.Module) -> "dict[str, Figure]":
        return {}


class DenseTask(ABC):
    """What segmentation and detection share: sets that check themselves, and a model on an encoder of timm."""

    def __init__(self, config: TrainConfig, place: Place, train_set: Any, val_set: Any) -> None:
        self.config, self.place = config, place
        self.train_set, self.val_set = train_set, val_set
        self.batches = _batches(config, place, len(train_set))
        model_cfg = timm.get_pretrained_cfg(config.model.name)
        self.mean, self.std = config.data.mean or list(model_cfg.mean), config.data.std or list(model_cfg.std)
        self.model_args = self._encoder_args()

    def _encoder_args(self) -> dict[str, Any]:
        """Arguments of ``timm.create_model(config.model.name, features_only=True, ...)``.

        This package's models get a norm for each feature map, as the authors' have for dense prediction.
        """
        model = self.config.model
        if (channels := model.args.get("in_chans", 3)) != 3:
            raise ValueError(f"model.args.in_chans: got {channels}, the images are RGB: 3")
        ours = {"img_size": list(self.config.data.size), "fork_feat": True} if is_ours(model.name) else {}
        return {**model.args, **ours}

    def _encoder_weights(self) -> dict[str, Any]:
        """What to add to them to load ``model.checkpoint``, the weights of a classifier, into the encoder."""
        model = self.config.model
        if not model.checkpoint:
            return {}
        arguments = {name: value for name, value in self.model_args.items() if name != "fork_feat"}
        classifier = timm.create_model(model.name, **arguments)
        load_checkpoint(classifier, model.checkpoint)  # strict, where timm would pass over what is missing
        return {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": classifier.state_dict()}}

    @abstractmethod
    def on_encoder(self, arguments: dict[str, Any]) -> Any:
        """The model, whose encoder is created with ``arguments``."""

    def check(self) -> None:
        if self.config.data.check_images:
            self.train_set.check()
            self.val_set.check()

    def build_model(self) -> nn.Module:
        model: Any = self.on_encoder({**self.model_args, **self._encoder_weights()})
        if self.config.model.grad_checkpointing:
            model.set_grad_checkpointing()
        return cast(nn.Module, model)

    def save(self, weights: dict[str, Tensor], path: Path, classes: list[str], **about: Any) -> None:
        """Writes a checkpoint; ``about`` is what else it says of the model."""
        images = {"input_size": [3, *self.config.data.size], "mean": self.mean, "std": self.std}
        save_checkpoint(weights, path, self.config.model.name, written_args(self.model_args), classes, images, **about)
