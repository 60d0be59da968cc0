"""What a checkpoint's description of its model may contain.

The text comes with the file and is not trusted: anything that the tables here do not list, by name, type and bounds,
is an error. Model arguments in recipes must pass the same tables, so every trained model can be saved and loaded.
"""

import json
import re
import reprlib
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import timm

from dfformer.models.filter_resize import RULE
from dfformer.models.metaformer import POOL
from dfformer.models.registry import VARIANTS
from dfformer.utils.accepted import Kind, choice
from dfformer.utils.io import unique_keys
from dfformer.utils.suggest import did_you_mean

_MAX_TEXT = 16 * 2**20  # characters; the names of ImageNet-21k's classes take 0.5 million
_MAX_DIGITS = 18  # of an integer
_ARCHITECTURE = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)?")  # timm's NAME or NAME.TAG; no hub's name, no path

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 60


def whole(low: int, high: int) -> Kind:
    """Whole numbers from ``low`` to ``high``."""
    return Kind(lambda value: type(value) is int and low <= value <= high, f"a whole number from {low} to {high}")


def real(low: float, high: float) -> Kind:
    """Numbers from ``low`` to ``high``, never NaN."""
    return Kind(
        lambda value: type(value) in (int, float) and low <= value <= high, f"a number from {low:g} to {high:g}"
    )


def list_of(kind: Kind, shortest: int, longest: int) -> Kind:
    """Lists (or tuples) of ``shortest`` to ``longest`` such values."""
    count = f"{shortest}" if shortest == longest else f"{shortest} to {longest}"
    return Kind(
        lambda value: (
            isinstance(value, list | tuple) and shortest <= len(value) <= longest and all(map(kind.accepts, value))
        ),
        f"a list of {count} values, each {kind.words}",
    )


def either(*kinds: Kind) -> Kind:
    """Values that any of ``kinds`` accepts."""
    return Kind(lambda value: any(kind.accepts(value) for kind in kinds), " or ".join(kind.words for kind in kinds))


def _is_name(value: Any) -> bool:
    if not isinstance(value, str) or not 0 < len(value) <= 1000:
        return False
    return value.isprintable() or not any(unicodedata.category(character) in ("Cc", "Cs") for character in value)


def _is_architecture(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 200 and bool(_ARCHITECTURE.fullmatch(value))


FLAG = Kind(lambda value: isinstance(value, bool), "true or false")
NONE = Kind(lambda value: value is None, "null")
SHARE = real(0, 1)
NAME = Kind(_is_name, "a name of 1 to 1000 characters, without control characters or lone surrogates")
_SIDE = whole(1, 4096)  # images of that size take gigabytes
_CHANNELS = whole(1, 16384)

IMAGE_SIZE = either(_SIDE, list_of(_SIDE, 2, 2))
Interpolation = Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"]

_COMMON_ARGS: dict[str, Kind] = {
    "num_classes": whole(0, 1_000_000),
    "in_chans": whole(1, 1024),
    "img_size": IMAGE_SIZE,
    "drop_rate": SHARE,
    "drop_path_rate": SHARE,
    "depths": list_of(whole(1, 128), 1, 8),
    "dims": list_of(_CHANNELS, 1, 8),
    "features_only": FLAG,
    "out_indices": list_of(whole(-8, 7), 1, 8),
}
# Arguments of this package's models.
MODEL_ARGS: dict[str, Kind] = {
    **_COMMON_ARGS,
    "global_pool": POOL,
    "res_scale_init_values": list_of(either(real(-1e6, 1e6), NONE), 1, 8),
    "strides": list_of(whole(1, 64), 1, 8),
    "resize": RULE,
    "fork_feat": FLAG,
}
# Arguments of timm's other models: those that many of them share.
TIMM_ARGS: dict[str, Kind] = {
    **_COMMON_ARGS,
    "global_pool": choice("avg", "max", "avgmax", "catavgmax", "token", "map", ""),
    **dict.fromkeys(("proj_drop_rate", "attn_drop_rate", "patch_drop_rate", "pos_drop_rate", "drop_block_rate"), SHARE),
    "output_stride": choice(8, 16, 32),
    "depth": whole(1, 128),
    "embed_dim": _CHANNELS,
    "num_heads": whole(1, 1024),
    "mlp_ratio": real(0.01, 100),
    "init_values": either(real(0, 1e6), NONE),
    "patch_size": IMAGE_SIZE,
    "window_size": IMAGE_SIZE,
    "dynamic_img_size": FLAG,
}
# The accepted entries of timm's pretrained_cfg, all about images.
DATA: dict[str, Kind] = {
    "input_size": list_of(_SIDE, 3, 3),
    "mean": list_of(real(-1e6, 1e6), 1, 1024),
    "std": list_of(real(1e-12, 1e6), 1, 1024),
    "interpolation": choice(*get_args(Interpolation)),
    "crop_pct": real(0.01, 1),
    "crop_mode": choice("center", "squash", "border"),
}
# Arguments of segmentation_models_pytorch's FPN, without those that load weights or change the kind of output.
DECODER: dict[str, Kind] = {
    "encoder_depth": whole(3, 5),
    "decoder_pyramid_channels": _CHANNELS,
    "decoder_segmentation_channels": _CHANNELS,
    "decoder_merge_policy": choice("add", "cat"),
    "decoder_dropout": SHARE,
    "decoder_interpolation": choice("nearest", "bilinear", "bicubic", "area"),
}
DETECTOR: dict[str, Kind] = {
    "channels": _CHANNELS,
    "anchor_scale": real(0.1, 1000),
    "norm_groups": whole(0, 16384),
}
# See `dfformer.tasks.restorer.Restorer`.
RESTORER: dict[str, Kind] = {"channels": whole(1, 1024), "stride": whole(1, 8), "blocks": whole(0, 128)}
# The degradation that a restorer undoes; see `dfformer.data.pairs.Degradation`.
DEGRADATION: dict[str, Kind] = {"scale": whole(1, 4), "blur": real(0, 5), "noise": real(0, 255)}
_MAPPING = Kind(lambda value: isinstance(value, dict), "a mapping")
_IDS = list_of(whole(-(2**53), 2**53), 1, 1_000_000)
Table = Mapping[str, Kind | Mapping[str, Kind]]
_COMMON: Table = {
    "architecture": either(NONE, Kind(_is_architecture, "the name of a model of timm, without a hub or a path")),
    "model_args": _MAPPING,  # see `check_model_args`
    "classes": either(NONE, list_of(NAME, 1, 1_000_000)),
    "data": DATA,
}
# By task: what a checkpoint has besides. Those of a dense task have every key of both tables.
_TASKS: dict[str, Table] = {
    "classify": {},
    "segment": {"decoder": DECODER, "reduce_zero_label": FLAG},
    "detect": {"detector": DETECTOR, "repair_boxes": FLAG, "category_ids": _IDS},
    "restore": {"classes": NONE, "restorer": RESTORER, "degradation": DEGRADATION},
}
# The settings that a dense task must have in these tables.
_NEEDED: dict[str, Iterable[str]] = {
    "data": ("input_size", "mean", "std"), "detector": DETECTOR, "restorer": RESTORER, "degradation": DEGRADATION
}  # fmt: skip


def is_ours(architecture: str) -> bool:
    """Whether a name for ``timm.create_model`` is one of this package's models."""
    return architecture.split(".")[0] in VARIANTS


def check_settings(values: Mapping[Any, Any], table: Table, prefix: str = "") -> None:
    """Raises ValueError for the first of ``values`` that ``table`` does not list or accept."""
    for name, value in values.items():
        if name not in table:
            hint = did_you_mean(name, table) if isinstance(name, str) else ""
            raise ValueError(f"{prefix}{_readable(name)}: unknown name, expected one of {', '.join(table)}{hint}")
        inner = table[name]
        kind = inner if isinstance(inner, Kind) else _MAPPING
        if not kind.accepts(value):
            raise ValueError(f"{prefix}{name}: expected {kind.words}, got {shortened(value)}")
        if not isinstance(inner, Kind):
            check_settings(value, inner, f"{prefix}{name}.")


def check_model_args(architecture: str | None, args: Mapping[str, Any], prefix: str = "model_args.") -> None:
    """Raises ValueError for arguments that ``architecture``, None for any of this package, cannot be created with."""
    check_settings(args, MODEL_ARGS if architecture is None or is_ours(architecture) else TIMM_ARGS, prefix)


def check_architecture(architecture: str, name: str = "architecture") -> None:
    """Raises ValueError unless this model is registered with timm, so it is neither on a hub nor in a folder."""
    if not _is_architecture(architecture) or not timm.is_model(architecture):
        hint = did_you_mean(architecture[:200], timm.list_models()) or "; `dfformer info` lists this package's models"
        raise ValueError(f"{name}: timm knows no model {shortened(architecture)}{hint}")


def check_classes(classes: list[str]) -> None:
    """Raises ValueError for the first class name that a checkpoint cannot store."""
    for name in classes:
        if not NAME.accepts(name):
            raise ValueError(f"classes: expected {NAME.words}, got {shortened(name)}")


def check_description(description: Mapping[str, Any]) -> None:
    """Raises ValueError, naming the key, for an unknown key of a checkpoint, an invalid value or a missing key."""
    task = description.get("task", "classify")
    if not isinstance(task, str) or task not in _TASKS:
        raise ValueError(f"task: expected one of {', '.join(_TASKS)}, got {shortened(task)}")
    table = {**_COMMON, **_TASKS[task], "task": choice(task)}
    check_settings(description, table)
    if task != "classify":
        _check_complete(description, [name for name, kind in table.items() if kind is not NONE], task)
        for name, needed in _NEEDED.items():
            if name in table:
                _check_complete(description[name], needed, task, f"{name}.")
    if task == "detect":
        classes, different = len(description["classes"]), len(set(description["category_ids"]))
        if not different == len(description["category_ids"]) == classes:
            raise ValueError(f"category_ids: expected {classes} different numbers, one a class, got {different}")
    architecture = description.get("architecture") or next(iter(VARIANTS))
    check_architecture(architecture)
    model_args = description.get("model_args", {})
    check_model_args(architecture, model_args)
    check_channels(model_args.get("in_chans", 3), description.get("data", {}))


def check_channels(channels: int, data: Mapping[str, Any]) -> None:
    """Raises ValueError for settings of images that do not fit the number of input channels."""
    for name in ("mean", "std"):
        if name in data and len(data[name]) != channels:
            raise ValueError(f"data.{name}: expected {channels} values, one an input channel, got {len(data[name])}")
    if "input_size" in data and data["input_size"][0] != channels:
        size = list(data["input_size"])
        raise ValueError(f"data.input_size: expected {channels} channels, as the model has, got {size}")


def _check_complete(given: Mapping[str, Any], needed: Iterable[str], task: str, prefix: str = "") -> None:
    for name in needed:
        if given.get(name) is None:
            raise ValueError(f"{prefix}{name}: is missing, a checkpoint for the task {task} has it")


def read_description(text: str) -> dict[str, Any]:
    """The contents of a checkpoint's JSON description; ValueError if it is invalid."""
    description = parse_json(text)
    if not isinstance(description, dict):
        raise ValueError(f"its description of the model is not a mapping: {shortened(description)}")
    check_description(description)
    return description


def write_description(description: Mapping[str, Any]) -> str:
    """``description`` as JSON, the same for equal contents; ValueError if `read_description` would not accept it."""
    try:
        text = json.dumps(description, sort_keys=True, allow_nan=False)
    except (TypeError, RecursionError) as error:
        raise ValueError(f"is not of JSON's types: {error}") from error
    read_description(text)
    return text


def parse_json(text: str) -> Any:
    """Parses JSON from an untrusted source; ValueError if it is not JSON, has a key twice, or is too long or deep."""
    if len(text) > _MAX_TEXT:
        raise ValueError(f"has {len(text)} characters, at most {_MAX_TEXT} are allowed")
    try:
        return json.loads(text, object_pairs_hook=unique_keys, parse_int=_whole)
    except RecursionError:
        raise ValueError("is nested too deep") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"its description of the model is not JSON ({error})") from None


def _whole(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"has a number of {len(digits)} digits, at most {_MAX_DIGITS} are allowed")
    return int(digits)


def shortened(value: Any) -> str:
    """``repr(value)``, shortened for messages; works for any value."""
    return _short.repr(value)


def _readable(name: Any) -> str:
    return name if isinstance(name, str) and name.isidentifier() and len(name) < 60 else shortened(name)
