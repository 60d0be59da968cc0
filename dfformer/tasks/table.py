"""The tasks, and where the parts of each are. A module is only imported when its part is needed."""

import pkgutil
from typing import Any, Literal

# Each task's module, its function that loads a checkpoint, and its class that trains, see `dfformer.tasks.base.Task`.
# Each module also has `evaluate`, for `dfformer.tasks.evaluate.tabulate`, and `predictor`, for
# `dfformer.tasks.predict.predict_files`.
_TASKS: dict[str, tuple[str, str, str]] = {
    "classify": ("classification", "load_model", "Classification"),
    "segment": ("segmentation", "load_segmenter", "Segmentation"),
    "detect": ("detection", "load_detector", "Detection"),
    "restore": ("restoration", "load_restorer", "Restoration"),
}


def check_task(task: str) -> None:
    """Raises ValueError for an unknown task."""
    if task not in _TASKS:
        raise ValueError(f"task: expected one of {', '.join(_TASKS)}, got {task!r}")


def task_part(task: str, part: Literal["loading", "training", "evaluation", "prediction"]) -> Any:
    """A class or function of a task."""
    check_task(task)
    module, loading, training = _TASKS[task]
    parts = {"loading": loading, "training": training, "evaluation": "evaluate", "prediction": "predictor"}
    return pkgutil.resolve_name(f"dfformer.tasks.{module}:{parts[part]}")
