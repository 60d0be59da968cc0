"""The settings of a training run: typed, from a YAML recipe and the command line; unknown keys are refused.

The defaults are the authors' recipe for ImageNet-1k: the command in their README and, for anything it leaves out, the
defaults of their ``train.py``. A recipe file names the model and the settings that differ.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from dfformer.train.checks import check, flatten
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
            root/annotations/instances_SPLIT.json and root/SPLIT, or "synthetic_digits". To restore, "" for
            root/targets/SPLIT and, unless inputs are made, root/inputs/SPLIT, or "photographs", built in.
        root: its folder.
        train_split: name of the training split; for folders, of the folder.
        val_split: the same for validation.
        download: let timm download a "torch/..." dataset.
        img_size: one number or [H, W], in training and validation. To segment, of the crops in training; whole images
            are validated, their shorter side as long as its. To detect, the most for the shorter and for the longer
            side. To restore, of the crops in training, and of the tiles that whole images are validated in.
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
class RestoreConfig:
    """Restoration: what is undone, and what is done to training images instead of ``augment``: crops, mirrored.

    Inputs are made from the targets, blurred, then made smaller, then with noise; or they are files, see ``data``.

    Args:
        scale: how many times as high and wide as its input a target is.
        blur: standard deviation of the Gaussian, in pixels of the target.
        noise: standard deviation of the noise, in levels of 0 to 255.
        crops: how many an epoch takes of each training image.
    """

    scale: int = 1
    blur: float = 0.0
    noise: float = 0.0
    crops: int = 1


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
        task: what is learned: classify, segment, detect or restore.
        model: the model.
        data: the images.
        augment: augmentation of training images, for classification.
        segment: settings of segmentation only.
        detect: settings of detection only.
        restore: settings of restoration only.
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
    restore: RestoreConfig = field(default_factory=RestoreConfig)
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
