"""Images for training and evaluation: timm's datasets and the built-in digits, checked before anything starts.

All randomness of a training image comes from (seed, epoch, index), and the order of an epoch from (seed, epoch). So the
same images come whatever the number of processes and workers, and wherever an interrupted run goes on.
"""

import os
import random
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset
from timm.data.loader import fast_collate
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset

DIGITS = "digits"
DIGITS_MEAN, DIGITS_STD = 0.305, 0.376  # of the digits, scaled to 0..1
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what opening an image file may raise
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}  # the last marker of a file that is not cut off

Item = TypeVar("Item")
Found = TypeVar("Found")


@dataclass
class Digits:
    """Handwritten digits as (N,1,32,32) images scaled to 0..1, with labels (N,)."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def load_digit_images(seed: int) -> Digits:
    """scikit-learn's 1,797 digits of 8x8, enlarged to 32x32, split 80:20 with equal shares of each class."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise RuntimeError("the digits come with scikit-learn: pip install 'dfformer[train]'") from error
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    images = F.interpolate(images, size=(32, 32), mode="bilinear", align_corners=False)
    train, test = train_test_split(np.arange(len(images)), test_size=0.2, stratify=data.target, random_state=seed)
    labels = torch.tensor(data.target)
    return Digits(images[train], labels[train], images[test], labels[test])


class DigitImages(Dataset):
    """The digits as pairs of grey PIL image and label, the way timm's datasets give theirs; split: train or val."""

    def __init__(self, split: str) -> None:
        digits = load_digit_images(seed=0)
        splits = {"train": (digits.train_x, digits.train_y), "val": (digits.test_x, digits.test_y)}
        if split not in splits:
            raise ValueError(f"split: got {split!r}, the digits have train and val")
        images, labels = splits[split]
        self.images = (255 * images[:, 0]).round().to(torch.uint8).numpy()
        self.labels: list[int] = labels.tolist()
        self.classes = [str(digit) for digit in range(10)]
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.fromarray(self.images[index])
        return (self.transform(image) if self.transform else image), self.labels[index]


def open_dataset(name: str, root: str | None, split: str, channels: int = 3, download: bool = False) -> Any:
    """A map-style dataset of (image, label), with a settable ``transform``.

    Args:
        name: "" for class folders or a .tar of them, "digits", or timm's name of another dataset.
        root: where it is; for "", the folder that has the split, as a folder or a .tar file.
        channels: of the model's images; 1 converts to grey.

    Raises:
        ValueError: no such split, no images in it, class folders without images, or a streamed dataset.
    """
    if name == DIGITS:
        return DigitImages(split)
    path = str(given_root(root) if name else _split_path(given_root(root), split))
    where = f"{root}, split {split}"
    try:
        dataset = create_dataset(name, root=path, split=split, search_split=False, download=download)
    except (AssertionError, RuntimeError, ImportError, OSError, tarfile.TarError) as error:
        raise ValueError(f"{where}: {error or 'no such dataset'}") from error
    if isinstance(dataset, IterableDataset):
        raise ValueError(f"{name}: streamed datasets have no order to resume in; accepted are map-style ones")
    if len(dataset) == 0:
        raise ValueError(f"{where}: no images")
    return Images(dataset, "L" if channels == 1 else "RGB")


def given_root(root: str | None) -> Path:
    """Where data are; ValueError if nothing says that."""
    if root is None:
        raise ValueError("root: give the folder of the data: --data.root in training, else --root")
    return Path(root)


class Images(Dataset):
    """``dataset`` of timm or torchvision as pairs of image and label, with a settable ``transform`` of the image.

    An image that cannot be read is an error that names it: timm's own dataset would give the next one in its place.

    Args:
        mode: PIL's, to which images are converted.
    """

    def __init__(self, dataset: Any, mode: str) -> None:
        self.dataset, self.mode = dataset, mode
        self.reader: Any = getattr(dataset, "reader", None)  # timm's
        self.classes = class_names(self.reader or dataset)
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self._read(index) if self.reader else self.dataset[index]
        image = image.convert(self.mode)
        return (self.transform(image) if self.transform else image), label

    def _read(self, index: int) -> tuple[Image.Image, int]:
        file, label = self.reader[index]
        with file, opened(file, self.reader.filename(index, absolute=True) or f"image {index}") as image:
            image.load()
            return image, label


def _split_path(root: Path, split: str) -> Path:
    """The folder or .tar file of a split; timm would take ``root`` itself for one that is not there."""
    folder, tar = root / split, root / f"{split}.tar"
    if not root.is_dir():
        raise ValueError(f"root: {root} is not a folder")
    if tar.is_file() and not folder.is_dir():
        return tar
    if not folder.is_dir():
        raise ValueError(f"{root}: has neither a folder {split!r} nor {tar.name}")
    classes = [entry for entry in sorted(folder.iterdir()) if entry.is_dir()]
    if not classes:
        raise ValueError(f"{folder}: has no class folders")
    for entry in classes:
        if not any(path.is_file() for path in entry.rglob("*")):
            raise ValueError(f"{entry}: this class folder has no images")
    return folder


def class_names(dataset: Any) -> list[str] | None:
    """Names of the classes of a dataset, or of one of timm's readers, in the order of their labels; or None."""
    mapping = getattr(dataset, "class_to_idx", None) or getattr(dataset, "class_name_to_idx", None)
    if mapping:
        return sorted(mapping, key=mapping.__getitem__)
    names = getattr(dataset, "classes", None)
    return list(map(str, names)) if names else None


def check_same_classes(train: Any, val: Any, where: str) -> None:
    """Raises ValueError unless both splits have the same classes: labels are positions in the sorted list of them."""
    expected, found = class_names(train), class_names(val)
    if expected is None or found is None or expected == found:
        return
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    raise ValueError(
        f"{where}: its classes are not those of the training images"
        + (f"; missing: {some(missing)}" if missing else "")
        + (f"; not in training: {some(extra)}" if extra else "")
    )


def check_images(dataset: Any) -> None:
    """`check_image` of every file of a folder dataset."""
    samples = getattr(getattr(dataset, "reader", None), "samples", None)
    if isinstance(samples, list):  # otherwise an archive, or no files at all
        check_each(check_image, [Path(path) for path, _ in samples])


def check_each(check: Callable[[Item], Found], items: Sequence[Item]) -> list[Found]:
    """What ``check`` returns for each of a dataset's images; one ValueError with those it raises, if it does."""
    problems: list[str] = []

    def attempt(item: Item) -> Found | None:
        try:
            return check(item)
        except ValueError as error:
            problems.append(str(error))
            return None

    with ThreadPoolExecutor(16) as pool:
        found: list[Any] = list(pool.map(attempt, items))
    if problems:
        raise ValueError(f"{len(problems)} of {len(items)} images cannot be used: {some(sorted(problems))}")
    return found


def check_image(path: Path) -> tuple[int, int]:
    """The size (W,H) of an image file; ValueError for one that is no image or is cut off.

    Read are its header and its end, and all of it where the end does not show that it is whole.
    """
    with opened(path) as image:
        marker = _ENDS.get(image.format or "")
        if marker is None or marker not in _tail(path):
            image.load()
        return image.size


def _tail(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 64))
        return file.read()


@contextmanager
def opened(file: Path | IO[bytes], name: Path | str = "") -> Iterator[Image.Image]:
    """An image, not decoded yet. What cannot be read of it, then too, is a ValueError that names it."""
    name = str(name or file)
    try:
        with Image.open(file) as image:
            yield image
    except UNREADABLE as error:
        raise ValueError(str(error) if name in str(error) else f"{name}: {error}") from error


def some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def seed_everything(*numbers: int) -> None:
    """Seeds Python, numpy and torch (all devices) from several numbers at once."""
    state = np.random.SeedSequence(numbers).generate_state(3)
    random.seed(int(state[0]))
    np.random.seed(state[1])  # noqa: NPY002 (timm's augmentation draws from the global generator)
    torch.manual_seed(int(state[2]))


class SeededImages(Dataset):
    """``dataset`` indexed by (epoch, index), its augmentation drawn from (seed, epoch, index)."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, int]:
        seed_everything(self.seed, *key)
        return self.dataset[key[1]]


class GlobalBatches:
    """Batches of (epoch, index) for one of several processes: slices of global batches that do not depend on how many.

    Set ``epoch`` and ``first_step`` before iterating. The last images of an epoch, too few for a batch, are left out.

    Args:
        images: in the dataset.
        global_batch: images an optimiser step, over all processes and passes.
        accumulation: passes a step; as many batches come.
        rank, world: this process and how many there are.
    """

    def __init__(self, images: int, global_batch: int, accumulation: int, rank: int, world: int, seed: int) -> None:
        parts = world * accumulation
        if global_batch % parts:
            raise ValueError(
                f"optim.global_batch: got {global_batch}, which {world} processes x {accumulation} accumulated passes "
                f"do not divide"
            )
        if images < global_batch:
            raise ValueError(f"optim.global_batch: got {global_batch}, the training split has only {images} images")
        self.images, self.batch, self.accumulation = images, global_batch // parts, accumulation
        self.rank, self.world, self.seed = rank, world, seed
        self.steps = images // global_batch
        self.epoch = self.first_step = 0

    def __len__(self) -> int:
        return (self.steps - self.first_step) * self.accumulation

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        shuffled = np.random.default_rng([self.seed, self.epoch]).permutation(self.images)
        order = torch.from_numpy(shuffled).split(self.batch)
        parts = self.world * self.accumulation
        for step in range(self.first_step, self.steps):
            for part in range(self.accumulation):
                indices = order[step * parts + part * self.world + self.rank]
                yield [(self.epoch, index) for index in indices.tolist()]


Collate = Callable[[list[Any]], Any]


def training_loader(
    dataset: Any, batches: GlobalBatches, workers: int, pin_memory: bool, collate: Collate = fast_collate
) -> DataLoader:
    """Pairs of an image and its truth in the order of ``batches``, put together by ``collate``: timm's gives uint8
    images (B,channels,H,W) and labels (B,)."""
    return DataLoader(
        SeededImages(dataset, batches.seed),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
    )


def _no_label(truth: Any) -> int:
    return -1


class _Padded(Dataset):
    """``dataset`` going on past its end with images again, without truth: equally many for each process."""

    def __init__(self, dataset: Any, surplus: Callable[[Any], Any]) -> None:
        self.dataset, self.surplus = dataset, surplus

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image, truth = self.dataset[index % len(self.dataset)]
        return image, truth if index < len(self.dataset) else self.surplus(truth)


def evaluation_loader(
    dataset: Any,
    batch_size: int,
    workers: int,
    pin_memory: bool,
    rank: int = 0,
    world: int = 1,
    collate: Collate = fast_collate,
    surplus: Callable[[Any], Any] = _no_label,
) -> DataLoader:
    """Images and their truth in the dataset's order, every ``world``-th from ``rank`` on.

    All processes get equally many; of what that needs beyond the dataset ``surplus`` changes the truth, by default to
    the label -1, so that it is not counted.
    """
    each = -(-len(dataset) // world)
    return DataLoader(
        _Padded(dataset, surplus),
        batch_size=batch_size,
        sampler=range(rank, each * world, world),
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_memory,
    )
