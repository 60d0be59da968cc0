"""Images with masks: what is read from a folder, what is said of faults, and the random crops of training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_files import noise, oriented, write_mask
from PIL import Image
from torchvision import tv_tensors

from dfformer.data.files import DatasetSpec
from dfformer.data.images import check_images
from dfformer.data.masks import IGNORED, MaskFolder, TrainTransform

CLASSES = ["sky", "sea", "sand"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Four images in ADE20K's layout; 0 in a mask is no class."""
    for n in range(4):
        labels = np.arange(40 * 30).reshape(30, 40) % 4
        write_mask(tmp_path, "train", f"{n % 2}/{n}", np.asarray(noise(seed=n)), labels)
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return tmp_path


def opened(root: Path, reduce_zero_label: bool = True, **options: Any) -> MaskFolder:
    return MaskFolder(DatasetSpec("", str(root), "train", **options), reduce_zero_label)


def test_labels_become_classes(root: Path) -> None:
    dataset = opened(root)
    check_images(dataset)
    assert (len(dataset), dataset.classes) == (4, CLASSES)
    image, mask = dataset[0]
    assert (image.mode, image.size, mask.shape) == ("RGB", (40, 30), (30, 40))
    assert mask[0, :4].tolist() == [IGNORED, 0, 1, 2]
    (root / "classes.txt").write_text("none\n" + "\n".join(CLASSES))
    assert opened(root, reduce_zero_label=False)[0][1][0, :4].tolist() == [0, 1, 2, 3]


def test_classes_that_no_mask_has_are_told(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As where the objects of two classes are white in a mask, 255, which is no class."""
    check_images(opened(root))
    assert capsys.readouterr().err == ""
    (root / "classes.txt").write_text("background\nobject")
    for path in (root / "annotations").rglob("*.png"):
        Image.fromarray(255 * (np.arange(40 * 30, dtype=np.uint8).reshape(30, 40) % 2)).save(path)
    check_images(opened(root, reduce_zero_label=False))
    assert capsys.readouterr().err.endswith("train: 1 of 2 classes are in none of its masks: object\n")


@pytest.mark.parametrize("count", [254, 255])
@pytest.mark.parametrize("reduce_zero_label", [False, True])
def test_255_is_no_class_however_many_there_are(count: int, reduce_zero_label: bool, root: Path) -> None:
    (root / "classes.txt").write_text("\n".join(f"c{n}" for n in range(count)))
    first = int(reduce_zero_label)
    last = min(254, count - 1 + first)  # the largest label there can be
    for path in (root / "annotations").rglob("*.png"):
        Image.fromarray(np.array([[255, 0, 1, last]] * 30, dtype=np.uint8).repeat(10, 1)).save(path)
    mask = opened(root, reduce_zero_label)[0][1][0, ::10].tolist()
    assert mask == [IGNORED, IGNORED if first else 0, 1 - first, last - first]


def test_the_list_of_ade20k(root: Path) -> None:
    (root / "classes.txt").unlink()
    (root / "objectInfo150.txt").write_text("Idx\tRatio\tName\n1\t0.5\twall\n2\t0.3\tsky\n3\t0.2\ttree, plant\n")
    assert opened(root).classes == ["wall", "sky", "tree, plant"]


def test_palettes_and_links(root: Path, tmp_path: Path) -> None:
    path = root / "annotations" / "train" / "0" / "0.png"
    with Image.open(path) as grey:
        palette = Image.fromarray(np.asarray(grey))
    palette.putpalette(bytes(range(256)) * 3)
    palette.save(path)
    assert opened(root)[0][1][0, :4].tolist() == [IGNORED, 0, 1, 2]
    for kind in ("images", "annotations"):
        (root / kind / "train" / "0").rename(tmp_path / f"store-{kind}")
        (root / kind / "train" / "more").symlink_to(tmp_path / f"store-{kind}")
    assert [path.name for path in opened(root).images] == ["1.jpg", "3.jpg", "0.jpg", "2.jpg"]
    check_images(opened(root))


def test_masks_of_images_as_viewers_show_them(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An orientation that swaps the sides is an error that says what helps; others are told."""
    path = root / "images" / "train" / "0" / "0.jpg"
    oriented(noise(), path, 3)
    check_images(opened(root))
    assert "1 of 4 images have an EXIF orientation" in capsys.readouterr().err
    oriented(noise((30, 40)), path, 6)
    with pytest.raises(ValueError, match=r"0\.png: is 40x30, its image 30x40; .*--exif-orientation, .* applies it"):
        check_images(opened(root))
    check_images(opened(root, exif_orientation=True))
    assert opened(root, exif_orientation=True)[0][0].size == (40, 30)


def _mask(root: Path, change: Callable[[np.ndarray], np.ndarray]) -> Path:
    path = root / "annotations" / "train" / "1" / "3.png"
    with Image.open(path) as mask:
        changed = change(np.asarray(mask))
    Image.fromarray(changed).save(path)
    return path


def _label(root: Path) -> str:
    path = _mask(root, lambda mask: np.where(mask == 3, 4, mask).astype(np.uint8))
    return f"1 of 4 images cannot be used: {path}: expected labels from 0 to 3 and 255, got 4"


def _no_mask(root: Path) -> str:
    path = root / "annotations" / "train" / "0" / "2.png"
    path.unlink()
    return f"{root / 'images' / 'train' / '0' / '2.jpg'} has no mask {path}"


def _broken(kind: str, name: str) -> Callable[[Path], str]:
    def change(root: Path) -> str:
        path = root / kind / "train" / "0" / name
        path.write_bytes(path.read_bytes()[:60])
        return str(path)

    return change


def _two_images(root: Path) -> str:
    path = root / "images" / "train" / "0" / "2.webp"
    noise().save(path)
    return f"{path.with_suffix('.jpg')} and {path}: have the same name"


def _empty(root: Path) -> str:
    for path in (root / "images").rglob("*.jpg"):
        path.unlink()
    return f"{root / 'images' / 'train'}: no images"


def _no_folder(root: Path) -> str:
    (root / "annotations").rename(root / "masks")
    return f"{root / 'annotations' / 'train'}: is not a folder"


def _all_ignored(root: Path) -> str:
    for path in (root / "annotations").rglob("*.png"):
        Image.fromarray(np.full((30, 40), 255, dtype=np.uint8)).save(path)
    return f"{root / 'annotations' / 'train'}: no pixel of its masks has a class"


def _classes(text: str, message: str) -> Callable[[Path], str]:
    def change(root: Path) -> str:
        (root / "classes.txt").write_text(text)
        return message

    return change


def _no_classes(root: Path) -> str:
    (root / "classes.txt").unlink()
    return f"{root}: has neither classes.txt"


ONE_CHANNEL = "expected mode L or P (one channel of 8 bits)"
MALFORMED: dict[str, Callable[[Path], str]] = {
    "unknown-label": _label,
    "size": lambda root: f"{_mask(root, lambda mask: mask[1:])}: is 40x29, its image 40x30",
    "colours": lambda root: f"{_mask(root, lambda mask: np.stack([mask] * 3, -1))}: {ONE_CHANNEL}, got",
    "16-bit": lambda root: f"{_mask(root, lambda mask: mask.astype(np.uint16))}: {ONE_CHANNEL}, got I;16",
    "no-mask": _no_mask,
    "two-images": _two_images,
    "broken-image": _broken("images", "2.jpg"),
    "broken-mask": _broken("annotations", "2.png"),
    "empty-split": _empty,
    "no-folder": _no_folder,
    "all-ignored": _all_ignored,
    "no-classes": _no_classes,
    "empty-class": _classes("sky\n\nsand\n", "classes.txt: line 2 has no class name"),
    "too-many": _classes("x\n" * 256, "expected 2 to 255 names, none empty, got 256"),
    "one": _classes("sky\n", "expected 2 to 255 names, none empty, got 1"),
}


@pytest.mark.parametrize("change", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_data(change: Callable[[Path], str], root: Path) -> None:
    message = change(root)
    with pytest.raises(ValueError) as raised:  # noqa: PT011 (the message is compared below)
        check_images(opened(root))
    assert message in str(raised.value)


def test_what_was_not_checked_is_found_when_read(root: Path) -> None:
    _label(root)
    with pytest.raises(ValueError, match=r"3\.png: expected labels from 0 to 3 and 255, got 4"):
        [opened(root)[n] for n in range(4)]


def transform(size: tuple[int, int], scale: float, most_of_one_class: float = 0.75, fill: Any = (0,) * 3) -> Any:
    return TrainTransform(size, (scale, scale), most_of_one_class, hflip=0.5, photometric=False, fill=list(fill))


def test_a_training_crop() -> None:
    """What is beyond the image is ignored and has the mean colour; image and mask are cropped alike."""
    labels = torch.arange(30)[:, None].repeat(1, 30).to(torch.uint8)
    image, mask = transform((40, 64), 0.5, fill=(1, 2, 3))(
        tv_tensors.Image(8 * labels.expand(3, -1, -1)), tv_tensors.Mask(labels)
    )
    assert (image.shape, mask.shape) == ((3, 40, 64), (40, 64))
    inside = mask != IGNORED
    assert inside.sum() == 20 * 20, "scaled to half of the shorter side"
    assert image[:, ~inside].unique(dim=1).squeeze(1).tolist() == [1, 2, 3]
    assert (image[0][inside].float() - 8 * mask[inside].float()).abs().max() <= 16


def test_crops_are_not_of_one_class() -> None:
    labels = torch.zeros(64, 64, dtype=torch.uint8)
    labels[-8:] = 1
    image, mask = tv_tensors.Image(labels.expand(3, -1, -1)), tv_tensors.Mask(labels)
    shares = {}
    for most in (0.75, 1.0):
        crop = transform((16, 16), 4, most)
        shares[most] = np.mean([(crop(image, mask)[1] == 1).float().mean() > 0.25 for _ in range(40)])
    assert shares[0.75] > shares[1.0] + 0.3


@pytest.mark.parametrize("size", [(3, 2000), (2000, 1)])
def test_strips_are_cropped(size: tuple[int, int]) -> None:
    labels = torch.zeros(size, dtype=torch.uint8)
    image, mask = transform((16, 16), 2.0)(tv_tensors.Image(labels.expand(3, -1, -1)), tv_tensors.Mask(labels))
    assert (image.shape, mask.shape) == ((3, 16, 16), (16, 16))
