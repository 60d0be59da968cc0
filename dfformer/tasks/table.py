"""The tasks, and where the parts of each are. A module is only imported when its part is needed."""

import pkgutil
from typing import Any, Literal

_TASKS: dict[str, dict[str, str]] = {
    "classify": {
        "loading": "dfformer.models.checkpoint:load_model",
        "training": "dfformer.tasks.classification:Classification",  # see `dfformer.tasks.base.Task`
        "evaluation": "dfformer.tasks.evaluate:evaluate",  # see `dfformer.tasks.evaluate.tabulate`
        "prediction": "dfformer.tasks.predict:predictor",  # see `dfformer.tasks.predict.predict_files`
    },
    "segment": {
        "loading": "dfformer.tasks.segmentation:load_segmenter",
        "training": "dfformer.tasks.segmentation:Segmentation",
        "evaluation": "dfformer.tasks.segmentation:evaluate",
        "prediction": "dfformer.tasks.segmentation:predictor",
    },
    "detect": {
        "loading": "dfformer.tasks.detection:load_detector",
        "training": "dfformer.tasks.detection:Detection",
        "evaluation": "dfformer.tasks.detection:evaluate",
        "prediction": "dfformer.tasks.detection:predictor",
    },
    "restore": {
        "loading": "dfformer.tasks.restoration:load_restorer",
        "training": "dfformer.tasks.restoration:Restoration",
        "evaluation": "dfformer.tasks.restoration:evaluate",
        "prediction": "dfformer.tasks.restoration:predictor",
    },
}


def check_task(task: str) -> None:
    """Raises ValueError for an unknown task."""
    if task not in _TASKS:
        raise ValueError(f"task: got {task!r}, accepted are {', '.join(_TASKS)}")


def task_part(task: str, part: Literal["loading", "training", "evaluation", "prediction"]) -> Any:
    """A class or function of a task."""
    check_task(task)
    return pkgutil.resolve_name(_TASKS[task][part])
