"""The state of a run: its folder is one training's, and what a checkpoint holds is looked at before it is used."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dfformer.models.checkpoint import CheckpointError
from dfformer.train.state import load_latest_state, locked, save_state

HOLD = "import sys, time, pathlib; from dfformer.train.state import locked\n"
HOLD += "with locked(pathlib.Path(sys.argv[1])):\n print('held', flush=True); time.sleep(60)"
STATE: dict[str, Any] = {"state_dict": {"a": torch.zeros(1)}, "optimizer": {}, "scaler": {}, "step": 3}
STATE |= {"loss_sum": 1.5, "history": [{"epoch": 1, "step": 3, "train_loss": 0.5}], "config": "{}"}


def test_a_second_training_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=r"output: .*run is in use by another training"), locked(folder):
            pass
        other.send_signal(signal.SIGKILL)
        other.wait()
    with locked(folder):
        with pytest.raises(ValueError, match="of this process"), locked(folder):
            pass
        time.sleep(0)
    with locked(folder):
        pass


CHANGES: dict[str, list[Any]] = {
    "state_dict": [None, [], {"a": 1}],
    "optimizer": [[], 1],
    "scaler": [None],
    "step": [-1, 1.5, "3", True, 10**30],
    "loss_sum": ["1", None, float("inf")],
    "history": [{}, [1], [{"epoch": 1}], [{"epoch": "1", "step": 1, "train_loss": 1.0}]],
    "config": [{}, "[]", "{", "[" * 10_000],
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_state_that_no_run_writes(name: str, tmp_path: Path) -> None:
    for value in CHANGES[name]:
        path = save_state(tmp_path, 3, {**STATE, name: value}, keep=1)
        with pytest.raises(CheckpointError, match=rf"{path.name}: {name}: "):
            load_latest_state(tmp_path)
    save_state(tmp_path, 3, {key: value for key, value in STATE.items() if key != name}, keep=1)
    with pytest.raises(CheckpointError, match=f"{name}: is missing"):
        load_latest_state(tmp_path)
