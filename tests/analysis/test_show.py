"""``dfformer show``: figures and tables of filters, responses, spectra, receptive fields, similarity."""

import csv
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from dense_models import dense_checkpoint
from paths import ROOT
from PIL import Image
from torch import Tensor, nn

from dfformer import DFFormer
from dfformer.analysis import metrics as analysis
from dfformer.analysis import show
from dfformer.cli.main import main
from dfformer.models.checkpoint import read_checkpoint, save_checkpoint

SMALL: dict[str, Any] = {"depths": (1, 1, 2, 1), "dims": (8, 8, 16, 16), "img_size": 32, "num_classes": 3}
GREY = {"in_chans": 1, "strides": (2, 1, 1, 2)}


def small(name: str = "dfformer_s18", **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **{**SMALL, **kwargs}).eval()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "grey.safetensors"
    arguments = {**SMALL, **GREY}
    data = {"input_size": (1, 32, 32), "mean": (0.3,), "std": (0.4,), "crop_pct": 1.0}
    save_checkpoint(small("cdfformer_s18", **GREY), path, "cdfformer_s18", arguments, data=data)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of three images."""
    random = np.random.default_rng(0)
    for group in ("ant", "bee"):
        (tmp_path / "images" / group).mkdir(parents=True)
        for n in range(3):
            pixels = random.integers(0, 255, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / group / f"{n}.png")
    return tmp_path / "images"


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def column(rows: list[dict[str, str]], *names: str) -> Tensor:
    return torch.tensor([[float(row[name]) for name in names] for row in rows], dtype=torch.float64)


def run(what: str, *arguments: object) -> None:
    assert main(["show", what, *map(str, arguments)]) == 0


def assert_figures(output: Path, names: set[str]) -> None:
    assert {path.stem for path in output.glob("*.png")} == names
    for path in output.glob("*.png"):
        assert np.asarray(Image.open(path).convert("L")).std() > 5, f"{path.name} shows nothing"


def test_show_filters(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    run("filters", "--checkpoint", checkpoint, "--layer", "stages.2.0.*", "--output", output, folder)
    name = "filters.stages.2.0.token_mixer"
    assert_figures(output, {f"{name}.{part}" for part in ("basis", "routing", "mixed_images", "mixed_classes")})
    layer: Any = small("cdfformer_s18", **GREY).get_submodule("stages.2.0.token_mixer")
    H, K, F, _ = layer.complex_weights.shape
    basis = column(read(output / f"{name}.basis.csv"), "real", "imaginary").view(F, H, K, 2)
    assert torch.equal(basis.float(), layer.complex_weights.detach().permute(2, 0, 1, 3))
    rows = read(output / f"{name}.basis.csv")[: H * K]
    assert [int(row["vertical_cycles"]) for row in rows[::K]] == torch.fft.fftfreq(H, 1 / H).round().int().tolist()
    routed = read(output / f"{name}.routing_images.csv")
    assert [row["class"] for row in routed] == 3 * ["ant"] + 3 * ["bee"]
    assert column(routed, *(f"share_{f}" for f in range(F))).sum(1) == pytest.approx(1)
    classes = column(read(output / f"{name}.routing_classes.csv"), *(f"share_{f}" for f in range(F)))
    mixed = column(read(output / f"{name}.mixed_classes.csv"), "real", "imaginary").view(2, 4, H, K, 2)
    channels = [int(row["channel"]) for row in read(output / f"{name}.mixed_classes.csv")[: 4 * H * K : H * K]]
    expected = torch.einsum("gcf,fhkx->gchkx", classes.view(2, -1, F)[:, channels], basis)
    torch.testing.assert_close(mixed, expected, rtol=1e-5, atol=1e-7)


def test_show_global_filters(tmp_path: Path) -> None:
    """On the built-in photographs; there is no routing to show."""
    path = tmp_path / "gf.safetensors"
    save_checkpoint(small("gfformer_s18"), path, "gfformer_s18", SMALL, data={"input_size": (3, 32, 32)})
    for what in ("filters", "response"):
        run(what, "--checkpoint", path, "--layer", "stages.0.*", "--output", tmp_path / what)
    assert_figures(tmp_path / "filters", {"filters.stages.0.0.token_mixer.basis"})
    responses = {f"response.stages.0.0.token_mixer.{photograph}" for photograph in ("china", "flower")}
    assert_figures(tmp_path / "response", responses)


def test_show_response(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    image = folder / "ant" / "0.png"
    run("response", "--checkpoint", checkpoint, "--output", output, image, "--layer", "stages.3.*")
    assert_figures(output, {"response.stages.3.0.token_mixer.0"})
    rows = read(output / "response.stages.3.0.token_mixer.0.csv")
    side = 8
    maps = column(rows, "value").view(4, 6, side, side)
    layer: Any = small("cdfformer_s18", **GREY).get_submodule("stages.3.0.token_mixer")
    basis = torch.view_as_complex(layer.complex_weights.detach()).to(torch.complex128)
    for planes in maps:
        for f in range(4):
            expected = torch.fft.irfft2(torch.fft.rfft2(planes[0]) * basis[..., f], s=(side, side))
            torch.testing.assert_close(planes[1 + f], expected, rtol=0, atol=1e-5)


def test_images_of_the_same_name_do_not_overwrite_each_other(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    arguments = ("--checkpoint", checkpoint, "--layer", "stages.3.*", "--output")
    run("response", *arguments, tmp_path / "folder", folder)
    names = {f"response.stages.3.0.token_mixer.{name}" for name in ("ant_0", "bee_0")}
    assert_figures(tmp_path / "folder", names)
    run("response", *arguments, tmp_path / "files", folder / "ant" / "0.png", folder / "bee" / "0.png")
    assert_figures(tmp_path / "files", names)


def test_show_spectrum_of_the_built_in_digits(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("spectrum", "--checkpoint", checkpoint, "--output", tmp_path / "out", "--layer", "stages.?")
    assert_figures(tmp_path / "out", {"spectrum"})
    rows = read(tmp_path / "out" / "spectrum.csv")
    assert {row["layer"] for row in rows} == {f"stages.{i}" for i in range(4)}
    assert all(float(row["relative_log_amplitude"]) == 0 for row in rows if float(row["frequency_pi"]) == 0)
    written = [line.rsplit("/", 1)[1] for line in capsys.readouterr().out.splitlines()]
    assert written == ["spectrum.png", "spectrum.csv", "spectrum.report.html"]


def test_show_receptive_fields_side_by_side(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    run("receptive-field", "--checkpoint", checkpoint, "--untrained", "--output", output, "--img-size", "32x48", folder)
    assert_figures(output, {"receptive_field"})
    rows = read(output / "receptive_field.csv")
    fields = column(rows, "contribution").view(2, 32, 48)
    torch.testing.assert_close(fields.sum((1, 2)), torch.ones(2, dtype=torch.float64))


def test_show_similarity_of_two(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    other = tmp_path / "other.safetensors"
    other.write_bytes(checkpoint.read_bytes())
    run("similarity", "--checkpoint", checkpoint, "--checkpoint", other, "--output", output, folder)
    assert_figures(output, {"similarity"})
    rows = read(output / "similarity.csv")
    cka = column(rows, "cka").view(5, 5)
    torch.testing.assert_close(cka.diag(), torch.ones(5, dtype=torch.float64))
    assert {(row["model"], row["other_model"]) for row in rows} == {("grey.safetensors", "other.safetensors")}


def test_show_checkpoints_of_the_same_name(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    """Runs call theirs all last.safetensors."""
    other = tmp_path / "other" / checkpoint.name
    other.parent.mkdir()
    other.write_bytes(checkpoint.read_bytes())
    output = tmp_path / "out"
    run("receptive-field", "--checkpoint", checkpoint, "--checkpoint", other, "--output", output, folder)
    assert {row["model"] for row in read(output / "receptive_field.csv")} == {str(checkpoint), str(other)}


@pytest.mark.parametrize("task", ["segment", "detect"])
def test_show_the_encoder_of_a_model_for_dense_prediction(task: str, folder: Path, tmp_path: Path) -> None:
    """By itself, and beside one with fresh weights: prepared images and trained weights are what is shown."""
    arguments = {**SMALL, "img_size": [32, 48], "fork_feat": True}
    path = dense_checkpoint(task, tmp_path / "dense.safetensors", "cdfformer_s18", arguments)
    output = tmp_path / "out"
    run("filters", "--checkpoint", path, "--layer", "stages.3.*", "--output", output, folder)
    encoder = show._trained(path, None)
    assert isinstance(encoder, DFFormer)
    weights, _ = read_checkpoint(path)
    name = "stages.2.0.token_mixer.complex_weights"
    [stored] = [t for key, t in weights.items() if key.endswith(name)]
    assert torch.equal(encoder.state_dict()[name], stored)
    assert show.ShownModel("", encoder).config["input_size"] == [3, 32, 48]
    assert show.ShownModel("", encoder).config["mean"] == [0.3] * 3
    run("receptive-field", "--checkpoint", path, "--untrained", "--output", output, folder)
    assert column(read(output / "receptive_field.csv"), "contribution").numel() == 2 * 32 * 48


def test_show_an_encoder_of_maps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = dense_checkpoint("restore", tmp_path / "dense.safetensors", "dfformer_s18", {**SMALL, "img_size": [32, 48]})
    assert main(["show", "spectrum", "--checkpoint", str(path)]) == 2
    assert "expected a model of images, got an encoder of maps of 8 channels" in capsys.readouterr().err


def test_show_another_encoder_for_dense_prediction(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = dense_checkpoint("segment", tmp_path / "dense.safetensors", "convnext_atto", {})
    assert main(["show", "spectrum", "--checkpoint", str(path)]) == 2
    assert "its encoder convnext_atto is not one of dfformer's models" in capsys.readouterr().err
    assert main(["show", "spectrum", "--checkpoint", str(path), "--model", "dfformer_s18"]) == 2
    assert "says its model, got dfformer_s18" in capsys.readouterr().err


MISUSES = {
    "nothing": (["filters"], "pass --checkpoint FILE, or --model NAME"),
    "two-models": (
        ["filters", "--model", "dfformer_s18", "--model", "gfformer_s18"],
        "for filters, expected at most 1, got 2",
    ),
    "not-ours": (["spectrum", "--model", "resnet10t"], "is a ResNet and not"),
    "unknown": (["spectrum", "--model", "dfformer_s19"], "dfformer_s19"),
    "no-filters": (["filters", "--model", "dfformer_s18_afno"], "no DynamicFilter or GlobalFilter"),
    "absent": (["spectrum", "--model", "dfformer_s18", "absent.png"], "No such file or directory: 'absent.png'"),
    "both-weights": (["spectrum", "--checkpoint", "a", "--pretrained"], "--pretrained: is for --model by itself"),
    "pairs": (
        ["similarity", *["--checkpoint", "a"] * 3, *["--model", "dfformer_s18"] * 2],
        "expected one for all 3 checkpoints, or one for each, got 2",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), MISUSES.values(), ids=MISUSES.keys())
def test_show_misused(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", *arguments, "--output", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_show_without_its_libraries(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in [name for name in sys.modules if name.startswith("dfformer.analysis.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["show", "spectrum", "--model", "dfformer_s18"]) == 2
    assert "pip install 'dfformer[demo]'" in capsys.readouterr().err


def test_show_a_broken_image(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    assert main(["show", "spectrum", "--checkpoint", str(checkpoint), str(tmp_path / "broken.png")]) == 2
    assert "cannot identify image file" in (printed := capsys.readouterr().err)
    assert "broken.png" in printed


def test_the_python_of_the_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "see_inside.md").read_text(encoding="utf-8")
    scope: dict[str, Any] = {}
    exec(text.split("```python\n")[1].split("```")[0], scope)
    torch.testing.assert_close(scope["filters"], analysis.mix(scope["shares"], scope["basis"]))
    with torch.no_grad():
        shown = scope["layer"].pwconv2(scope["response"])
        torch.testing.assert_close(shown, scope["layer"](scope["x"]), rtol=1e-4, atol=1e-5)
    shapes = {"x": (8, 4, 4, 320), "basis": (4, 3, 4), "shares": (8, 4, 640), "filters": (8, 4, 3, 640)}
    shapes |= {"response": (8, 4, 4, 640), "field": (64, 64), "cka": (18, 18)}
    assert {name: tuple(scope[name].shape) for name in shapes} == shapes
    assert_figures(tmp_path, {"spectrum"})
