"""The scenes made for segmentation and detection: their truth is exact, and they can be had again."""

from typing import Any

import numpy as np
import pytest

from dfformer.data import synthetic_digits
from dfformer.data.synthetic_digits import DigitScenes

SCENES = [pytest.param(split, size, id=f"{split}-{size}") for split in ("train", "val") for size in (64, (96, 160))]


@pytest.mark.parametrize(("split", "size"), SCENES)
def test_boxes_are_tight_around_what_the_mask_shows(split: str, size: int | tuple[int, int]) -> None:
    dataset = DigitScenes(split, size, count=20)
    H, W = dataset.size
    for n in range(len(dataset)):
        scene = dataset[n]
        assert (scene.image.mode, scene.image.size) == ("RGB", (W, H))
        assert (scene.mask.shape, scene.mask.dtype) == ((H, W), np.uint8)
        assert (scene.boxes.dtype, scene.labels.dtype) == (np.float32, np.int64)
        assert 1 <= len(scene.boxes) == len(scene.labels) <= synthetic_digits.MOST_DIGITS
        assert {*np.unique(scene.mask)} - {0} == {1 + label for label in scene.labels}
        for (left, top, right, bottom), label in zip(scene.boxes.astype(int), scene.labels, strict=True):
            inside = scene.mask[top:bottom, left:right] == 1 + label
            assert inside[0].any()
            assert inside[-1].any()
            assert inside[:, 0].any()
            assert inside[:, -1].any()
        in_boxes = np.zeros((H, W), dtype=bool)
        for left, top, right, bottom in scene.boxes.astype(int):
            in_boxes[top:bottom, left:right] = True
        assert not (scene.mask[~in_boxes]).any()


def test_scenes_follow_from_seed_split_and_index() -> None:
    first, again = DigitScenes("train", 64, 3)[2], DigitScenes("train", 64, 9)[2]
    for mine, theirs in zip(first, again, strict=True):
        assert np.array_equal(np.asarray(mine), np.asarray(theirs))
    others = [DigitScenes("train", 64, 3)[1], DigitScenes("val", 64, 3)[2], DigitScenes("train", 64, 3, seed=1)[2]]
    for other in others:
        assert not np.array_equal(np.asarray(other.image), np.asarray(first.image))


def test_digits_hide_little_of_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """In scenes where no digit comes twice, the mask tells how much is seen of each."""
    areas: list[int] = []
    place = synthetic_digits._place

    def recorded(rng: Any, ink: np.ndarray, *rest: Any) -> Any:
        found = place(rng, ink, *rest)
        areas.extend([ink.sum()] if found else [])
        return found

    monkeypatch.setattr(synthetic_digits, "_place", recorded)
    dataset, shares = DigitScenes("train", 64, 60), []
    for n in range(len(dataset)):
        areas.clear()
        scene = dataset[n]
        if len({*scene.labels}) == len(scene.labels):
            shares += [(scene.mask == 1 + label).sum() / area for label, area in zip(scene.labels, areas, strict=True)]
    assert min(shares) >= 1 - synthetic_digits.MOST_HIDDEN
    assert np.mean(np.array(shares) < 1) > 0.1, "some do overlap"


def test_misuses() -> None:
    with pytest.raises(ValueError, match="split: got 'test'"):
        DigitScenes("test", 64, 1)
    with pytest.raises(ValueError, match="img_size, count: got 8, 1"):
        DigitScenes("train", 8, 1)
    with pytest.raises(IndexError, match="index: got 3, there are 3 scenes"):
        DigitScenes("train", 64, 3)[3]
