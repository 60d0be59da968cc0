"""The ``dfformer`` command: finds the command in the table, runs it, and turns mistakes into one line each."""

import argparse
import os
import pickle
import pkgutil
import sys
from collections.abc import Sequence
from typing import Any

from dfformer.cli.commands import COMMANDS, Command
from dfformer.utils.extras import extra
from dfformer.utils.suggest import did_you_mean
from dfformer.utils.text import without_advice
from dfformer_kernels import __version__

# Exit status after writing to a closed pipe: 128 + SIGPIPE, as of programs that the signal kills.
_BROKEN_PIPE, _INTERRUPTED, _FAILED = 141, 130, 2
# Lower bounds of arguments that several commands have.
_MINIMA = {"topk": 1, "batch_size": 1, "synthetic_images": 1, "workers": 0}
# The files that several commands write, and how their names end.
_REPORTS = {"json": ".json", "csv": ".csv"}
_ALL = Command("The DFFormer family of vision models.", commands=COMMANDS)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    try:
        try:
            return _run(list(sys.argv[1:] if argv is None else argv))
        finally:
            sys.stdout.flush()  # now, so that a closed pipe raises its error inside the try
    except BrokenPipeError:  # e.g. in `dfformer info | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more at exit
        return _BROKEN_PIPE


def _run(argv: list[str]) -> int:
    prog, command, rest = _found(argv)
    if command.commands:
        parser = _group_parser(prog, command)
        parser.parse_args(rest)
        parser.print_help()
        return 0
    try:
        arguments = rest if command.own_parser else _parsed(prog, command, rest)
        with extra(command.extra):
            status: int = pkgutil.resolve_name(command.run)(arguments)
        return status
    except BrokenPipeError:
        raise
    except (RuntimeError, ValueError, OSError, MemoryError, pickle.UnpicklingError, AssertionError) as error:
        print(f"{prog}: {_message(error)}", file=sys.stderr)
        return _FAILED
    except KeyboardInterrupt:
        return _INTERRUPTED


def _found(argv: list[str]) -> tuple[str, Command, list[str]]:
    """The words of a command in the table, the command (or a group), and the remaining arguments."""
    prog, command = "dfformer", _ALL
    while command.commands and argv and not argv[0].startswith("-"):
        if argv[0] not in command.commands:
            hint = did_you_mean(argv[0], command.commands)
            message = f"command: expected one of {', '.join(command.commands)}, got {argv[0]!r}{hint}"
            _group_parser(prog, command).error(message)
        prog, command, argv = f"{prog} {argv[0]}", command.commands[argv[0]], argv[1:]
    return prog, command, argv


def _group_parser(prog: str, group: Command) -> argparse.ArgumentParser:
    """The parser of ``dfformer`` or ``dfformer show`` without a command. Its help lists the commands."""
    lines = "\n".join(f"  {name:<17}{command.summary}" for name, command in group.commands.items())
    parser = argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s COMMAND ...",
        description=group.details or group.summary,
        epilog=f"commands:\n{lines}\n\n`{prog} COMMAND --help` lists the arguments of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"dfformer {__version__}")
    return parser


def _parsed(prog: str, command: Command, argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=prog, description=command.details or command.summary, allow_abbrev=False)
    for argument in command.arguments:
        parser.add_argument(*argument.flags, **argument.options)
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [flag for argument in command.arguments for flag in argument.flags if flag.startswith("-")]
        hint = did_you_mean(unknown[0].split("=")[0], flags) if unknown[0].startswith("-") else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    arguments.what = prog.split()[-1]
    for name, least in _MINIMA.items():
        if (value := getattr(arguments, name, least)) < least:
            raise ValueError(f"--{name.replace('_', '-')}: expected a number from {least} up, got {value}")
    for name, suffix in _REPORTS.items():
        path = getattr(arguments, name, None)
        if path and path.is_file() and path.suffix.lower() != suffix:  # e.g. an image, where the name was forgotten
            raise ValueError(f"--{name}: expected a new file or one ending in {suffix}, got the existing {path}")
    if getattr(arguments, "pretrained", False) and arguments.checkpoint:
        raise ValueError("--pretrained: is for --model by itself, a checkpoint brings its weights")
    models, model_args = getattr(arguments, "model", None) or [], getattr(arguments, "model_args", {})
    if models or model_args:
        _check_models(models, model_args)
    return arguments


def _check_models(names: str | list[str], args: dict[str, Any]) -> None:
    """Checks ``--model``, given once or several times, and ``--model-args``."""
    import timm

    import dfformer  # noqa: F401 (registers the models with timm)
    from dfformer.models.description import check_model_args

    for name in [names] if isinstance(names, str) else names:
        if ":" not in name and not timm.is_model(name):  # a prefix such as hf-hub: names another source
            raise ValueError(f"--model: expected a model of timm, got {name!r}{did_you_mean(name, timm.list_models())}")
    if "pretrained" in args:
        raise ValueError("--model-args.pretrained: use --pretrained or --checkpoint instead")
    if args:
        check_model_args(names if isinstance(names, str) else None, args, "--model-args.")


def _message(error: Exception) -> str:
    """The error's message, in one line if possible, without the traceback that a data worker adds.

    It may be an AssertionError: timm's models raise it, for images of a size that they do not take for example.
    """
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    text = without_advice(str(error).strip())
    if "Original Traceback" in text:  # from a worker of a DataLoader
        text = text.splitlines()[-1].partition(": ")[2]
    return text or type(error).__name__
