"""Training runs in tests: started, read back and compared."""

import csv
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from paths import ROOT
from PIL import Image

from dfformer.cli.main import main
from dfformer.train import state as train_state

# A run of a second: 2 epochs of 3 steps, with everything random switched on.
TINY: dict[str, Any] = {
    "model": {
        "name": "dfformer_s18",
        "args": {"depths": [1, 1, 1, 1], "dims": [4, 4, 8, 8], "drop_path_rate": 0.3, "drop_rate": 0.1},
    },
    "data": {"img_size": 16, "workers": 0},
    "optim": {
        "global_batch": 8,
        "epochs": 2,
        "cooldown_epochs": 0,
        "warmup_epochs": 1,
        "ema_decay": 0.9,
        "clip_grad": 1.0,
    },
    "log_steps": 1,
    "save_steps": 1,
}
# Without what draws differently in each process, so that their number makes no difference.
NOTHING_RANDOM = ["--model.args.drop_path_rate=0", "--model.args.drop_rate=0", "--augment.re_prob=0"]
NOTHING_RANDOM += ["--augment.mixup=0", "--augment.cutmix=0"]


def write_images(folder: Path, counts: dict[str, int]) -> Path:
    """Images of noise whose brightness tells the class."""
    generator = np.random.default_rng(0)
    for level, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for n in range(count):
            pixels = generator.integers(80 * level, 80 * level + 60, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{n}.png")
    return folder


def write_splits(folder: Path) -> Path:
    """A folder in ImageNet's manner: 25 images to train on, 7 to validate."""
    write_images(folder / "train", {"ant": 9, "bee": 8, "cat": 8})
    write_images(folder / "val", {"ant": 3, "bee": 2, "cat": 2})
    return folder


def reference_run(folder: Path, *arguments: str) -> Path:
    """A run that nobody disturbs, on the images of `write_splits`, with all its checkpoints."""
    write_splits(folder / "images")
    (folder / "recipe.yaml").write_text(json.dumps(TINY))
    command = ["train", "--recipe", str(folder / "recipe.yaml"), "--data.root", str(folder / "images"), *arguments]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert main([*command, "--output", str(folder / "run"), "--keep", "9"]) == 0
    finally:
        torch.set_num_threads(threads)
    return folder / "run"


def history(folder: Path) -> list[dict[str, str]]:
    return _rows(folder / "epochs.csv")


def evaluated(folder: Path, *arguments: str) -> list[dict[str, str]]:
    """The rows of the table that ``dfformer eval`` writes into a folder, which is made."""
    table = folder / "tables" / "eval.csv"
    assert main(["eval", *arguments, "--workers", "0", "--csv", str(table)]) == 0
    return _rows(table)


def _rows(table: Path) -> list[dict[str, str]]:
    with table.open() as file:
        return list(csv.DictReader(file))


def steps(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "time"} for line in lines]


def assert_same_result(folder: Path, expected: Path) -> None:
    """Bit for bit: weights, averaged weights, optimizer, measures, logs."""
    assert history(folder) == history(expected)
    assert steps(folder) == steps(expected)
    for name in ("last.safetensors", "best.safetensors"):
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name
    (_, actual), (_, wanted) = (found(train_state.load_latest_state(f)) for f in (folder, expected))
    for state in (actual, wanted):
        state.pop("config")  # names the folder
    assert_same(actual, wanted, "state")


def assert_alike(folder: Path, expected: Path, names: Sequence[str], tolerance: float, **of_epochs: Any) -> None:
    """Two runs have similar numbers: of each step those called ``names``, of each epoch all."""
    for name in names:
        mine, theirs = ([step[name] for step in steps(run)] for run in (folder, expected))
        assert mine == pytest.approx(theirs, rel=tolerance), (folder, name)
    for rows in zip(history(folder), history(expected), strict=True):
        found, wanted = ({name: float(value) for name, value in row.items()} for row in rows)
        assert found == pytest.approx(wanted, **of_epochs), folder


def assert_resumes(command: list[str], folder: Path, step: int) -> None:
    """A run that resumes after ``step`` comes to the same as one that nobody disturbs."""
    expected, run = folder / "expected", folder / "run"
    assert main([*command, "--keep=9", "--output", str(expected)]) == 0
    run.mkdir()
    for name in (f"checkpoint-{step:08d}.pt", "steps.jsonl", "best.safetensors"):
        shutil.copy(expected / name, run)
    assert main([*command, "--keep=9", "--output", str(run), "--resume=true"]) == 0
    assert_same_result(run, expected)


def assert_same(actual: Any, expected: Any, where: str) -> None:
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_same(actual[key], value, f"{where}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected), where
        for i, value in enumerate(expected):
            assert_same(actual[i], value, f"{where}[{i}]")
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(actual, expected), where
    else:
        assert actual == expected, where


# What torchrun starts: imports once, then a fork for each command, which has a port of its own.
EACH = """
import importlib, json, os, sys
from dfformer.cli.main import main

for name in ("dfformer.train.engine", *sys.argv[2:]):
    importlib.import_module(name)

os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
for port, arguments in json.loads(sys.argv[1]):
    if not (child := os.fork()):
        os.environ["MASTER_PORT"] = str(port)
        status = main(arguments)
        sys.stdout.flush()
        os._exit(status)
    if os.waitpid(child, 0)[1]:
        sys.exit(f"{arguments} failed")
"""


def torchrun(processes: int, *commands: list[str], imports: Sequence[str] = ()) -> None:
    """Runs commands of dfformer one after the other, each in that many processes; ``imports`` come before the first."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    address = ["--nnodes", "1", "--nproc-per-node", str(processes), "--master-addr", "127.0.0.1"]
    launcher = [sys.executable, "-m", "torch.distributed.run", *address, "--master-port", str(free_port())]
    run = ["--no-python", sys.executable, "-c", EACH, json.dumps([(free_port(), each) for each in commands]), *imports]
    timeout = 200 * len(commands)
    done = subprocess.run([*launcher, *run], env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def found(latest: tuple[Path, dict[str, Any]] | None) -> tuple[Path, dict[str, Any]]:
    assert latest is not None
    return latest
