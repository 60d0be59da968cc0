"""The interface of tasks: data, model, loss and metrics. The engine can train any task."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import timm
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dfformer.data import images as image_data
from dfformer.data.files import Samples
from dfformer.models import checkpoint
from dfformer.models.description import check_classes, is_ours
from dfformer.utils.device import DistContext

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dfformer.train.config import TrainConfig

_SHOWN = 6  # images in predictions.png
Model = TypeVar("Model", bound=nn.Module)


class Task(ABC):
    """What the engine requires of a task, and what all tasks share."""

    metric: str  # key of `validate`'s result by which the best weights are selected; larger is better
    unit = "%"  # of the displayed metric; "%" for a fraction
    classes: list[str] | None  # None if the data does not name them
    model_args: dict[str, Any]  # of ``timm.create_model``

    def __init__(
        self, config: "TrainConfig", context: DistContext, samples: Samples, whole: Samples, classes: list[str] | None
    ) -> None:
        """``samples``: what `loss` takes in batches, an epoch of it. ``whole``: what `validate` takes."""
        self.config, self.context, self.classes = config, context, classes
        self.samples, self.whole, optim = samples, whole, config.optim
        self.batches = image_data.GlobalBatches(
            len(samples), optim.global_batch, optim.accumulation, context, config.seed
        )

    def check(self) -> None:
        """Checks the data, and raises ValueError naming what is wrong."""
        check_classes(self.classes or [])
        if self.config.data.check_images:
            image_data.check_images(self.samples.images, self.whole.images)

    @abstractmethod
    def build_model(self) -> nn.Module: ...

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The mean loss of a batch from the loader. Random numbers come from the global generators."""

    @abstractmethod
    def validate(self, model: nn.Module) -> dict[str, float]:
        """Metrics over all validation images. Each process handles a part; all return the same result."""

    def score(self, row: Mapping[str, float]) -> float:
        """The metric among the measures of an epoch, of the averaged weights if there are any."""
        return row.get(f"ema_{self.metric}", row[self.metric])

    def picture(self, model: nn.Module) -> "Figure | None":
        """A picture of predictions of a model in eval mode on some validation images; called in all processes."""
        return None

    @abstractmethod
    def own_description(self) -> dict[str, Any]:
        """What else a checkpoint says of the model: how images are prepared (``data``), and settings of the task."""

    def description(self) -> dict[str, Any]:
        """What a checkpoint says of the model."""
        arguments = {name: value for name, value in self.model_args.items() if name != "pretrained"}
        described = {"task": self.config.task, "architecture": self.config.model.name, "model_args": arguments}
        return {**described, "classes": self.classes or None, **self.own_description()}

    def export(self, weights: dict[str, Tensor], path: Path) -> None:
        """Writes weights for use."""
        checkpoint.save_checkpoint(weights, path, **self.description())

    def training_loader(self) -> DataLoader:
        return image_data.training_loader(self.samples, self.batches, self.config.data.workers, self.context)

    def validation_loader(self, batch_size: int = 1) -> DataLoader:
        return image_data.evaluation_loader(self.whole, self.config.data.workers, self.context, batch_size)


def load_dense(path: str | Path, task: str, build: Callable[[dict[str, Any]], Model]) -> tuple[Model, dict[str, Any]]:
    """The model that ``build`` creates from the description in a checkpoint, in eval mode, and that description.

    Raises CheckpointError unless the file is for ``task``.
    """
    state_dict, description = checkpoint.read_checkpoint(path)
    if description.get("task") != task:
        raise checkpoint.CheckpointError(f"{path}: is not for the task {task}, or does not say so")
    return checkpoint.build_and_load(lambda: build(description), state_dict, path), description


def mean_and_std(config: "TrainConfig") -> tuple[list[float], list[float]]:
    """Of the pixels: those of the settings, or the model's own."""
    model_cfg = timm.get_pretrained_cfg(config.model.name)
    return config.data.mean or list(model_cfg.mean), config.data.std or list(model_cfg.std)


class DenseTask(Task):
    """The base of tasks on whole images, whose model has an encoder of timm."""

    classes: list[str]
    build: Callable[[dict[str, Any]], Any]  # a model, from its description in a checkpoint
    norm_each_map = True  # in this package's encoders, as in the authors' for dense prediction

    def __init__(self, config: "TrainConfig", context: DistContext, *data: Any) -> None:
        """``data``: as for `Task`."""
        super().__init__(config, context, *data)
        self.mean, self.std = mean_and_std(config)
        self.model_args = self._encoder_args()

    @property
    def shown(self) -> range:
        """The validation images of the picture."""
        return range(min(_SHOWN, len(self.whole)))

    def _encoder_args(self) -> dict[str, Any]:
        """Arguments of ``timm.create_model(config.model.name, features_only=True, ...)``."""
        model = self.config.model
        if (channels := model.args.get("in_chans", 3)) != 3:
            raise ValueError(f"model.args.in_chans: images are RGB, so it must be 3, got {channels}")
        if not is_ours(model.name):
            return model.args
        norms = {"fork_feat": True} if self.norm_each_map else {}
        return {**model.args, "img_size": list(self.config.data.size), **norms}

    def _encoder_weights(self) -> dict[str, Any]:
        """Additional arguments that load ``model.checkpoint``, a classifier's weights, into the encoder."""
        model = self.config.model
        if not model.checkpoint:
            return {}
        arguments = {name: value for name, value in self.model_args.items() if name != "fork_feat"}
        classifier = timm.create_model(model.name, **arguments)
        checkpoint.load_checkpoint(classifier, model.checkpoint)  # strict; timm would ignore missing weights
        return {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": classifier.state_dict()}}

    def build_model(self) -> nn.Module:
        arguments = {**self.model_args, **self._encoder_weights()}
        model: nn.Module = self.build({**self.description(), "model_args": arguments})
        return model

    def own_description(self) -> dict[str, Any]:
        size = [3, *self.config.data.size]
        return {"data": {"input_size": size, "mean": self.mean, "std": self.std}}
