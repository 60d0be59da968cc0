"""Images made on the fly for segmentation and detection: real handwritten digits pasted on real photographs."""

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torchvision.ops import masks_to_boxes

from dfformer.data.files import ImageDataset
from dfformer.data.images import DigitImages
from dfformer.data.photographs import sklearn_photographs

NAME = "synthetic_digits"
CLASSES = [str(digit) for digit in range(10)]
MAX_DIGITS = 4
MAX_HIDDEN = 0.1  # largest share of a digit's pixels that later digits may cover
_DIGIT_SIDES = (0.3, 0.6)  # least and most, as shares of the image's shorter side
_CROP_SIDES = (96, 192)  # least and most of a crop's shorter side, in pixels of its photograph
_TRAINING_COLUMNS = 0.7  # share of a photograph's columns, from the left; validation uses the rest
_DIMMED = 0.5  # brightness of photographs, so that light ink of any colour stands out
_INK = (140, 255)  # least and most of each channel
_TRIES = 20  # attempts to find a place for a digit


class SyntheticImage(NamedTuple):
    """An image with exact annotations.

    ``image`` is RGB; ``mask`` (H,W) uint8 has 0 for the background and 1 + digit; ``boxes`` (n,4) float32 are
    (left, top, right, bottom), tight around the visible pixels of each digit, right and bottom exclusive; ``labels``
    (n,) int64 are the digits.
    """

    image: Image.Image
    mask: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray


class SyntheticDigits(ImageDataset[SyntheticImage]):
    """``count`` images of 1 to 4 of scikit-learn's digits in light ink on dimmed crops of its two photographs.

    Size, place and ink of each digit are random; an image is a function of (seed, split, index). Training and
    validation share no digit and no part of the photographs.

    Args:
        split: train or val.
        img_size: (H, W) of the images, or one number.
    """

    def __init__(self, split: str, img_size: int | tuple[int, int], count: int, seed: int = 0) -> None:
        self.digits = DigitImages(split)
        self.size: tuple[int, int] = (img_size, img_size) if isinstance(img_size, int) else (img_size[0], img_size[1])
        if min(self.size) < 16 or count < 1:
            raise ValueError(f"img_size, count: expected numbers from 16 and from 1 up, got {img_size}, {count}")
        self.images, self.split, self.seed = range(count), split, seed

    def __getitem__(self, index: int) -> SyntheticImage:
        if not 0 <= index < len(self):
            raise IndexError(f"index: got {index}, there are {len(self)} images")
        rng = np.random.default_rng([self.seed, self.split == "train", index])
        pixels = _DIMMED * np.asarray(self._background(rng), dtype=np.float32)
        owner = np.zeros(self.size, dtype=np.uint8)  # 1 + number of the digit visible at a pixel
        areas: list[int] = []
        labels: list[int] = []
        for _ in range(rng.integers(1, MAX_DIGITS + 1)):
            coverage, label = self._digit(rng)
            place = _place(rng, coverage >= 0.5, owner, areas)
            if place is None:
                continue
            ink = rng.uniform(*_INK, 3).astype(np.float32)
            pixels[place] += coverage[..., None] * (ink - pixels[place])
            areas.append(int((coverage >= 0.5).sum()))
            labels.append(label)
            owner[place][coverage >= 0.5] = len(areas)
        classes = np.array([0, *(1 + label for label in labels)], dtype=np.uint8)
        boxes = masks_to_boxes(torch.from_numpy(owner == 1 + np.arange(len(areas))[:, None, None])).numpy()
        boxes[:, 2:] += 1
        image = Image.fromarray(pixels.round().astype(np.uint8))
        return SyntheticImage(image, classes[owner], boxes, np.array(labels, dtype=np.int64))

    def _background(self, rng: np.random.Generator) -> Image.Image:
        photographs = list(sklearn_photographs().values())
        photo = photographs[rng.integers(len(photographs))]
        border = int(_TRAINING_COLUMNS * photo.width)
        first, last = (0, border) if self.split == "train" else (border, photo.width)
        scale = rng.integers(*_CROP_SIDES, endpoint=True) / min(self.size)
        height, width = min(scale * self.size[0], photo.height), min(scale * self.size[1], last - first)
        left, top = rng.uniform(first, last - width), rng.uniform(0, photo.height - height)
        box = (left, top, left + width, top + height)
        return photo.resize(self.size[::-1], Image.Resampling.BICUBIC, box)

    def _digit(self, rng: np.random.Generator) -> tuple[np.ndarray, int]:
        """The share of each pixel that a digit covers, (side,side), and its class."""
        index = rng.integers(len(self.digits))
        side = round(rng.uniform(*_DIGIT_SIDES) * min(self.size))
        grey = Image.fromarray(self.digits.images[index]).resize((side, side), Image.Resampling.BICUBIC)
        # Enlarged from 8x8, strokes are blurred. This makes them steeper, with half grey at the edge of the ink.
        coverage = np.clip(2 * np.asarray(grey, dtype=np.float32) / 255 - 0.5, 0, 1)
        return coverage, self.digits.labels[index]


def _place(
    rng: np.random.Generator, ink: np.ndarray, owner: np.ndarray, areas: list[int]
) -> tuple[slice, slice] | None:
    """A place where a digit does not hide too much of an earlier one; None if none is found."""
    for _ in range(_TRIES):
        top, left = (int(rng.integers(total - len(ink), endpoint=True)) for total in owner.shape)
        place = slice(top, top + len(ink)), slice(left, left + len(ink))
        seen = np.bincount(owner.ravel(), minlength=1 + len(areas))
        seen -= np.bincount(owner[place][ink], minlength=1 + len(areas))
        if all(seen[1:] >= (1 - MAX_HIDDEN) * np.array(areas)):
            return place
    return None
