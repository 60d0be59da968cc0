"""The demo, shortened: one epoch of few digits, a small photograph. The full one is run by `make demo`."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dfformer.analysis.figures import full_spectrum
from dfformer.cli import demo
from dfformer.cli.main import main
from dfformer.data import images
from dfformer.data.images import DigitImages
from dfformer.data.photographs import sklearn_photographs


@pytest.fixture
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def one_photograph() -> dict[str, Image.Image]:
        return {"china": sklearn_photographs()["china"].crop((0, 0, 128, 96))}

    class FewDigits(DigitImages):
        def __init__(self, split: str) -> None:
            super().__init__(split)
            self.images, self.labels = self.images[:192], self.labels[:192]

    monkeypatch.setattr(demo, "sklearn_photographs", one_photograph)
    monkeypatch.setattr(images, "DigitImages", FewDigits)
    monkeypatch.setattr(demo, "QUICK", demo.Effort(epochs=1, target=0.0, repetitions=1))
    return tmp_path / "demo"


def test_demo_writes_everything(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--output", str(output), "--seed", "3", "--quick"]) == 0
    report = (output / "report.html").read_text()
    figures = {path.stem for path in output.glob("*.png")}
    assert figures == {name for name in figures if f'"name": "{name}"' in report}, "every figure is in the report"
    assert len(figures) == 13
    layers = {f"stages.{layer}.token_mixer" for layer in ("2.0", "2.1", "3.0")}
    assert set(re.findall(r'"name": "(stages[^"]*)"', report)) == layers, "the sliders have every spectral layer"
    for figure in output.glob("*.png"):
        assert np.asarray(Image.open(figure).convert("L")).std() > 5, f"{figure.name} shows nothing"
    content = json.loads((output / "report.json").read_text())
    assert content["seed"] == 3
    assert all(photo["difference"] < 1e-5 and photo["fused_mib"] < photo["eager_mib"] for photo in content["photos"])
    assert main(["predict", "--checkpoint", str(output / "digits.safetensors"), str(output / "digits")]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 10


def test_memory_is_drawn_once_for_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, list[tuple[str, float, float]]] = {}
    monkeypatch.setattr(demo.figures, "comparison_bars", lambda rows, names, unit, title: drawn.setdefault(unit, rows))
    monkeypatch.setattr(demo.Output, "figure", lambda *given: None)
    comparisons = [demo.Comparison(name, 4, 6, 0.0, time, time / 2, 3.0, 1.0) for name, time in (("a", 8), ("b", 9))]
    demo.draw_comparisons(comparisons, demo.Output(tmp_path))
    assert drawn == {
        "MiB an image": [("4x6", 3.0, 1.0)],
        "ms (median)": [("a\n4x6", 8, 4.0), ("b\n4x6", 9, 4.5)],
    }


def test_demo_fails_below_its_target(
    output: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "QUICK", demo.Effort(epochs=1, target=1.01, repetitions=1))
    for _ in range(2):  # the second time over the first one's files
        assert main(["demo", "--output", str(output), "--quick"]) == 2
        assert "of the test set right, not 101 %" in capsys.readouterr().err
    assert not (output / "report.html").exists()


def test_split_is_stratified_and_disjoint() -> None:
    train, test = DigitImages("train"), DigitImages("val")
    assert (len(train), len(test)) == (1437, 360)
    train_labels, test_labels = torch.tensor(train.labels), torch.tensor(test.labels)
    shares = torch.bincount(test_labels) / torch.bincount(torch.cat([train_labels, test_labels]))
    assert ((shares - 0.2).abs() < 0.01).all()
    again = DigitImages("val")
    assert np.array_equal(test.images, again.images)


@pytest.mark.parametrize(("H", "W"), [(4, 6), (5, 7), (1, 4), (6, 1)])
def test_full_spectrum_is_the_whole_one(H: int, W: int) -> None:
    image = torch.randn(H, W, 3)
    expected = torch.fft.fftshift(torch.fft.fft2(image, dim=(0, 1)), dim=(0, 1))
    actual = torch.tensor(full_spectrum(torch.fft.rfft2(image, dim=(0, 1)), W))
    assert torch.allclose(actual, expected, atol=1e-5)
