"""The command line, run as a user would, and what it counts."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from image_files import noise
from PIL import Image

from dfformer import VARIANTS
from dfformer.cli import info
from dfformer.cli.main import main
from dfformer.models.checkpoint import read_checkpoint, save_checkpoint
from dfformer.utils.profile import profile
from dfformer_kernels import dispatch
from dfformer_kernels.backend import cpu

SMALL: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16), "img_size": 32, "num_classes": 3}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "model.safetensors"
    data = {"input_size": (3, 32, 32), "crop_pct": 1.0}
    save_checkpoint(
        timm.create_model("dfformer_s18", **SMALL), path, "dfformer_s18", SMALL, ["ant", "bee", "cat"], data
    )
    return path


@pytest.fixture
def image(tmp_path: Path) -> str:
    noise().save(tmp_path / "a.jpg")
    return str(tmp_path / "a.jpg")


@pytest.fixture
def one_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model is said to cost what the first one does: counting all of them takes ten seconds."""
    counted = profile(lambda: timm.create_model("dfformer_s18"), (64, 96))
    monkeypatch.setattr(info, "profile", lambda make_model, img_size: counted)


@pytest.mark.parametrize(("group", "commands"), [([], ("train", "demo")), (["show"], ("filters", "spectrum"))], ids=str)
def test_group_lists_its_commands(
    group: list[str], commands: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(group) == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {name} " in printed for name in commands)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "command: expected one of info, .*, got 'trian'; did you mean train?"),
        (["show", "filtrs"], "command: expected one of filters, .*, got 'filtrs'; did you mean filters?"),
        (["info", "--img-sise", "64"], "unrecognized arguments: --img-sise 64; did you mean --img-size?"),
        (["info", "model"], "unrecognized arguments: model$"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_unknown_words_are_answered_with_the_nearest(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    assert exit_.value.code == 2
    assert re.search(message.replace("?", r"\?"), capsys.readouterr().err.strip(), re.MULTILINE)


FAULTS = [(KeyboardInterrupt, 130), (MemoryError("no memory"), 2), (AssertionError("not this size"), 2)]


@pytest.mark.parametrize(("fault", "status"), FAULTS, ids=str)
def test_interruption_and_errors_have_their_exit_codes(
    fault: Any, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: Any) -> None:
        raise fault

    monkeypatch.setattr(info, "info_command", fail)
    assert main(["info"]) == status
    assert capsys.readouterr().err == (f"dfformer info: {fault}\n" if status == 2 else "")


@pytest.mark.usefixtures("one_profile")
def test_info_names_versions_backends_and_every_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--img-size", "64x96"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*VARIANTS, torch.__version__, timm.__version__, "cpu kernels"))
    assert "models at 64x96" in printed
    assert "16x24x64" in printed


def test_info_counts_no_resizing_of_filters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "VARIANTS", ["gfformer_s18"])
    _, line = info.model_table((32, 48))
    counted = profile(lambda: timm.create_model("gfformer_s18", img_size=(32, 48)), (32, 48))
    assert line.split()[2] == f"{counted.macs / 1e9:.2f}"


@pytest.mark.usefixtures("one_profile")
def test_info_says_why_a_backend_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = "the compiled core is hidden"
    hidden = dispatch.Backend("cpu", "cpu", cpu.KERNELS, lambda: [reason])
    monkeypatch.setattr(dispatch, "TABLE", (hidden, *dispatch.TABLE[1:]))
    assert main(["info", "--img-size", "32"]) == 0
    assert f"no: {reason}" in capsys.readouterr().out


@pytest.mark.parametrize("size", ["0", "12x", "axb", "1x2x3", "16385", "100000000"])
def test_bad_sizes(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["info", "--img-size", size])
    assert stopped.value.code == 2
    assert repr(size) in capsys.readouterr().err


def test_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "in.pth", tmp_path / "out.safetensors"
    torch.save({"state_dict": timm.create_model("dfformer_s18", **SMALL).state_dict()}, source)
    assert main(["convert", str(source), str(target)]) == 0
    assert f"wrote {len(read_checkpoint(target)[0])} tensors" in capsys.readouterr().out
    assert main(["convert", str(tmp_path / "absent.pth"), str(target)]) == 2
    assert "absent.pth does not exist" in capsys.readouterr().err
    assert target.stat().st_mode == source.stat().st_mode, "readable for whom other new files are"


def test_a_name_that_is_not_unicode(checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A file that is written is not followed by an error about its name."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system only has Unicode names")
    assert main(["convert", str(checkpoint), str(folder / "copy.safetensors")]) == 0
    assert main(["show", "spectrum", "--checkpoint", str(checkpoint), "--output", str(folder)]) == 0
    assert capfd.readouterr().out.count("caf\\udce9") == 4


def test_predict_is_what_the_model_says(checkpoint: Path, image: str, tmp_path: Path) -> None:
    from timm.data import create_transform, resolve_model_data_config

    from dfformer.models.checkpoint import load_model

    report = tmp_path / "new" / "out.json"
    assert main(["predict", "--checkpoint", str(checkpoint), "--json", str(report), image]) == 0
    model, classes = load_model(checkpoint)
    assert classes is not None
    with Image.open(image) as opened, torch.no_grad():
        x = create_transform(**resolve_model_data_config(model), is_training=False)(opened)
        expected = model(x[None]).softmax(-1)[0]
    [prediction] = json.loads(report.read_text())["predictions"]
    assert prediction["top"] == sorted(prediction["top"], key=lambda entry: -entry["probability"])
    probabilities = {entry["class"]: entry["probability"] for entry in prediction["top"]}
    assert [probabilities[name] for name in classes] == pytest.approx(expected.tolist(), rel=1e-5)


def test_predict_at_another_size_and_with_class_names(
    checkpoint: Path, image: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = tmp_path / "names.txt"
    names.write_text("x\ny\nz\n")
    arguments = ["predict", "--checkpoint", str(checkpoint), "--classes", str(names), image]
    assert main([*arguments, "--img-size", "48x64", "--topk", "1"]) == 0
    assert capsys.readouterr().out.split()[1] in "xyz"
    names.write_text("x\ny\n")
    assert main(arguments) == 2
    assert "--classes: got 2 names, the model has 3 classes" in capsys.readouterr().err


MISUSES = {
    "no-weights": (["--model", "dfformer_s18"], "untrained weights cannot predict"),
    "absent-checkpoint": (["--checkpoint", "absent.safetensors"], "absent.safetensors does not exist"),
    "topk-0": (["--checkpoint", "absent.safetensors", "--topk", "0"], "--topk"),
}


@pytest.mark.parametrize(("arguments", "message"), MISUSES.values(), ids=MISUSES.keys())
def test_predict_misused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", *arguments, "image.png"]) == 2
    assert message in capsys.readouterr().err


def test_a_table_replaces_no_checkpoint(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = checkpoint.read_bytes()
    assert main(["eval", "absent.safetensors", "--dataset", "digits", "--csv", str(checkpoint)]) == 2
    assert f"--csv: expected a new file or one ending in .csv, got the existing {checkpoint}" in capsys.readouterr().err
    assert checkpoint.read_bytes() == before


EMPTY = [
    ["predict", "image.png", "--checkpoint="],
    ["predict", ""],
    ["eval", "m.pth", "--root="],
    ["eval", "m.pth", "--split="],
    ["doctor", "--json", ""],
    ["convert", "", "m.safetensors"],
    ["show", "filters", ""],
    ["predict", "image.png", "--output="],
]


@pytest.mark.parametrize("argv", EMPTY, ids=" ".join)
def test_an_empty_path_or_split_is_no_folder(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    assert re.search(r"error: argument \S+: expected a (path|name), got ''", capsys.readouterr().err)


COMMANDS = [["predict", "image.png"], ["eval", "m.pth"], ["export", "m.onnx"], ["show", "filters"]]


@pytest.mark.parametrize("arguments", COMMANDS, ids=lambda arguments: arguments[0])
def test_a_device_that_is_not_there(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*arguments, "--device", "cuda:99"])
    assert "argument --device: expected one that can be used here, got 'cuda:99': " in capsys.readouterr().err


def test_predict_on_an_empty_folder(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint that is missing too is named first."""
    (tmp_path / "empty\n").mkdir()
    for weights, message in (
        (["--checkpoint", str(checkpoint)], f"no images in {tmp_path}/empty\\n"),
        (["--checkpoint", str(tmp_path / "absent.pth")], "absent.pth does not exist"),
        ([], "pass --checkpoint FILE"),
    ):
        assert main(["predict", *weights, str(tmp_path / "empty\n")]) == 2
        assert message in capsys.readouterr().err
