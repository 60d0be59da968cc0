"""The tasks models are trained for and where the parts of each are: a module is imported when its part is wanted."""

import pkgutil
from typing import Any, Literal

_TASKS: dict[str, dict[str, str]] = {
    "classify": {
        "loading": "dfformer.checkpoint:load_model",
        "training": "dfformer.train_task:Classification",  # see `dfformer.train_task.Task`
        "evaluation": "dfformer.evaluate:evaluate_command",
        "prediction": "dfformer.predict:predict_command",
    },
    "segment": {
        "loading": "dfformer.segment:load_segmenter",
        "training": "dfformer.segment:Segmentation",
        "evaluation": "dfformer.segment:evaluate_command",
        "prediction": "dfformer.segment:predict_command",
    },
    "detect": {
        "loading": "dfformer.detect:load_detector",
        "training": "dfformer.detect:Detection",
        "evaluation": "dfformer.detect:evaluate_command",
        "prediction": "dfformer.detect:predict_command",
    },
}


def check_task(task: str) -> None:
    """Raises ValueError for a task that is not there."""
    if task not in _TASKS:
        raise ValueError(f"task: got {task!r}, accepted are {', '.join(_TASKS)}")


def task_part(task: str, part: Literal["loading", "training", "evaluation", "prediction"]) -> Any:
    """A class or function of a task."""
    check_task(task)
    return pkgutil.resolve_name(_TASKS[task][part])
