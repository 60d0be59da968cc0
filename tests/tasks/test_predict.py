"""``dfformer predict``: no file costs another one its result, no result costs anybody a file, all failures are told."""

import io
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_files import READABLE, UNREADABLE, noise, oriented, write_all, write_flipped
from PIL import Image

from dfformer.analysis import dense_figures
from dfformer.cli.main import main
from dfformer.models.checkpoint import chosen_model, load_model
from dfformer.tasks import classification, detection, predict, results

SMALL: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16), "img_size": 32}
TASKS = ["classify", "segment", "detect"]
# The readable kinds of which pictures are drawn, which takes far longer than to predict them.
DRAWN = [name for name in READABLE if name in ("deep.png", "strip.png", "tall.png") or not name[0].isalpha()]
DRAWN += [name for name in READABLE if name.startswith(("two", "latin"))]
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning"),
]


def paths_of(entries: list[dict[str, Any]]) -> set[str]:
    return {entry["path"] for entry in entries}


@pytest.mark.parametrize("task", TASKS)
def test_every_kind_of_file(
    task: str, run: Callable[..., tuple[int, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What can be read has a prediction and its results, what cannot has an error that is told; nothing is missing."""
    images = tmp_path / "images"
    kinds = READABLE if task == "classify" else {name: READABLE[name] for name in DRAWN}
    good, bad = write_all(images, kinds), write_all(images, UNREADABLE)
    flipped = write_flipped(images / "flipped.png", "x.tif", 30 if task == "classify" else 4)
    absent = tmp_path / "absent.jpg"
    status, report = run(task, [images, absent])
    predicted, failed = paths_of(report["predictions"]), paths_of(report["errors"])
    assert status == 1
    assert predicted >= good
    assert failed >= {*bad, str(absent)}
    assert predicted | failed == good | bad | flipped | {str(absent)}
    assert not predicted & failed
    printed = capsys.readouterr()
    assert f"{len(failed)} of {len(predicted | failed)} images failed" in printed.err
    assert len([line for line in printed.err.splitlines() if line.startswith("skipped ")]) == len(failed)
    assert "two\\nlines\\x1b[31m.png" in printed.out
    if task == "segment":
        assert len(list((tmp_path / "out").iterdir())) == 2 * len(predicted)
        with Image.open(tmp_path / "out" / "strip.png") as mask:
            assert (mask.mode, mask.size) == ("P", (3000, 3))
    if task == "detect":
        assert len(list((tmp_path / "out").iterdir())) == len(predicted) + 1


def test_output_survives_any_terminal(
    run: Callable[..., tuple[int, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [os.fsdecode(b"\xe9.png"), "\u732b.png", "caf\u00e9.png"]
    write_all(tmp_path / "images", dict.fromkeys(names, READABLE["plain.png"]))
    for encoding in ("ascii", "latin-1", "utf-8"):
        screen = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
        monkeypatch.setattr(sys, "stdout", screen)
        assert run("classify", [tmp_path / "images"])[0] == 0
        assert screen.buffer.getvalue().count(b"\n") == 3


class FailsOnBlack(torch.nn.Module):
    """A model that does not take black images."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model, self.pretrained_cfg, self.num_classes = model, model.pretrained_cfg, model.num_classes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if any(image.unique().numel() <= 3 for image in x):
            raise RuntimeError("not enough memory: you tried to allocate 999 bytes")
        logits: torch.Tensor = self.model(x)
        return logits


def test_an_image_that_the_model_fails_on(
    run: Callable[..., tuple[int, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Costs the others of its batch nothing."""
    for n in range(5):
        noise(seed=n).save(tmp_path / f"{n}.png")
    Image.new("RGB", (40, 30)).save(tmp_path / "2.png")
    status, expected = run("classify", [tmp_path], "--batch-size", "4")
    assert status == 0

    def failing(*arguments: Any) -> tuple[torch.nn.Module, list[str] | None]:
        model, classes = chosen_model(*arguments)
        return FailsOnBlack(model).eval(), classes

    monkeypatch.setattr(classification, "chosen_model", failing)
    status, report = run("classify", [tmp_path], "--batch-size", "4")
    assert status == 1
    [error] = report["errors"]
    assert error["path"].endswith("2.png")
    assert error["error"] == "not enough memory: you tried to allocate 999 bytes"
    others = [p for p in expected["predictions"] if not p["path"].endswith("2.png")]
    assert [p["path"] for p in report["predictions"]] == [p["path"] for p in others]
    for mine, other in zip(report["predictions"], others, strict=True):
        assert [t["probability"] for t in mine["top"]] == pytest.approx(
            [t["probability"] for t in other["top"]], rel=1e-5
        )


@pytest.mark.parametrize("task", ["segment", "detect"])
def test_a_result_that_cannot_be_written(
    task: str, run: Callable[..., tuple[int, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = results.write_atomically

    def full(path: Path, content: Any) -> None:
        if path.name == "b.png":
            raise OSError(28, "No space left on device", str(path))
        write(path, content)

    monkeypatch.setattr(results, "write_atomically", full)
    write_all(tmp_path / "images", dict.fromkeys(("a.png", "b.png", "c.png"), READABLE["plain.png"]))
    status, report = run(task, [tmp_path / "images"])
    assert status == 1
    assert [Path(entry["path"]).name for entry in report["predictions"]] == ["a.png", "c.png"]
    [error] = report["errors"]
    assert "No space left on device" in error["error"]
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith("b") or "partial" in path.name]


def test_json_that_cannot_be_written(
    checkpoints: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Is told after the table, which is not lost with it."""
    noise().save(tmp_path / "a.png")
    (tmp_path / "file").write_text("")
    report = tmp_path / "file" / "report.json"
    arguments = ["--checkpoint", checkpoints["classify"], "--json", str(report), str(tmp_path / "a.png")]
    assert main(["predict", *arguments]) == 1
    printed = capsys.readouterr()
    assert "a.png" in printed.out
    assert "not written: " in printed.err


def test_json_is_written_before_anything_is_printed(
    checkpoints: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = tmp_path / "report.json"
    (tmp_path / "b.png").write_bytes(b"")
    noise().save(tmp_path / "a.png")

    def closed(*lines: str, file: Any = None) -> None:
        assert len(json.loads(report.read_text())["predictions"]) == 1
        raise BrokenPipeError

    monkeypatch.setattr(predict, "echo", closed)
    monkeypatch.setattr(os, "dup2", lambda *descriptors: None)  # what the command does with a closed stdout
    assert main(["predict", "--checkpoint", checkpoints["classify"], "--json", str(report), str(tmp_path)]) == 141
    assert len(json.loads(report.read_text())["errors"]) == 1


def test_an_interrupted_run_says_what_it_did_not_reach(
    run: Callable[..., tuple[int, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(4):
        noise(seed=n).save(tmp_path / f"{n}.png")
    detect, calls = detection.detect, []

    def interrupted(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return detect(*arguments)

    monkeypatch.setattr(detection, "detect", interrupted)
    status, report = run("detect", [tmp_path])
    assert status == 130
    assert [Path(entry["path"]).name for entry in report["predictions"]] == ["0.png", "1.png"]
    errors = {Path(entry["path"]).name: entry["error"] for entry in report["errors"]}
    assert errors == {"2.png": "not reached: KeyboardInterrupt", "3.png": "not reached: KeyboardInterrupt"}
    assert (tmp_path / "out" / "detections.json").exists()


# What is predicted


def test_deep_images_are_those_of_eight_bits(run: Callable[..., tuple[int, Any]], tmp_path: Path) -> None:
    grey = np.asarray(noise().convert("L"))
    deep, floats = grey.astype(np.uint16) * 257, (grey / 255).astype(np.float32)
    for name, pixels in (("8.png", grey), ("16.png", deep), ("f.tif", floats)):
        Image.fromarray(pixels).save(tmp_path / name)
    _, report = run("classify", [tmp_path], "--batch-size", "1")  # a batch rounds otherwise by position
    first, *others = [[(t["class"], t["probability"]) for t in p["top"]] for p in report["predictions"]]
    assert others == [first, first]


@pytest.mark.parametrize("task", TASKS)
def test_exif_orientations_are_told_and_applied_on_request(
    task: str, run: Callable[..., tuple[int, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for n, orientation in enumerate((1, 6, 8)):  # one of 16 bits, which are converted
        image = noise() if n != 1 else Image.fromarray(np.asarray(noise().convert("L")) * np.uint16(257))
        oriented(image, images / f"{n}.png", orientation)
    assert run(task, [images])[0] == 0
    assert "2 of 3 images have an EXIF orientation, which is not applied" in capsys.readouterr().err
    assert run(task, [images], "--exif-orientation")[0] == 0
    assert not capsys.readouterr().err
    if task == "segment":
        for n in (1, 2):
            with Image.open(tmp_path / "out" / f"{n}.png") as mask:
                assert mask.size == (30, 40)


def test_the_list_of_objects_is_what_is_drawn(
    run: Callable[..., tuple[int, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """detections.json has everything, as COCO's measures want it."""
    noise().save(tmp_path / "7.png")
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30], [30, 10, 40, 20]])
    objects = {"boxes": boxes, "labels": torch.tensor([0, 1, 1, 0]), "scores": torch.tensor([0.9, 0.8, 0.35, 0.1])}
    drawn: list[Any] = []
    picture = dense_figures.detections

    def recorded(images: Any, rows: Any, *others: Any) -> Any:
        [[shown]] = rows.values()
        drawn.append(shown["scores"].tolist())
        return picture(images, rows, *others)

    monkeypatch.setattr(dense_figures, "detections", recorded)
    monkeypatch.setattr(detection, "detect", lambda *arguments: [objects])
    for least, expected in (("0.3", [0.9, 0.35]), ("0.5", [0.9]), ("0", [0.9, 0.35, 0.1]), ("1", [])):
        _, report = run("detect", [tmp_path / "7.png"], "--min-score", least)
        listed = [entry["score"] for entry in report["predictions"][0]["top"]]
        assert listed == pytest.approx(expected)
        assert drawn.pop() == pytest.approx(expected)
        everything = json.loads((tmp_path / "out" / "detections.json").read_text())
        assert [entry["image_id"] for entry in everything] == [7] * 4


def test_arguments_of_a_model(checkpoints: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint that does not say its model is used with ``--model`` and ``--model-args``, by eval too."""
    model, _ = load_model(checkpoints["classify"])
    torch.save(model.state_dict(), tmp_path / "m.pth")
    for name in ("ant", "bee", "cat"):
        write_all(tmp_path / "data" / "val" / name, {"1.png": READABLE["plain.png"]})
    said = json.dumps({**SMALL, "num_classes": 3})
    image = str(tmp_path / "data" / "val" / "ant" / "1.png")
    evaluated = ["eval", str(tmp_path / "m.pth"), "--root", str(tmp_path / "data"), "--workers", "0"]
    for arguments in (["predict", "--checkpoint", str(tmp_path / "m.pth"), image], evaluated):
        assert main([*arguments, "--model", "dfformer_s18", "--model-args", said]) == 0
        assert main([*arguments, "--model", "dfformer_s18"]) == 2
    with pytest.raises(SystemExit):
        main(["eval", "m.pth", "--model-args", "[1]"])
    assert "--model-args: expected a JSON object of arguments by name, got '[1]'" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["eval", "m.pth"], ["predict", "--pretrained", "1.png"]], ids=["eval", "predict"])
@pytest.mark.parametrize(
    ("model", "args", "message"),
    [
        ("dfformer_s18", '{"pretrained": true}', "pretrained: use --pretrained or --checkpoint"),
        ("dfformer_s18", '{"depths": "abc"}', "depths: expected a list of 1 to 8 values, .*, got 'abc'"),
        ("dfformer_s18", '{"dimms": [8]}', "dimms: unknown name, .*; did you mean dims"),
        ("resnet18", '{"in_chans": 2.5}', "in_chans: expected a whole number .*, got 2.5"),
        ("resnet18", '{"checkpoint_path": "m.pth"}', "checkpoint_path: unknown name"),
    ],
)
def test_wrong_arguments_of_a_model(
    command: list[str], model: str, args: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--model", model, "--model-args", args]) == 2
    assert re.search(rf"--model-args\.{message}", capsys.readouterr().err)


MISUSES = {
    "model": (
        "segment",
        ["--model", "dfformer_s18"],
        "--model: not for the task segment, only for",
    ),
    "model-args": ("detect", ["--model-args", '{"depths": [1]}'], "--model-args: not for the task detect"),
    "classes": ("detect", ["--classes", "names.txt"], "--classes: not for the task detect"),
    "score": ("detect", ["--min-score", "nan"], "--min-score: expected a number from 0 to 1, got nan"),
    "score-of-masks": ("segment", ["--min-score", "0"], "--min-score: not for the task segment"),
    "pretrained": ("segment", ["--pretrained"], "--pretrained: is for --model by itself, a checkpoint brings its"),
    "self-ensemble": ("detect", ["--self-ensemble"], "--self-ensemble: not for the task detect"),
}


@pytest.mark.parametrize(("task", "arguments", "message"), MISUSES.values(), ids=MISUSES.keys())
def test_misuses(
    task: str,
    arguments: list[str],
    message: str,
    checkpoints: dict[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["predict", "--checkpoint", checkpoints[task], *arguments, "image.png"]) == 2
    assert message in capsys.readouterr().err
