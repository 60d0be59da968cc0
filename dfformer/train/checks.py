"""Checks the settings of a training run: ranges of numbers, and names of models, optimisers and datasets."""

import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
from timm.optim import get_optimizer_class, get_optimizer_info, list_optimizers

from dfformer.data.transforms import check_auto_augment
from dfformer.models.metadata import DECODER, DEGRADATION, FLAG, check_model_args, check_settings
from dfformer.tasks.table import check_task
from dfformer.utils.suggest import did_you_mean
from dfformer.utils.text import reason

if TYPE_CHECKING:
    from dfformer.train.config import TrainConfig

_LARGE = 1e9  # above any real value: a number from a file must not make a run endless
_DATASET = re.compile(r"[^/:]*|(torch|hfds)/.+")  # leaves out timm's readers that run commands, e.g. webdataset's

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
    "restore.crops": (1, 10**6),
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


def check(config: "TrainConfig") -> None:
    """Raises ValueError for settings that are not accepted."""
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
    milestones = config.optim.milestones
    if milestones != sorted(set(milestones)) or min(milestones, default=1) < 1:
        raise ValueError(f"optim.milestones: got {milestones}, accepted are epochs from 1, in ascending order")
    if config.optim.warmup_epochs >= config.optim.epochs:
        raise ValueError(
            f"optim.warmup_epochs: got {config.optim.warmup_epochs}, accepted are numbers below "
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


def _check_names(config: "TrainConfig") -> None:
    model, optimizer = config.model.name, config.optim.opt.lower().split("_")[-1]  # without timm's prefix "lookahead_"
    if not re.fullmatch(r"\w+(\.\w+)?", model) or not timm.is_model(model):
        hint = did_you_mean(model[:100], timm.list_models()) or "; `dfformer info` lists this package's models"
        raise ValueError(f"model.name: timm knows no model {model[:100]!r}{hint}")
    if optimizer not in list_optimizers():
        hint = did_you_mean(optimizer[:100], list_optimizers())
        raise ValueError(f"optim.opt: timm knows no optimiser {config.optim.opt[:100]!r}{hint}")
    if get_optimizer_info(optimizer).second_order:
        raise ValueError(f"optim.opt: got {config.optim.opt!r}, accepted are optimisers without second derivatives")
    try:
        get_optimizer_class(optimizer)
    except Exception as error:  # timm asserts, or imports, what some need
        raise ValueError(f"optim.opt: got {config.optim.opt!r}, which cannot be used here: {reason(error)}") from error
    args = dict(config.model.args)
    check_settings({"pretrained": args.pop("pretrained", False)}, {"pretrained": FLAG}, "model.args.")
    check_model_args(model, args, "model.args.")
    check_settings(config.segment.decoder, DECODER, "segment.decoder.")
    check_settings({name: getattr(config.restore, name) for name in DEGRADATION}, DEGRADATION, "restore.")
    if not _DATASET.fullmatch(config.data.dataset):
        raise ValueError(
            f"data.dataset: got {config.data.dataset[:100]!r}, accepted of timm's are 'torch/NAME' and 'hfds/NAME'"
        )
    check_auto_augment(config.augment.auto_augment)


def _check_images(config: "TrainConfig") -> None:
    data, channels = config.data, config.model.args.get("in_chans", 3)
    default = timm.get_pretrained_cfg(config.model.name)
    for name, numbers in (("img_size", data.size), ("synthetic_images", data.synthetic_images)):
        most = 4096 if name == "img_size" else 10**7  # 4096 is also the limit of checkpoints
        if min(numbers) < 1 or max(numbers) > most:
            raise ValueError(f"data.{name}: got {getattr(data, name)}, accepted are numbers from 1 to {most}")
    for name in ("mean", "std"):
        values = getattr(data, name)
        if values is not None and len(values) != channels:
            raise ValueError(f"data.{name}: got {values}, accepted is a number for each of {channels} channels")
        if values is None and config.task == "classify" and default and len(getattr(default, name)) != channels:
            raise ValueError(
                f"data.{name}: is not given, and the model's default has {len(getattr(default, name))} values; "
                f"accepted is a number for each of the {channels} channels (model.args.in_chans)"
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
