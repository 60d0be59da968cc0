"""The ``dfformer`` command. Each subcommand's work is in a module of its own, imported when it runs."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from dfformer_kernels import __version__

# Processes that read images: more than processors would be slower.
_WORKERS = min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)

_SHOWN = {
    "filters": "Stored filters, which of them the routing picks, and the filters mixed for images and classes.",
    "response": "What the filters do to an image and to the layer's own input.",
    "spectrum": "Relative log amplitude of feature maps, by depth.",
    "receptive-field": "Effective receptive fields, of several models side by side (repeat --checkpoint or --model).",
    "similarity": "CKA between the layers of a model, or of two (repeat --checkpoint or --model).",
}


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.command != "train":  # which reads its own
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.rest = rest
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return run(arguments)
    except (RuntimeError, ValueError, OSError) as error:
        print(f"dfformer {arguments.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dfformer", description="The DFFormer family of vision models.")
    parser.add_argument("--version", action="version", version=f"dfformer {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace], int], help: str, add_help: bool = True
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help, add_help=add_help)
        sub.set_defaults(run=run)
        return sub

    info = command("info", _info, "What is installed, which backends run here and why others do not, and the models.")
    info.add_argument("--img-size", type=_plane, default=(224, 224), metavar="N or HxW", help="default: 224")

    doctor = command(
        "doctor", _doctor, "Verifies every available backend against float64, forward and backward, and times it."
    )
    doctor.add_argument("--quick", action="store_true", help="small shapes only, and no torch.compile")
    doctor.add_argument("--json", type=Path, help="also write everything there, to send to somebody")

    convert = command("convert", _convert, "Converts a checkpoint (.pth) to .safetensors.")
    convert.add_argument("source", type=Path)
    convert.add_argument("target", type=Path)

    predict = command("predict", _predict, "Classifies images, or does what else the checkpoint is for.")
    predict.add_argument("inputs", nargs="+", type=Path, metavar="IMAGE", help="image files, or folders of them")
    predict.add_argument("--checkpoint", type=Path, help=".safetensors or .pth")
    predict.add_argument("--model", help="e.g. dfformer_s18; checkpoints written by dfformer say it themselves")
    predict.add_argument("--pretrained", action="store_true", help="download the authors' weights of --model")
    predict.add_argument("--classes", type=Path, help="a text file with a class name a line")
    predict.add_argument("--img-size", type=_plane, metavar="N or HxW", help="default: the model's")
    predict.add_argument("--topk", type=int, default=5)
    predict.add_argument("--batch-size", type=int, default=16)
    predict.add_argument("--workers", type=int, default=_WORKERS, help=f"processes that read images (here: {_WORKERS})")
    predict.add_argument("--device", type=_device, default="cpu")
    predict.add_argument("--json", type=Path, help="also write the result there")
    predict.add_argument(
        "--output",
        type=Path,
        default=Path("predictions"),
        help="folder for masks, boxes and pictures (default: predictions)",
    )

    show = command("show", _show, "Shows what is inside models: pictures, and the numbers as CSV.")
    shown = show.add_subparsers(dest="what", required=True, metavar="WHAT")
    for what, help in _SHOWN.items():
        sub = shown.add_parser(what, help=help, description=help)
        sub.add_argument("inputs", nargs="*", type=Path, metavar="IMAGE", help="default: scikit-learn's")
        sub.add_argument("--checkpoint", action="append", type=Path, help=".safetensors or .pth")
        sub.add_argument("--model", action="append", help="e.g. dfformer_s18, of a checkpoint or by itself")
        sub.add_argument("--pretrained", action="store_true", help="download the authors' weights of --model")
        if what in ("receptive-field", "similarity"):
            sub.add_argument("--untrained", action="store_true", help="the same model with fresh weights too")
        if what != "receptive-field":
            sub.add_argument("--layer", metavar="PATTERN", help="of names, e.g. 'stages.2.*'")
        sub.add_argument("--img-size", type=_plane, metavar="N or HxW", help="default: the model's")
        sub.add_argument("--output", type=Path, default=Path("show"), help="folder to write to (default: show)")
        sub.add_argument("--device", type=_device, default="cpu")

    export = command("export", _export, "Writes a model as a file that other programs run, and checks that file.")
    export.add_argument("output", type=Path, help="a name ending in .pt2, .onnx or .safetensors")
    export.add_argument("--checkpoint", type=Path, help=".safetensors or .pth")
    export.add_argument("--model", help="e.g. dfformer_s18; checkpoints written by dfformer say it themselves")
    export.add_argument("--pretrained", action="store_true", help="download the authors' weights of --model")
    export.add_argument("--img-size", type=_plane, metavar="N or HxW", help="of the images; default: the model's")
    export.add_argument("--format", help="pt2, onnx, safetensors or aoti (a .pt2 too); default: by output's name")
    export.add_argument(
        "--fused", action="store_true", help="pt2, aoti: keep this package's operators; loading needs dfformer_kernels"
    )
    export.add_argument("--device", type=_device, default="cpu")

    command("train", _train, "Trains a model from a recipe.", add_help=False)

    evaluate = command("eval", _evaluate, "Measures the accuracy and speed of checkpoints.")
    evaluate.add_argument("checkpoints", nargs="+", type=Path, metavar="CHECKPOINT", help=".safetensors, .pth or .pt")
    evaluate.add_argument("--root", help="folder of the data")
    evaluate.add_argument(
        "--dataset", default="", help="digits, digit_scenes, or timm's name; default: the task's folders in root"
    )
    evaluate.add_argument("--scenes", type=int, default=200, help="how many digit_scenes to make (default: 200)")
    evaluate.add_argument("--split", default="val", help="default: val")
    evaluate.add_argument("--model", help="e.g. dfformer_s18; checkpoints written by dfformer say it themselves")
    evaluate.add_argument(
        "--img-size", nargs="+", type=_plane, metavar="N or HxW", help="one or several; default: the model's"
    )
    evaluate.add_argument("--crop-pct", type=float, help="share of the image's side that is kept; default: the model's")
    evaluate.add_argument("--batch-size", type=int, default=64)
    evaluate.add_argument(
        "--workers", type=int, default=_WORKERS, help=f"processes that read images (here: {_WORKERS})"
    )
    evaluate.add_argument("--device", type=_device, default="cpu")
    evaluate.add_argument("--amp", choices=["none", "bfloat16", "float16"], default="none")
    evaluate.add_argument("--csv", type=Path, help="also write the table there")

    demo = command(
        "demo", _demo, "Trains a small CDFFormer on handwritten digits and compares the step on photographs."
    )
    demo.add_argument("--output", type=Path, default=Path("demo"), help="folder to write to (default: demo)")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--quick", action="store_true", help="less training, fewer repetitions")
    return parser


def _plane(text: str) -> tuple[int, int]:
    """``224`` or ``427x640`` as (H, W)."""
    try:
        sizes = [int(part) for part in text.lower().split("x")]
        H, W = sizes * 2 if len(sizes) == 1 else sizes
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, accepted are N or HxW") from None
    if min(H, W) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, sizes are at least 1")
    return H, W


def _device(text: str) -> str:
    from dfformer.utils.device import usable_device

    try:
        return str(usable_device(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("device: ")) from None


def _info(arguments: argparse.Namespace) -> int:
    from dfformer.cli.info import print_info

    print_info(arguments.img_size)
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from dfformer.cli.doctor import examine

    return 0 if examine(quick=arguments.quick, report=arguments.json) else 1


def _convert(arguments: argparse.Namespace) -> int:
    from dfformer.models.checkpoint import convert

    print(f"wrote {convert(arguments.source, arguments.target)} tensors to {arguments.target}")
    return 0


def _predict(arguments: argparse.Namespace) -> int:
    if arguments.topk < 1 or arguments.batch_size < 1 or arguments.workers < 0:
        raise ValueError("--topk and --batch-size: accepted are numbers from 1 up; --workers: from 0 up")
    return _of_task("prediction", [arguments.checkpoint] if arguments.checkpoint else [], arguments)


def _show(arguments: argparse.Namespace) -> int:
    from dfformer.analysis.show import show_command

    return show_command(arguments)


def _export(arguments: argparse.Namespace) -> int:
    from dfformer.export.export import export_command

    return export_command(arguments)


def _train(arguments: argparse.Namespace) -> int:
    from dfformer.train.engine import train_command

    return train_command(arguments.rest)


def _evaluate(arguments: argparse.Namespace) -> int:
    return _of_task("evaluation", arguments.checkpoints, arguments)


def _of_task(part: Literal["evaluation", "prediction"], checkpoints: list[Path], arguments: argparse.Namespace) -> int:
    """Runs the command of the task that the checkpoints are for."""
    from dfformer.models.checkpoint import read_task
    from dfformer.tasks.table import task_part

    found = {checkpoint: read_task(checkpoint) for checkpoint in checkpoints}
    if len(set(found.values())) > 1:
        listed = ", ".join(f"{checkpoint} is for {task}" for checkpoint, task in found.items())
        raise ValueError(f"checkpoints of several tasks: {listed}")
    run: Callable[[argparse.Namespace], int] = task_part(next(iter(found.values()), "classify"), part)
    return run(arguments)


def _demo(arguments: argparse.Namespace) -> int:
    from dfformer.cli.demo import run_demo

    run_demo(arguments.output, seed=arguments.seed, quick=arguments.quick)
    return 0
