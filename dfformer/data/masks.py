"""Images with a class for every pixel: folders in ADE20K's layout and synthetic digits, checked and prepared."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from dfformer.data import synthetic_digits
from dfformer.data.files import (
    DatasetSpec,
    FileDataset,
    ImageDataset,
    Samples,
    check_image,
    images_by_stem,
    opened,
    read_class_names,
    read_image,
)
from dfformer.data.transforms import resize_shorter_side
from dfformer.utils.text import abbreviate, echo

IGNORED = 255  # in masks: a pixel that counts neither in the loss nor in the metrics
BACKGROUND = "background"
_CROPS_TRIED = 10

ImageAndMask = tuple[Tensor, Tensor]  # uint8 (3,h,w) and uint8 (H,W)


class MaskDataset(ImageDataset[tuple[Image.Image, np.ndarray]]):
    """Pairs of an RGB image and its mask (H,W) uint8 of classes or IGNORED."""

    classes: list[str]


class MaskFolder(MaskDataset, FileDataset[tuple[Image.Image, np.ndarray]]):
    """``root/images/SPLIT/NAME.jpg`` with ``root/annotations/SPLIT/NAME.png``, also in folders inside these.

    Masks have one channel of 8 bits. The classes are the lines of ``root/classes.txt``, or those of ADE20K's own
    ``root/objectInfo150.txt``.

    Args:
        reduce_zero_label: 0 in a mask stands for no class, and labels count from 1. 255 always stands for no class.
    """

    def __init__(self, spec: DatasetSpec, reduce_zero_label: bool) -> None:
        super().__init__(spec)
        root = spec.folder("segmentation", "a folder", synthetic_digits.NAME)
        images, masks = root / "images" / spec.split, root / "annotations" / spec.split
        self.folder = masks
        self._found: set[int] = set()  # classes in the masks checked so far
        found = images_by_stem(images)
        self.images = list(found.values())
        if not masks.is_dir():
            raise ValueError(f"{masks}: is not a folder")
        self.classes = _class_names(root)
        self.masks = [masks / f"{stem}.png" for stem in found]
        self.first_label = int(reduce_zero_label)
        self.to_class = np.full(256, IGNORED, dtype=np.uint8)  # the class of each value of a mask
        labels = np.arange(self.first_label, min(self.first_label + len(self.classes), IGNORED))
        self.to_class[labels] = labels - self.first_label

    def __getitem__(self, index: int) -> tuple[Image.Image, np.ndarray]:
        pixels = read_image(self.images[index], "RGB", exif_orientation=self.exif_orientation)
        with opened(self.masks[index]) as mask:
            self._check_mask(mask, pixels.size)
            return pixels, self.to_class[np.asarray(mask)]

    def check(self) -> list[bool]:
        oriented = super().check()
        if not self._found:
            raise ValueError(f"{self.folder}: no pixel of its masks has a class, all are ignored")
        if absent := [name for n, name in enumerate(self.classes) if n not in self._found]:  # e.g. where 255 is meant
            count = f"{len(absent)} of {len(self.classes)} classes are in none of its masks"
            echo(f"{self.folder}: {count}: {abbreviate(absent)}", file=sys.stderr)
        return oriented

    def check_file(self, index: int) -> bool:
        info, path = check_image(self.images[index], self.exif_orientation), self.masks[index]
        if not path.is_file():
            raise ValueError(f"{self.images[index]} has no mask {path}")
        with opened(path) as mask:
            self._found |= self._check_mask(mask, info.size)
        return info.has_orientation

    def _check_mask(self, mask: Image.Image, size: tuple[int, int]) -> set[int]:
        """The classes in a mask; ValueError if the mask cannot belong to an image of ``size``."""
        if mask.mode not in ("L", "P"):
            raise ValueError(f"expected mode L or P (one channel of 8 bits), got {mask.mode}")
        if mask.size != size:
            raise ValueError("is {}x{}, its image {}x{}{}".format(*mask.size, *size, self.size_hint(mask.size, size)))
        labels = np.flatnonzero(mask.histogram())
        last = self.first_label + len(self.classes) - 1
        unknown = labels[(labels > last) & (labels != IGNORED)]
        if unknown.size:
            raise ValueError(f"expected labels from 0 to {last} and {IGNORED}, got {unknown[0]}")
        return {*self.to_class[labels].tolist()} - {IGNORED}


class SyntheticMasks(MaskDataset):
    """Synthetic images of digits; the classes are the background and ten digits."""

    classes: list[str] = [BACKGROUND, *synthetic_digits.CLASSES]  # noqa: RUF012 (never changed)

    def __init__(self, spec: DatasetSpec) -> None:
        self.images = synthetic_digits.SyntheticDigits(spec.split, spec.img_size, spec.synthetic_images)

    def __getitem__(self, index: int) -> tuple[Image.Image, np.ndarray]:
        sample = self.images[index]
        return sample.image, sample.mask


def open_mask_dataset(spec: DatasetSpec, reduce_zero_label: bool) -> MaskDataset:
    """Images and masks in a folder, or synthetic images of digits; for ``reduce_zero_label`` see `MaskFolder`."""
    return SyntheticMasks(spec) if spec.name == synthetic_digits.NAME else MaskFolder(spec, reduce_zero_label)


def _class_names(root: Path) -> list[str]:
    own, ade20k = root / "classes.txt", root / "objectInfo150.txt"
    if own.is_file():
        names = read_class_names(own)
    elif ade20k.is_file():  # a table with a header line and the name in the last column
        names = [line.split("\t")[-1].strip() for line in read_class_names(ade20k)[1:]]
    else:
        raise ValueError(f"{root}: has neither {own.name}, one class name per line, nor ADE20K's {ade20k.name}")
    if not 2 <= len(names) <= IGNORED or not all(names):
        raise ValueError(f"{root}: the list of classes: expected 2 to {IGNORED} names, none empty, got {len(names)}")
    return names


class SegmentationTensors(Samples):
    """``images`` as pairs of tensors that ``transform`` returned, an image and its mask."""

    def __init__(self, images: MaskDataset, transform: Callable[[Any, Any], ImageAndMask]) -> None:
        self.images, self.transform = images, transform

    def __getitem__(self, index: int) -> ImageAndMask:
        image, mask = self.images[index]
        pixels, classes = self.transform(v2.functional.to_image(image), tv_tensors.Mask(mask))
        return pixels.as_subclass(Tensor), classes.as_subclass(Tensor)

    @staticmethod
    def ignored_target(target: Tensor) -> Tensor:
        return torch.full_like(target, IGNORED)


@dataclass
class TrainTransform:
    """A random crop of ``size`` (H,W), at a random scale.

    Args:
        scale: range of the image's shorter side before the crop, relative to that of ``size``.
        most_of_one_class: a crop is drawn again, up to ten times, while one class has a larger share of its pixels.
        hflip: probability of a horizontal flip.
        photometric: whether to change brightness, contrast, saturation, hue and the order of channels at random.
        fill: colour of a crop outside of its image; its mask is IGNORED there.
    """

    size: tuple[int, int]
    scale: tuple[float, float]
    most_of_one_class: float
    hflip: float
    photometric: bool
    fill: list[int]

    def __post_init__(self) -> None:
        fills = {tv_tensors.Image: self.fill, tv_tensors.Mask: IGNORED}
        self.crop = v2.RandomCrop(self.size, pad_if_needed=True, fill=fills)
        distort = [v2.RandomPhotometricDistort()] if self.photometric else []
        self.rest = v2.Compose([v2.RandomHorizontalFlip(self.hflip), *distort])

    def __call__(self, image: Any, mask: Any) -> ImageAndMask:
        least, most = (max(1, round(factor * min(self.size))) for factor in self.scale)
        shorter = int(torch.randint(least, most + 1, ()))
        image, mask = (resize_shorter_side(part, shorter) for part in (image, mask))
        for _ in range(_CROPS_TRIED):
            cropped = self.crop(image, mask)
            counts = torch.bincount(cropped[1].flatten())[:IGNORED]
            if counts.max() <= self.most_of_one_class * counts.sum():
                break
        return self.rest(*cropped)


def whole_images(images: MaskDataset, shorter: int) -> SegmentationTensors:
    """Whole images, resized by `resize_shorter_side`, with their original masks."""
    return SegmentationTensors(images, partial(_resized, shorter=shorter))


def _resized(image: Any, mask: Any, shorter: int) -> ImageAndMask:
    return resize_shorter_side(image, shorter), mask
