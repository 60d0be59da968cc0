"""The settings of a training run: typed, from a YAML recipe and the command line; unknown keys are refused.

The defaults are the authors' recipe for ImageNet-1k: the command in their README and, for anything it leaves out, the
defaults of their ``train.py``. A recipe file names the model and the settings that differ.
"""

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import timm
from timm.optim import list_optimizers

from dfformer.models.metadata import DECODER, FLAG, check_model_args, check_settings
from dfformer.tasks.table import check_task
from dfformer.train.recipes import with_recipe_files
from dfformer.utils.suggest import did_you_mean

try:
    from jsonargparse import ArgumentError, ArgumentParser, Namespace

    from dfformer.train import strict_yaml
except ImportError as error:
    raise RuntimeError(f"training needs {error.name}: pip install 'dfformer[train]'") from error


Interpolation = Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"]


@dataclass
class ModelConfig:
    """The model.

    Args:
        name: of a model for ``timm.create_model``.
        args: its other arguments, e.g. drop_path_rate. The number of classes follows from the data, if it names them.
        checkpoint: weights to start from; a classifier for other classes is left out.
        grad_checkpointing: recompute activations in backward instead of keeping them: slower, less memory.
        compile: run under torch.compile.
    """

    name: str = "dfformer_s18"
    args: dict[str, Any] = field(default_factory=dict)
    checkpoint: str | None = None
    grad_checkpointing: bool = False
    compile: bool = False


@dataclass
class DataConfig:
    """The images.

    Args:
        dataset: to classify, "" for root/train and root/val with a folder a class, or .tar files of that; "digits",
            built in; or any map-style dataset timm knows: "torch/cifar10", "hfds/...". To segment, "" for
            root/images/SPLIT and root/annotations/SPLIT, or "synthetic_digits", built in. To detect, "" for
            root/annotations/instances_SPLIT.json and root/SPLIT, or "synthetic_digits".
        root: its folder.
        train_split: name of the training split; for folders, of the folder.
        val_split: the same for validation.
        download: let timm download a "torch/..." dataset.
        img_size: one number or [H, W], in training and validation. To segment, of the crops in training; whole images
            are validated, their shorter side as long as its. To detect, the most for the shorter and for the longer
            side.
        mean: of the pixels, 0 to 1, a value a channel; the model's if not given.
        std: the same.
        interpolation: when resizing for validation; the model's if not given.
        crop_pct: share of the image's side kept in validation; the model's if not given.
        workers: processes that decode images, for each training process.
        check_images: before training starts, read the header and the end of every file of a folder, and all of every
            mask.
        exif_orientation: turn and mirror images as their EXIF orientation says; viewers do, timm and torchvision do
            not.
        synthetic_images: of synthetic_digits: how many to train on and to validate.
    """

    dataset: str = ""
    root: str | None = None
    train_split: str = "train"
    val_split: str = "val"
    download: bool = False
    img_size: int | tuple[int, int] = 224
    mean: list[float] | None = None
    std: list[float] | None = None
    interpolation: Interpolation | None = None
    crop_pct: float | None = None
    workers: int = 8
    check_images: bool = True
    exif_orientation: bool = False
    synthetic_images: tuple[int, int] = (1000, 200)

    @property
    def size(self) -> tuple[int, int]:
        """img_size as (H, W)."""
        return (self.img_size, self.img_size) if isinstance(self.img_size, int) else self.img_size


@dataclass
class AugmentConfig:
    """Augmentation of training images, by timm.

    Args:
        scale: lower and upper bound of a random crop's share of the area.
        ratio: lower and upper bound of its aspect ratio.
        hflip: probability of a horizontal flip.
        color_jitter: strength; not used together with auto_augment.
        auto_augment: a policy in timm's notation, or none.
        interpolation: when resizing; "random" is bilinear or bicubic.
        re_prob: probability of erasing a random rectangle.
        re_mode: "pixel" fills it with noise, "rand" with one colour, "const" with the mean.
        mixup: alpha; 0 for none.
        cutmix: alpha; 0 for none.
        smoothing: of labels.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    color_jitter: float = 0.4
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    interpolation: Interpolation | Literal["random"] = "random"
    re_prob: float = 0.25
    re_mode: Literal["pixel", "rand", "const"] = "pixel"
    mixup: float = 0.8
    cutmix: float = 1.0
    smoothing: float = 0.1


@dataclass
class SegmentConfig:
    """Semantic segmentation: its decoder, its masks, and its augmentation, which replaces ``augment``.

    Args:
        decoder: arguments of segmentation_models_pytorch's FPN, e.g. decoder_dropout.
        reduce_zero_label: 0 in a mask means "ignore", and classes count from 1.
        scale: least and most of a random size, relative to data.img_size, for the image's shorter side.
        most_of_one_class: a crop is drawn again, up to ten times, while one class has a larger share of its pixels.
        hflip: probability of a horizontal flip.
        photometric: random brightness, contrast, saturation, hue, and order of the channels.
    """

    decoder: dict[str, Any] = field(default_factory=dict)
    reduce_zero_label: bool = False
    scale: tuple[float, float] = (0.5, 2.0)
    most_of_one_class: float = 0.75
    hflip: float = 0.5
    photometric: bool = True


@dataclass
class DetectConfig:
    """Object detection: its head, its boxes, and its augmentation, which replaces ``augment``.

    Args:
        channels: of the feature pyramid and the head.
        anchor_scale: side of the smallest anchors, in strides of their feature map.
        norm_groups: of a group norm after each convolution of the pyramid and the head; 0 for none.
        hflip: probability of a horizontal flip.
        repair_boxes: clip boxes to their image and drop boxes without area, instead of refusing them.
    """

    channels: int = 256
    anchor_scale: float = 4.0
    norm_groups: int = 0
    hflip: float = 0.5
    repair_boxes: bool = False


@dataclass
class OptimConfig:
    """Optimizer and learning-rate schedule.

    Args:
        opt: an optimizer timm knows.
        lr: the peak learning rate, for steps of global_batch images. It is used as given, never scaled.
        global_batch: images per optimizer step, over all processes and accumulated passes.
        accumulation: forward and backward passes per step; each process handles global_batch / (processes x
            accumulation) images at a time.
        weight_decay: not applied to biases and norms.
        clip_grad: largest norm of the gradient, or none.
        epochs: of the schedule, warm-up included.
        cooldown_epochs: added after it, at min_lr.
        schedule: of the learning rate, a value a step.
        decay_rate: the power of poly; what step and multistep multiply by.
        milestones: epochs at which multistep does.
        warmup_epochs: from warmup_lr up to lr, in a straight line.
        warmup_lr: where it starts.
        min_lr: where it ends.
        ema_decay: of an averaged copy of the weights, which is then what is saved for use; 0 for none.
    """

    opt: str = "adamw"
    lr: float = 1e-3
    global_batch: int = 1024
    accumulation: int = 1
    weight_decay: float = 0.05
    clip_grad: float | None = None
    epochs: int = 300
    cooldown_epochs: int = 10
    schedule: Literal["cosine", "poly", "step", "multistep", "constant"] = "cosine"
    decay_rate: float = 0.1
    milestones: list[int] = field(default_factory=list)
    warmup_epochs: float = 20
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5
    ema_decay: float = 0.0


@dataclass
class TrainConfig:
    """A training run.

    Args:
        task: what is learned: classify, segment or detect.
        model: the model.
        data: the images.
        augment: augmentation of training images, for classification.
        segment: settings of segmentation only.
        detect: settings of detection only.
        optim: optimizer and learning-rate schedule.
        output: folder for checkpoints, logs and pictures.
        resume: resume the run in output, if there is one.
        seed: of everything random.
        device: "auto" is CUDA where there is one, else the CPU.
        amp: type of mixed precision; float16 needs CUDA, its gradients are scaled.
        distributed: under torchrun, how processes share the work: replicas (ddp) or shards of the weights (fsdp).
        save_steps: also write a checkpoint every so many steps inside an epoch; 0 for only after each epoch.
        keep: how many of the latest checkpoints stay.
        log_steps: steps between two lines of steps.jsonl.
        tensorboard: also write events for TensorBoard.
    """

    task: str = "classify"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    segment: SegmentConfig = field(default_factory=SegmentConfig)
    detect: DetectConfig = field(default_factory=DetectConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    output: str = "runs/train"
    resume: bool = False
    seed: int = 0
    device: str = "auto"
    amp: Literal["none", "bfloat16", "float16"] = "none"
    distributed: Literal["ddp", "fsdp"] = "ddp"
    save_steps: int = 0
    keep: int = 2
    log_steps: int = 50
    tensorboard: bool = False


# Settings that may change when a run is resumed: they do not affect the result.
FREE_TO_CHANGE = {"output", "resume", "save_steps", "keep", "log_steps", "tensorboard"}
FREE_TO_CHANGE |= {"data.root", "data.download", "data.workers", "data.check_images", "model.checkpoint"}

_LARGE = 1e9  # above any real value: a number from a file must not make a run endless
_DATASET = re.compile(r"[^/:]*|(torch|hfds)/.+")  # no reader of timm that runs commands, such as webdataset's

_RANGES: dict[str, tuple[float, float]] = {
    "data.workers": (0, 1024),
    "data.crop_pct": (0.01, 1),
    "augment.color_jitter": (0, _LARGE),
    "augment.hflip": (0, 1),
    "augment.re_prob": (0, 1),
    "augment.mixup": (0, _LARGE),
    "augment.cutmix": (0, _LARGE),
    "augment.smoothing": (0, 1),
    "segment.hflip": (0, 1),
    "segment.most_of_one_class": (0, 1),
    "detect.hflip": (0, 1),
    "detect.channels": (1, 16384),
    "detect.anchor_scale": (0.1, 1000),
    "detect.norm_groups": (0, 16384),
    "optim.lr": (0, _LARGE),
    "optim.global_batch": (1, _LARGE),
    "optim.accumulation": (1, _LARGE),
    "optim.weight_decay": (0, _LARGE),
    "optim.clip_grad": (0, _LARGE),
    "optim.epochs": (1, 10**6),
    "optim.cooldown_epochs": (0, 10**6),
    "optim.warmup_epochs": (0, 10**6),
    "optim.decay_rate": (0, _LARGE),
    "optim.ema_decay": (0, 1),
    "optim.warmup_lr": (0, _LARGE),
    "optim.min_lr": (0, _LARGE),
    "seed": (0, 2**63 - 1),
    "save_steps": (0, _LARGE),
    "keep": (1, _LARGE),
    "log_steps": (1, _LARGE),
}


def parse(arguments: list[str]) -> TrainConfig:
    """The configuration of a command line: ``--recipe`` (or ``--config``) and a file or a packaged recipe's name, then
    ``--optim.lr 1e-4`` and the like.

    Raises:
        ValueError: an unknown key, a value of the wrong type or out of range, an unknown model.
    """
    parser = ArgumentParser(
        prog="dfformer train", description="Trains a model.", exit_on_error=False, parser_mode=strict_yaml.MODE
    )
    parser.add_argument(
        "--recipe", "--config", action="config", help="a YAML file, or a packaged recipe's name: digits"
    )
    parser.add_class_arguments(TrainConfig)
    try:
        parsed: Namespace = parser.parse_args(with_recipe_files(arguments))
    except (ArgumentError, OverflowError, RecursionError) as error:
        unknown = [a.split("=")[0] for a in arguments if a.startswith("--") and a.split("=")[0] in str(error)]
        known = [f"--{name}" for name in flatten(asdict(TrainConfig()))]
        hint = did_you_mean(unknown[0], known) if unknown and unknown[0] not in known else ""
        raise ValueError(" ".join(str(error).split())[:2000] + hint) from error
    parsed.pop("recipe", None)
    config = TrainConfig(**vars(parser.instantiate(parsed)))
    check(config)
    return config


def check(config: TrainConfig) -> None:
    """Raises ValueError for values that no run can have."""
    check_task(config.task)
    values = flatten(asdict(config))
    _check_numbers(values)
    for name, (low, high) in _RANGES.items():
        if values[name] is not None and not low <= values[name] <= high:
            raise ValueError(f"{name}: got {values[name]}, accepted are numbers from {low} to {high}")
    for name in ("augment.scale", "augment.ratio", "segment.scale"):
        least, most = values[name]
        if not 0 < least <= most:
            raise ValueError(f"{name}: got {values[name]}, accepted are two numbers above 0, least and most")
    if config.optim.warmup_epochs >= config.optim.epochs:
        raise ValueError(
            f"optim.warmup_epochs: got {config.optim.warmup_epochs}, which leaves nothing of "
            f"optim.epochs={config.optim.epochs}"
        )
    if config.model.checkpoint and not Path(config.model.checkpoint).is_file():
        raise FileNotFoundError(f"model.checkpoint: {config.model.checkpoint} does not exist")
    _check_names(config)
    _check_images(config)


def _check_numbers(values: dict[str, Any]) -> None:
    for name, value in values.items():
        for number in value if isinstance(value, list | tuple) else (value,):
            if isinstance(number, int | float) and not abs(number) < 2**63:  # NaN is refused too
                raise ValueError(f"{name}: got {str(value)[:60]}, accepted are finite numbers")


def _check_names(config: TrainConfig) -> None:
    model, optimizer = config.model.name, config.optim.opt.lower().split("_")[-1]  # behind timm's "lookahead_"
    if not re.fullmatch(r"\w+(\.\w+)?", model) or not timm.is_model(model):
        hint = did_you_mean(model[:100], timm.list_models()) or "; `dfformer info` lists this package's models"
        raise ValueError(f"model.name: timm knows no model {model[:100]!r}{hint}")
    if optimizer not in list_optimizers():
        hint = did_you_mean(optimizer[:100], list_optimizers())
        raise ValueError(f"optim.opt: timm knows no optimiser {config.optim.opt[:100]!r}{hint}")
    args = dict(config.model.args)
    check_settings({"pretrained": args.pop("pretrained", False)}, {"pretrained": FLAG}, "model.args.")
    check_model_args(model, args, "model.args.")
    check_settings(config.segment.decoder, DECODER, "segment.decoder.")
    if not _DATASET.fullmatch(config.data.dataset):
        raise ValueError(
            f"data.dataset: got {config.data.dataset[:100]!r}, accepted of timm's are 'torch/NAME' and 'hfds/NAME'"
        )
    policy = config.augment.auto_augment
    if policy is not None and (len(policy) > 100 or re.search(r"\d{5}", policy.replace(".", ""))):
        raise ValueError(f"augment.auto_augment: got {policy[:60]!r}, accepted are policies in timm's notation")


def _check_images(config: TrainConfig) -> None:
    data, channels = config.data, config.model.args.get("in_chans", 3)
    default = timm.get_pretrained_cfg(config.model.name)
    for name, numbers in (("img_size", data.size), ("synthetic_images", data.synthetic_images)):
        most = 4096 if name == "img_size" else 10**7  # as a checkpoint may say
        if min(numbers) < 1 or max(numbers) > most:
            raise ValueError(f"data.{name}: got {getattr(data, name)}, accepted are numbers from 1 to {most}")
    for name in ("mean", "std"):
        values = getattr(data, name)
        if values is not None and len(values) != channels:
            raise ValueError(f"data.{name}: got {values}, accepted is a number for each of {channels} channels")
        if values is None and config.task == "classify" and default and len(getattr(default, name)) != channels:
            raise ValueError(
                f"data.{name}: is not given, and the model's has {len(getattr(default, name))} values for the "
                f"{channels} channels of model.args.in_chans; accepted is a number for each"
            )
    if data.std and min(data.std) <= 0:
        raise ValueError(f"data.std: got {data.std}, accepted are numbers above 0")


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"optim": {"lr": 1}}`` as ``{"optim.lr": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, dict) and key != "args"
        flat |= flatten(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return flat
