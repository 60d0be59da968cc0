"""Segmentation, detection and restoration in two processes: the losses and measures of one."""

import json
from pathlib import Path
from typing import Any

import pytest
from extent import FULL
from train_runs import assert_alike, torchrun

from dfformer.cli.main import main
from dfformer.data.synthetic_digits import SyntheticDigits

SMALL: dict[str, Any] = {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}
RECIPE: dict[str, Any] = {
    "model": {"name": "dfformer_s18", "args": SMALL},
    # two processes cannot share 3 validation images evenly
    "data": {"dataset": "synthetic_digits", "img_size": 64, "synthetic_images": [8, 3], "workers": 0},
    "segment": {"decoder": {"decoder_pyramid_channels": 8, "decoder_segmentation_channels": 32, "decoder_dropout": 0}},
    "detect": {"channels": 8, "anchor_scale": 2.0, "norm_groups": 2},
    "restore": {"scale": 2},
    "optim": {"lr": 1e-3, "global_batch": 4, "epochs": 1, "cooldown_epochs": 0, "warmup_epochs": 0.5, "clip_grad": 1.0},
    "log_steps": 1,
}
DENSE = ("segment", "detect")
KINDS = [*((task, "ddp") for task in (*DENSE, "restore")), *((task, "fsdp") for task in DENSE if FULL)]


def targets(folder: Path) -> Path:
    """Synthetic images as files, of which smaller ones are made."""
    for split, count in (("train", 8), ("val", 3)):
        images = SyntheticDigits(split, 64, count)
        (folder / "targets" / split).mkdir(parents=True)
        for n in range(count):
            images[n].image.save(folder / "targets" / split / f"{n}.png")
    return folder


def command(task: str, folder: Path) -> list[str]:
    recipe, settings = folder / f"{task}.yaml", RECIPE
    if task == "restore":
        settings = {**RECIPE, "data": {**RECIPE["data"], "dataset": "", "root": str(targets(folder))}}
        settings["model"] = {**RECIPE["model"], "args": {**SMALL, "strides": [2, 2, 2, 2]}}
    recipe.write_text(json.dumps({"task": task, **settings}))  # which is YAML too
    return ["train", "--recipe", str(recipe)]


@pytest.mark.usefixtures("one_thread")
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """All tasks in one test: processes take longer to start than to train."""
    commands = {task: command(task, tmp_path) for task, _ in KINDS}
    for task, arguments in commands.items():
        assert main([*arguments, "--output", str(tmp_path / task)]) == 0
    distributed = [[*commands[t], "--output", str(tmp_path / f"{t}-{k}"), "--distributed", k] for t, k in KINDS]
    torchrun(2, *distributed, imports=["segmentation_models_pytorch", "torchvision"])
    for task, kind in KINDS:
        one, two = tmp_path / task, tmp_path / f"{task}-{kind}"
        assert_alike(two, one, ("loss", "grad_norm"), 1e-4, abs=2e-3)
