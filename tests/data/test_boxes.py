"""Images with boxes: what is read from COCO's format, and what is said of faults in it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_files import annotate, coco_folder, noise, oriented
from PIL import Image

from dfformer.data.boxes import CocoImages, DetectionTensors, open_box_dataset, with_ids
from dfformer.data.files import DatasetSpec
from dfformer.data.images import check_images, check_same_classes

Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Four images in COCO's layout: 100 is empty, 101 has crowds only, 102 and 103 have an object of each category."""
    return coco_folder(tmp_path, train=4)


def test_images_and_objects(root: Path) -> None:
    everything, training = (
        CocoImages(DatasetSpec("", str(root), "train")),
        CocoImages(DatasetSpec("", str(root), "train"), training=True),
    )
    check_images(everything)
    assert training.categories == {3: "bright", 7: "dark"}
    assert (len(everything), len(training)) == (4, 2), "without the empty one and the one with a crowd only"
    image, objects = everything[2]
    assert image.size == (70, 45)
    assert objects["boxes"].tolist() == [[7, 6, 21, 24], [27, 6, 41, 24]]
    assert objects["labels"].tolist() == [1, 0], "numbers of the sorted ids"
    pixels = np.asarray(image)
    assert pixels[6:24, 7:21].max() == 30
    assert pixels[6:24, 27:41].min() == 220
    assert everything[1][1]["iscrowd"].tolist() == [1, 1]
    assert len(everything[0][1]["labels"]) == 0


def test_training_images_are_flipped_with_their_boxes_and_have_no_crowds(root: Path) -> None:
    dataset = CocoImages(DatasetSpec("", str(root), "train"))
    image, target = DetectionTensors(dataset, hflip=1.0)[2]
    straight, _ = DetectionTensors(dataset)[2]
    assert torch.equal(image, straight.flip(-1))
    left, top, right, bottom = target["boxes"][0].int().tolist()
    assert image[:, top:bottom, left:right].max() == 30
    assert len(DetectionTensors(dataset, hflip=0.0)[1][1]["labels"]) == 0
    assert DetectionTensors(dataset)[1][1]["iscrowd"].tolist() == [1, 1]


def test_repaired_boxes(root: Path) -> None:
    def spoil(content: dict[str, Any]) -> None:
        for entry, box in zip(content["annotations"], ([-8, 4, 20, 99], [5, 5, 6, 0], [500, 5, 6, 5]), strict=False):
            entry["bbox"] = box

    annotate(root, spoil)
    dataset = CocoImages(DatasetSpec("", str(root), "train"), repair_boxes=True)
    assert dataset[1][1]["boxes"].tolist() == [[0, 4, 12, 60]]
    assert len(dataset[2][1]["labels"]) == 1


def test_rounding_is_cut_off_silently(root: Path) -> None:
    annotate(root, lambda content: content["annotations"][0].update(bbox=[-0.4, 4, 20, 56.5]))
    assert CocoImages(DatasetSpec("", str(root), "train"))[1][1]["boxes"][0].tolist() == pytest.approx([0, 4, 19.6, 60])


TINY = [[20.0, 5, 1e-7, 10], [1e-7, 5, 2e-7, 10], [20, 5, 10, 1e-9], [69.99999999, 5, 0.9, 10], [20, 44.9999, 5, 0.5]]


@pytest.mark.parametrize("box", TINY, ids=str)
def test_boxes_that_are_empty_in_float32(box: list[float], root: Path) -> None:
    """Also once they are flipped: 1e-7 and 3e-7 are two numbers, 70 less each of them are one."""
    annotate(root, lambda content: content["annotations"][2].update(bbox=box))
    spec = DatasetSpec("", str(root), "train")
    repaired = DetectionTensors(CocoImages(spec, repair_boxes=True), hflip=1.0)[2][1]["boxes"]
    assert len(repaired) == 1
    assert (repaired[:, 2:] > repaired[:, :2]).all()
    try:
        kept = DetectionTensors(CocoImages(spec), hflip=1.0)[2][1]["boxes"]
    except ValueError as error:
        kept = repaired
        assert "annotation 20: the box" in str(error)  # noqa: PT017 (either way is right, an empty box is not)
    assert (kept[:, 2:] > kept[:, :2]).all()


def test_synthetic_images_have_the_digits_as_objects() -> None:
    dataset = open_box_dataset(DatasetSpec("synthetic_digits", None, "val", (64, 96), 3))
    image, objects = dataset[0]
    assert image.size == (96, 64)
    assert objects["boxes"].shape == (len(objects["labels"]), 4)
    assert list(dataset.categories.values()) == [str(digit) for digit in range(10)]


# Errors


def _entry(kind: str, **values: Any) -> Change:
    return lambda content: content[kind][2].update(values)


def _without(*keys: Any) -> Change:
    def change(content: Any) -> None:
        *path, last = keys
        for key in path:
            content = content[key]
        del content[last]

    return change


def _no_objects(content: dict[str, Any]) -> None:
    for entry in content["annotations"]:
        entry["iscrowd"] = 1


def _file_name(name: str) -> Change:
    return _entry("images", file_name=name)


ANNOTATIONS: dict[str, tuple[Change, str]] = {
    "outside": (
        _entry("annotations", bbox=[60, 3, 14, 18]),
        "the box [60, 3, 14, 18] (left, top, width, height) is not",
    ),
    "no-area": (_entry("annotations", bbox=[5, 3, 14, 0]), "annotation 20: the box [5, 3, 14, 0] (left, top, width, h"),
    "three-numbers": (_entry("annotations", bbox=[5, 3, 14]), "annotation 20: the box [5, 3, 14] is not four numbers"),
    "not-a-number": (_entry("annotations", bbox=[5, 3, 14, float("nan")]), "nan] is not four numbers"),
    "infinite": (_entry("annotations", bbox=[5, 3, float("inf"), 4]), "inf, 4] is not four numbers"),
    "400-digits": (_entry("annotations", bbox=[10**400, 3, 14, 4]), "annotation 20: the box [1000"),
    "true": (_entry("annotations", bbox=[True, 3, 14, 4]), "the box [True, 3, 14, 4] is not four numbers"),
    "nested": (_entry("annotations", bbox=[[5], 3, 14, 4]), "the box [[5], 3, 14, 4] is not four numbers"),
    "category": (_entry("annotations", category_id=4), "annotation 20 has the unknown category 4"),
    "crowd": (_entry("annotations", iscrowd="no"), "annotation 20: iscrowd must be 0 or 1"),
    "crowd-digits": (_entry("annotations", iscrowd=10**400), "annotation 20: iscrowd must be 0 or 1"),
    "area": (_entry("annotations", area=float("inf")), "annotation 20: iscrowd must be 0 or 1, and area a number"),
    "area-below-0": (_entry("annotations", area=-1), "annotation 20: iscrowd must be 0 or 1, and area a number from 0"),
    "id-digits": (_entry("images", id=10**400), "images[2] has a 'id' above 9007199254740992"),
    "relative": (
        lambda content: [entry.update(bbox=[0.2, 0.3, 0.5, 0.4]) for entry in content["annotations"]],
        "expected boxes in pixels, got boxes that all lie within one pixel",
    ),
    "area-digits": (_entry("annotations", area=10**400), "annotation 20: iscrowd must be 0 or 1, and area a number"),
    "image": (_entry("annotations", image_id=9), "annotation 20 is of image 9, which is not listed"),
    "no-list": (_without("categories"), "has no list 'categories'"),
    "no-key": (_without("images", 2, "width"), "images[2] has no 'width' of type int"),
    "type": (_entry("images", height="60"), "images[2] has no 'height' of type int"),
    "twice": (_entry("images", id=101), "2 images have the id 101"),
    "empty": (lambda content: content["images"].clear(), "has no list 'images', or an empty one"),
    "crowds-only": (_no_objects, "no images with objects, crowds not counted"),
    "size": (_entry("images", width=72), "102.png: is 70x45, "),
    "turned": (_entry("images", width=45, height=70), "102.png: is 70x45, "),
    "missing-image": (_file_name("gone.jpg"), "gone.jpg"),
    "above": (_file_name("../secret.png"), "image 102: file_name: expected a file in "),
    "above-inside": (_file_name("more/../../secret.png"), "got 'more/../../secret.png'"),
    "absolute": (_file_name("/etc/passwd"), "got '/etc/passwd'"),
    "link": (_file_name("link.png"), "got 'link.png'"),
    "linked-folder": (_file_name("linked/secret.png"), "got 'linked/secret.png'"),
    "loop": (_file_name("loop.png"), "loop.png"),
    "long": (_file_name("/" + 5000 * "x"), f", got '/{98 * 'x'}'"),
    "null": (_file_name("a\0.png"), "got 'a\\x00.png'"),
    "itself": (_file_name(""), "is not a regular file"),
}


@pytest.mark.parametrize(("change", "message"), ANNOTATIONS.values(), ids=ANNOTATIONS.keys())
def test_malformed_annotations(change: Change, message: str, root: Path) -> None:
    noise((70, 45)).save(root / "secret.png")
    (root / "train" / "link.png").symlink_to(root / "secret.png")
    (root / "train" / "linked").symlink_to(root)
    (root / "train" / "loop.png").symlink_to("loop.png")
    path = annotate(root, change)
    with pytest.raises(ValueError) as raised:  # noqa: PT011 (the message is compared below)
        check_images(CocoImages(DatasetSpec("", str(root), "train")))
    assert message in str(raised.value)
    assert str(path) in str(raised.value) or str(root / "train") in str(raised.value)


@pytest.mark.parametrize("name", ["../secret.png", "/etc/hostname", "link.png"])
def test_a_file_name_that_leaves_its_folder_is_not_read_unchecked(name: str, root: Path) -> None:
    noise((70, 45)).save(root / "secret.png")
    (root / "train" / "link.png").symlink_to(root / "secret.png")
    annotate(root, _file_name(name))
    with pytest.raises(ValueError, match="image 102: file_name: expected a file in"):
        CocoImages(DatasetSpec("", str(root), "train"))[2]


def test_folders_inside_and_a_linked_split(root: Path, tmp_path: Path) -> None:
    (root / "train").rename(tmp_path / "store")
    (root / "train").symlink_to(tmp_path / "store")
    (tmp_path / "store" / "a:b").mkdir()
    (tmp_path / "store" / "102.png").rename(tmp_path / "store" / "a:b" / "..102.png")
    annotate(root, _file_name("a:b/..102.png"))
    check_images(CocoImages(DatasetSpec("", str(root), "train")))


TEXTS = {"no-json": b"{", "a-list": b"[]", "deep": b"[" * 100_000, "bytes": b"\xff\xfe\xfd", "digits": b"9" * 5000}
TEXTS["key-twice"] = b'{"images": [], "images": []}'


@pytest.mark.parametrize("content", TEXTS.values(), ids=TEXTS.keys())
def test_files_that_are_no_annotations(content: bytes, root: Path) -> None:
    (root / "annotations" / "instances_train.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"instances_train\.json: (is not JSON|has no list)"):
        CocoImages(DatasetSpec("", str(root), "train"))


def test_a_missing_file(root: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"instances_test\.json: does not exist"):
        CocoImages(DatasetSpec("", str(root), "test"))


def test_other_categories() -> None:
    with pytest.raises(ValueError, match=r"here: its classes are not those of there; unknown: grey \(9\)"):
        check_same_classes(with_ids({1: "a", 9: "grey"}), with_ids({1: "a"}), "here", "there")


def test_boxes_of_images_as_viewers_show_them(root: Path) -> None:
    with Image.open(root / "train" / "102.png") as image:
        oriented(image.transpose(Image.Transpose.ROTATE_90), root / "train" / "102.png", 6)
    with pytest.raises(ValueError, match=r"102\.png: is 45x70, .* says 70x45; .*--exif-orientation, .* applies it"):
        check_images(CocoImages(DatasetSpec("", str(root), "train")))
    turned = CocoImages(DatasetSpec("", str(root), "train", exif_orientation=True))
    check_images(turned)
    shown, objects = turned[2]
    left, top, right, bottom = objects["boxes"][0].astype(int)
    assert np.asarray(shown)[top:bottom, left:right].max() == 30


@pytest.mark.parametrize("spoil", [lambda path: noise((9, 9)).save(path), lambda path: path.write_bytes(b"")])
def test_what_was_not_checked_is_found_when_read(spoil: Callable[[Path], Any], root: Path) -> None:
    spoil(root / "train" / "103.png")
    dataset = CocoImages(DatasetSpec("", str(root), "train"))
    with pytest.raises(ValueError, match=r"103\.png"):
        [dataset[n] for n in range(len(dataset))]
