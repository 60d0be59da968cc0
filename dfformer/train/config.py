"""The settings of a training run: typed, from a YAML recipe and the command line; unknown keys are refused.

The defaults are the authors' recipe for ImageNet-1k: the command in their README and, for anything it leaves out, the
defaults of their ``train.py``. A recipe file names the model and the settings that differ.
"""

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from dfformer.data.files import DatasetSpec
from dfformer.models.description import (
    DATA,
    DEGRADATION,
    DETECTOR,
    IMAGE_SIZE,
    RESTORER,
    SHARE,
    Interpolation,
    list_of,
    real,
    whole,
)
from dfformer.train.checks import check, flatten
from dfformer.train.recipes import split_recipes
from dfformer.utils.accepted import Kind
from dfformer.utils.extras import extra
from dfformer.utils.suggest import did_you_mean

with extra("train"):
    import yaml
    from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_loader

    from dfformer.train import strict_yaml

# The values that settings accept. A number from a file must not make a run endless.
_POSITIVE = real(0, 1e9)
_COUNT = whole(1, 10**9)
_PATH = Kind(bool, "a path")  # an empty one would be the current folder
_SPLIT = Kind(bool, "a name")  # an empty one would be all splits together
_RANGE = Kind(lambda value: 0 < value[0] <= value[1] <= 1e9, "two numbers above 0 and up to 1e9, in order")
# Leaves out timm's readers that run commands, e.g. webdataset's.
_DATASET = Kind(
    lambda name: bool(re.fullmatch(r"[^/:]*|(torch|hfds)/.+", name)),
    "a built-in dataset, or timm's 'torch/NAME' or 'hfds/NAME'",
)
_MILESTONES = Kind(
    lambda value: value == sorted(set(value)) and all(1 <= epoch <= 10**6 for epoch in value),
    "epochs from 1 to 1000000, in ascending order",
)

MODE = "dfformer_yaml"  # for ``ArgumentParser(parser_mode=)``


def setting(kind: Kind, default: Any) -> Any:
    """A field whose values `check` compares with ``kind``; None, where the type allows it, needs no comparison."""
    return field(default=default, metadata={"kind": kind})


@dataclass
class ModelConfig:
    """The model.

    Args:
        name: of a model for ``timm.create_model``.
        args: its other arguments, e.g. drop_path_rate. The number of classes is that of the data, if it is known.
        checkpoint: weights to start from; the last layer of a classifier for other classes is not loaded.
        grad_checkpointing: recompute activations in backward instead of keeping them: slower, but takes less memory.
        compile: run under torch.compile.
    """

    name: str = "dfformer_s18"
    args: dict[str, Any] = field(default_factory=dict)
    checkpoint: str | None = setting(_PATH, None)
    grad_checkpointing: bool = False
    compile: bool = False


@dataclass
class DataConfig:
    """The images.

    Args:
        dataset: to classify, "" for root/train and root/val with a folder per class, or .tar files of that; "digits",
            built in; or any map-style dataset timm knows: "torch/cifar10", "hfds/...". To segment, "" for
            root/images/SPLIT and root/annotations/SPLIT, or "synthetic_digits", built in. To detect, "" for
            root/annotations/instances_SPLIT.json and root/SPLIT, or "synthetic_digits". To restore, "" for
            root/targets/SPLIT and, unless inputs are made, root/inputs/SPLIT, or "photographs", built in.
        root: the folder of the dataset.
        train_split: name of the training split, which is also the name of its folder.
        val_split: name of the validation split.
        download: let timm download a "torch/..." dataset.
        img_size: one number or [H, W]. To classify, the size of images in training and validation. To segment, the
            size of the training crops; whole images are validated with a shorter side of its shorter side. To detect,
            the limits of the shorter and the longer side. To restore, the size of the training crops, and of the tiles
            in which whole images are validated.
        mean: mean of the pixels (0 to 1), a value for each channel; the model's if not given.
        std: their standard deviation, likewise.
        interpolation: used to resize images for validation; the model's if not given.
        crop_pct: share of the image's side kept in validation; the model's if not given.
        workers: number of processes that read images, for each training process.
        check_images: before training starts, read the header and the end of every file of a folder, and all of every
            mask.
        exif_orientation: rotate and mirror images as their EXIF orientation says. Viewers do so; timm and torchvision
            do not.
        synthetic_images: number of images of synthetic_digits for training and for validation.
    """

    dataset: str = setting(_DATASET, "")
    root: str | None = setting(_PATH, None)
    train_split: str = setting(_SPLIT, "train")
    val_split: str = setting(_SPLIT, "val")
    download: bool = False
    img_size: int | tuple[int, int] = setting(IMAGE_SIZE, 224)
    mean: list[float] | None = setting(DATA["mean"], None)  # noqa: RUF009 (None is not mutable)
    std: list[float] | None = setting(DATA["std"], None)  # noqa: RUF009
    interpolation: Interpolation | None = None
    crop_pct: float | None = setting(DATA["crop_pct"], None)
    workers: int = setting(whole(0, 1024), 8)
    check_images: bool = True
    exif_orientation: bool = False
    synthetic_images: tuple[int, int] = setting(list_of(whole(1, 10**7), 2, 2), (1000, 200))

    @property
    def size(self) -> tuple[int, int]:
        """img_size as (H, W)."""
        return (self.img_size, self.img_size) if isinstance(self.img_size, int) else self.img_size

    def spec(self, training: bool) -> DatasetSpec:
        """The training or the validation split."""
        split = self.train_split if training else self.val_split
        count = self.synthetic_images[0 if training else 1]
        return DatasetSpec(self.dataset, self.root, split, self.size, count, self.exif_orientation, "--data.root")


@dataclass
class AugmentConfig:
    """Augmentation of training images, by timm.

    Args:
        scale: lower and upper bound of a random crop's share of the area.
        ratio: lower and upper bound of its aspect ratio.
        hflip: probability of a horizontal flip.
        color_jitter: its strength; not used together with auto_augment.
        auto_augment: a policy in timm's notation, or none.
        interpolation: used to resize crops; "random" is bilinear or bicubic.
        re_prob: probability of erasing a random rectangle.
        re_mode: "pixel" fills it with noise, "rand" with one colour, "const" with the mean.
        mixup: alpha of mixup; 0 for none.
        cutmix: alpha of cutmix; 0 for none.
        smoothing: label smoothing.
    """

    scale: tuple[float, float] = setting(_RANGE, (0.08, 1.0))
    ratio: tuple[float, float] = setting(_RANGE, (3 / 4, 4 / 3))
    hflip: float = setting(SHARE, 0.5)
    color_jitter: float = setting(_POSITIVE, 0.4)
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    interpolation: Interpolation | Literal["random"] = "random"
    re_prob: float = setting(SHARE, 0.25)
    re_mode: Literal["pixel", "rand", "const"] = "pixel"
    mixup: float = setting(_POSITIVE, 0.8)
    cutmix: float = setting(_POSITIVE, 1.0)
    smoothing: float = setting(SHARE, 0.1)


@dataclass
class SegmentConfig:
    """Semantic segmentation: its decoder, its masks, and its augmentation, which replaces ``augment``.

    Args:
        decoder: arguments of segmentation_models_pytorch's FPN, e.g. decoder_dropout.
        reduce_zero_label: 0 in a mask means "ignore", and classes count from 1.
        scale: range of the image's shorter side before the crop, relative to that of data.img_size.
        most_of_one_class: a crop is drawn again, up to ten times, while one class has a larger share of its pixels.
        hflip: probability of a horizontal flip.
        photometric: change brightness, contrast, saturation, hue and the order of channels at random.
    """

    decoder: dict[str, Any] = field(default_factory=dict)
    reduce_zero_label: bool = False
    scale: tuple[float, float] = setting(_RANGE, (0.5, 2.0))
    most_of_one_class: float = setting(SHARE, 0.75)
    hflip: float = setting(SHARE, 0.5)
    photometric: bool = True


@dataclass
class DetectConfig:
    """Object detection: its head, its boxes, and its augmentation, which replaces ``augment``.

    Args:
        channels: number of channels of the feature pyramid and the head.
        anchor_scale: side of the smallest anchors, in strides of their feature map.
        norm_groups: number of groups of a group norm after each convolution of the pyramid and the head; 0 for no norm.
        hflip: probability of a horizontal flip.
        repair_boxes: clip boxes to their image and leave out boxes without area, instead of refusing them.
    """

    channels: int = setting(DETECTOR["channels"], 256)
    anchor_scale: float = setting(DETECTOR["anchor_scale"], 4.0)
    norm_groups: int = setting(DETECTOR["norm_groups"], 0)
    hflip: float = setting(SHARE, 0.5)
    repair_boxes: bool = False


@dataclass
class RestoreConfig:
    """Restoration: the degradation to undo, the model around its U-shaped network, and random crops, which replace
    ``augment``.

    Inputs are files (see ``data``), or made from the targets, which are blurred, then reduced, then given noise.

    Args:
        scale: factor between the sides of target and input.
        blur: standard deviation of the Gaussian, in pixels of the target.
        noise: standard deviation of the noise, in levels of 0 to 255.
        crops: number of crops of each training image in an epoch.
        photometric: change brightness, contrast, saturation, hue and the order of channels of crops at random, before
            inputs are made from them.
        channels: number of channels of the image's feature map, to which residual blocks and the U-shaped network add.
        stride: stride of this map; with 1 it has full resolution.
        blocks: number of residual blocks, of two convolutions each, before the U-shaped network, and after it.
    """

    scale: int = setting(DEGRADATION["scale"], 1)
    blur: float = setting(DEGRADATION["blur"], 0.0)
    noise: float = setting(DEGRADATION["noise"], 0.0)
    crops: int = setting(whole(1, 10**6), 1)
    photometric: bool = False
    channels: int = setting(RESTORER["channels"], 64)
    stride: int = setting(RESTORER["stride"], 2)
    blocks: int = setting(RESTORER["blocks"], 3)


@dataclass
class OptimConfig:
    """Optimizer and learning-rate schedule.

    Args:
        opt: timm's name of the optimizer.
        lr: the peak learning rate, for steps of global_batch images. It is used as given, never scaled.
        global_batch: images per optimizer step, over all processes and accumulated passes.
        accumulation: forward and backward passes per step; each process handles global_batch / (processes x
            accumulation) images at a time.
        weight_decay: not applied to biases and norms.
        clip_grad: largest norm of the gradient, or none.
        epochs: number of epochs of the schedule, warm-up included.
        cooldown_epochs: number of further epochs at min_lr, after cosine and poly.
        schedule: of the learning rate, which changes at every step; "step" is a multistep with milestones 90, 180, ...
        decay_rate: the power of poly; the factor of step and multistep.
        milestones: epochs at which multistep multiplies by it.
        warmup_epochs: number of epochs in which the rate rises linearly from warmup_lr to lr.
        warmup_lr: the first learning rate.
        min_lr: the last learning rate, of cosine and poly.
        ema_decay: decay of an averaged copy of the weights, which is then saved for use; 0 for none.
    """

    opt: str = "adamw"
    lr: float = setting(_POSITIVE, 1e-3)
    global_batch: int = setting(_COUNT, 1024)
    accumulation: int = setting(_COUNT, 1)
    weight_decay: float = setting(_POSITIVE, 0.05)
    clip_grad: float | None = setting(_POSITIVE, None)
    epochs: int = setting(whole(1, 10**6), 300)
    cooldown_epochs: int = setting(whole(0, 10**6), 10)
    schedule: Literal["cosine", "poly", "step", "multistep", "constant"] = "cosine"
    decay_rate: float = setting(_POSITIVE, 0.1)
    milestones: list[int] = field(default_factory=list, metadata={"kind": _MILESTONES})
    warmup_epochs: float = setting(_POSITIVE, 20)
    warmup_lr: float = setting(_POSITIVE, 1e-6)
    min_lr: float = setting(_POSITIVE, 1e-5)
    ema_decay: float = setting(SHARE, 0.0)


@dataclass
class TrainConfig:
    """A training run.

    Args:
        task: classify, segment, detect or restore.
        model: the model.
        data: the images.
        augment: augmentation of training images, for classification.
        segment: settings of segmentation only.
        detect: settings of detection only.
        restore: settings of restoration only.
        optim: optimizer and learning-rate schedule.
        output: folder for checkpoints, logs and pictures.
        resume: continue the run in output, if there is one.
        seed: seed of all random numbers.
        device: e.g. cpu or cuda; "auto" is cuda if available, else cpu.
        amp: dtype of mixed precision; float16 needs CUDA, and scales gradients.
        distributed: under torchrun, how processes share the work: replicas (ddp) or shards of the weights (fsdp).
        save_steps: number of steps after which a checkpoint is also written within an epoch; 0 for never.
        keep: number of latest checkpoints that are kept.
        log_steps: steps between two lines of steps.jsonl.
        tensorboard: also write events for TensorBoard.
    """

    task: str = "classify"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    segment: SegmentConfig = field(default_factory=SegmentConfig)
    detect: DetectConfig = field(default_factory=DetectConfig)
    restore: RestoreConfig = field(default_factory=RestoreConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    output: str = setting(_PATH, "runs/train")
    resume: bool = False
    seed: int = setting(whole(0, 2**63 - 1), 0)
    device: str = "auto"
    amp: Literal["none", "bfloat16", "float16"] = "none"
    distributed: Literal["ddp", "fsdp"] = "ddp"
    save_steps: int = setting(whole(0, 10**9), 0)
    keep: int = setting(_COUNT, 2)
    log_steps: int = setting(_COUNT, 50)
    tensorboard: bool = False


# Settings that may change when a run is resumed: they do not affect the result.
FREE_TO_CHANGE = {"output", "resume", "save_steps", "keep", "log_steps", "tensorboard"}
FREE_TO_CHANGE |= {"data.root", "data.download", "data.workers", "data.check_images", "model.checkpoint"}

_SETTINGS = flatten(asdict(TrainConfig()))
_SECTIONS = {name.split(".")[0] for name in _SETTINGS if "." in name}

set_loader(MODE, strict_yaml.load, (yaml.YAMLError, ValueError))


def _check_recipe(path: Path) -> None:
    """Raises ValueError, naming the file, unless it has settings by name and names no other recipe."""
    try:
        content = strict_yaml.load(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"expected settings by name, got {str(content)[:60]!r}")
        for name, value in flatten(content).items():
            if name in ("recipe", "config"):
                raise ValueError(f"{name}: a recipe cannot name another")
            if name in _SECTIONS:
                raise ValueError(f"{name}: expected its settings by name, got {str(value)[:60]!r}")
            if name not in _SETTINGS and not name.startswith(("model.args.", "segment.decoder.")):
                raise ValueError(f"{name[:60]}: is not a setting{did_you_mean(name[:60], _SETTINGS)}")
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())[:2000]}") from error


def parse(arguments: list[str]) -> TrainConfig:
    """The configuration of a command line: ``--recipe`` (or ``--config``) with a file or the name of a packaged recipe,
    and settings such as ``--optim.lr 1e-4``.

    Raises:
        ValueError: an unknown key, a value of the wrong type or out of range, an unknown model.
    """
    parser = ArgumentParser(prog="dfformer train", description="Trains a model.", exit_on_error=False, parser_mode=MODE)
    parser.add_argument(
        "--recipe", "--config", action="config", help="a YAML file, or a packaged recipe's name: digits"
    )
    parser.add_class_arguments(TrainConfig)
    try:
        recipes, settings = split_recipes(arguments)
        for path in recipes:
            _check_recipe(path)
        parsed: Namespace = parser.parse_args([*(f"--recipe={path}" for path in recipes), *settings])
    except (ArgumentError, OverflowError, RecursionError) as error:
        unknown = [a.split("=")[0] for a in arguments if a.startswith("--") and a.split("=")[0] in str(error)]
        known = [f"--{name}" for name in _SETTINGS]
        hint = did_you_mean(unknown[0], known) if unknown and unknown[0] not in known else ""
        raise ValueError(" ".join(str(error).split())[:2000] + hint) from error
    parsed.pop("recipe", None)
    config = TrainConfig(**vars(parser.instantiate(parsed)))
    check(config)
    return config
