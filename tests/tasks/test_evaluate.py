"""Evaluation: of several checkpoints and sizes, on folders and on the digits; and prediction with workers."""

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from train_runs import evaluated, write_images

from dfformer.cli.main import main
from dfformer.models.checkpoint import load_model, save_checkpoint

SMALL: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16), "img_size": 32}
CLASSES = ["ant", "bee", "cat"]
pytestmark = pytest.mark.usefixtures("one_thread")


def write_checkpoint(path: Path, classes: list[str], seed: int = 0, channels: int = 3) -> Path:
    torch.manual_seed(seed)
    arguments = {**SMALL, "num_classes": len(classes), "in_chans": channels}
    model = timm.create_model("dfformer_s18", **arguments)
    torch.nn.init.normal_(model.head.fc2.weight)  # decided, and not all for one class
    pixels = {"mean": (0.5,) * channels, "std": (0.25,) * channels}
    settings = {"input_size": (channels, 32, 32), "crop_pct": 0.9, **pixels}
    save_checkpoint(model, path, "dfformer_s18", arguments, classes, settings)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_images(tmp_path / "images" / "val", dict.fromkeys(CLASSES, 4))
    return tmp_path / "images"


def test_several_checkpoints_and_sizes(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each line of the table is what the model says of each image, one by one."""
    checkpoints = [str(write_checkpoint(tmp_path / f"{n}.safetensors", CLASSES, n)) for n in range(2)]
    arguments = ["--root", str(root), "--batch-size", "5", "--img-size", "32", "48x64", "--crop-pct", "0.8"]
    rows = evaluated(tmp_path, *checkpoints, *arguments)
    assert len(capsys.readouterr().out.splitlines()) == 4
    assert [(row["checkpoint"], row["height"], row["width"]) for row in rows] == [
        (checkpoint, *size) for checkpoint in checkpoints for size in (("32", "32"), ("48", "64"))
    ]
    for row in rows:
        model, _ = load_model(row["checkpoint"], img_size=(int(row["height"]), int(row["width"])))
        config = resolve_model_data_config(model) | {"crop_pct": 0.8}
        config["input_size"] = (3, int(row["height"]), int(row["width"]))
        transform = create_transform(**config)
        right, losses = 0, []
        for label, name in enumerate(CLASSES):
            for path in (root / "val" / name).iterdir():
                with Image.open(path) as image, torch.no_grad():
                    logits = model(transform(image)[None])
                right += int(logits.argmax()) == label
                losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor([label])).item())
        assert float(row["top1"]) == pytest.approx(right / 12)
        assert float(row["loss"]) == pytest.approx(np.mean(losses), rel=1e-4)
        assert float(row["top5"]) == 1
        assert (row["images"], row["crop_pct"], row["model"]) == ("12", "0.8", "dfformer_s18")
        assert float(row["images_per_second"]) > 0
    assert len({row["loss"] for row in rows}) == 4


def test_a_model_of_rgb_images_on_grey_data(tmp_path: Path) -> None:
    """Grey images are RGB images whose channels are equal."""
    digits = [str(digit) for digit in range(10)]
    rows = []
    for channels in (1, 3):
        checkpoint = write_checkpoint(tmp_path / f"{channels}.safetensors", digits, channels=channels)
        if channels == 3:  # the grey model's weights, a third for each channel
            model, _ = load_model(tmp_path / "1.safetensors")
            weights = model.state_dict()
            name = "downsample_layers.0.conv.weight"
            weights[name] = weights[name].repeat(1, 3, 1, 1) / 3
            arguments = {**SMALL, "num_classes": 10}
            data = {"input_size": (3, 32, 32), "crop_pct": 0.9, "mean": (0.5,) * 3, "std": (0.25,) * 3}
            save_checkpoint(weights, checkpoint, "dfformer_s18", arguments, digits, data)
        rows += evaluated(tmp_path, str(checkpoint), "--dataset", "digits")
    assert (rows[0]["images"], rows[0]["crop_pct"]) == ("360", "0.9"), "the model's own"
    assert float(rows[0]["top1"]) < float(rows[0]["top5"]) < 1
    assert rows[0]["top1"] == rows[1]["top1"]
    assert float(rows[0]["loss"]) == pytest.approx(float(rows[1]["loss"]), rel=1e-4)


# with the messages of prediction and of evaluation
NO_CLASSIFIERS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "four-channels": ({"in_chans": 4}, ["expected a model of images with 1 (grey) or 3 (RGB) channels"] * 2),
    "every-position": ({"global_pool": ""}, ["expected logits (B,classes), got (1, 1, 1, 3)"] * 2),
    "no-classes": ({"num_classes": 0}, ["num_classes is 0, the model has no classifier", "has 0 classes, the data 3"]),
}


@pytest.mark.parametrize(("arguments", "messages"), NO_CLASSIFIERS.values(), ids=NO_CLASSIFIERS.keys())
def test_models_that_do_not_classify_images(
    arguments: dict[str, Any], messages: list[str], root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tmp_path / "m.safetensors"
    arguments = {**SMALL, "num_classes": 3, **arguments}
    save_checkpoint(timm.create_model("dfformer_s18", **arguments), checkpoint, "dfformer_s18", arguments)
    image = str(root / "val" / "ant" / "0.png")
    commands = ["predict", "--checkpoint", str(checkpoint), image], ["eval", str(checkpoint), "--root", str(root)]
    for command, message in zip(commands, messages, strict=True):
        assert main([*command, "--workers", "0", "--batch-size", "1"]) != 0
        assert message in capsys.readouterr().err


def test_bfloat16(tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = write_checkpoint(tmp_path / "m.safetensors", CLASSES)
    assert main(["eval", str(checkpoint), "--root", str(root), "--workers", "0", "--amp", "bfloat16"]) == 0
    assert "images 12  top1 " in capsys.readouterr().out


MISUSES = {
    "no-root": ([], "root: give the folder of the data, --root FOLDER"),
    "crop": (["--root", "{root}", "--crop-pct", "0"], "--crop-pct: expected a number above 0, up to 1, got 0.0"),
    "batch": (["--root", "{root}", "--batch-size", "0"], "--batch-size"),
    "classes": (["--dataset", "digits"], "its classes are not those of the data; missing: 0, 1, 2, 3, 4"),
}


@pytest.mark.parametrize(("arguments", "message"), MISUSES.values(), ids=MISUSES.keys())
def test_misuses(
    arguments: list[str], message: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write_checkpoint(tmp_path / "m.safetensors", CLASSES)
    assert main(["eval", str(checkpoint), *(a.format(root=root) for a in arguments)]) == 2
    assert message in capsys.readouterr().err


def test_a_tar_file(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tarfile.open(tmp_path / "val.tar", "w") as tar:
        tar.add(root / "val", arcname=".")
    checkpoint = write_checkpoint(tmp_path / "m.safetensors", CLASSES)
    assert main(["eval", str(checkpoint), "--root", str(tmp_path), "--workers", "0"]) == 0
    from_tar = capsys.readouterr().out
    assert main(["eval", str(checkpoint), "--root", str(root), "--workers", "0"]) == 0
    assert from_tar.split("images_per_second")[0] == capsys.readouterr().out.split("images_per_second")[0]


def test_predicting_with_workers_is_the_same(root: Path, tmp_path: Path) -> None:
    """In the same order too, with a file in between that cannot be read."""
    (root / "val" / "bee" / "1.png").write_bytes(b"")
    checkpoint = write_checkpoint(tmp_path / "m.safetensors", CLASSES)
    reports = []
    for workers in ("0", "2"):
        report = tmp_path / f"{workers}.json"
        arguments = ["--checkpoint", str(checkpoint), "--batch-size", "3", "--json", str(report)]
        assert main(["predict", *arguments, "--workers", workers, str(root)]) == 1
        reports.append(json.loads(report.read_text()))
    assert reports[0] == reports[1]
    assert len(reports[0]["predictions"]) == 11
    assert [Path(e["path"]).name for e in reports[0]["errors"]] == ["1.png"]
