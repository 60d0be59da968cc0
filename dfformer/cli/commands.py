"""The table of commands: their summaries, their arguments, and the functions that run them."""

import argparse
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_MAX_SIDE = 16384  # of an image, in pixels


class Argument:
    """The arguments of a call of `argparse.ArgumentParser.add_argument`."""

    def __init__(self, *flags: str, **options: Any) -> None:
        self.flags, self.options = flags, options


@dataclass(frozen=True)
class Command:
    """A command, or a group of ``commands``."""

    summary: str  # at most 54 characters: a line of the list
    run: str = ""  # module:function of the parsed arguments; the module is imported when the command runs
    arguments: tuple[Argument, ...] = ()
    commands: dict[str, "Command"] = field(default_factory=dict)
    details: str = ""  # the description in its help, instead of the summary
    extra: str = ""  # the extra whose packages it needs
    own_parser: bool = False  # it parses the rest of the command line itself


def path(text: str) -> Path:
    if not text:  # Path("") is the current folder
        raise argparse.ArgumentTypeError("expected a path, got ''")
    return Path(text)


def split(text: str) -> str:
    if not text:  # its folder would be that of all splits together
        raise argparse.ArgumentTypeError("expected a name, got ''")
    return text


def plane(text: str) -> tuple[int, int]:
    """``224`` or ``427x640`` as (H, W)."""
    try:
        sizes = [int(part) for part in text.lower().split("x")]
        H, W = sizes * 2 if len(sizes) == 1 else sizes
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected N or HxW, got {text!r}") from None
    if not 1 <= min(H, W) <= max(H, W) <= _MAX_SIDE:
        raise argparse.ArgumentTypeError(f"expected sizes from 1 to {_MAX_SIDE}, got {text!r}")
    return H, W


def device(text: str) -> str:
    from dfformer.utils.device import usable_device

    try:
        return str(usable_device(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("device: ")) from None


def model_args(text: str) -> dict[str, Any]:
    """``{"depths": [1, 1, 1, 1]}``."""
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r}: {error}") from None
    if not isinstance(arguments, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object of arguments by name, got {text!r}")
    return arguments


# The number of processes that read images: more of them than processors would be slower.
_WORKERS = min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)

_CHECKPOINT = Argument("--checkpoint", type=path, help="file with the weights, .safetensors or .pth")
_MODEL = Argument("--model", help="name of the model, e.g. dfformer_s18 (default: the checkpoint's)")
_MODEL_ARGS = Argument(
    "--model-args",
    type=model_args,
    default={},
    metavar="JSON",
    help="arguments of --model, e.g. '{\"depths\": [2, 2, 6, 2]}'",
)
_EXIF_ORIENTATION = Argument(
    "--exif-orientation", action="store_true", help="rotate and mirror images as viewers do (default: as stored)"
)
_PRETRAINED = Argument("--pretrained", action="store_true", help="download the authors' weights of --model")
_DEVICE = Argument("--device", type=device, default="cpu", help="device, e.g. cuda or cuda:1 (default: cpu)")
_WORKERS_ARGUMENT = Argument(
    "--workers", type=int, default=_WORKERS, help=f"number of processes that read images (default: {_WORKERS})"
)
_SELF_ENSEMBLE = Argument(
    "--self-ensemble", action="store_true", help="restoration: average over the eight rotations and flips"
)


def _img_size(words: str = "size of the images (default: the model's)", **options: Any) -> Argument:
    return Argument("--img-size", type=plane, metavar="N or HxW", help=words, **options)


def _output(folder: str, words: str = "folder to write to") -> Argument:
    return Argument("--output", type=path, default=Path(folder), help=f"{words} (default: {folder})")


def _batch_size(default: int) -> Argument:
    return Argument("--batch-size", type=int, default=default, help=f"number of images in a batch (default: {default})")


_SHOW = (
    Argument(
        "inputs",
        nargs="*",
        type=path,
        metavar="IMAGE",
        help="image files, or folders of them (default: scikit-learn's)",
    ),
    Argument("--checkpoint", action="append", type=path, help="file with the weights, .safetensors or .pth"),
    Argument("--model", action="append", help="name of the model, e.g. dfformer_s18, with or without a checkpoint"),
    _PRETRAINED,
    _img_size(),
    _output("show"),
    _DEVICE,
)
_LAYER = Argument("--layer", metavar="PATTERN", help="show only layers with such names, e.g. 'stages.2.*'")
_UNTRAINED = Argument("--untrained", action="store_true", help="also show the same model with fresh weights")


def _shows(summary: str, details: str, *own: Argument) -> Command:
    run = "dfformer.analysis.show:show_command"
    return Command(summary, run, (*own, *_SHOW), details=details, extra="demo")


SHOW = {
    "filters": _shows(
        "show stored filters, routing, and mixed filters",
        "Shows stored filters, the weights that the routing gives them, and the mixed filters of images and classes.",
        _LAYER,
    ),
    "response": _shows("show the filters' responses to an image", "", _LAYER),
    "spectrum": _shows("show the relative log amplitude of maps by depth", "", _LAYER),
    "receptive-field": _shows(
        "show the effective receptive fields of models",
        "Shows effective receptive fields, of several models side by side (repeat --checkpoint or --model).",
        _UNTRAINED,
    ),
    "similarity": _shows(
        "show the CKA between the layers of one model or two",
        "Shows the CKA between the layers of a model, or of two (repeat --checkpoint or --model).",
        _UNTRAINED,
        _LAYER,
    ),
}

COMMANDS = {
    "info": Command(
        "show versions, available backends and the models",
        "dfformer.cli.info:info_command",
        (_img_size("size of the images (default: 224)", default=(224, 224)),),
    ),
    "doctor": Command(
        "verify every backend against float64",
        "dfformer.cli.doctor:doctor_command",
        (
            Argument("--quick", action="store_true", help="small shapes only"),
            Argument("--json", type=path, help="also write all results to this file"),
        ),
        details="Verifies every available backend against float64, forward and backward.",
    ),
    "train": Command(
        "train a model from a recipe",
        "dfformer.train.engine:train_command",
        extra="train",
        own_parser=True,
    ),
    "eval": Command(
        "measure the accuracy and speed of checkpoints",
        "dfformer.cli.by_task:evaluate_command",
        (
            Argument("checkpoints", nargs="+", type=path, metavar="CHECKPOINT", help=".safetensors, .pth or .pt"),
            Argument("--root", type=path, help="folder of the data"),
            Argument(
                "--dataset",
                default="",
                help="digits, synthetic_digits, photographs, or timm's name (default: the task's folders in root)",
            ),
            Argument("--synthetic-images", type=int, default=200, help="number of synthetic images (default: 200)"),
            Argument("--split", type=split, default="val", help="name of the split (default: val)"),
            _EXIF_ORIENTATION,
            _MODEL,
            _MODEL_ARGS,
            _img_size("one or several sizes of the images (default: the model's)", nargs="+"),
            Argument("--crop-pct", type=float, help="share of the image's side that is kept (default: the model's)"),
            _SELF_ENSEMBLE,
            _batch_size(64),
            _WORKERS_ARGUMENT,
            _DEVICE,
            Argument(
                "--amp",
                choices=["none", "bfloat16", "float16"],
                default="none",
                help="dtype of mixed precision (default: none)",
            ),
            Argument("--csv", type=path, help="also write the table to this file"),
        ),
        extra="train",
    ),
    "predict": Command(
        "classify, segment, detect objects, or restore",
        "dfformer.cli.by_task:predict_command",
        (
            Argument("inputs", nargs="+", type=path, metavar="IMAGE", help="image files, or folders of them"),
            _EXIF_ORIENTATION,
            _CHECKPOINT,
            _MODEL,
            _MODEL_ARGS,
            _PRETRAINED,
            Argument("--classes", type=path, help="a text file with a class name per line"),
            _img_size(),
            Argument("--topk", type=int, default=5, help="for classification, number of classes shown (default: 5)"),
            Argument("--min-score", type=float, help="for detection, lowest score of drawn boxes (default: 0.3)"),
            _SELF_ENSEMBLE,
            _batch_size(16),
            _WORKERS_ARGUMENT,
            _DEVICE,
            Argument("--json", type=path, help="also write the result to this file"),
            _output("predictions", "folder for masks, boxes and restored images"),
        ),
        details="Classifies or restores images, segments them, or detects objects, depending on the checkpoint.",
        extra="train",
    ),
    "export": Command(
        "export a model to another runtime, e.g. as ONNX",
        "dfformer.export.export:export_command",
        (
            Argument("output", type=path, help="a name with the format's ending, or a new folder (hub)"),
            _CHECKPOINT,
            _MODEL,
            _PRETRAINED,
            _img_size(),
            Argument(
                "--format",
                help="pt2, aoti (a .pt2 too), onnx, openvino (.xml), executorch (.pte), coreml (.mlpackage), "
                "safetensors or hub (default: by output's name)",
            ),
            Argument(
                "--fused",
                action="store_true",
                help="pt2, aoti: keep this package's operators; loading needs dfformer_kernels",
            ),
            _DEVICE,
        ),
        details="Writes a model as a file for another runtime, and checks that file.",
        extra="export",
    ),
    "show": Command("plot and tabulate what happens inside a model", commands=SHOW),
    "convert": Command(
        "convert a checkpoint (.pth) to .safetensors",
        "dfformer.cli.convert:convert_command",
        (
            Argument("source", type=path, help="the checkpoint to read"),
            Argument("target", type=path, help="the .safetensors file to write"),
        ),
    ),
    "demo": Command(
        "train on handwritten digits, compare on photographs",
        "dfformer.cli.demo:demo_command",
        (
            _output("demo"),
            Argument("--seed", type=int, default=0, help="seed of all random numbers (default: 0)"),
            Argument("--quick", action="store_true", help="less training, fewer repetitions"),
        ),
        details="Trains a small CDFFormer on handwritten digits and compares the filter step on photographs.",
        extra="demo",
    ),
}
