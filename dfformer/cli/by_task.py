"""``dfformer predict`` and ``dfformer eval``: run by the task that the checkpoints are for."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from dfformer.models.checkpoint import read_task
from dfformer.tasks.table import task_part


def predict_command(arguments: argparse.Namespace) -> int:
    return _run("prediction", [arguments.checkpoint] if arguments.checkpoint else [], arguments)


def evaluate_command(arguments: argparse.Namespace) -> int:
    return _run("evaluation", arguments.checkpoints, arguments)


def _run(part: Literal["evaluation", "prediction"], checkpoints: Sequence[Path], arguments: argparse.Namespace) -> int:
    tasks = {checkpoint: read_task(checkpoint) for checkpoint in checkpoints}
    if len(set(tasks.values())) > 1:
        listed = ", ".join(f"{checkpoint} is for {task}" for checkpoint, task in tasks.items())
        raise ValueError(f"checkpoints of several tasks: {listed}")
    task = next(iter(tasks.values()), "classify")
    if arguments.self_ensemble and task != "restore":
        raise ValueError(f"--self-ensemble: not for the task {task}, only for checkpoints of the task restore")
    status: int = task_part(task, part)(arguments)
    return status
