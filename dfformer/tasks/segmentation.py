"""Semantic segmentation: any encoder of timm with a feature pyramid decoder, trained, evaluated and applied."""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

try:
    from segmentation_models_pytorch import FPN
    from torchmetrics.classification import MulticlassConfusionMatrix
except ImportError as error:
    raise RuntimeError(f"segmentation needs {error.name}: pip install 'dfformer[dense]'") from error
from torchvision.transforms import v2

from dfformer.data import images as image_data
from dfformer.data.masks import IGNORED, Masked, Pair, Prepared, TrainingView, WholeView, all_ignored, open_masked
from dfformer.models.checkpoint import CheckpointError, build_and_load, read_checkpoint
from dfformer.tasks.base import DenseTask, Place
from dfformer.tasks.evaluate import Pixels, Timed, progress, write_csv
from dfformer.tasks.predict import Files, OnError, Prediction, check_names, predict_files
from dfformer.train.config import TrainConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STRIDE = 32  # of the encoder's last feature map
_CLASSES_AT_ONCE = 16  # enlarged together: of a photograph of 12 megapixels these take 0.8 GB
_SHOWN = 6  # images in predictions.png


class Segmenter(nn.Module):
    """Images (B,3,H,W) of any size to logits (B,classes,H,W): segmentation_models_pytorch's FPN on an encoder of timm.

    Args:
        encoder: its name for ``timm.create_model``; its feature maps must have strides 4, 8, 16 and 32, or 2 to 32.
        encoder_args: other arguments for it.
        classes: how many.
        decoder: arguments of the FPN.
    """

    def __init__(self, encoder: str, encoder_args: dict[str, Any], classes: int, decoder: dict[str, Any]) -> None:
        super().__init__()
        arguments = dict(encoder_args)
        weights = arguments.pop("pretrained", False) or None
        self.fpn = FPN(f"tu-{encoder}", encoder_weights=weights, classes=classes, **decoder, **arguments)

    def forward(self, images: Tensor) -> Tensor:
        H, W = images.shape[-2:]
        # the decoder's maps double in size; zeros are the mean colour
        logits: Tensor = self.fpn(F.pad(images, (0, -W % _STRIDE, 0, -H % _STRIDE)))
        return logits[..., :H, :W]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        encoder = self.fpn.encoder.model
        getattr(encoder, "model", encoder).set_grad_checkpointing(enable)


def load_segmenter(path: str | Path) -> tuple[Segmenter, dict[str, Any]]:
    """The model of a checkpoint of segmentation, in eval mode, and what the file says about it.

    That is: ``architecture`` and ``model_args`` of the encoder, ``decoder``, ``classes`` (names), ``data`` (input_size,
    mean, std) and ``reduce_zero_label`` (whether its training masks had 0 for no class).
    """
    state_dict, about = read_checkpoint(path)
    if about.get("task") != "segment":
        raise CheckpointError(f"{path}: is not of segmentation, or does not say so")
    encoder, classes = about["architecture"], len(about["classes"])
    model = build_and_load(lambda: Segmenter(encoder, about["model_args"], classes, about["decoder"]), state_dict, path)
    return model, about


def segment(model: nn.Module, images: Tensor, size: Sequence[int]) -> Tensor:
    """Classes uint8 (B,H,W) of normalised ``images`` (B,3,h,w), for pictures of ``size`` (H, W)."""
    best, classes = [], []
    for first, part in enumerate(model(images).float().split(_CLASSES_AT_ONCE, dim=1)):
        value, index = F.interpolate(part, tuple(size), mode="bilinear").max(1)
        best.append(value)
        classes.append((first * _CLASSES_AT_ONCE + index).to(torch.uint8))
    winner = torch.stack(best).max(0, keepdim=True).indices
    return torch.stack(classes).gather(0, winner)[0]


def count_pixels(model: nn.Module, batches: Iterable[Pair], pixels: Pixels, classes: int) -> Tensor:
    """How many pixels of each class (row) were taken for each (column), over all processes; leaves eval mode on."""
    model.eval()
    device = pixels.mean.device
    confusion = MulticlassConfusionMatrix(classes, ignore_index=IGNORED, validate_args=False).to(device)
    with torch.inference_mode():
        for images, masks in batches:
            confusion.update(segment(model, pixels(images), masks.shape[1:]), masks.to(device))
    matrix: Tensor = confusion.compute()
    return matrix.double().cpu()


def intersection_over_union(confusion: Tensor) -> Tensor:
    """Of each class; NaN for one that is neither there nor predicted."""
    right = confusion.diagonal()
    return right / (confusion.sum(0) + confusion.sum(1) - right)


def _measures(confusion: Tensor) -> dict[str, float]:
    """The mean IoU over the classes that have one, and the share of pixels that are right."""
    if not confusion.any():
        raise ValueError("validation: the masks have no pixel with a class, all are to be ignored")
    miou = intersection_over_union(confusion).nanmean()
    return {"miou": float(miou), "pixel_accuracy": float(confusion.diagonal().sum() / confusion.sum())}


def _loader(dataset: Masked, shorter: int, workers: int, device: torch.device, rank: int = 0, world: int = 1) -> Any:
    """Whole images, one by one, as they differ in size."""
    whole = Prepared(dataset, WholeView(shorter))
    pinned = device.type == "cuda"
    return image_data.evaluation_loader(
        whole, 1, workers, pinned, rank, world, torch.utils.data.default_collate, surplus=all_ignored
    )


class Segmentation(DenseTask):
    """Images with a class for every pixel; cross entropy; mean IoU of whole images at their own size."""

    metric = "miou"

    def __init__(self, config: TrainConfig, place: Place) -> None:
        given, zero = config.data, config.segment.reduce_zero_label
        splits = zip((given.train_split, given.val_split), given.scenes, strict=True)
        train_set, val_set = (
            open_masked(given.dataset, given.root, split, given.size, count, zero) for split, count in splits
        )
        super().__init__(config, place, train_set, val_set)
        self.classes = train_set.classes
        self.pixels = Pixels(self.mean, self.std, place.device)

    def on_encoder(self, arguments: dict[str, Any]) -> Segmenter:
        return Segmenter(self.config.model.name, arguments, len(self.classes), self.config.segment.decoder)

    def training_loader(self) -> DataLoader:
        given = self.config.data
        view = TrainingView(given.size, self.config.segment, [round(255 * mean) for mean in self.mean])
        collate, pinned = torch.utils.data.default_collate, self.place.device.type == "cuda"
        return image_data.training_loader(Prepared(self.train_set, view), self.batches, given.workers, pinned, collate)

    def loss(self, model: nn.Module, batch: Pair) -> Tensor:
        """The mean over all pixels, in which those to be ignored are 0: the same however a batch is shared out."""
        masks = batch[1].to(self.place.device, non_blocking=True).long()
        logits = model(self.pixels(batch[0]))
        return F.cross_entropy(logits, masks, ignore_index=IGNORED, reduction="sum") / masks.numel()

    def validate(self, model: nn.Module) -> dict[str, float]:
        given, place = self.config.data, self.place
        loader = _loader(self.val_set, min(given.size), given.workers, place.device, place.rank, place.world)
        return _measures(count_pixels(model, loader, self.pixels, len(self.classes)))

    def export(self, weights: dict[str, Tensor], path: Path) -> None:
        self.save(
            weights,
            path,
            self.classes,
            task="segment",
            decoder=self.config.segment.decoder,
            reduce_zero_label=self.config.segment.reduce_zero_label,
        )

    def pictures(self, model: nn.Module) -> "dict[str, Figure]":
        from dfformer.analysis.figures import segmentations

        model.eval()
        whole = Prepared(self.val_set, WholeView(min(self.config.data.size)))
        images, truths, predictions = [], [], []
        for index in range(min(_SHOWN, len(self.val_set))):
            image, truth = self.val_set[index]
            with torch.inference_mode():
                prediction = segment(model, self.pixels(whole[index][0][None]), truth.shape)[0]
            images.append(np.asarray(image))
            truths.append(truth)
            predictions.append(prediction.cpu().numpy())
        title = f"{self.config.model.name}: the first {len(images)} validation images"
        figure = segmentations(images, {"truth": truths, "prediction": predictions}, self.classes, title)
        return {"predictions.png": figure}


def evaluate_command(arguments: argparse.Namespace) -> int:
    """The command line's ``eval`` for checkpoints of segmentation."""
    if arguments.crop_pct is not None or arguments.model is not None:
        raise ValueError("--crop-pct, --model: not for segmentation: whole images, and checkpoints say their model")
    rows: list[list[Any]] = []
    for checkpoint in arguments.checkpoints:
        model, about = load_segmenter(checkpoint)
        for size in arguments.img_size or [about["data"]["input_size"][1:]]:
            shorter = min(size)
            row, classes = _evaluate(checkpoint, model, about, shorter, arguments)
            rows.append([str(checkpoint), about["architecture"], shorter, arguments.amp, *row])
            measured = f"mIoU {row[1]:.2%}  pixel accuracy {row[2]:.2%}  {row[3]:.1f} images/s"
            print(f"{checkpoint}  shorter side {shorter}  {row[0]} images  {measured}", flush=True)
            if arguments.csv:
                columns = ["checkpoint", "model", "shorter_side", "amp", "images", "miou", "pixel_accuracy"]
                write_csv(arguments.csv, [*columns, "images_per_second", *(f"iou {name}" for name in classes)], rows)
    return 0


def _evaluate(
    checkpoint: Path, model: nn.Module, about: dict[str, Any], shorter: int, arguments: argparse.Namespace
) -> tuple[list[Any], list[str]]:
    """Number of images, mean IoU, pixel accuracy, images a second and each class's IoU; and the classes."""
    device = torch.device(arguments.device)
    H, W = about["data"]["input_size"][1:]
    dataset = open_masked(
        arguments.dataset, arguments.root, arguments.split, (H, W), arguments.scenes, about["reduce_zero_label"]
    )
    if dataset.classes != about["classes"]:
        different = sorted(set(dataset.classes) ^ set(about["classes"]))
        raise ValueError(
            f"{checkpoint}: its {len(about['classes'])} classes are not the data's {len(dataset.classes)}; "
            f"only in one of them: {image_data.some(different) or 'none, their order differs'}"
        )
    dataset.check()
    loader = _loader(dataset, shorter, arguments.workers, device)
    timed = Timed(model.to(device), device, arguments.amp)
    pixels = Pixels(about["data"]["mean"], about["data"]["std"], device)
    confusion = count_pixels(timed, progress(loader, f"{checkpoint.name} {shorter}"), pixels, len(dataset.classes))
    iou = intersection_over_union(confusion).tolist()
    return [len(dataset), *_measures(confusion).values(), len(dataset) / timed.seconds, *iou], dataset.classes


def predict_command(arguments: argparse.Namespace) -> int:
    """The command line's ``predict`` for a checkpoint of segmentation: a mask and a picture for each image."""
    if arguments.model or arguments.classes or arguments.pretrained:
        raise ValueError("--model, --classes, --pretrained: a checkpoint of segmentation says its model and classes")
    model, about = load_segmenter(arguments.checkpoint)
    pixels = Pixels(about["data"]["mean"], about["data"]["std"], torch.device(arguments.device))
    model.to(arguments.device)
    view = _WithOriginal(min(arguments.img_size or about["data"]["input_size"][1:]))

    def run(paths: list[Path], workers: int, on_error: OnError) -> list[Prediction]:
        check_names(paths)
        predictions = []
        for [(path, content)] in DataLoader(Files(paths, view, 3), num_workers=workers, collate_fn=list):
            if isinstance(content, Exception):
                on_error(path, content)
                continue
            image, resized = content
            with torch.inference_mode():
                mask = segment(model, pixels(resized[None]), image.shape[:2])[0].cpu().numpy()
            _write_mask(arguments.output / path.stem, image, mask, about["classes"])
            predictions.append(_shares(path, mask, about["classes"], arguments.topk))
        print(f"masks and pictures: {arguments.output}")
        return predictions

    return predict_files(arguments, run, "share")


class _WithOriginal:
    """An image (PIL) as its pixels (H,W,3) and as the tensor that is predicted from."""

    def __init__(self, shorter: int) -> None:
        self.resize = WholeView(shorter).resize

    def __call__(self, image: Image.Image) -> tuple[np.ndarray, Tensor]:
        return np.asarray(image), self.resize(v2.functional.pil_to_tensor(image))


def _write_mask(stem: Path, image: np.ndarray, mask: np.ndarray, classes: list[str]) -> None:
    """``NAME.png``, whose values are the classes' numbers, and ``NAME_picture.png``."""
    from dfformer.analysis.figures import class_colours, segmentations

    stem.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(mask)
    picture.putpalette(class_colours(classes).tobytes())
    picture.save(stem.with_name(f"{stem.name}.png"))
    figure = segmentations([image], {"prediction": [mask]}, classes, stem.name)
    figure.savefig(stem.with_name(f"{stem.name}_picture.png"), dpi=110)


def _shares(path: Path, mask: np.ndarray, classes: list[str], topk: int) -> Prediction:
    shares = np.bincount(mask.ravel(), minlength=len(classes)) / mask.size
    top = [int(n) for n in np.argsort(-shares, kind="stable")[:topk] if shares[n]]
    return Prediction(str(path), [classes[n] for n in top], [float(shares[n]) for n in top])
