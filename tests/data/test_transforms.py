"""What is done to images: augmentation that no version of Pillow stops, whole images and strips of any shape."""

from typing import Any

import numpy as np
import pytest
import torch
from image_files import noise
from PIL import Image
from timm.data import create_transform
from torchvision.transforms import v2

from dfformer.data.images import seed_everything
from dfformer.data.transforms import (
    _augment_ops,
    evaluation_transform,
    resize_shorter_side,
    shorter_side_size,
    training_transform,
)

POLICIES = ["rand-m9-mstd0.5-inc1", "rand-m0", "rand-m10-inc1", "augmix-m3", "originalr", "v0", "original-mstd0.5"]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_every_strength_of_every_operation(policy: str, mode: str) -> None:
    mean = (0.5,) * len(mode.replace("RGB", "abc"))
    transform: Any = training_transform((len(mean), 16, 16), auto_augment=policy, mean=mean)
    ops = list(_augment_ops(transform))
    assert ops
    image = noise((20, 20)).convert(mode)
    for op in ops:
        op.prob = 1.0
        for magnitude in (0, 3, 10):
            op.magnitude, op.magnitude_std = magnitude, 0
            assert op(image).size == image.size, op.name


@pytest.mark.parametrize(
    "policy",
    [
        *("", "magic", "rand-m9-q3", "rand-m-5", "rand-m9-n9999", "rand-m9x", "rand-p1e9", "rand-m9\n", "augmix-a0.0"),
        # These timm builds: it passes over sections without a number, and takes any name after -t.
        *(
            "rand-mx",
            "rand-",
            "rand-m9-inc",
            "rand-mstd",
            "rand-twrong",
            "augmix-m",
            "augmix3",
            "v0-mstd",
            "original-x",
        ),
    ],
)
def test_policies_that_are_refused(policy: str) -> None:
    with pytest.raises(ValueError, match=r"augment\.auto_augment: expected.* rand and any of -m9 .*, got "):
        training_transform((3, 16, 16), auto_augment=policy)


@pytest.mark.parametrize(
    "policy",
    ["rand-m9-n3-p0.5-mstd101-mmax12-inc0-t3aw", "rand-tweights-mstd0.5", "augmix-m5-w4-d2-a1.5-b1", "3a", "v0r"],
)
def test_policies_in_all_of_timms_notation(policy: str) -> None:
    assert training_transform((3, 16, 16), auto_augment=policy)(noise((20, 20))).shape == (3, 16, 16)


def test_the_recipes_augmentation_of_many_images() -> None:
    transform = training_transform((3, 16, 16), auto_augment="rand-m9-mstd0.5-inc1")
    image = noise((20, 20))
    for n in range(1500):
        seed_everything(0, 0, n)
        assert transform(image).shape == (3, 16, 16)


def test_posterizing_to_no_bits_is_black() -> None:
    transform = training_transform((3, 16, 16), auto_augment="rand-m10-inc1")
    [op] = [op for op in _augment_ops(transform) if op.name == "PosterizeIncreasing"]
    op.prob, op.magnitude, op.magnitude_std = 1.0, 10, 0
    assert np.asarray(op(noise())).max() == 0
    op.magnitude = 5  # two bits
    assert np.array_equal(np.asarray(op(noise())), np.asarray(noise()) & 0xC0)


@pytest.mark.parametrize("size", [(48, 64), (300, 40), (30, 30)])
@pytest.mark.parametrize("crop_pct", [0.875, 1.0])
def test_evaluation_is_timms(size: tuple[int, int], crop_pct: float) -> None:
    config = {"input_size": (3, 32, 32), "crop_pct": crop_pct, "interpolation": "bicubic"}
    expected = create_transform(**config, is_training=False)(noise(size))
    assert torch.equal(evaluation_transform(config)(noise(size)), expected)


@pytest.mark.parametrize("size", [(100_000, 1), (1, 100_000), (65_000, 3)])
def test_strips_are_cut_before_they_are_enlarged(size: tuple[int, int]) -> None:
    """timm alone would make images of gigabytes of them."""
    config = {"input_size": (3, 64, 64), "crop_pct": 1.0, "interpolation": "bilinear"}
    pixels = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    middle = tuple(slice(max(0, side // 2 - 300), side // 2 + 300) for side in pixels.shape[:2])
    pixels[middle] = 255
    assert evaluation_transform(config, as_uint8=True)(Image.fromarray(pixels)).min() == 255


SIZES = {
    ((30, 40), 60): [60, 80],
    ((41, 30), 60): [82, 60],
    ((100, 410), 50): [48, 200],
    ((3, 10_000), 64): [1, 256],
    ((10_000, 1), 64): [256, 1],
    ((1, 1), 7): [7, 7],
}


@pytest.mark.parametrize(("given", "expected"), SIZES.items())
def test_sizes_of_whole_images(given: tuple[tuple[int, int], int], expected: list[int]) -> None:
    """torchvision's for its ``max_size``, but no side is ever 0."""
    size, shorter = given
    assert shorter_side_size(size, shorter) == expected
    if min(expected) > 1:
        assert list(v2.Resize(shorter, max_size=4 * shorter)(torch.zeros(3, *size)).shape[1:]) == expected
    assert list(resize_shorter_side(torch.zeros(3, *size, dtype=torch.uint8), shorter).shape[1:]) == expected
    assert resize_shorter_side(Image.new("RGB", size[::-1]), shorter).size == tuple(expected[::-1])
