"""``dfformer predict`` and ``dfformer eval``: run by the task that the checkpoints are for."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from dfformer.models.checkpoint import read_task
from dfformer.tasks.evaluate import tabulate
from dfformer.tasks.predict import predict_files
from dfformer.tasks.table import task_part

# Options that only one task has, and what the others do instead.
_ONLY_FOR: dict[str, tuple[tuple[str, ...], str]] = {
    "classify": (
        ("crop_pct", "model", "model_args", "classes"),
        ": others use whole images, and the model and classes of their checkpoint",
    ),
    "detect": (("min_score",), ""),
    "restore": (("self_ensemble",), ""),
}


def predict_command(arguments: argparse.Namespace) -> int:
    if not arguments.checkpoint and not (arguments.model and arguments.pretrained):
        raise ValueError("pass --checkpoint FILE, or --model NAME with --pretrained; untrained weights cannot predict")
    task = _task([arguments.checkpoint] if arguments.checkpoint else [], arguments)
    return predict_files(arguments, task_part(task, "prediction"), draws=task != "classify")


def evaluate_command(arguments: argparse.Namespace) -> int:
    task = _task(arguments.checkpoints, arguments)
    return tabulate(arguments, task_part(task, "evaluation"))


def _task(checkpoints: Sequence[Path], arguments: argparse.Namespace) -> str:
    """The task of the checkpoints; raises ValueError for several, and for given options of another task."""
    tasks = {checkpoint: read_task(checkpoint) for checkpoint in checkpoints}
    if len(set(tasks.values())) > 1:
        listed = ", ".join(f"{checkpoint} is for {task}" for checkpoint, task in tasks.items())
        raise ValueError(f"checkpoints of several tasks: {listed}")
    task = next(iter(tasks.values()), "classify")
    for owner, (names, instead) in _ONLY_FOR.items():
        values = {name: getattr(arguments, name, None) for name in names}
        given = [name for name, value in values.items() if value not in (None, {}) and value is not False]
        if given and owner != task:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise ValueError(f"{flags}: not for the task {task}, only for checkpoints of the task {owner}{instead}")
    return task
