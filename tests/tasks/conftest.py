"""A checkpoint of every task that predicts, and ``dfformer predict`` on it."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from dense_models import dense_checkpoint

from dfformer.cli.main import main
from dfformer.models.checkpoint import save_checkpoint

SMALL: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16), "img_size": 32}
TASKS = ["classify", "segment", "detect"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    arguments = {**SMALL, "num_classes": 3}
    model = timm.create_model("dfformer_s18", **arguments)
    torch.nn.init.normal_(model.head.fc2.weight)  # decided, and not all for one class
    save_checkpoint(model, folder / "classify.safetensors", "dfformer_s18", arguments, ["$a_$", "b", "_c"])
    encoder = {**SMALL, "img_size": [32, 48]}
    for task in TASKS[1:]:
        dense_checkpoint(task, folder / f"{task}.safetensors", "dfformer_s18", encoder)
    return {task: str(folder / f"{task}.safetensors") for task in TASKS}


@pytest.fixture
def command(request: pytest.FixtureRequest, root: Path, tmp_path: Path) -> list[str]:
    """Training by the recipe ``TINY`` of a test's module, on its ``root``."""
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(request.module.TINY))  # which is YAML too
    return ["train", "--recipe", str(path), "--data.root", str(root)]


@pytest.fixture
def run(checkpoints: dict[str, str], tmp_path: Path) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Predicts; returns the status and the JSON. Results are in tmp_path/out."""

    def predict_them(task: str, inputs: Sequence[Path], *more: str) -> tuple[int, dict[str, Any]]:
        report = tmp_path / "report.json"
        report.unlink(missing_ok=True)
        output = [] if "--output" in more else ["--output", str(tmp_path / "out")]
        arguments = ["predict", "--checkpoint", checkpoints[task], "--workers", "0", "--json", str(report), *output]
        status = main([*arguments, *more, *map(str, inputs)])
        return status, json.loads(report.read_text()) if report.exists() else {}

    return predict_them
