"""Images for training and evaluation: timm's datasets and the built-in digits, checked before anything starts.

All randomness of a training image comes from (seed, epoch, index), and the order of an epoch from (seed, epoch). So
training sees the same images for any number of processes and workers, and after an interruption at any step.
"""

import io
import random
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset
from timm.data.loader import fast_collate
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from dfformer.data.class_folders import ClassFolders, ClassTar
from dfformer.data.files import DatasetSpec, ImageDataset, Samples, image_mode, orientation_note, read_image
from dfformer.utils.device import DistContext
from dfformer.utils.extras import extra
from dfformer.utils.suggest import did_you_mean
from dfformer.utils.text import abbreviate, echo

DIGITS = "digits"


class DigitImages(ImageDataset[tuple[Image.Image, int, str]]):
    """scikit-learn's 1,797 handwritten digits of 8x8, enlarged to 32x32, split 80:20 with equal shares of each class.

    Args:
        split: train or val.
    """

    def __init__(self, split: str) -> None:
        with extra("train"):
            from sklearn.datasets import load_digits
            from sklearn.model_selection import train_test_split
        if split not in ("train", "val"):
            raise ValueError(f"split: expected train or val, got {split!r}")
        data = load_digits()
        parts = train_test_split(np.arange(len(data.target)), test_size=0.2, stratify=data.target, random_state=0)
        part = parts[split == "val"]
        images = torch.tensor(data.images[part], dtype=torch.float32)[:, None] / 16
        images = F.interpolate(images, size=(32, 32), mode="bilinear", align_corners=False)
        self.images = (255 * images[:, 0]).round().to(torch.uint8).numpy()
        self.labels: list[int] = data.target[part].tolist()
        self.classes = [str(digit) for digit in range(10)]

    def __getitem__(self, index: int) -> tuple[Image.Image, int, str]:
        """The image, its label, and a name for errors."""
        return Image.fromarray(self.images[index]), self.labels[index], f"digit {index}"


def open_dataset(spec: DatasetSpec, channels: int = 3, download: bool = False) -> "Images":
    """A map-style dataset of (image, label), with a settable ``transform``.

    Args:
        spec: its name is "" for class folders or a .tar of them (its root contains the split, as a folder or a .tar
            file), "digits", or timm's name of another dataset.
        channels: number of channels of the model's images, see `dfformer.data.files.image_mode`.

    Raises:
        ValueError: the dataset or split does not exist, is streamed or has no images, a class folder has no images, or
            images cannot have this number of channels.
    """
    mode, name = image_mode(channels), spec.name
    if name == DIGITS:
        return Images(DigitImages(spec.split), mode, spec.exif_orientation)
    if name and not name.lower().startswith(("torch/", "hfds/")):  # timm would read any other name as a folder
        raise ValueError(
            f"dataset: expected '' for class folders, {DIGITS!r}, or timm's 'torch/...' or 'hfds/...', got {name!r}"
            f"{did_you_mean(name, [DIGITS])}"
        )
    folder = spec.given_root()
    source = LibraryDataset(name, folder, spec.split, download) if name else _class_images(folder, spec.split)
    return Images(source, mode, spec.exif_orientation)


def _class_images(root: Path, split: str) -> ClassFolders | ClassTar:
    folder, tar = root / split, root / f"{split}.tar"
    if not root.is_dir():
        raise ValueError(f"root: {root} is not a folder")
    if folder.is_dir():
        return ClassFolders(folder)
    if not tar.is_file():
        raise ValueError(f"{root}: has neither a folder {split!r} nor {tar.name}")
    try:
        return ClassTar(tar)
    except tarfile.TarError as error:
        raise ValueError(f"{tar}: {error}; expected a .tar file without compression, links and holes") from error


class LibraryDataset(ImageDataset[tuple[Any, int, str]]):
    """A map-style dataset of torchvision or Hugging Face, opened by timm.

    `check` finds nothing, because images are only read when they are used.
    """

    def __init__(self, name: str, root: Path, split: str, download: bool) -> None:
        try:
            self.images = create_dataset(name, root=str(root), split=split, search_split=False, download=download)
        except (AssertionError, RuntimeError, ImportError, OSError) as error:
            raise ValueError(f"{root}, split {split}: {error or 'no such dataset'}") from error
        if len(self.images) == 0:
            raise ValueError(f"{root}, split {split}: no images")
        self.reader: Any = getattr(self.images, "reader", None)  # Hugging Face's datasets have one
        self.classes = _class_names(self.reader or self.images)

    def __getitem__(self, index: int) -> tuple[Any, int, str]:
        """A file or an image, its label, and a name for errors."""
        name = f"image {index}"
        if self.reader is None:
            try:
                return (*self.images[index], name)
            except Exception as error:  # torchvision decodes here
                raise ValueError(f"{name}: {error or type(error).__name__}") from error
        file, label = self.reader[index]  # timm's dataset would silently return the next image for a damaged one
        with file:
            return io.BytesIO(file.read()), label, self.reader.filename(index, absolute=True) or name


Source = ClassFolders | ClassTar | DigitImages | LibraryDataset


class Images(Samples):
    """``source`` as pairs of image and label, with a settable ``transform`` of the image.

    An image that cannot be read raises a ValueError that names it.

    Args:
        mode: the PIL mode that images are converted to.
        exif_orientation: apply images' EXIF orientation.
    """

    collate = staticmethod(fast_collate)

    def __init__(self, source: Source, mode: str, exif_orientation: bool) -> None:
        self.images, self.mode, self.classes = source, mode, source.classes
        source.exif_orientation = exif_orientation
        self.transform: Any = None

    def __getitem__(self, index: int) -> tuple[Any, int]:
        content, label, name = self.images[index]
        image = read_image(content, self.mode, name, self.images.exif_orientation)
        try:
            return (self.transform(image) if self.transform else image), label
        except Exception as error:
            raise ValueError(f"{name}: {error or type(error).__name__}") from error

    @staticmethod
    def ignored_target(target: int) -> int:
        return -1


def _class_names(dataset: Any) -> list[str] | None:
    """The class names of a dataset, or of one of timm's readers, in the order of their labels; None if unknown."""
    mapping = getattr(dataset, "class_to_idx", None) or getattr(dataset, "class_name_to_idx", None)
    if mapping:
        return sorted(mapping, key=mapping.__getitem__)
    names = getattr(dataset, "classes", None)
    return list(map(str, names)) if names else None


def check_same_classes(found: Sequence[str] | None, expected: Sequence[str] | None, where: str | Path, of: str) -> None:
    """Raises ValueError unless both are the same, because labels are positions in these lists; None is not known."""
    if found is None or expected is None or list(found) == list(expected):
        return
    missing, unknown = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    raise ValueError(
        f"{where}: its classes are not those of {of}"
        + (f"; missing: {abbreviate(missing)}" if missing else "")
        + (f"; unknown: {abbreviate(unknown)}" if unknown else "")
        + ("" if missing or unknown else "; their order differs")
    )


def check_images(*datasets: Any) -> None:
    """Checks the files of datasets, and reports images with an EXIF orientation that is not applied.

    Raises:
        ValueError: naming the files that cannot be used, and why.
    """
    oriented = [image for dataset in datasets for image in dataset.check() if not dataset.exif_orientation]
    if note := orientation_note(oriented):
        echo(note, file=sys.stderr)


def seed_everything(*numbers: int) -> None:
    """Seeds Python, numpy and torch (all devices) from several numbers together."""
    state = np.random.SeedSequence(numbers).generate_state(3)
    random.seed(int(state[0]))
    np.random.seed(state[1])  # noqa: NPY002 (timm's augmentation draws from the global generator)
    torch.manual_seed(int(state[2]))


class _Seeded(Dataset):
    """``samples`` indexed by (epoch, index), with augmentation seeded by (seed, epoch, index)."""

    def __init__(self, samples: Samples, seed: int) -> None:
        self.samples, self.seed = samples, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, Any]:
        seed_everything(self.seed, *key)
        return self.samples[key[1]]


class GlobalBatches:
    """Batches of (epoch, index) for one of several processes.

    They are slices of global batches, which do not depend on the number of processes. Set ``epoch`` and ``first_step``
    before iterating. If the last images of an epoch are too few for a batch, they are left out.

    Args:
        images: number of images in the dataset.
        global_batch: images per optimizer step, over all processes and passes.
        accumulation: passes per step; each has a batch of its own.
    """

    def __init__(self, images: int, global_batch: int, accumulation: int, context: DistContext, seed: int) -> None:
        parts = context.world * accumulation
        if global_batch % parts:
            raise ValueError(
                f"optim.global_batch: expected a multiple of {context.world} processes x {accumulation} accumulated "
                f"passes, got {global_batch}"
            )
        if images < global_batch:
            raise ValueError(
                f"optim.global_batch: expected at most {images}, the images to train on, got {global_batch}"
            )
        self.images, self.batch, self.accumulation = images, global_batch // parts, accumulation
        self.context, self.seed = context, seed
        self.steps = images // global_batch
        self.epoch = self.first_step = 0

    def __len__(self) -> int:
        return (self.steps - self.first_step) * self.accumulation

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        shuffled = np.random.default_rng([self.seed, self.epoch]).permutation(self.images)
        order = torch.from_numpy(shuffled).split(self.batch)
        parts = self.context.world * self.accumulation
        for step in range(self.first_step, self.steps):
            for part in range(self.accumulation):
                indices = order[step * parts + part * self.context.world + self.context.rank]
                yield [(self.epoch, index) for index in indices.tolist()]


def training_loader(samples: Samples, batches: GlobalBatches, workers: int, context: DistContext) -> DataLoader:
    """``samples`` in the order of ``batches``."""
    return DataLoader(
        _Seeded(samples, batches.seed),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=samples.collate,
        pin_memory=context.device.type == "cuda",
        persistent_workers=workers > 0,
    )


class _Padded(Dataset):
    """``samples``, extended by repeated images whose targets do not count, so that all processes get equally many."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image, target = self.samples[index % len(self.samples)]
        return image, target if index < len(self.samples) else self.samples.ignored_target(target)


def evaluation_loader(samples: Samples, workers: int, context: DistContext, batch_size: int) -> DataLoader:
    """This process's part of ``samples`` in their order: every ``world``-th from ``rank`` on; equally many for all."""
    each = -(-len(samples) // context.world)
    return DataLoader(
        _Padded(samples),
        batch_size=batch_size,
        sampler=range(context.rank, each * context.world, context.world),
        num_workers=workers,
        collate_fn=samples.collate,
        pin_memory=context.device.type == "cuda",
    )
