"""Transforms of images for models: timm's, and the one rule for resizing whole images."""

import re
from functools import partial
from itertools import chain
from typing import Any

from PIL import Image
from timm.data import auto_augment, create_transform
from torchvision.transforms import v2

MAX_RESIZED_ASPECT = 4  # the most that a resized image's longer side may be, in shorter sides
# timm's notation of augmentation: a policy and sections, each with a number that is not large.
_NUMBER = r"\d{1,3}(\.\d{1,4})?"
_POLICY = re.compile(
    rf"rand(-(m\d\d?|n[1-9]|p{_NUMBER}|mstd{_NUMBER}|mmax\d\d?|inc[01]|t(weights|3aw|3a)))*"
    rf"|augmix(-(m\d\d?|w[1-9]|d[1-9]|a(?=[0.]*[1-9]){_NUMBER}|b[01]|mstd{_NUMBER}))*"
    rf"|(original|originalr|v0|v0r|3a)(-mstd{_NUMBER})?"
)
_MAX_ASPECT = 64  # ratio of sides; timm would enlarge a longer strip to gigabytes before it crops


def shorter_side_size(size: tuple[int, int], shorter: int) -> list[int]:
    """The size (H,W) of an image of ``size`` after resizing its shorter side to ``shorter`` pixels.

    The longer side has at most MAX_RESIZED_ASPECT times as many, and each side at least one.
    """
    longer = shorter * max(size) // min(size)
    if longer > MAX_RESIZED_ASPECT * shorter:
        shorter, longer = MAX_RESIZED_ASPECT * shorter * shorter // longer, MAX_RESIZED_ASPECT * shorter
    new = [max(1, shorter), longer]
    return new if size[0] <= size[1] else new[::-1]


def resize_shorter_side(image: Any, shorter: int) -> Any:
    """Resizes an image (...,H,W) or PIL image to `shorter_side_size`, with antialiasing."""
    return v2.functional.resize(image, shorter_side_size(v2.functional.get_size(image), shorter))


def evaluation_transform(config: dict[str, Any], as_uint8: bool = False) -> v2.Compose:
    """timm's transform for a model's data ``config``: resize, centre crop, and normalise unless ``as_uint8``.

    The ends of very long strips are cut off first; the centre crop would not keep them.
    """
    H, W = config["input_size"][-2:]
    most = _MAX_ASPECT * max(H / W, W / H)
    transform = create_transform(**config, is_training=False, use_prefetcher=as_uint8)
    return v2.Compose([partial(_cut_strip, most=most), transform])


def _cut_strip(image: Image.Image, most: float) -> Image.Image:
    """The middle of an image, at most ``most`` times as long as wide."""
    longest = int(most * min(image.size))
    if max(image.size) <= longest:
        return image
    size = [min(side, longest) for side in image.size]
    left, top = ((side - kept) // 2 for side, kept in zip(image.size, size, strict=True))
    return image.crop((left, top, left + size[0], top + size[1]))


def check_auto_augment(policy: str | None) -> None:
    """Raises ValueError unless timm knows all of ``policy``: it passes over some of what it does not know."""
    if policy is not None and not _POLICY.fullmatch(policy):
        raise ValueError(
            "augment.auto_augment: expected, with these or other numbers, rand and any of -m9 -n2 -p0.5 -mstd0.5 "
            "-mmax10 -inc1 -tweights, or augmix and any of -m3 -w3 -d2 -a1 -b1 -mstd0.5, or original, originalr, v0, "
            f"v0r or 3a, which may have -mstd0.5, got {policy[:60]!r}"
        )


def training_transform(input_size: tuple[int, int, int], **augment: Any) -> Any:
    """`timm.data.create_transform` for training, to uint8, with augmentation that runs with any version of Pillow."""
    check_auto_augment(augment.get("auto_augment"))
    transform = create_transform(input_size, is_training=True, use_prefetcher=True, **augment)
    for op in _augment_ops(transform):
        if op.name.startswith("Posterize"):
            op.aug_fn = _posterize
    return transform


def _augment_ops(transform: Any) -> list[auto_augment.AugmentOp]:
    parts = transform.transforms  # RandAugment and AugMix have ops, AutoAugment has lists of them
    return [op for part in parts for op in chain(getattr(part, "ops", []), *getattr(part, "policy", []))]


def _posterize(image: Image.Image, bits_to_keep: int, **options: Any) -> Image.Image:
    """timm's posterize, whose strongest setting keeps 0 bits: black, as in Pillow up to 12; later ones refuse it."""
    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    posterized: Image.Image = auto_augment.posterize(image, bits_to_keep, **options)
    return posterized
