"""Logs of a training run: steps, epochs, a learning curve, printed lines, and the message of an interruption."""

import csv
import json
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dfformer.analysis.figures import learning_curve
from dfformer.tasks.base import Task
from dfformer.train.config import TrainConfig
from dfformer.train.state import checkpoints, weights
from dfformer.utils.io import as_csv, write_atomically
from dfformer.utils.text import printable, reason

STEPS, EPOCHS = "steps.jsonl", "epochs.csv"


class Log:
    """``steps.jsonl``, ``epochs.csv``, ``learning_curve.png``, printed lines, and events for TensorBoard if requested.

    When a run is resumed, lines logged after the step it resumes from are removed.
    """

    def __init__(self, step: int, history: list[dict[str, float]], config: TrainConfig, task: Task) -> None:
        folder = Path(config.output)
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.task = folder, task
        steps = folder / STEPS
        write_atomically(steps, "".join(f"{line}\n" for line in _up_to(step, steps)).encode())
        self.steps = steps.open("a", encoding="utf-8", buffering=1)
        write_atomically(folder / "config.json", json.dumps(asdict(config), indent=2).encode())
        if history:  # an earlier run may have been killed before it wrote the last row
            self._write_epochs(history)
        self.events: Any = None
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.events = SummaryWriter(str(folder / "tensorboard"), purge_step=step)

    def step(self, values: dict[str, float]) -> None:
        self.steps.write(json.dumps({**values, "time": round(time.time(), 3)}) + "\n")
        self._add_events(values)

    def epoch(self, history: list[dict[str, float]], seconds: float) -> None:
        self._write_epochs(history)
        self._add_events(history[-1])
        tqdm.write(f"{epoch_line(history[-1])}  ({seconds:.1f} s)", file=sys.stdout)
        sys.stdout.flush()  # also where it is a file or a pipe

    def _write_epochs(self, history: list[dict[str, float]]) -> None:
        write_atomically(self.folder / EPOCHS, as_csv(history[-1], history))
        losses, scores = [row["train_loss"] for row in history], [self.task.score(row) for row in history]
        figure = learning_curve(losses, scores, self.task.metric, "validation", self.task.unit)
        write_atomically(self.folder / "learning_curve.png", lambda file: figure.savefig(file, dpi=130))

    def _add_events(self, values: dict[str, float]) -> None:
        if self.events:
            for name, value in values.items():
                if name not in ("step", "epoch"):
                    self.events.add_scalar(name, value, values["step"])

    def close(self) -> None:
        self.steps.close()
        if self.events:
            self.events.close()


def epoch_line(row: Mapping[str, float | str]) -> str:
    """A printed line with an epoch's measures, or with those of a row of ``epochs.csv``."""
    shown = "  ".join(f"{name} {float(value):.4g}" for name, value in row.items() if name not in ("epoch", "step"))
    return f"epoch {row['epoch']}  {shown}"


def interruption(folder: Path, arguments: Sequence[str], distributed: bool) -> str:
    """The message for an interrupted run: its last epoch, the saved files, and how to resume it."""
    lines = ["training was interrupted"]
    with suppress(OSError, ValueError, TypeError, LookupError, csv.Error):  # it is absent, or no training run wrote it
        *_, last = csv.DictReader(_whole_lines(folder / EPOCHS))
        lines.append(f"last finished epoch: {printable(epoch_line(last))}")
    if not (saved := checkpoints(folder)):
        lines.append("no checkpoint was saved yet: one is written after each epoch, or every --save_steps steps")
        return "\n".join(lines)
    lines.append(f"saved: {saved[-1]}, after step {int(saved[-1].stem.split('-')[1])}")
    if written := weights(folder):
        lines.append(f"weights for use: {', '.join(map(str, written))}")
    command = shlex.join(["dfformer", "train", *arguments, "--resume=true"])
    lines.append("resume with: " + ("the same torchrun command and --resume=true" if distributed else command))
    return "\n".join(lines)


def _up_to(step: int, path: Path) -> list[str]:
    """The lines of ``steps.jsonl`` up to a step."""
    try:
        return [line for line in _whole_lines(path) if json.loads(line)["step"] <= step]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path}: has a line that no training run writes ({reason(error)})") from error


def _whole_lines(path: Path) -> list[str]:
    """The lines of a file, if it exists, without a last line that was cut off."""
    return path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
