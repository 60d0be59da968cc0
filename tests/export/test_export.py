"""Exported files: what they compute, in processes that have nothing of this package, and what is refused."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import require_compiler
from paths import ROOT
from timm.data import resolve_model_data_config
from torch import Tensor, nn

import dfformer.export.export
from dfformer import (
    AFNO2D,
    VARIANTS,
    DFFormer,
    DynamicFilter,
    GlobalFilter,
    SepConv,
    load_model,
    optimize_for_inference,
)
from dfformer.cli.main import main
from dfformer.export.dft_matmul import with_dft_matmul
from dfformer.export.export import FORMATS, ExportError, export
from dfformer.models.checkpoint import save_checkpoint
from dfformer.utils.eager_baseline import eager_baseline
from dfformer_kernels.tolerance import BOUND, relative_error

MIXERS: dict[str, Callable[..., nn.Module]] = {
    "dynamic": DynamicFilter,
    "dynamic_gelu": partial(DynamicFilter, act1_layer=nn.GELU, num_filters=2),
    "global": GlobalFilter,
    "afno": AFNO2D,
    "afno_low_pass": partial(AFNO2D, hard_thresholding_fraction=0.5),
    "conv": SepConv,
}
# Even and odd sides, wide and tall ones, and the smallest.
PLANES = [(8, 8), (7, 5), (4, 9), (12, 6), (1, 2), (1, 1)]
# float32 models round some tens of times in a row, in an order that programs change
ERROR = 20 * BOUND[torch.float32]
ARGS: dict[str, Any] = {
    "depths": (1, 1), "dims": (8, 16), "strides": (4, 2), "res_scale_init_values": (None, 1.0), "img_size": 32,
    "num_classes": 3,
}  # fmt: skip
FULL = bool(os.environ.get("DFFORMER_TEST_FULL"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def tiny(mixer: str = "dynamic", img_size: tuple[int, int] = (24, 20)) -> Any:
    """Two stages, with filters large enough to matter."""
    shape: dict[str, Any] = {"depths": (1, 1), "dims": (8, 16), "strides": (2, 2), "in_chans": 1}
    model = DFFormer(
        **shape, img_size=img_size, num_classes=5, token_mixers=MIXERS[mixer], res_scale_init_values=(None, 1.0)
    )
    return spread(model)


def spread(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def filter_size(model: Any) -> tuple[int, int]:
    """The planes that the first stage's filters are stored for."""
    return model.stages[0][0].token_mixer.size


def images(batch: int, *shape: int) -> Tensor:
    return torch.randn(batch, *(shape or (1, 24, 20)))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("plane", PLANES, ids=str)
@pytest.mark.parametrize("mixer", [name for name in MIXERS if name != "conv"])
@torch.no_grad()
def test_matrix_products_are_the_transforms(mixer: str, plane: tuple[int, int]) -> None:
    """In float64 to its rounding, on spectra that are not Hermitian where the convention matters."""
    layer = spread(MIXERS[mixer](dim=8, size=plane).double())
    x = torch.randn(3, *plane, 8, dtype=torch.float64)
    assert relative_error(with_dft_matmul(layer)(x), eager_baseline(layer)(x)) < 1e-14


def test_matrices_are_made_once() -> None:
    model, x = with_dft_matmul(tiny()), images(2)
    with torch.no_grad():
        model(x)
        program = torch.export.export(model, (x,))
    shapes = sorted(tuple(constant.shape) for constant in program.constants.values())
    assert shapes == [(5, 6), (6, 5), (9, 10), (10, 9), (12, 12), (12, 12), (22, 22), (22, 22)]  # 11x9 and 6x5


# In this process


@pytest.mark.parametrize("mixer", MIXERS if FULL else ["dynamic", "global", "afno", "conv"])
@pytest.mark.parametrize("name", ["pt2", "onnx"])
def test_program(mixer: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / f"model{FORMATS[name].suffix}"
    model = tiny(mixer)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert export(model, path, (24, 20), name) < ERROR
    run = FORMATS[name].load(path)
    with torch.no_grad():
        for batch in (1, 5):
            x = images(batch)
            (y,) = torch.utils._pytree.tree_leaves(run(x))
            assert relative_error(y, model(x)) < ERROR
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert names(tmp_path) == [path.name]


@pytest.mark.parametrize(
    ("name", "fused", "img_size"), [("pt2", False, None), ("pt2", True, None), ("onnx", False, (24, 20))]
)
def test_optimised_for_inference(name: str, fused: bool, img_size: tuple[int, int] | None, tmp_path: Path) -> None:
    model, path = tiny(), tmp_path / f"model{FORMATS[name].suffix}"
    assert export(optimize_for_inference(model, img_size=img_size), path, (24, 20), name, fused=fused) < ERROR
    x = images(4)
    with torch.no_grad():
        (y,) = torch.utils._pytree.tree_leaves(FORMATS[name].load(path)(x))
        assert relative_error(y, model(x)) < ERROR
    if name == "pt2":
        targets = {str(node.target) for node in torch.export.load(path).graph.nodes}
        assert any(target.startswith("dfformer.") for target in targets) == fused


def test_image_size_of_its_own(tmp_path: Path) -> None:
    """Filters are resized once, while exporting: nothing of it is in the program."""
    model, path = tiny(img_size=(32, 32)), tmp_path / "model.pt2"
    assert export(model, path, (21, 34)) < ERROR
    shapes = {tuple(value.shape) for key, value in torch.export.load(path).state_dict.items() if "complex" in key}
    assert shapes == {(10, 9, 4, 2), (5, 5, 4, 2)}
    assert filter_size(model) == (15, 15)


def test_features(tmp_path: Path) -> None:
    import onnxruntime

    path = tmp_path / "features.onnx"
    model = spread(timm.create_model("dfformer_s18", features_only=True, out_indices=(0, 1), **ARGS))
    assert export(model, path, 32) < ERROR
    session = onnxruntime.InferenceSession(path)
    assert [output.name for output in session.get_outputs()] == [f"features_{i}" for i in range(2)]
    x = images(3, 3, 32, 32)
    with torch.no_grad():
        for actual, expected in zip(session.run(None, {"images": x.numpy()}), model(x), strict=True):
            assert relative_error(torch.from_numpy(actual), expected) < ERROR


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


@pytest.mark.parametrize("architecture", VARIANTS if FULL else ["cdfformer_s18"])
def test_variant_in_onnx(architecture: str, tmp_path: Path) -> None:
    """The registry's models: all whole ones with DFFORMER_TEST_FULL, else a block a stage of one."""
    depths = {} if FULL else {"depths": (1, 1, 1, 1)}
    model = timm.create_model(architecture, img_size=64, **depths)
    assert export(model, tmp_path / "model.onnx", 64) < 1e-4


# In a process that has nothing of this package

LOADERS = {
    "pt2": "run = torch.export.load(path).module()",
    "aoti": "run = torch._inductor.aoti_load_package(path)",
    "onnx": """session = onnxruntime.InferenceSession(path)
run = lambda x: torch.from_numpy(session.run(None, {'images': x.numpy()})[0])""",
}


def run_apart(name: str, path: Path, first: str, *inputs: Tensor) -> list[Tensor]:
    """Outputs of an exported file in a process of its own, that ran ``first`` before."""
    folder = path.parent
    np.savez(folder / "inputs.npz", *(x.numpy() for x in inputs))
    script = f"""
import os, sys
import numpy as np, torch
{first}
path = {str(path)!r}
with torch.no_grad():
    {"import onnxruntime" if name == "onnx" else "import torch._inductor"}
    {LOADERS[name].replace(chr(10), chr(10) + "    ")}
    inputs = np.load({str(folder / "inputs.npz")!r})
    np.savez({str(folder / "outputs.npz")!r}, *(run(torch.from_numpy(inputs[key])).numpy() for key in inputs.files))
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=folder, capture_output=True, text=True)
    outputs = np.load(folder / "outputs.npz")
    return [torch.from_numpy(outputs[key]) for key in outputs.files]


ABSENT = "sys.modules.update(dfformer=None, dfformer_kernels=None)"
PRESENT = f"sys.path.insert(0, {str(ROOT)!r}); import dfformer_kernels"


@pytest.mark.parametrize(
    ("name", "fused"),
    [("pt2", False), ("pt2", True), ("onnx", False), ("aoti", False), *([("aoti", True)] if FULL else [])],
)
def test_fresh_process(name: str, fused: bool, tmp_path: Path) -> None:
    if name == "aoti":
        require_compiler()
    model, path = tiny(), tmp_path / f"model{FORMATS[name].suffix}"
    export(model, path, (24, 20), name, fused=fused)
    inputs = [images(1), images(4)]
    outputs = run_apart(name, path, PRESENT if fused else ABSENT, *inputs)
    with torch.no_grad():
        assert max(relative_error(y, model(x)) for x, y in zip(inputs, outputs, strict=True)) < ERROR
    if fused:
        with pytest.raises(subprocess.CalledProcessError) as failed:
            run_apart(name, path, ABSENT, *inputs)
        assert "dfformer" in failed.value.stderr


def test_description(tmp_path: Path) -> None:
    """What a program needs to prepare images and name classes is in the file."""
    import onnxruntime

    path = tmp_path / "model.onnx"
    data = {"mean": (0.5,), "std": (0.25,), "crop_pct": 1.0, "interpolation": "bilinear"}
    model = timm.create_model("dfformer_s18", pretrained_cfg_overlay=data, **ARGS)
    export(model, path, (32, 40), architecture="dfformer_s18", model_args=ARGS, classes=["ant", "bee", "cat"])
    description = json.loads(onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map["dfformer"])
    assert description["architecture"] == "dfformer_s18"
    assert description["classes"] == ["ant", "bee", "cat"]
    assert description["model_args"]["img_size"] == [32, 40]
    assert description["data"] == {
        "input_size": [3, 32, 40], "mean": [0.5] * 3, "std": [0.25] * 3, "crop_pct": 1.0, "interpolation": "bilinear"
    }  # fmt: skip


# What is refused


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "suffix": ("model.bin", {}, r"path: got .*model.bin, accepted are names ending in .*\.onnx"),
    "format": ("model.pt2", {"format": "tflite"}, "format: got 'tflite', accepted are 'pt2', 'onnx'"),
    "other suffix": ("model.onnx", {"format": "aoti"}, "path: got .*, format aoti takes names ending in .pt2"),
    "fused onnx": ("model.onnx", {"fused": True}, "fused: is for pt2, aoti, not for onnx"),
    "nameless": ("model.safetensors", {}, "architecture: required for safetensors"),
    "small image": ("model.pt2", {"img_size": 2}, r"img_size: got \(2, 2\), which this model cannot take"),
}


@pytest.mark.parametrize(("name", "arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(name: str, arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        export(tiny(), tmp_path / name, **{"img_size": 24, **arguments})
    assert names(tmp_path) == []


REFUSED_MODELS: dict[str, tuple[Callable[[Any], nn.Module], str, str]] = {
    "bfloat16": (
        lambda model: model.bfloat16(),
        "model.onnx",
        "model: got torch.bfloat16 parameters, accepted are float32",
    ),
    "optimised in bfloat16": (
        lambda model: optimize_for_inference(model, torch.bfloat16),
        "model.pt2",
        "model: got torch.bfloat16 parameters, accepted are float32",
    ),
    "optimised weights": (
        optimize_for_inference,
        "model.safetensors",
        "model: is optimised for inference; safetensors accepts the one it was made from",
    ),
    "optimised for another size": (
        lambda model: optimize_for_inference(model, img_size=32),
        "model.pt2",
        r"img_size: got \(24, 24\), which this model cannot take: x: got a plane",
    ),
}


@pytest.mark.parametrize(("changed", "name", "message"), REFUSED_MODELS.values(), ids=REFUSED_MODELS)
def test_refused_model(changed: Callable[[Any], nn.Module], name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        export(changed(tiny()), tmp_path / name, 24, architecture="dfformer_s18")
    assert names(tmp_path) == []


def test_refused_directory(tmp_path: Path) -> None:
    (tmp_path / "model.pt2").mkdir()
    with pytest.raises(IsADirectoryError, match=r"model.pt2 is a directory"):
        export(tiny(), tmp_path / "model.pt2", 24)


def test_missing_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ModuleNotFoundError, match=r"onnx needs onnxscript.*pip install 'dfformer\[export\]'"):
        export(tiny(), tmp_path / "model.onnx", 24)


def test_file_that_computes_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is not left behind, and what was there stays."""
    path = tmp_path / "model.pt2"
    path.write_text("what was there")
    load = FORMATS["pt2"].load
    wrong = FORMATS["pt2"]._replace(load=lambda path: lambda x: 1.001 * load(path)(x))
    monkeypatch.setitem(dfformer.export.export.FORMATS, "pt2", wrong)
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
        (["--model", "dfformer_s18", "--img-size", "2", "model.onnx"], "img_size: got (2, 2)"),
        (["--model", "dfformer_s17", "model.onnx"], "dfformer_s17"),
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
