"""Training runs in tests: started, read back and compared."""

import csv
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from paths import ROOT

from dfformer.models.checkpoint import read_checkpoint
from dfformer.train import state as train_state

FULL = bool(os.environ.get("DFFORMER_TEST_FULL"))  # set by `make test-full`


def history(folder: Path) -> list[dict[str, str]]:
    with (folder / "epochs.csv").open() as file:
        return list(csv.DictReader(file))


def steps(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "time"} for line in lines]


def assert_same_result(folder: Path, expected: Path) -> None:
    """Bit for bit: weights, averaged weights, optimiser, measures, logs."""
    assert history(folder) == history(expected)
    assert steps(folder) == steps(expected)
    for name in ("last.safetensors", "best.safetensors"):
        assert_same(read_checkpoint(folder / name), read_checkpoint(expected / name), name)
    (_, actual), (_, wanted) = (found(train_state.load_latest_state(f)) for f in (folder, expected))
    for state in (actual, wanted):
        state.pop("config")  # names the folder
    assert_same(actual, wanted, "state")


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


def torchrun(processes: int, arguments: list[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    address = ["--nnodes", "1", "--nproc-per-node", str(processes), "--master-addr", "127.0.0.1"]
    launcher = [sys.executable, "-m", "torch.distributed.run", *address, "--master-port", str(port)]
    done = subprocess.run(
        [*launcher, "-m", "dfformer", *arguments], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr


def found(latest: tuple[Path, dict[str, Any]] | None) -> tuple[Path, dict[str, Any]]:
    assert latest is not None
    return latest
