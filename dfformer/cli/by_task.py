"""``dfformer predict`` and ``dfformer eval``: run by the task that the checkpoints are for."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from dfformer.models.checkpoint import read_task
from dfformer.tasks.table import task_part


def predict_command(arguments: argparse.Namespace) -> int:
    return _part("prediction", [arguments.checkpoint] if arguments.checkpoint else [])(arguments)


def evaluate_command(arguments: argparse.Namespace) -> int:
    return _part("evaluation", arguments.checkpoints)(arguments)


def _part(
    part: Literal["evaluation", "prediction"], checkpoints: Sequence[Path]
) -> Callable[[argparse.Namespace], int]:
    tasks = {checkpoint: read_task(checkpoint) for checkpoint in checkpoints}
    if len(set(tasks.values())) > 1:
        listed = ", ".join(f"{checkpoint} is for {task}" for checkpoint, task in tasks.items())
        raise ValueError(f"checkpoints of several tasks: {listed}")
    run: Callable[[argparse.Namespace], int] = task_part(next(iter(tasks.values()), "classify"), part)
    return run
