"""The benchmark of accuracy: its images, its models, what it writes, and that it goes on where it was interrupted."""

import csv
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import bench_accuracy
import pytest
import timm
import torch
from accuracy import dense, images
from accuracy.figures import learning_figure, sizes_figure
from accuracy.images import SCALES, SIZE, VIEWS
from accuracy.models import CHANGES, MODELS
from accuracy.training import LOOKS, Case, Result, accuracy, train
from paths import ROOT
from torch import nn

from dfformer.data.synthetic_digits import SyntheticDigits
from dfformer.models.spectral import DynamicFilter

pytestmark = pytest.mark.usefixtures("one_thread")

KEYS = [f"{view} {scale:g}" for view in VIEWS for scale in SCALES if scale != 1]
CURVE = [[1.0, 2.0, 50.0], [2.0, 4.0, 80.0]]
RESULT = Result("digits", "convformer", 0, 1000, 1.5, 4.0, 80.0, CURVE, dict.fromkeys(KEYS, 40.0))
RULES = {f"{key} {rule}": value for key in KEYS for rule, value in (("bicubic", 30.0), ("fourier", 20.0))}
OURS = replace(RESULT, model="dfformer", sizes=RULES)


@pytest.mark.parametrize("name", ["digits", "photographs"])
def test_images(name: str) -> None:
    found = images.load(name)
    assert len(found.sources) == len(found.labels)
    assert len(found.test) == len(found.test_labels)
    assert found.labels.unique().tolist() == found.test_labels.unique().tolist() == list(range(found.classes))
    batch = found.batch(torch.tensor([0, len(found.sources) - 1]), torch.Generator())
    assert batch.shape == (2, found.in_chans, SIZE, SIZE)
    assert abs(batch.mean()) < 2  # standardised
    for view, scale in itertools.product(VIEWS, SCALES):
        assert found.view(view, scale).shape[2:] == (scale * SIZE, scale * SIZE)
    assert torch.equal(found.view("finer", 1), found.view("wider", 1))


def test_views() -> None:
    """Finer: as much of the scene; wider: pixels as before."""
    test = torch.arange(16.0).expand(1, 1, 16, 16)  # the scene is in columns 4 to 11
    found = images.Images([], torch.zeros(1), test, torch.zeros(1))
    steps = {(v, s): float(found.view(v, s)[0, 0, 0].diff().median()) for v in VIEWS for s in (1, 2)}
    pixel = 8 / SIZE
    assert steps == pytest.approx({k: pixel / 2 if k == ("finer", 2) else pixel for k in steps})
    assert found.view("wider", 2).max() == 15
    assert found.view("finer", 2).max() == 11


def test_training_and_test_halves_are_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    ramp = torch.arange(600.0).expand(300, 600)
    monkeypatch.setattr(images.skimage.data, "brick", lambda: ramp.numpy())
    monkeypatch.setattr(images, "PHOTOGRAPHS", ("brick",))
    found = images._photographs()
    right = found.test[found.test_labels == 0]
    assert (found.sources[0].amax((1, 2)) < right.amin((0, 2, 3))).all()


@pytest.mark.parametrize("name", MODELS)
def test_models_take_any_size(name: str) -> None:
    model = MODELS[name](3, 5).eval()
    for scale in SCALES:
        assert model(torch.zeros(1, 3, round(scale * SIZE), round(scale * SIZE))).shape == (1, 5)
    assert 110_000 < sum(p.numel() for p in model.parameters()) < 145_000


@pytest.mark.parametrize("name", CHANGES)
def test_changes(name: str) -> None:
    mixers = []
    for build in (CHANGES[name], MODELS["dfformer"]):
        torch.manual_seed(0)
        mixers.append(next(m for m in build(1, 10).modules() if isinstance(m, DynamicFilter)))
    changed, usual = ({k: (p.shape, float(p.detach().norm())) for k, p in m.named_parameters()} for m in mixers)
    assert changed != usual


def test_accuracy() -> None:
    x = torch.eye(4)
    assert accuracy(nn.Identity(), x, torch.tensor([0, 1, 2, 0])) == 75


def test_a_seed_repeats() -> None:
    first, again, other = (train(Case("digits", "convformer", seed), brief=True) for seed in (1, 1, 2))
    assert [look[::2] for look in first.curve] == [look[::2] for look in again.curve]
    assert len(first.curve) == min(LOOKS, 2)  # two steps
    assert first.sizes == again.sizes
    assert first != replace(other, seed=1, seconds=first.seconds)


def test_dense_encoders_differ_in_their_mixers_only() -> None:
    """ConvFormer has the norms of this package's encoders, and separable convolutions for all filters."""
    shape = {"features_only": True, **dense.SHAPE}
    ours, theirs = (
        {name: tuple(p.shape) for name, p in timm.create_model(dense.MODELS[model], **shape, **more).named_parameters()}
        for model, more in (("cdfformer", {"fork_feat": True, "img_size": dense.SIDE}), ("convformer", {}))
    )
    different = {name for name in ours.keys() ^ theirs.keys() if "token_mixer" not in name}
    different |= {name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name]}
    assert different == set()
    assert not any("complex_weights" in name for name in theirs)
    assert any("complex_weights" in name for name in ours)


@pytest.mark.parametrize("name", dense.RECIPES)
def test_images_of_dense_tasks_are_made_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = dense.train(Case(name, "cdfformer", 0), brief=True)
    monkeypatch.setattr(SyntheticDigits, "__getitem__", None)
    assert dense.train(Case(name, "cdfformer", 0), brief=True).accuracy == first.accuracy


def test_planned() -> None:
    assert len(bench_accuracy.planned([], 5)) == 105
    assert bench_accuracy.planned(["digits", "dfformer"], 1) == [Case("digits", "dfformer", 0)]
    assert {c.model for c in bench_accuracy.planned(["detection"], 1)} == {"dfformer", "cdfformer", "convformer"}
    changed = bench_accuracy.planned([*CHANGES], 2)
    assert changed == [Case(bench_accuracy.CHANGED_ON, name, seed) for seed in (0, 1) for name in CHANGES]


def test_files_and_continuation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--quick", "--workers", "1", "--output", str(tmp_path)]
    bench_accuracy.main(arguments)
    assert len(capsys.readouterr().out.splitlines()) == len(bench_accuracy.QUICK)
    content = json.loads((tmp_path / "accuracy.json").read_text())
    assert [(r["images"], r["model"], r["seed"]) for r in content["rows"]] == [tuple(c) for c in bench_accuracy.QUICK]
    assert {"machine", "commit", "torch", "timm", "dirty"} <= content["machine"].keys()
    for name in ("accuracy", "accuracy_sizes"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    bench_accuracy.main(arguments)
    assert capsys.readouterr().out == ""  # nothing is left to do
    with (tmp_path / "accuracy.csv").open(newline="") as file:
        assert [row["images"] for row in csv.DictReader(file)] == ["digits", "digits", "segmentation", "detection"]


def test_summary_and_tables() -> None:
    results = [OURS, replace(OURS, seed=1, accuracy=90.0), RESULT]
    ours, theirs, dense = bench_accuracy.summary([*results, replace(RESULT, images="segmentation", sizes={})])
    assert (ours["seeds"], ours["accuracy"], ours["deviation"]) == (2, 85.0, 7.07)
    assert math.isnan(theirs["deviation"])
    text = bench_accuracy.markdown([ours, theirs, dense])
    assert "| dfformer | 2 | 85.0 ± 7.1 | 1 | 1.50 | 4 |" in text
    assert "| dfformer fourier | 80 | 20 | 20 | 20 | 20 | 20 | 20 |" in text
    assert "| convformer | 80 | 40 | 40 | 40 | 40 | 40 | 40 |" in text
    assert "| model | seeds | mIoU, % |" in text
    assert text.count("at other sizes") == 1


def test_pictures() -> None:
    results = [OURS, replace(OURS, seed=1, curve=[[1.0, 2.0, 60.0], [2.0, 6.0, 90.0]]), RESULT]
    learning: Any = learning_figure(results)
    by_epochs, by_seconds = learning.axes
    drawn = {line.get_label(): line for line in by_seconds.lines}
    assert list(drawn["dfformer"].get_xdata()) == [2, 5]
    assert list(drawn["dfformer"].get_ydata()) == [45, 15]
    assert list(by_epochs.lines[0].get_xdata()) == [1, 2]
    sizes: Any = sizes_figure(results)
    finer = {line.get_label(): line for line in sizes.axes[0].lines}
    assert list(finer["dfformer, fourier"].get_ydata()) == [20, 85, 20, 20]
    assert list(finer["convformer"].get_ydata()) == [40, 80, 40, 40]


@pytest.mark.parametrize("name", [".", "dense"])
def test_the_committed_results(name: str) -> None:
    folder = ROOT / "benchmarks/results" / name
    results = [Result(**row) for row in json.loads((folder / "accuracy.json").read_text())["rows"]]
    assert bench_accuracy.markdown(bench_accuracy.summary(results)) == (folder / "accuracy.md").read_text()
