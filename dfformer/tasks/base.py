"""What every task provides: data, model, loss and measures. The engine trains any of them."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import timm
import torch
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader, default_collate

from dfformer.data import images as image_data
from dfformer.models.checkpoint import CheckpointError, load_checkpoint, read_checkpoint, save_checkpoint
from dfformer.models.metadata import check_classes, is_ours

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dfformer.train.config import TrainConfig


SHOWN = 6  # images in predictions.png


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
    unit: str  # in which it is shown: "%" for a share of 1
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


def global_batches(config: "TrainConfig", place: Place, images: int) -> image_data.GlobalBatches:
    optim = config.optim
    return image_data.GlobalBatches(
        images, optim.global_batch, optim.accumulation, place.rank, place.world, config.seed
    )


def read_dense_checkpoint(path: str | Path, task: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """`read_checkpoint`; CheckpointError unless the file says that it is for ``task``."""
    state_dict, about = read_checkpoint(path)
    if about.get("task") != task:
        raise CheckpointError(f"{path}: is not for the task {task}, or does not say so")
    return state_dict, about


def whole_images(
    dataset: Any,
    workers: int,
    place: Place,
    collate: image_data.Collate = default_collate,
    surplus: Callable[[Any], Any] = lambda truth: truth,
) -> DataLoader:
    """This process's images and their truth, one by one, as they differ in size; see `evaluation_loader`."""
    pinned = place.device.type == "cuda"
    return image_data.evaluation_loader(dataset, 1, workers, pinned, place.rank, place.world, collate, surplus)


class DenseTask(ABC):
    """What the tasks share that have whole images: sets that check themselves, and a model on an encoder of timm."""

    unit = "%"
    norm_each_map = True  # of this package's encoders, as the authors' have for dense prediction

    def __init__(
        self,
        config: "TrainConfig",
        place: Place,
        train_set: Any,
        val_set: Any,
        classes: list[str],
        epoch: int | None = None,
    ) -> None:
        """``epoch``: samples an epoch takes of the training set, if not each image once."""
        self.config, self.place, self.classes = config, place, classes
        self.train_set, self.val_set = train_set, val_set
        self.batches = global_batches(config, place, len(train_set) if epoch is None else epoch)
        model_cfg = timm.get_pretrained_cfg(config.model.name)
        self.mean, self.std = config.data.mean or list(model_cfg.mean), config.data.std or list(model_cfg.std)
        self.model_args = self._encoder_args()

    def _encoder_args(self) -> dict[str, Any]:
        """Arguments of ``timm.create_model(config.model.name, features_only=True, ...)``."""
        model = self.config.model
        if (channels := model.args.get("in_chans", 3)) != 3:
            raise ValueError(f"model.args.in_chans: got {channels}, the images are RGB: 3")
        if not is_ours(model.name):
            return model.args
        norms = {"fork_feat": True} if self.norm_each_map else {}
        return {**model.args, "img_size": list(self.config.data.size), **norms}

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
        check_classes(self.classes)
        if self.config.data.check_images:
            image_data.check_images(self.train_set, self.val_set)

    def build_model(self) -> nn.Module:
        model: Any = self.on_encoder({**self.model_args, **self._encoder_weights()})
        if self.config.model.grad_checkpointing:
            model.set_grad_checkpointing()
        return cast(nn.Module, model)

    def loader(self, tensors: Any, collate: image_data.Collate = default_collate) -> DataLoader:
        """Training batches of ``tensors``, which are the images of the training set."""
        pinned = self.place.device.type == "cuda"
        return image_data.training_loader(tensors, self.batches, self.config.data.workers, pinned, collate)

    def save(self, weights: dict[str, Tensor], path: Path, **about: Any) -> None:
        """Writes a checkpoint; ``about`` is what else it says of the model."""
        images = {"input_size": [3, *self.config.data.size], "mean": self.mean, "std": self.std}
        arguments = written_args(self.model_args), self.classes or None, images
        save_checkpoint(weights, path, self.config.model.name, *arguments, **about)
