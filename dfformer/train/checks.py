"""Checks the settings of a training run: ranges of numbers, and names of models, optimizers and datasets."""

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import timm
import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from torch import nn

from dfformer.data.transforms import check_auto_augment
from dfformer.models.description import DECODER, FLAG, check_architecture, check_model_args, check_settings
from dfformer.tasks.table import check_task
from dfformer.utils.suggest import did_you_mean
from dfformer.utils.text import reason

if TYPE_CHECKING:
    from dfformer.train.config import TrainConfig


def check(config: "TrainConfig") -> None:
    """Raises ValueError for invalid settings."""
    check_task(config.task)
    _check_values(config)
    if config.optim.warmup_epochs >= config.optim.epochs:
        raise ValueError(
            f"optim.warmup_epochs: expected a number below optim.epochs={config.optim.epochs}, "
            f"got {config.optim.warmup_epochs}"
        )
    if config.model.checkpoint and not Path(config.model.checkpoint).is_file():
        raise FileNotFoundError(f"model.checkpoint: {config.model.checkpoint} does not exist")
    _check_names(config)
    _check_channels(config)


def _check_values(section: Any, prefix: str = "") -> None:
    """Checks each setting against the ``kind`` of its field; a recipe may say null where the type has no None."""
    for field in fields(section):
        value = getattr(section, field.name)
        if is_dataclass(value):
            _check_values(value, f"{prefix}{field.name}.")
        elif value is None:
            if type(None) not in get_args(field.type):
                words = field.metadata["kind"].words if "kind" in field.metadata else "another value"
                raise ValueError(f"{prefix}{field.name}: expected {words}, got null")
        elif "kind" in field.metadata:
            check_settings({field.name: value}, {field.name: field.metadata["kind"]}, prefix)


def _check_names(config: "TrainConfig") -> None:
    check_architecture(config.model.name, "model.name")
    optimizer = config.optim.opt.lower().split("_")[-1]  # without timm's prefix "lookahead_"
    if optimizer not in list_optimizers():
        hint = did_you_mean(optimizer[:100], list_optimizers())
        raise ValueError(f"optim.opt: timm knows no optimizer {config.optim.opt[:100]!r}{hint}")
    if get_optimizer_info(optimizer).second_order:
        raise ValueError(f"optim.opt: expected an optimizer without second derivatives, got {config.optim.opt!r}")
    try:
        groups = create_optimizer_v2(nn.Linear(1, 1, device="meta"), config.optim.opt, lr=config.optim.lr).param_groups
        if any(isinstance(value, torch.dtype) for group in groups for value in group.values()):
            raise ValueError("torch cannot gather its settings for a checkpoint")
    except Exception as error:  # timm asserts, or imports, what some need
        expected = f"expected an optimizer that can be used here, got {config.optim.opt!r}"
        raise ValueError(f"optim.opt: {expected}: {reason(error)}") from error
    args = dict(config.model.args)
    check_settings({"pretrained": args.pop("pretrained", False)}, {"pretrained": FLAG}, "model.args.")
    check_model_args(config.model.name, args, "model.args.")
    check_settings(config.segment.decoder, DECODER, "segment.decoder.")
    check_auto_augment(config.augment.auto_augment)


def _check_channels(config: "TrainConfig") -> None:
    channels, default = config.model.args.get("in_chans", 3), timm.get_pretrained_cfg(config.model.name)
    for name in ("mean", "std"):
        values, got = getattr(config.data, name), "got"
        if values is None and config.task == "classify":
            values, got = getattr(default, name, None), "got the model's default"
        if values is not None and len(values) != channels:
            expected = f"expected a number for each of {channels} channels (model.args.in_chans)"
            raise ValueError(f"data.{name}: {expected}, {got} {values}")


def flatten(values: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    """``{"optim": {"lr": 1}}`` as ``{"optim.lr": 1}``; the settings that are mappings stay whole."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, dict) and key not in ("args", "decoder")
        flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat
