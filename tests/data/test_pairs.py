"""Pairs of inputs and targets: what is done to a target, crops of both at one place, and what folders must have."""

import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import require
from PIL import Image

from dfformer.data.files import DatasetSpec
from dfformer.data.images import seed_everything
from dfformer.data.pairs import Degradation, RestorationTensors, open_pair_dataset
from dfformer.data.photographs import photographs

SIZE = (24, 36)  # H, W of the targets


def coordinates(scale: int) -> Image.Image:
    """Red has the row and green the column, in steps of ``scale``."""
    rows, columns = np.mgrid[0 : SIZE[0] : scale, 0 : SIZE[1] : scale]
    return Image.fromarray(np.stack([rows, columns, 0 * rows], -1).astype(np.uint8))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two targets, and inputs of half their size in another format."""
    for kind, scale, suffix in (("targets", 1, ".png"), ("inputs", 2, ".bmp")):
        folder = tmp_path / "data" / kind / "train" / "below"
        folder.mkdir(parents=True)
        for n in range(2):
            coordinates(scale).save(folder / f"{n}{suffix}")
    return tmp_path / "data"


def without_inputs(root: Path) -> None:
    shutil.rmtree(root / "inputs")


def test_crops_of_both_are_of_one_place(root: Path) -> None:
    """Mirrored the same way; another one each time."""
    dataset = open_pair_dataset(DatasetSpec("", str(root), "train"), Degradation(scale=2))
    assert dataset.check() == [False, False]
    crops = RestorationTensors(dataset, Degradation(scale=2), crop=(8, 12), repeats=30)
    assert len(crops) == 60
    seed_everything(0)
    corners = set()
    for n in range(30):
        source, target = crops[n]
        assert (source.shape, target.shape) == ((3, 4, 6), (3, 8, 12))
        near = (target[:2, ::2, ::2].int() - source[:2].int()).unique()  # mirrored, a pair has its odd pixel first
        assert set(near.tolist()) <= {0, 1}
        corners.add((int(source[0].min()), int(source[1].min()), int(source[0, 0, 0] > source[0, 1, 0])))
    assert len(corners) > 15


@pytest.mark.parametrize(("crop", "ways"), [((8, 8), 8), ((8, 12), 4)], ids=str)
def test_crops_are_mirrored_in_all_ways(crop: tuple[int, int], ways: int, root: Path) -> None:
    """Less their least values, crops of coordinates differ by nothing else."""
    dataset = open_pair_dataset(DatasetSpec("", str(root), "train"), Degradation(scale=2))
    crops = RestorationTensors(dataset, Degradation(scale=2), crop, repeats=60)
    seed_everything(0)
    targets = [crops[n][1] for n in range(120)]
    assert len({(target - target.amin((1, 2), keepdim=True)).numpy().tobytes() for target in targets}) == ways


def test_photometric_changes_come_before_the_degradation(root: Path) -> None:
    """The noise stays; the third channel, which is zero here, is exchanged with the others."""
    without_inputs(root)
    degradation = Degradation(noise=1.0)
    dataset = open_pair_dataset(DatasetSpec("", str(root), "train"), degradation)
    crops: Any = RestorationTensors(dataset, degradation, crop=(8, 12), repeats=20, photometric=True)
    seed_everything(0)
    pairs = list(crops)
    assert max(int((source.int() - target.int()).abs().max()) for source, target in pairs) <= 6
    assert {int(target.float().std((1, 2)).argmin()) for _, target in pairs} == {0, 1, 2}


def test_whole_pairs(root: Path) -> None:
    """What the scale does not divide is cut off; the noise of an image is always the same."""
    without_inputs(root)
    degradation = Degradation(scale=5, noise=9.0)
    whole: Any = RestorationTensors(open_pair_dataset(DatasetSpec("", str(root), "train"), degradation), degradation)
    (source, target), (other, _) = whole  # and no more
    again, _ = whole[0]
    assert (source.shape, target.shape) == ((3, 4, 7), (3, 20, 35))
    assert torch.equal(source, again)
    assert not torch.equal(source, other)
    assert RestorationTensors.ignored_target(target).numel() == 0


def test_degradation() -> None:
    grey = torch.full((3, 64, 64), 100, dtype=torch.uint8)
    noisy = Degradation(noise=20.0)(grey, torch.Generator().manual_seed(0)).float()
    assert (float(noisy.mean()), float(noisy.std())) == pytest.approx((100, 20), abs=0.6)
    edge = torch.zeros(3, 32, 32, dtype=torch.uint8)
    edge[:, :, 16:] = 200
    blurred = Degradation(blur=2.0)(edge)[0, 16].float()
    expected = 100 * (1 + torch.erf(torch.arange(-15.5, 16) / (2 * 2**0.5)))
    torch.testing.assert_close(blurred, expected, atol=1.5, rtol=0)
    smaller = Degradation(scale=2)(edge)
    pillow = Image.fromarray(edge.permute(1, 2, 0).numpy()).resize((16, 16), Image.Resampling.BICUBIC)
    assert np.abs(smaller.permute(1, 2, 0).numpy().astype(int) - np.asarray(pillow)).max() <= 1


def missing(root: Path) -> None:
    (root / "inputs" / "train" / "below" / "1.bmp").unlink()


def twice(root: Path) -> None:
    coordinates(2).save(root / "inputs" / "train" / "below" / "1.png")


def of_another_size(root: Path) -> None:
    coordinates(3).save(root / "inputs" / "train" / "below" / "1.bmp")


REFUSED: dict[str, tuple[Callable[[Path], object], Degradation, tuple[int, int], str]] = {
    "no-input": (missing, Degradation(scale=2), (8, 8), "has no image below/1, although there is such a target"),
    "two-inputs": (twice, Degradation(scale=2), (8, 8), r"1[.](bmp|png) and .*1[.](png|bmp): have the same name"),
    "other-size": (of_another_size, Degradation(scale=2), (8, 8), r"expected 18x12 for a target of 36x24, got 12x8"),
    "files-and-made": (lambda _: None, Degradation(noise=1.0), (8, 8), "has inputs, so restore.blur and restore.noise"),
    "small": (lambda _: None, Degradation(scale=2), (32, 8), r"expected 8x32 or larger, got 36x24"),
    "nothing-to-do": (without_inputs, Degradation(), (8, 8), "has no inputs/ folder; to generate inputs, set"),
}


@pytest.mark.parametrize(("damage", "degradation", "least", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_folders_that_are_refused(
    damage: Callable[[Path], object], degradation: Degradation, least: tuple[int, int], message: str, root: Path
) -> None:
    damage(root)
    with pytest.raises(ValueError, match=message):
        open_pair_dataset(DatasetSpec("", str(root), "train"), degradation, least).check()


def test_photographs() -> None:
    """Nine to train on and four others, none of them grey noise or empty."""
    require("skimage", find_spec("skimage") is not None, "no scikit-image: pip install 'dfformer[dense]'")
    train, val = photographs("train"), photographs("val")
    assert (len(train), len(val)) == (9, 4)
    assert not train.keys() & val.keys()
    for image in (*train.values(), *val.values()):
        assert (image.mode, min(image.size) >= 300) == ("RGB", True)
    with pytest.raises(ValueError, match="split: expected train or val, got 'test'"):
        photographs("test")
    with pytest.raises(ValueError, match="the photographs have no inputs"):
        open_pair_dataset(DatasetSpec("photographs", None, "train"), Degradation())
