"""Images with a class for every pixel: folders in ADE20K's manner and the built-in scenes, checked and prepared."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from dfformer.data import synthetic_digits
from dfformer.data.images import check_each, check_image, given_root, opened
from dfformer.tasks.predict import image_files
from dfformer.train.config import SegmentConfig

IGNORED = 255  # in masks: a pixel that counts neither in the loss nor in a measure
BACKGROUND = "background"
_CROPS_TRIED = 10


class Masked(Protocol):
    """A dataset of pairs: an RGB image and its mask (H,W) uint8 of classes or IGNORED."""

    classes: list[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image.Image, np.ndarray]: ...

    def check(self) -> None:
        """Raises ValueError naming the files that cannot be used, and why."""


class MaskFolder:
    """``root/images/SPLIT/NAME.jpg`` with ``root/annotations/SPLIT/NAME.png``, also in folders below those.

    Masks have one channel of 8 bits. The classes are the lines of ``root/classes.txt``, or those of ADE20K's own
    ``root/objectInfo150.txt``.

    Args:
        reduce_zero_label: 0 in a mask is no class, and labels count from 1. 255 is no class in any case.
    """

    def __init__(self, root: Path, split: str, reduce_zero_label: bool) -> None:
        images, masks = root / "images" / split, root / "annotations" / split
        self.folder = masks
        for folder in (images, masks):
            if not folder.is_dir():
                raise ValueError(f"{folder}: is not a folder")
        self.classes = _class_names(root)
        self.images = list(image_files([images]))
        if not self.images:
            raise ValueError(f"{images}: no images")
        self.masks = [masks / path.relative_to(images).with_suffix(".png") for path in self.images]
        self.first_label = int(reduce_zero_label)
        self.to_class = np.full(256, IGNORED, dtype=np.uint8)  # what each value of a mask becomes
        self.to_class[self.first_label : self.first_label + len(self.classes)] = np.arange(len(self.classes))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, np.ndarray]:
        with opened(self.images[index]) as image:
            pixels = image.convert("RGB")
        with opened(self.masks[index]) as mask:
            self._check_mask(mask, pixels.size)
            return pixels, self.to_class[np.asarray(mask)]

    def check(self) -> None:
        if not any(check_each(self._check, range(len(self)))):
            raise ValueError(f"{self.folder}: its masks have no pixel with a class, all are to be ignored")

    def _check(self, index: int) -> bool:
        """Whether any pixel has a class."""
        size, path = check_image(self.images[index]), self.masks[index]
        if not path.is_file():
            raise ValueError(f"{self.images[index]} has no mask {path}")
        with opened(path) as mask:
            return self._check_mask(mask, size)

    def _check_mask(self, mask: Image.Image, size: tuple[int, int]) -> bool:
        if mask.mode not in ("L", "P"):
            raise ValueError(f"has mode {mask.mode}, accepted are L and P: one channel of 8 bits")
        if mask.size != size:
            raise ValueError("is {}x{}, its image {}x{}".format(*mask.size, *size))
        labels = np.flatnonzero(mask.histogram())
        last = self.first_label + len(self.classes) - 1
        unknown = labels[(labels > last) & (labels != IGNORED)]
        if unknown.size:
            raise ValueError(f"has label {unknown[0]}, known are 0 to {last} and {IGNORED}")
        return bool((self.to_class[labels] != IGNORED).any())


class SceneMasks:
    """The built-in scenes of digits: the background and ten digits."""

    classes: list[str] = [BACKGROUND, *synthetic_digits.CLASSES]  # noqa: RUF012 (nobody changes it)

    def __init__(self, split: str, img_size: tuple[int, int], count: int) -> None:
        self.scenes = synthetic_digits.DigitScenes(split, img_size, count)

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> tuple[Image.Image, np.ndarray]:
        scene = self.scenes[index]
        return scene.image, scene.mask

    def check(self) -> None:
        """Nothing can be wrong with them."""


def open_masked(
    name: str, root: str | None, split: str, img_size: tuple[int, int], count: int, reduce_zero_label: bool
) -> Masked:
    """The dataset ``name``: "" for a folder, "digit_scenes" for ``count`` scenes of ``img_size``."""
    if name == synthetic_digits.DIGIT_SCENES:
        return SceneMasks(split, img_size, count)
    if name:
        raise ValueError(
            f"dataset: got {name!r}, accepted to segment are '' (a folder) and {synthetic_digits.DIGIT_SCENES!r}"
        )
    return MaskFolder(given_root(root), split, reduce_zero_label)


def _class_names(root: Path) -> list[str]:
    plain, ade20k = root / "classes.txt", root / "objectInfo150.txt"
    if plain.is_file():
        names = plain.read_text(encoding="utf-8").splitlines()
    elif ade20k.is_file():  # a table with a heading, the name last
        names = [line.split("\t")[-1].strip() for line in ade20k.read_text(encoding="utf-8").splitlines()[1:]]
    else:
        raise ValueError(f"{root}: has neither {plain.name}, a class name a line, nor ADE20K's {ade20k.name}")
    if not names or not all(names) or len(names) > IGNORED:
        raise ValueError(f"{root}: the list of classes has an empty line, or not 1 to {IGNORED} lines")
    return names


Pair = tuple[Tensor, Tensor]


class Prepared(Dataset):
    """``dataset`` as pairs of tensors: the image uint8 (3,h,w), the mask uint8 (H,W), both as ``view`` made them."""

    def __init__(self, dataset: Masked, view: Callable[[Any, Any], Pair]) -> None:
        self.dataset, self.view = dataset, view

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Pair:
        image, mask = self.dataset[index]
        pixels, classes = self.view(v2.functional.to_image(image), tv_tensors.Mask(mask))
        return pixels.as_subclass(Tensor), classes.as_subclass(Tensor)


class TrainingView:
    """A random crop of ``size`` (H, W), of a random scale; what it has beyond the image is ``fill``, and ignored."""

    def __init__(self, size: tuple[int, int], config: SegmentConfig, fill: list[int]) -> None:
        shorter = [max(1, round(scale * min(size))) for scale in config.scale]
        self.resize = v2.RandomResize(shorter[0], shorter[1] + 1)  # the second is exclusive
        fills = {tv_tensors.Image: fill, tv_tensors.Mask: IGNORED}
        self.crop = v2.RandomCrop(size, pad_if_needed=True, fill=fills)
        distort = [v2.RandomPhotometricDistort()] if config.photometric else []
        self.rest = v2.Compose([v2.RandomHorizontalFlip(config.hflip), *distort])
        self.most = config.most_of_one_class

    def __call__(self, image: Any, mask: Any) -> Pair:
        image, mask = self.resize(image, mask)
        for _ in range(_CROPS_TRIED):
            cropped = self.crop(image, mask)
            counts = torch.bincount(cropped[1].flatten())[:IGNORED]
            if counts.max() <= self.most * counts.sum():
                break
        return self.rest(*cropped)


class WholeView:
    """The whole image, its shorter side ``shorter`` pixels long and the longer at most four times that; the mask as it
    is."""

    def __init__(self, shorter: int) -> None:
        self.resize = v2.Resize(shorter, max_size=4 * shorter)

    def __call__(self, image: Any, mask: Any) -> Pair:
        return self.resize(image), mask


def all_ignored(mask: Tensor) -> Tensor:
    """A mask like ``mask`` that says nothing."""
    return torch.full_like(mask, IGNORED)
