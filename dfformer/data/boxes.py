"""Images with boxes around objects: COCO's format and synthetic digits, checked and prepared."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from dfformer.data import synthetic_digits
from dfformer.data.files import DatasetSpec, FileDataset, ImageDataset, Samples, check_image, read_image, real_path
from dfformer.utils.io import unique_keys
from dfformer.utils.text import abbreviate

# The required fields of each entry of an annotation file, with their types.
_FIELDS: dict[str, dict[str, type]] = {
    "categories": {"id": int, "name": str},
    "images": {"id": int, "file_name": str, "width": int, "height": int},
    "annotations": {"id": int, "image_id": int, "category_id": int, "bbox": list},
}
_ROUNDING = 1.0  # pixels by which a box may extend beyond its image before that counts as a mistake
_MIN_SIDE = 0.01  # pixels; a smaller box may become empty as float32, or when flipped or resized
_MAX_NUMBER = 1e9  # number in a box
_MAX_INTEGER = 2**53  # that a checkpoint can keep


# The ``n`` objects of an image, by the names of torchvision and torchmetrics. ``boxes`` (n,4) are (left, top, right,
# bottom) in pixels, ``labels`` (n,) are class numbers. ``iscrowd`` (n,) is 1 for a box around many objects. ``area``
# (n,) is the area of the object itself, by which COCO's metrics distinguish small from large objects.
_DTYPES = {"boxes": np.float32, "labels": np.int64, "iscrowd": np.int64, "area": np.float32}
Objects = dict[str, np.ndarray]
Target = dict[str, Tensor]


class BoxDataset(ImageDataset[tuple[Image.Image, Objects]]):
    """RGB images and their objects."""

    categories: dict[int, str]  # COCO's id and name of each class, in the order of their labels


class CocoImages(BoxDataset, FileDataset[tuple[Image.Image, Objects]]):
    """``root/annotations/instances_SPLIT.json`` in COCO's format, with the images it lists in ``root/SPLIT``.

    Args:
        repair_boxes: clip boxes to the image and leave out boxes without area, instead of refusing them.
        training: leave out images without objects; crowds do not count as objects.

    Raises:
        ValueError, FileNotFoundError: naming the file, the entry and what is wrong with it.
    """

    def __init__(self, spec: DatasetSpec, repair_boxes: bool = False, training: bool = False) -> None:
        super().__init__(spec)
        root = spec.folder("detection", "COCO's format", synthetic_digits.NAME)
        self.file, self.folder = root / "annotations" / f"instances_{spec.split}.json", root / spec.split
        content = _read(self.file)
        names = {entry["id"]: entry["name"] for entry in content["categories"]}
        self.categories: dict[int, str] = dict(sorted(names.items()))
        sizes = {entry["id"]: (entry["width"], entry["height"]) for entry in content["images"]}
        boxes, faults = _boxes(content["annotations"], sizes, self.categories, repair_boxes)
        if faults:
            raise ValueError(f"{self.file}: {len(faults)} annotations cannot be used: {abbreviate(faults)}")
        self.images = [
            (entry["id"], entry["file_name"], sizes[entry["id"]], _stack(boxes[entry["id"]]))
            for entry in content["images"]
        ]
        if training:
            self.images = [image for image in self.images if not image[3]["iscrowd"].all()]
        if all(objects["iscrowd"].all() for *_, objects in self.images):
            raise ValueError(f"{self.file}: no images with objects, crowds not counted")
        if all((objects["boxes"] <= 1).all() for *_, objects in self.images):
            raise ValueError(f"{self.file}: expected boxes in pixels, got boxes that all lie within one pixel")

    def __getitem__(self, index: int) -> tuple[Image.Image, Objects]:
        image = read_image(self._path(index), "RGB", exif_orientation=self.exif_orientation)
        self._check_size(index, image.size)
        return image, self.images[index][3]

    def check_file(self, index: int) -> bool:
        info = check_image(self._path(index), self.exif_orientation)
        self._check_size(index, info.size)
        return info.has_orientation

    def _path(self, index: int) -> Path:
        """The file of an image; ValueError if it is not in the split's folder after links are followed."""
        number, name, *_ = self.images[index]
        path, given = self.folder / name, Path(name)
        outside = given.anchor or ".." in given.parts or "\0" in name
        if outside or not real_path(path).is_relative_to(real_path(self.folder)):
            raise ValueError(
                f"{self.file}: image {number}: file_name: expected a file in {self.folder}, got {name[:99]!r}"
            )
        return path

    def _check_size(self, index: int, found: tuple[int, int]) -> None:
        said = self.images[index][2]
        if found != said:
            sizes = "is {}x{}, {} says {}x{}".format(*found, self.file, *said)
            raise ValueError(f"{self._path(index)}: {sizes}{self.size_hint(found, said)}")


def _read(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The lists of an annotation file, checked: entries have the required fields and unique ids."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: does not exist")
    try:
        content = json.loads(path.read_bytes(), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not JSON: {error}") from error
    for kind, fields in _FIELDS.items():
        entries = content.get(kind) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not entries:
            raise ValueError(f"{path}: has no list {kind!r}, or an empty one")
        for n, entry in enumerate(entries):
            for field, wanted in fields.items():
                if not isinstance(entry, dict) or type(entry.get(field)) is not wanted:
                    raise ValueError(f"{path}: {kind}[{n}] has no {field!r} of type {wanted.__name__}")
                if wanted is int and abs(entry[field]) > _MAX_INTEGER:
                    raise ValueError(f"{path}: {kind}[{n}] has a {field!r} above {_MAX_INTEGER}")
        [(most_common, times)] = Counter(entry["id"] for entry in entries).most_common(1)
        if times > 1:
            raise ValueError(f"{path}: {times} {kind} have the id {most_common}")
    return content


def _boxes(
    annotations: list[dict[str, Any]], sizes: dict[int, tuple[int, int]], categories: dict[int, str], repair: bool
) -> tuple[dict[int, list[tuple[Any, ...]]], list[str]]:
    """The objects of each image as (box, label, crowd, area), and the faults of annotations."""
    label = {category: n for n, category in enumerate(categories)}
    found: dict[int, list[tuple[Any, ...]]] = {image: [] for image in sizes}
    faults = []
    for entry in annotations:
        name, image, category, bbox = entry["id"], entry["image_id"], entry["category_id"], entry["bbox"]
        crowd, area = entry.get("iscrowd", 0), entry.get("area", 0)
        if image not in sizes:
            faults.append(f"annotation {name} is of image {image}, which is not listed")
        elif category not in categories:
            faults.append(f"annotation {name} has the unknown category {category}")
        elif len(bbox) != 4 or not all(map(_is_number, bbox)):
            faults.append(f"annotation {name}: the box {str(bbox)[:99]} is not four numbers")
        elif crowd not in (0, 1) or not (_is_number(area) and area >= 0):
            faults.append(f"annotation {name}: iscrowd must be 0 or 1, and area a number from 0")
        else:
            box, beyond = _clip(bbox, sizes[image])
            has_area = min(box[2] - box[0], box[3] - box[1]) >= _MIN_SIDE
            if has_area and (repair or beyond <= _ROUNDING):
                found[image].append((box, label[category], crowd, entry.get("area", bbox[2] * bbox[3])))
            elif not repair:
                inside = "is not inside its image of {}x{}".format(*sizes[image])
                what = "has no area" if min(bbox[2:]) < _MIN_SIDE else inside
                faults.append(f"annotation {name}: the box {bbox} (left, top, width, height) {what}")
    return found, faults


def _is_number(value: Any) -> bool:
    """Whether a value can be a coordinate: not NaN, not infinite, without hundreds of digits."""
    return type(value) in (int, float) and -_MAX_NUMBER <= value <= _MAX_NUMBER


def _clip(bbox: list[float], size: tuple[int, int]) -> tuple[tuple[float, ...], float]:
    """The corners of a box (left, top, width, height), clipped to the image, and how far it extends beyond."""
    left, top, width, height = bbox
    corners = (left, top, left + width, top + height)
    clipped = tuple(min(max(value, 0), limit) for value, limit in zip(corners, size * 2, strict=True))
    return clipped, max(abs(a - b) for a, b in zip(corners, clipped, strict=True))


def _stack(objects: list[tuple[Any, ...]]) -> Objects:
    columns = zip(*objects, strict=True) if objects else [()] * len(_DTYPES)
    stacked = {name: np.array(column, _DTYPES[name]) for name, column in zip(_DTYPES, columns, strict=True)}
    return {**stacked, "boxes": stacked["boxes"].reshape(-1, 4)}


class SyntheticBoxes(BoxDataset):
    """Synthetic images of digits, of ten classes."""

    categories: dict[int, str] = dict(enumerate(synthetic_digits.CLASSES))  # noqa: RUF012 (never changed)

    def __init__(self, spec: DatasetSpec) -> None:
        self.images = synthetic_digits.SyntheticDigits(spec.split, spec.img_size, spec.synthetic_images)

    def __getitem__(self, index: int) -> tuple[Image.Image, Objects]:
        sample = self.images[index]
        area = (sample.boxes[:, 2:] - sample.boxes[:, :2]).prod(1)
        crowd = np.zeros_like(sample.labels)
        return sample.image, {"boxes": sample.boxes, "labels": sample.labels, "iscrowd": crowd, "area": area}


def open_box_dataset(spec: DatasetSpec, repair_boxes: bool = False, training: bool = False) -> BoxDataset:
    """Images and boxes in COCO's format, or synthetic images of digits; for the flags see `CocoImages`."""
    if spec.name == synthetic_digits.NAME:
        return SyntheticBoxes(spec)
    return CocoImages(spec, repair_boxes, training)


def with_ids(categories: dict[int, str]) -> list[str]:
    """The names of categories with their ids, to compare and to show."""
    return [f"{name} ({number})" for number, name in categories.items()]


class DetectionTensors(Samples):
    """``images`` as pairs of an image uint8 (3,H,W) and its target. In training, without crowds and randomly flipped.

    Batches are lists, because images differ in size and targets in length.

    Args:
        hflip: probability of a horizontal flip; None for evaluation.
    """

    def __init__(self, images: BoxDataset, hflip: float | None = None) -> None:
        self.images, self.training = images, hflip is not None
        self.flip = v2.RandomHorizontalFlip(hflip or 0.0)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        image, objects = self.images[index]
        if self.training:
            objects = {name: values[objects["iscrowd"] == 0] for name, values in objects.items()}
        boxes = tv_tensors.BoundingBoxes(objects["boxes"], format="XYXY", canvas_size=(image.height, image.width))
        pixels, flipped = self.flip(v2.functional.to_image(image), boxes)
        target = {name: torch.from_numpy(values) for name, values in objects.items()}
        return pixels.as_subclass(Tensor), {**target, "boxes": flipped.as_subclass(Tensor)}

    @staticmethod
    def collate(samples: list[tuple[Tensor, Any]]) -> tuple[list[Tensor], list[Any]]:
        images, targets = zip(*samples, strict=True)
        return list(images), list(targets)

    @staticmethod
    def ignored_target(target: Target) -> None:
        return None
