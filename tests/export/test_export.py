"""`dfformer export`: what is exported, what is refused, and the command line. test_formats.py has the files."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from export_models import ERROR, detector, images, spread, tiny
from small_models import EVERY_COMPUTATION
from timm.data import resolve_model_data_config
from torch import Tensor, nn

import dfformer
from dfformer import VARIANTS, load_model, optimize_for_inference
from dfformer.cli.main import main
from dfformer.export.export import BOUND, ExportError, export
from dfformer.export.formats import FORMATS
from dfformer.models.checkpoint import save_checkpoint
from dfformer_kernels.tolerance import relative_error

ARGS: dict[str, Any] = {
    "depths": (1, 1), "dims": (8, 16), "strides": (4, 2), "res_scale_init_values": (None, 1.0), "img_size": 32,
    "num_classes": 3,
}  # fmt: skip


def filter_size(model: Any) -> tuple[int, int]:
    """The planes that the first stage's filters are stored for."""
    return model.stages[0][0].token_mixer.size


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_image_size_of_its_own(tmp_path: Path) -> None:
    """Filters are resized once, while exporting: nothing of it is in the program."""
    model, path = tiny(img_size=(32, 32)), tmp_path / "model.pt2"
    assert export(model, path, (21, 34)) < ERROR
    shapes = {tuple(value.shape) for key, value in torch.export.load(path).state_dict.items() if "complex" in key}
    assert shapes == {(10, 9, 4, 2)}
    assert filter_size(model) == (15, 15)


@pytest.mark.filterwarnings("ignore:The tensor attribute .* was assigned")  # by the pruning
@EVERY_COMPUTATION
def test_computed_filters_at_another_image_size(compute: Callable[[nn.Module], object], tmp_path: Path) -> None:
    """Filters that are computed at each call stay as they are: the program computes and resizes them."""
    model = tiny(img_size=(32, 32))
    compute(model.stages[0][0].token_mixer)
    assert export(model, tmp_path / "model.pt2", (21, 34)) < ERROR


class Pyramid(nn.Module):
    """One layer on two planes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.mixer = dfformer.GlobalFilter(8, size=8, weight_resize=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        return self.mixer(x).square().mean((1, 2)) + self.mixer(x[:, ::2, ::2]).square().mean((1, 2))


def test_a_layer_on_two_planes_keeps_its_filters(tmp_path: Path) -> None:
    model, path, x = spread(Pyramid()), tmp_path / "model.pt2", images(2, 3, 48, 48)
    export(model, path, 48)
    assert relative_error(torch.export.load(path).module()(x), model(x)) < ERROR
    served = optimize_for_inference(model, img_size=48)
    assert [str(entry) for entry in served.left_alone] == ["mixer: it runs on 2 planes"]
    assert relative_error(served(x), model(x)) < ERROR


def test_features(tmp_path: Path) -> None:
    """Each output has a name; a description has what timm says of the data."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    path = tmp_path / "features.onnx"
    data = {"mean": (0.5,), "std": (0.25,), "crop_pct": 1.0, "interpolation": "bilinear"}
    model = timm.create_model(
        "dfformer_s18", features_only=True, out_indices=(0, 1), pretrained_cfg_overlay=data, **ARGS
    )
    export(spread(model), path, 32)
    session = onnxruntime.InferenceSession(path)
    assert [output.name for output in session.get_outputs()] == [f"features_{i}" for i in range(2)]
    description = json.loads(session.get_modelmeta().custom_metadata_map["dfformer"])
    assert description["data"] == {
        "input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.25] * 3, "crop_pct": 1.0, "interpolation": "bilinear"
    }  # fmt: skip


def test_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    model = spread(timm.create_model("dfformer_s18", **ARGS))
    export(model, path, (40, 33), architecture="dfformer_s18", model_args=ARGS, classes=["ant", "bee", "cat"])
    reloaded, classes = load_model(path)
    assert classes == ["ant", "bee", "cat"]
    assert list(resolve_model_data_config(reloaded)["input_size"]) == [3, 40, 33]
    assert filter_size(reloaded) == (10, 8)
    x = images(2, 3, 40, 33)
    with torch.no_grad():
        assert torch.equal(reloaded(x), model(x))


def test_foreign_model(tmp_path: Path) -> None:
    """A detector whose copy of the layer was swapped."""
    model, path = detector(), tmp_path / "model.pt2"
    dfformer.replace_dynamic_filters(model)
    assert export(model, path, 32) < ERROR
    assert torch.export.load(path).module()(images(3, 3, 32, 32)).keys() == {"boxes", "scores"}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", VARIANTS)
def test_variant_in_onnx(architecture: str, tmp_path: Path) -> None:
    model = timm.create_model(architecture, img_size=64)
    assert export(model, tmp_path / "model.onnx", 64) < BOUND


# What is refused


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "suffix": ("model.bin", {}, r"path: expected a name ending in .*\.onnx.*, got .*model.bin"),
    "format": ("model.pt2", {"format": "tflite"}, "format: expected one of 'pt2', 'aoti', 'onnx', .*, got 'tflite'"),
    "other suffix": ("model.onnx", {"format": "aoti"}, "path: for format aoti, expected a name ending in .pt2"),
    "fused onnx": ("model.onnx", {"fused": True}, "fused: is for pt2, aoti, not for onnx"),
    "nameless": (
        "model.safetensors",
        {},
        "architecture: for safetensors and hub, expected a model of this package, .*, got None",
    ),
    "other architecture": ("hub", {"format": "hub", "architecture": "resnet18"}, "architecture: .* got 'resnet18'"),
    "size": (
        "model.pt2",
        {"img_size": "64"},
        "img_size: expected a whole number .*, got '64'",
    ),
    "small image": ("model.pt2", {"img_size": 2}, r"img_size: expected one that this model accepts, got \(2, 2\)"),
}


def test_a_model_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model: expected a model of images, got Linear without a Conv2d"):
        export(nn.Linear(3, 3), tmp_path / "model.pt2", img_size=64)


@pytest.mark.parametrize(("name", "arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(name: str, arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        export(tiny(), tmp_path / name, **{"img_size": 24, **arguments})
    assert names(tmp_path) == []


REFUSED_MODELS: dict[str, tuple[Callable[[Any], nn.Module], str, str]] = {
    "bfloat16": (
        lambda model: model.bfloat16(),
        "model.onnx",
        "model: expected float32 parameters, got torch.bfloat16",
    ),
    "optimised in bfloat16": (
        lambda model: optimize_for_inference(model, torch.bfloat16),
        "model.pt2",
        "model: expected float32 parameters, got torch.bfloat16",
    ),
    "optimised weights": (
        optimize_for_inference,
        "model.safetensors",
        "model: is optimised for inference; for safetensors and hub, pass the one it was made from",
    ),
    "optimised for another size": (
        lambda model: optimize_for_inference(model, img_size=32),
        "model.pt2",
        r"img_size: expected one that this model accepts, got \(24, 24\): x: expected a plane",
    ),
}


@pytest.mark.parametrize(("changed", "name", "message"), REFUSED_MODELS.values(), ids=REFUSED_MODELS)
def test_refused_model(changed: Callable[[Any], nn.Module], name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        export(changed(tiny()), tmp_path / name, 24, architecture="dfformer_s18")
    assert names(tmp_path) == []


def test_refused_directory(tmp_path: Path) -> None:
    (tmp_path / "model.pt2").mkdir()
    with pytest.raises(IsADirectoryError, match=r"got the existing folder .*model.pt2"):
        export(tiny(), tmp_path / "model.pt2", 24)


def test_missing_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(RuntimeError, match=r"onnxscript.*pip install 'dfformer\[export\]'"):
        export(tiny(), tmp_path / "model.onnx", 24)


def test_file_that_computes_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is not left behind, and what was there stays."""
    path = tmp_path / "model.pt2"
    path.write_text("what was there")
    load = FORMATS["pt2"].load
    wrong = FORMATS["pt2"]._replace(load=lambda path: lambda x: 1.001 * load(path)(x))
    monkeypatch.setitem(FORMATS, "pt2", wrong)
    with pytest.raises(ExportError, match="not written, its outputs differ"):
        export(tiny(), path, (24, 20))
    assert path.read_text() == "what was there"
    assert names(tmp_path) == ["model.pt2"]


# The command line


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_checkpoint(timm.create_model("dfformer_s18", **ARGS), path, "dfformer_s18", ARGS, ["ant", "bee", "cat"])
    return path


def test_command(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "model.pt2"
    arguments = ["export", "--checkpoint", str(checkpoint), str(output)]
    assert main(arguments) == 0
    assert f"wrote {output}: " in capsys.readouterr().out
    found = {"dfformer": ""}
    torch.export.load(output, extra_files=found)
    description = json.loads(found["dfformer"])
    assert description["architecture"] == "dfformer_s18"
    assert description["data"]["input_size"] == [3, 32, 32]
    again = tmp_path / "again.safetensors"
    assert main(["export", "--checkpoint", str(checkpoint), "--img-size", "48x32", str(again)]) == 0
    assert filter_size(load_model(again)[0]) == (12, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.onnx"], "pass --checkpoint FILE or --model NAME"),
        (["--checkpoint", "absent.pth", "model.onnx"], "absent.pth does not exist"),
        (["--checkpoint", "absent.pth", "--pretrained", "model.onnx"], "--pretrained: is for --model by itself"),
        (
            ["--model", "dfformer_s18", "--img-size", "2", "model.onnx"],
            "img_size: expected one that leaves pixels at stage 0, got (2, 2)",
        ),
        (["--model", "dfformer_s17", "model.onnx"], "dfformer_s17"),
        (["--model", "resnet18", "model.safetensors"], "architecture: for safetensors and hub, expected a model of"),
    ],
)
def test_command_refuses(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["export", *arguments]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("dfformer export: ")
    assert message in printed
    assert names(tmp_path) == []
