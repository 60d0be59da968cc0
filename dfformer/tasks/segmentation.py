"""Semantic segmentation with a feature pyramid on any encoder of timm: training, evaluation and prediction."""

import argparse
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2

from dfformer.data import images as image_data
from dfformer.data.masks import (
    IGNORED,
    ImageAndMask,
    SegmentationTensors,
    TrainTransform,
    open_mask_dataset,
    whole_images,
)
from dfformer.data.transforms import resize_shorter_side
from dfformer.tasks.base import DenseTask, load_dense, mean_and_std
from dfformer.tasks.evaluate import Measured, Pixels, Timed, at_each_size, batches, dataset_spec, own_size
from dfformer.tasks.predict import File, Predictor, Top, checked
from dfformer.tasks.results import result_paths, write_results
from dfformer.utils.device import DistContext
from dfformer.utils.extras import extra

with extra("dense"):
    from segmentation_models_pytorch import FPN
    from torchmetrics.classification import MulticlassConfusionMatrix

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dfformer.train.config import TrainConfig

_STRIDE = 32  # of the encoder's last feature map
_VALUES_AT_ONCE = 2e8  # the most logits enlarged together: 0.8 GB


class Segmenter(nn.Module):
    """segmentation_models_pytorch's FPN on an encoder of timm: maps images (B,3,H,W) to logits (B,classes,H,W).

    Images may have any size.

    Args:
        encoder: its name for ``timm.create_model``; its feature maps must have strides 4, 8, 16 and 32, or 2 to 32.
        encoder_args: other arguments of the encoder.
        classes: number of classes.
        decoder: arguments of the FPN.
    """

    def __init__(self, encoder: str, encoder_args: dict[str, Any], classes: int, decoder: dict[str, Any]) -> None:
        super().__init__()
        arguments = dict(encoder_args)
        weights = arguments.pop("pretrained", False) or None
        self.fpn = FPN(f"tu-{encoder}", encoder_weights=weights, classes=classes, **decoder, **arguments)

    def forward(self, images: Tensor) -> Tensor:
        H, W = images.shape[-2:]
        # The decoder's maps double in size, and its group norms need more than one pixel. Zeros are the mean colour.
        right = -W % _STRIDE + (_STRIDE if max(H, W) <= _STRIDE else 0)
        logits: Tensor = self.fpn(F.pad(images, (0, right, 0, -H % _STRIDE)))
        return logits[..., :H, :W]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        encoder = self.fpn.encoder.model
        getattr(encoder, "model", encoder).set_grad_checkpointing(enable)


def _segmenter(description: dict[str, Any]) -> Segmenter:
    return Segmenter(
        description["architecture"], description["model_args"], len(description["classes"]), description["decoder"]
    )


def load_segmenter(path: str | Path) -> tuple[Segmenter, dict[str, Any]]:
    """The model of a segmentation checkpoint, in eval mode, and the file's description of it.

    The description has ``architecture`` and ``model_args`` of the encoder, ``decoder``, ``classes`` (names), ``data``
    (input_size, mean, std) and ``reduce_zero_label`` (whether 0 stood for no class in its training masks).
    """
    return load_dense(path, "segment", _segmenter)


def segment(model: nn.Module, images: Tensor, size: Sequence[int]) -> Tensor:
    """Classes uint8 (B,H,W) of normalised ``images`` (B,3,h,w), at ``size`` (H, W)."""
    logits = checked(model(images).float())
    best = logits.new_full((len(logits), *size), -torch.inf)
    classes = torch.zeros_like(best, dtype=torch.uint8)
    at_once = max(1, int(_VALUES_AT_ONCE / best.numel()))
    for first in range(0, logits.shape[1], at_once):
        part = F.interpolate(logits[:, first : first + at_once], tuple(size), mode="bilinear")
        value, index = part.max(1)
        classes = torch.where(value > best, (first + index).to(torch.uint8), classes)
        best = torch.maximum(value, best)
    return classes


def count_pixels(model: nn.Module, batches: Iterable[ImageAndMask], pixels: Pixels, classes: int) -> Tensor:
    """The confusion matrix in pixels, true classes in rows, over all processes. The model is left in eval mode."""
    model.eval()
    device = pixels.mean.device
    confusion = MulticlassConfusionMatrix(classes, ignore_index=IGNORED, validate_args=False).to(device)
    with torch.inference_mode():
        for images, masks in batches:
            confusion.update(segment(model, pixels(images), masks.shape[1:]), masks.to(device))
    matrix: Tensor = confusion.compute()
    return matrix.double().cpu()


def intersection_over_union(confusion: Tensor) -> Tensor:
    """The IoU of each class; NaN for a class that neither occurs nor is predicted."""
    right = confusion.diagonal()
    return right / (confusion.sum(0) + confusion.sum(1) - right)


def _measures(confusion: Tensor) -> dict[str, float]:
    """The mean IoU over the classes that have one, and the share of correct pixels."""
    if not confusion.any():
        raise ValueError("validation: no pixel of the masks has a class, all are ignored")
    miou = intersection_over_union(confusion).nanmean()
    return {"miou": float(miou), "pixel_accuracy": float(confusion.diagonal().sum() / confusion.sum())}


class Segmentation(DenseTask):
    """Images with a class for every pixel; cross entropy; mean IoU of whole images at their own size."""

    metric = "miou"
    build = staticmethod(_segmenter)

    def __init__(self, config: "TrainConfig", context: DistContext) -> None:
        zero = config.segment.reduce_zero_label
        train_set, val_set = (open_mask_dataset(config.data.spec(training), zero) for training in (True, False))
        names = ("scale", "most_of_one_class", "hflip", "photometric")
        augment = {name: getattr(config.segment, name) for name in names}
        fill = [round(255 * mean) for mean in mean_and_std(config)[0]]
        samples = SegmentationTensors(train_set, TrainTransform(config.data.size, fill=fill, **augment))
        super().__init__(config, context, samples, whole_images(val_set, min(config.data.size)), train_set.classes)
        self.pixels = Pixels(self.mean, self.std, context.device)

    def loss(self, model: nn.Module, batch: ImageAndMask) -> Tensor:
        """The mean over all pixels, where ignored ones count as 0. So it does not depend on how a batch is split."""
        masks = batch[1].to(self.context.device, non_blocking=True).long()
        logits = model(self.pixels(batch[0]))
        return F.cross_entropy(logits, masks, ignore_index=IGNORED, reduction="sum") / masks.numel()

    def validate(self, model: nn.Module) -> dict[str, float]:
        return _measures(count_pixels(model, self.validation_loader(), self.pixels, len(self.classes)))

    def own_description(self) -> dict[str, Any]:
        names = ("decoder", "reduce_zero_label")
        return super().own_description() | {name: getattr(self.config.segment, name) for name in names}

    def picture(self, model: nn.Module) -> "Figure":
        from dfformer.analysis.dense_figures import segmentations

        images, truths = zip(*(self.whole.images[n] for n in self.shown), strict=True)
        sources = (self.pixels(self.whole[n][0][None]) for n in self.shown)
        with torch.inference_mode():
            found = [
                segment(model, source, truth.shape)[0].cpu().numpy()
                for source, truth in zip(sources, truths, strict=True)
            ]
        title = f"{self.config.model.name}: the first {len(images)} validation images"
        masks = {"truth": truths, "prediction": found}
        return segmentations([np.asarray(image) for image in images], masks, self.classes, title)


def evaluate(checkpoint: Path, arguments: argparse.Namespace) -> Iterator[Measured]:
    """``dfformer eval`` of a segmentation checkpoint."""
    model, description = load_segmenter(checkpoint)
    classes, pixels = description["classes"], _pixels(description, arguments)
    dataset = open_mask_dataset(dataset_spec(arguments, own_size(description)), description["reduce_zero_label"])
    image_data.check_same_classes(classes, dataset.classes, checkpoint, "the data")

    def measure(timed: Timed, size: tuple[int, int]) -> Any:
        bar = batches(whole_images(dataset, min(size)), arguments, f"{checkpoint.name} {min(size)}")
        confusion = count_pixels(timed, bar, pixels, len(classes))
        iou = intersection_over_union(confusion).tolist()
        by_class = {f"iou {name}": value for name, value in zip(classes, iou, strict=True)}
        return {"shorter_side": min(size)}, _measures(confusion), by_class

    return at_each_size(model, description, dataset, arguments, measure)


def _pixels(description: dict[str, Any], arguments: argparse.Namespace) -> Pixels:
    return Pixels(description["data"]["mean"], description["data"]["std"], torch.device(arguments.device))


_ENDINGS = (".png", "_picture.png")


def predictor(arguments: argparse.Namespace, paths: list[Path]) -> Predictor:
    """``dfformer predict`` for a segmentation checkpoint: a mask and a picture for each image.

    The values of the mask are the classes' numbers.
    """
    from dfformer.analysis.dense_figures import class_colours, segmentations

    model, description = load_segmenter(arguments.checkpoint)
    model.to(arguments.device)
    classes, pixels, shorter = (
        description["classes"],
        _pixels(description, arguments),
        min(arguments.img_size or own_size(description)),
    )
    palette = class_colours(classes).tobytes()
    stems = result_paths(paths, arguments.output, _ENDINGS)

    def apply(batch: list[File]) -> list[Top]:
        [(path, (image, resized), *_)] = batch
        with torch.inference_mode():
            mask = segment(model, pixels(resized[None]), image.shape[:2])[0].cpu().numpy()
        coloured = Image.fromarray(mask)
        coloured.putpalette(palette)
        figure = segmentations([image], {"prediction": [mask]}, classes, stems[path].name)
        write_results(stems[path], dict(zip(_ENDINGS, (coloured, figure), strict=True)))
        return [_shares(mask, classes, arguments.topk)]

    return Predictor(partial(_with_resized, shorter=shorter), apply, value="share", written="masks and pictures")


def _with_resized(image: Image.Image, shorter: int) -> tuple[np.ndarray, Tensor]:
    """An image as pixels (H,W,3), and as the input tensor of the model."""
    return np.asarray(image), resize_shorter_side(v2.functional.pil_to_tensor(image), shorter)


def _shares(mask: np.ndarray, classes: list[str], topk: int) -> Top:
    shares = np.bincount(mask.ravel(), minlength=len(classes)) / mask.size
    return [(classes[n], float(shares[n])) for n in np.argsort(-shares, kind="stable")[:topk] if shares[n]]
