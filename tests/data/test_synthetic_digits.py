"""Synthetic images for segmentation and detection: masks and boxes are exact, images reproducible."""

from typing import Any

import numpy as np
import pytest

from dfformer.data import synthetic_digits
from dfformer.data.synthetic_digits import SyntheticDigits

CASES = [pytest.param(split, size, id=f"{split}-{size}") for split in ("train", "val") for size in (64, (96, 160))]


@pytest.mark.parametrize(("split", "size"), CASES)
def test_boxes_are_tight_around_what_the_mask_shows(split: str, size: int | tuple[int, int]) -> None:
    dataset = SyntheticDigits(split, size, count=20)
    H, W = dataset.size
    for n in range(len(dataset)):
        sample = dataset[n]
        assert (sample.image.mode, sample.image.size) == ("RGB", (W, H))
        assert (sample.mask.shape, sample.mask.dtype) == ((H, W), np.uint8)
        assert (sample.boxes.dtype, sample.labels.dtype) == (np.float32, np.int64)
        assert 1 <= len(sample.boxes) == len(sample.labels) <= synthetic_digits.MAX_DIGITS
        assert {*np.unique(sample.mask)} - {0} == {1 + label for label in sample.labels}
        for (left, top, right, bottom), label in zip(sample.boxes.astype(int), sample.labels, strict=True):
            inside = sample.mask[top:bottom, left:right] == 1 + label
            assert inside[0].any()
            assert inside[-1].any()
            assert inside[:, 0].any()
            assert inside[:, -1].any()
        in_boxes = np.zeros((H, W), dtype=bool)
        for left, top, right, bottom in sample.boxes.astype(int):
            in_boxes[top:bottom, left:right] = True
        assert not (sample.mask[~in_boxes]).any()


def test_images_follow_from_seed_split_and_index() -> None:
    first, again = SyntheticDigits("train", 64, 3)[2], SyntheticDigits("train", 64, 9)[2]
    for mine, theirs in zip(first, again, strict=True):
        assert np.array_equal(np.asarray(mine), np.asarray(theirs))
    others = [
        SyntheticDigits("train", 64, 3)[1],
        SyntheticDigits("val", 64, 3)[2],
        SyntheticDigits("train", 64, 3, seed=1)[2],
    ]
    for other in others:
        assert not np.array_equal(np.asarray(other.image), np.asarray(first.image))


def test_digits_hide_little_of_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """In images where no digit comes twice, the mask tells how much is seen of each."""
    areas: list[int] = []
    place = synthetic_digits._place

    def recorded(rng: Any, ink: np.ndarray, *rest: Any) -> Any:
        found = place(rng, ink, *rest)
        areas.extend([ink.sum()] if found else [])
        return found

    monkeypatch.setattr(synthetic_digits, "_place", recorded)
    dataset, shares = SyntheticDigits("train", 64, 60), []
    for n in range(len(dataset)):
        areas.clear()
        sample = dataset[n]
        if len({*sample.labels}) == len(sample.labels):
            shares += [
                (sample.mask == 1 + label).sum() / area for label, area in zip(sample.labels, areas, strict=True)
            ]
    assert min(shares) >= 1 - synthetic_digits.MAX_HIDDEN
    assert np.mean(np.array(shares) < 1) > 0.1, "some do overlap"


def test_misuses() -> None:
    with pytest.raises(ValueError, match="split: expected train or val, got 'test'"):
        SyntheticDigits("test", 64, 1)
    with pytest.raises(ValueError, match="img_size, count: expected numbers from 16 and from 1 up, got 8, 1"):
        SyntheticDigits("train", 8, 1)
    with pytest.raises(IndexError, match="index: got 3, there are 3 images"):
        SyntheticDigits("train", 64, 3)[3]
