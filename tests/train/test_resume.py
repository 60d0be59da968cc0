"""Runs that were interrupted, killed or damaged, and resumed."""

import itertools
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from extent import FULL
from paths import ROOT
from torch.optim import AdamW
from train_runs import assert_resumes, assert_same_result, found, history

from dfformer.cli.main import main
from dfformer.models.checkpoint import CheckpointError
from dfformer.train import state as train_state
from dfformer.train.log import interruption

pytestmark = pytest.mark.usefixtures("one_thread")


def test_another_run_is_neither_overwritten_nor_mixed_up(
    command: list[str], expected: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["--output", str(tmp_path / "run")]
    shutil.copytree(expected, tmp_path / "run")
    assert main([*command, *run]) == 2
    assert "already contains a run; pass --resume=true" in capsys.readouterr().err
    shutil.copytree(expected, tmp_path / "weights", ignore=shutil.ignore_patterns("checkpoint-*"))
    assert main([*command, "--output", str(tmp_path / "weights")]) == 2
    assert "already contains a run" in capsys.readouterr().err
    assert main([*command, *run, "--resume", "true", "--optim.lr", "0.5"]) == 2
    assert "optim.lr was 0.001, is 0.5" in capsys.readouterr().err
    assert main([*command, *run, "--resume", "true"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1
    assert said[0].startswith("this run was already complete: best top1 ")


def test_a_run_is_not_resumed_with_fewer_images(
    command: list[str], root: Path, expected: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its epochs would have other steps: one that is over would count as trained."""
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(expected / "checkpoint-00000004.pt", run)
    for path in [*(root / "train" / "ant").iterdir()][1:]:
        path.unlink()
    assert main([*command, "--output", str(run), "--resume", "true"]) == 2
    assert "another number of training images: step 4 after 1 epochs, which have 2 steps" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_a_damaged_latest_checkpoint(
    damage: str, command: list[str], expected: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(expected, run)
    latest = train_state.checkpoints(run)[-1]
    content = bytearray(latest.read_bytes())
    content[len(content) // 3] ^= 0x10
    damaged = {"truncated": content[: len(content) // 2], "flipped": content, "empty": bytearray()}
    latest.write_bytes(damaged[damage])
    assert main([*command, "--output", str(run), "--keep", "3", "--resume", "true"]) == 0
    printed = capsys.readouterr()
    assert f"skipped a damaged checkpoint: {latest}" in printed.err
    assert f"resumes from {run / 'checkpoint-00000005.pt'}" in printed.out
    assert_same_result(run, expected)


def test_a_line_of_the_log_that_no_run_writes(
    command: list[str], expected: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(expected, run)
    for line in ("3", "{}"):
        (run / "steps.jsonl").write_text(f"{line}\n")
        assert main([*command, "--output", str(run), "--resume", "true"]) == 2
        assert f"{run / 'steps.jsonl'}: has a line that no training run writes" in capsys.readouterr().err


def test_all_checkpoints_damaged(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-00000001.pt").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="none of its 1 checkpoints can be read"):
        train_state.load_latest_state(tmp_path)
    assert train_state.load_latest_state(tmp_path / "absent") is None


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_amid_an_epoch_is_exact(workers: int, command: list[str], expected: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for stopped_after in [4] if workers else [1, 2, 3, 4, 5] if FULL else [2, 3]:
        folder = run / str(stopped_after)
        folder.mkdir(parents=True)
        name = f"checkpoint-{stopped_after:08d}.pt"
        (folder / name).write_bytes((expected / name).read_bytes())
        lines = (expected / "steps.jsonl").read_text().splitlines(keepends=True)
        # what was logged after the checkpoint, the last line cut off
        (folder / "steps.jsonl").write_text("".join(lines[: stopped_after + 1])[:-7])
        (folder / "best.safetensors").write_bytes((expected / "best.safetensors").read_bytes())
        arguments = ["--output", str(folder), "--resume", "true", "--keep", "9", "--data.workers", str(workers)]
        assert main([*command, *arguments]) == 0
        assert_same_result(folder, expected)


def test_weights_are_those_of_the_checkpoint_whatever_the_optimizer(command: list[str], tmp_path: Path) -> None:
    """MADGRAD rounds them in a step of size 0, which is how torch makes an optimizer's first state."""
    assert_resumes([*command, "--optim.opt=madgrad"], tmp_path, step=5)


# Starts training with slow writing of checkpoints, so that kills land in it.
SLOW = """
import sys, time
from dfformer.cli.main import main
from dfformer.utils import io
def slowly(path, flags):
    if path.name.startswith(".checkpoint"):
        print("writing", flush=True)
        time.sleep(0.15)
    sync(path, flags)
sync, io._sync = io._sync, slowly
print("ready", flush=True)
sys.exit(main(sys.argv[1:]))
"""


def test_killed_at_random_moments(command: list[str], expected: Path, tmp_path: Path) -> None:
    """Also amid the writing of checkpoints: the result is that of a run nobody disturbed."""
    run = tmp_path / "run"
    moment = random.Random(os.environ.get("DFFORMER_TEST_SEED", "0"))
    kills, landed = (10 if FULL else 2), 0
    arguments = [*command, "--output", str(run), "--resume", "true"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    while kills:
        process = subprocess.Popen([sys.executable, "-c", SLOW, *arguments], env=environment, **streams)
        assert process.stdout is not None
        for writings, line in enumerate(process.stdout):
            # the first kill is sure to be in a writing, the others anywhere
            if "ready" in line and landed:
                time.sleep(moment.uniform(0.1, 1.5))
                break
            if "writing" in line and writings > 2:
                break
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        kills, landed = kills - 1, landed + 1
        assert list(run.glob(".checkpoint-*.partial")) or landed > 1
    assert main(arguments) == 0
    assert_same_result(run, expected)
    assert not list(run.glob(".*.partial")), "what the killed ones left half written is gone"


def _without(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda state: state.pop(name)


SPOILED: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "no-weight": (r"does not fit.*missing \(1\): norm\.bias", lambda state: state["state_dict"].pop("norm.bias")),
    "wrong-shape": (
        r"wrongly shaped \(1\): norm\.bias",
        lambda state: state["state_dict"].update({"norm.bias": torch.zeros(1)}),
    ),
    "other-filters": (
        r"wrongly shaped \(1\): stages\.0\.0\.token_mixer\.complex_weights",
        lambda state: state["state_dict"].update({"stages.0.0.token_mixer.complex_weights": torch.zeros(8, 5, 4, 2)}),
    ),
    "other-classes": (
        r"wrongly shaped \(2\): head\.fc2",
        lambda state: state["state_dict"].update({f"head.fc2.{n}": t for n, t in _classifier(5).items()}),
    ),
    "no-averages": (r"does not fit.*missing \(", _without("state_dict_ema")),
    "empty-optimizer": ("optimizer, scaler: do not fit this run: ", lambda state: state["optimizer"].clear()),
    "half-an-optimizer": (
        "optimizer, scaler: do not fit this run: ",
        lambda state: state["optimizer"]["state"].pop("norm.bias"),
    ),
    "optimizer-without-moments": (
        "optimizer, scaler: do not fit",
        lambda state: state["optimizer"]["state"]["norm.bias"].pop("exp_avg"),
    ),
    "wrong-moments": (
        "optimizer, scaler: do not fit",
        lambda state: state["optimizer"]["state"]["norm.bias"].update(exp_avg=torch.zeros(3)),
    ),
    "bad-optimizer": ("optimizer, scaler: do not fit", lambda state: state["optimizer"].update(param_groups=[1])),
}


def _classifier(classes: int) -> dict[str, torch.Tensor]:
    return torch.nn.Linear(32, classes).state_dict()


@pytest.mark.parametrize(("message", "spoil"), SPOILED.values(), ids=SPOILED.keys())
def test_a_state_that_does_not_fit(
    message: str,
    spoil: Callable[[dict[str, Any]], Any],
    command: list[str],
    expected: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its digest is right, and its settings are those of the run; nothing of it is used."""
    _, state = found(train_state.load_latest_state(expected))
    spoil(state)
    train_state.save_state(tmp_path / "run", 6, state, keep=1)
    assert main([*command, "--output", str(tmp_path / "run"), "--resume", "true"]) == 2
    told = capsys.readouterr().err
    assert re.search(message, told, re.DOTALL), told


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, although a script's background process ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_interrupted_from_the_keyboard(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says what there is and how to resume, and the command that it prints finishes the run."""
    run = tmp_path / "run"
    arguments = [*command, "--optim.epochs", "4", "--save_steps", "0", "--output", str(run)]
    step, calls = AdamW.step, itertools.count(1)

    def interrupted(self: AdamW, *more: Any, **options: Any) -> Any:
        if next(calls) == 8:  # in the third epoch
            signal.raise_signal(signal.SIGINT)
        return step(self, *more, **options)

    monkeypatch.setattr(AdamW, "step", interrupted)
    assert main(arguments) == 130
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    told = dict(line.split(": ", 1) for line in errors.splitlines() if ": " in line)
    last = history(run)[-1]
    assert told["last finished epoch"].startswith(f"epoch {last['epoch']}  train_loss {float(last['train_loss']):.4g}")
    latest = train_state.checkpoints(run)[-1]
    assert told["saved"] == f"{latest}, after step {int(latest.stem[-8:])}"
    assert told["weights for use"] == f"{run / 'last.safetensors'}, {run / 'best.safetensors'}"
    resumed = shlex.split(told["resume with"])
    assert resumed == ["dfformer", *arguments, "--resume=true"]
    assert main(resumed[1:]) == 0
    assert [row["epoch"] for row in history(run)] == ["1", "2", "3", "4"]


def test_what_an_interruption_says_of_little(tmp_path: Path) -> None:
    (tmp_path / "epochs.csv").write_text("epoch,step,train_loss\n1,3,0.5\n2,6,0.2")  # the last line was cut off
    said = interruption(tmp_path, [], distributed=False).splitlines()
    assert said[1] == "last finished epoch: epoch 1  train_loss 0.5"
    assert said[2].startswith("no checkpoint was saved yet")
    (tmp_path / "checkpoint-00000004.pt").touch()
    assert interruption(tmp_path, [], distributed=True).splitlines()[2:] == [
        f"saved: {tmp_path / 'checkpoint-00000004.pt'}, after step 4",
        "resume with: the same torchrun command and --resume=true",
    ]
    assert interruption(tmp_path / "absent", [], distributed=False).count("\n") == 1


@pytest.mark.parametrize("content", [b"a\n1\n", b"epoch,b\n1,c\n", b"epoch,b\n1\n", b"epoch\n1,2\n", b"\xff\n"])
def test_what_an_interruption_says_beside_a_foreign_table(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "epochs.csv").write_bytes(content)
    said = interruption(tmp_path, [], distributed=False).splitlines()
    assert said[1].startswith("no checkpoint was saved yet")


def test_an_interruption_prints_no_control_characters(tmp_path: Path) -> None:
    (tmp_path / "epochs.csv").write_text("epoch,a\x1b[2J\n1,2\n")
    assert interruption(tmp_path, [], distributed=False).splitlines()[1].endswith("epoch 1  a\\x1b[2J 2")
