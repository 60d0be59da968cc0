"""Degraded images and their targets: pairs of files, or targets whose inputs are made on the fly."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2

from dfformer.data import photographs
from dfformer.data.files import (
    DatasetSpec,
    FileDataset,
    ImageDataset,
    Samples,
    check_image,
    images_by_stem,
    images_in,
    read_image,
)

MIN_SIDE = 16  # of a whole image, in pixels; the metrics need it
_MIRRORINGS = (Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.TRANSPOSE)

InputAndTarget = tuple[Tensor, Tensor]  # uint8 (3,H/scale,W/scale) and uint8 (3,H,W)


@dataclass(frozen=True)
class Degradation:
    """Makes the input of a target: blurs it, shrinks it, and adds noise, in this order; returns 8 bits a channel.

    Args:
        scale: the factor between the sides of target and input; shrinking is Pillow's antialiased bicubic.
        blur: standard deviation of the Gaussian, in pixels of the target.
        noise: standard deviation of the white Gaussian noise, in levels of 0 to 255.
    """

    scale: int = 1
    blur: float = 0.0
    noise: float = 0.0

    def __call__(self, target: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Maps uint8 (3,H,W) to uint8 (3,H/scale,W/scale). Without ``generator``, noise is from the global one."""
        pixels = target.float()
        if self.blur:
            side = 2 * math.ceil(3 * self.blur) + 1
            pixels = v2.functional.gaussian_blur(pixels, [side, side], [self.blur, self.blur])
        if self.scale > 1:
            size = [side // self.scale for side in pixels.shape[1:]]
            pixels = F.interpolate(pixels[None], size, mode="bicubic", antialias=True)[0]
        if self.noise:
            pixels = pixels + self.noise * torch.randn(pixels.shape, generator=generator)
        return pixels.round().clamp(0, 255).to(torch.uint8)


Pair = tuple[Image.Image | None, Image.Image]  # RGB: the input, or None if it is to be made, and the target
PairDataset = ImageDataset[Pair]


class PairFolder(FileDataset[Pair]):
    """``root/targets/SPLIT/NAME.png`` and, unless inputs are made, ``root/inputs/SPLIT/NAME.png``; also in subfolders.

    Args:
        degradation: gives the factor between the sides of target and input. If it blurs, adds noise, or there is no
            folder ``root/inputs``, inputs are made from the targets, and there must be none for the split.
        least: smallest size (H,W) of a target.
    """

    def __init__(self, spec: DatasetSpec, degradation: Degradation, least: tuple[int, int]) -> None:
        super().__init__(spec)
        root = spec.folder("restoration", "a folder", photographs.NAME)
        made = bool(degradation.blur or degradation.noise or not (root / "inputs").is_dir())
        if made and degradation == Degradation():
            raise ValueError(f"{root}: has no inputs/ folder; to generate inputs, set restore.scale, .blur or .noise")
        self.scale, self.least = degradation.scale, least
        targets, inputs = root / "targets" / spec.split, root / "inputs" / spec.split
        if made:
            self.images, self.inputs = images_in(targets), []
            if inputs.is_dir():
                raise ValueError(f"restore: {inputs} has inputs, so restore.blur and restore.noise must be 0")
            return
        wanted, found = images_by_stem(targets), images_by_stem(inputs)
        if missing := [name for name in wanted if name not in found]:
            raise ValueError(f"{inputs}: has no image {missing[0]}, although there is such a target")
        self.images, self.inputs = list(wanted.values()), [found[name] for name in wanted]

    def __getitem__(self, index: int) -> Pair:
        paths = [*self.inputs[index : index + 1], self.images[index]]
        *source, target = (read_image(path, "RGB", exif_orientation=self.exif_orientation) for path in paths)
        if source:
            self._check_sizes(source[0].size, target.size, paths[0])
        return (source[0] if source else None), target

    def check_file(self, index: int) -> bool:
        target, path = check_image(self.images[index], self.exif_orientation), self.images[index]
        if target.size[1] < self.least[0] or target.size[0] < self.least[1]:
            raise ValueError("{}: expected {}x{} or larger, got {}x{}".format(path, *self.least[::-1], *target.size))
        if not self.inputs:
            return target.has_orientation
        source = check_image(self.inputs[index], self.exif_orientation)
        self._check_sizes(source.size, target.size, self.inputs[index])
        return target.has_orientation or source.has_orientation

    def _check_sizes(self, source: tuple[int, int], target: tuple[int, int], path: Path) -> None:
        if tuple(self.scale * side for side in source) != target:
            raise ValueError(
                "{}: with restore.scale={}, expected {}x{} for a target of {}x{}, got {}x{}".format(
                    path, self.scale, *(side // self.scale for side in target), *target, *source
                )
            )


class Photographs(PairDataset):
    """The built-in photographs; their inputs are made from them."""

    def __init__(self, split: str) -> None:
        self.images = list(photographs.photographs(split).values())

    def __getitem__(self, index: int) -> Pair:
        return None, self.images[index]


def open_pair_dataset(
    spec: DatasetSpec, degradation: Degradation, least: tuple[int, int] = (MIN_SIDE, MIN_SIDE)
) -> PairDataset:
    """Pairs in a folder, or the photographs of scikit-image and scikit-learn; ``least`` is the smallest size (H,W)."""
    if spec.name == photographs.NAME:
        if degradation == Degradation():
            raise ValueError(
                "restore: the photographs have no inputs; to generate them, set restore.scale, .blur or .noise"
            )
        return Photographs(spec.split)
    return PairFolder(spec, degradation, least)


@dataclass
class RestorationTensors(Samples):
    """``images`` as pairs of tensors: whole images, or ``repeats`` random crops of each, mirrored at random,
    along the diagonal too if they are square.

    Args:
        degradation: makes the inputs that ``images`` lack. The noise of a whole image depends only on its index.
        crop: the size (H,W) of target crops; None for whole images, cut to multiples of ``scale``.
        photometric: change brightness, contrast, saturation, hue and the order of channels of crops at random, before
            inputs are made from them.
    """

    images: PairDataset
    degradation: Degradation
    crop: tuple[int, int] | None = None
    repeats: int = 1
    photometric: bool = False

    def __post_init__(self) -> None:
        self.distort = v2.RandomPhotometricDistort() if self.photometric else nn.Identity()

    def __len__(self) -> int:
        return self.repeats * len(self.images)

    def __getitem__(self, index: int) -> InputAndTarget:
        if not 0 <= index < len(self):  # ends a loop over the dataset
            raise IndexError(f"index: got {index}, there are {len(self)} pairs")
        source, target = self.images[index % len(self.images)]
        scale = self.degradation.scale
        cells = [side // scale for side in target.size]  # wide and high, in pixels of the input
        taken = [side // scale for side in self.crop[::-1]] if self.crop else cells
        left, top = (_below(cell - side + 1) if self.crop else 0 for cell, side in zip(cells, taken, strict=True))
        box = (left, top, left + taken[0], top + taken[1])
        pair = [target.crop(tuple(scale * edge for edge in box))]  # type: ignore[arg-type]
        if source is not None:
            pair.append(source.crop(box))
        if self.crop:
            for mirroring in _MIRRORINGS if taken[0] == taken[1] else _MIRRORINGS[:2]:
                if _below(2):
                    pair = [image.transpose(mirroring) for image in pair]
        if source is None:
            pair = self.distort(pair)
        pixels = [v2.functional.pil_to_tensor(image) for image in pair]
        if source is None:
            generator = None if self.crop else torch.Generator().manual_seed(index)
            pixels.append(self.degradation(pixels[0], generator))
        return pixels[1], pixels[0]

    @staticmethod
    def ignored_target(target: Tensor) -> Tensor:
        """A target without pixels."""
        return target[:, :0]


def _below(count: int) -> int:
    return int(torch.randint(count, ()))
