"""Finds and reads image files. They are untrusted: any fault of a file is an error that names it."""

import errno
import io
import os
import re
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path, PurePath
from typing import IO, Any, Generic, NamedTuple, TypeVar

import numpy as np
from PIL import ExifTags, Image, ImageOps, TiffImagePlugin
from torch.utils.data import default_collate

from dfformer.utils.text import abbreviate

IMAGE_SUFFIXES = {
    *(".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
    *(".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
}
# Images all the same: they are never left out without a word.
_UNSUPPORTED_SUFFIXES = {
    *(".arw", ".cr2", ".cr3", ".dds", ".dng", ".exr", ".hdr", ".heic", ".heif"),
    *(".jxl", ".nef", ".orf", ".pcx", ".psd", ".raf", ".rw2", ".tga"),
}
# Pillow supports more formats, but some run other programs (EPS) or cannot be decoded.
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
_APPLY_ORIENTATION = "--exif-orientation, in training --data.exif_orientation true,"
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}  # the last marker of a complete file

Item = TypeVar("Item")
Result = TypeVar("Result")
Sample = TypeVar("Sample", covariant=True)


class DatasetSpec(NamedTuple):
    """A split of a dataset."""

    name: str  # "" for files in ``root``, or the name of a built-in dataset
    root: str | Path | None
    split: str
    img_size: tuple[int, int] = (224, 224)  # of synthetic images
    synthetic_images: int = 1  # their number
    exif_orientation: bool = False  # whether images' EXIF orientation is applied
    option: str = "--root"  # that gives ``root`` on the command line

    def given_root(self) -> Path:
        """``root``; ValueError if it is not given."""
        if self.root is None:
            raise ValueError(f"root: give the folder of the data, {self.option} FOLDER")
        return Path(self.root)

    def folder(self, task: str, files: str, built_in: str) -> Path:
        """``root``; ValueError if another dataset is named, or if it is not given."""
        if self.name:
            raise ValueError(f"dataset: for {task}, expected '' ({files}) or {built_in!r}, got {self.name!r}")
        return self.given_root()


class ImageDataset(ABC, Generic[Sample]):
    """The base of a task's datasets."""

    images: Any  # what the images are read or made from, one entry each: paths, entries of an annotation file, arrays
    exif_orientation = False  # whether images' EXIF orientation is applied

    def __len__(self) -> int:
        return len(self.images)

    @abstractmethod
    def __getitem__(self, index: int) -> Sample: ...

    def check(self) -> list[bool]:
        """For each file, whether it has an EXIF orientation; here [], because there are no files.

        Raises ValueError naming the files that cannot be used, and why.
        """
        return []


class FileDataset(ImageDataset[Sample]):
    """The base of datasets of files."""

    def __init__(self, spec: DatasetSpec) -> None:
        self.exif_orientation = spec.exif_orientation

    @abstractmethod
    def check_file(self, index: int) -> bool:
        """Whether a sample has an EXIF orientation; raises ValueError if its files cannot be used."""

    def check(self) -> list[bool]:
        return check_each(self.check_file, range(len(self)))

    def size_hint(self, found: tuple[int, int], expected: tuple[int, int]) -> str:
        """The end of a message about an image of another size than expected: what may help."""
        if self.exif_orientation or found != expected[::-1]:
            return ""
        return f"; if the image has an EXIF orientation, {_APPLY_ORIENTATION} applies it"


class Samples(ImageDataset[tuple[Any, Any]]):
    """The base of what a task trains and evaluates with: pairs of an image and its target, made of those in ``images``.

    ``collate`` makes a batch of a list of pairs.
    """

    collate: Callable[[list[Any]], Any] = staticmethod(default_collate)

    @staticmethod
    @abstractmethod
    def ignored_target(target: Any) -> Any:
        """A target that does not count, in place of ``target``."""


class ImageInfo(NamedTuple):
    """The size (W,H) of an image, and whether its EXIF orientation rotates or mirrors it."""

    size: tuple[int, int]
    has_orientation: bool


def _raise(error: OSError) -> None:
    raise error


def image_files(inputs: Iterable[Path], on_unreadable: Callable[[OSError], Any] = _raise) -> list[Path]:
    """The images among ``inputs``: files, and images at any depth in folders, with symbolic links followed.

    Hidden files and folders inside a folder are left out, and so are files without the suffix of an image. Files with
    such a suffix are listed even if they cannot be read. Each file is listed once.

    Args:
        on_unreadable: called with the error for a folder that cannot be listed, and for an image of an unsupported
            format; by default it is raised.
    """
    found: dict[str, Path] = {}
    for path in inputs:
        is_folder = os.path.isdir(path)  # noqa: PTH112 (Path.is_dir raises where a parent is not accessible)
        for image in _below(path, frozenset(), on_unreadable) if is_folder else [path]:
            found.setdefault(os.path.abspath(image), image)  # noqa: PTH100 (resolve would follow links)
    return list(found.values())


def images_in(folder: Path) -> list[Path]:
    """The images at any depth in a folder; ValueError if there is no such folder, or if it has no images."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: is not a folder")
    if not (images := image_files([folder])):
        raise ValueError(f"{folder}: no images")
    return images


def images_by_stem(folder: Path) -> dict[str, Path]:
    """`images_in` by their path in ``folder`` without suffix; ValueError if two differ in nothing but the suffix."""
    found: dict[str, Path] = {}
    for path in images_in(folder):
        if (other := found.setdefault(str(path.relative_to(folder).with_suffix("")), path)) != path:
            raise ValueError(f"{other} and {path}: have the same name, expected one image a name")
    return found


def real_path(path: Path) -> Path:
    """`Path.resolve` for any path: before Python 3.13 that raises for a link to itself."""
    return Path(os.path.realpath(path))


def _below(folder: Path, above: frozenset[Path], on_unreadable: Callable[[OSError], Any]) -> Iterator[Path]:
    real = folder.resolve()
    if real in above:  # a link to a parent
        return
    try:
        with os.scandir(folder) as listing:
            entries = sorted(listing, key=lambda entry: entry.name)
    except OSError as error:
        on_unreadable(error)
        return
    for entry in entries:
        path = folder / entry.name
        if entry.name.startswith("."):
            continue
        if os.path.isdir(path) if entry.is_symlink() else entry.is_dir():  # noqa: PTH112
            yield from _below(path, above | {real}, on_unreadable)
        elif is_image(path, on_unreadable):
            yield path


def is_image(path: PurePath, on_unsupported: Callable[[OSError], Any] = _raise) -> bool:
    """Whether a file has the suffix of a supported image; calls ``on_unsupported`` for that of another image."""
    suffix = path.suffix.lower()
    if suffix in _UNSUPPORTED_SUFFIXES:
        reason = f"{suffix} images are not supported, only {' '.join(sorted(IMAGE_SUFFIXES))}"
        on_unsupported(io.UnsupportedOperation(errno.ENOTSUP, reason, str(path)))
    return suffix in IMAGE_SUFFIXES


def natural_key(text: str) -> tuple[list[Any], str]:
    """A sort key: numbers in a name compare as numbers, and case does not matter."""
    parts = re.split(r"(\d+)", text.lower())
    return [int(part) if n % 2 else part for n, part in enumerate(parts)], text


@contextmanager
def opened(file: Path | IO[bytes], name: Path | str = "") -> Iterator[Image.Image]:
    """Opens an image without decoding it. Any error while it is open becomes a ValueError that names it."""
    name = str(name or file)
    Image.init()
    try:
        if isinstance(file, Path) and not stat.S_ISREG(file.stat().st_mode):
            raise ValueError("is not a regular file")  # opening a pipe would wait forever
        with Image.open(file, formats=[known for known in _FORMATS if known in Image.OPEN]) as image:
            image.filename = ""  # so that it is not mapped: Pillow maps a rotated TIFF with its sides exchanged
            yield image
    except Exception as error:  # decoders raise anything for a damaged file
        message = str(error) or type(error).__name__
        raise ValueError(message if name in message else f"{name}: {message}") from error


def read_image(
    file: Path | IO[bytes] | Image.Image, mode: str, name: Path | str = "", exif_orientation: bool = False
) -> Image.Image:
    """The decoded image of a file; the first frame if it has several.

    12 or 16 bits a channel and floats from 0 to 1 are scaled to 8 bits. Transparency is dropped, as in timm and
    torchvision.

    Args:
        file: a file, or an image that is already open.
        mode: "RGB" or "L".
        name: name of the file for errors.
        exif_orientation: apply the image's EXIF orientation.

    Raises:
        ValueError: the file, which the message names, is no image, is damaged or has unsupported pixels.
    """
    with nullcontext(file) if isinstance(file, Image.Image) else opened(file, name) as image:
        image.load()
        highest = _highest(image)
        upright = ImageOps.exif_transpose(image) if exif_orientation else image
        if highest is not None:
            upright = _eight_bits(upright, highest)
        if upright.mode in ("P", "PA") and "transparency" in upright.info:
            upright = upright.convert("RGBA")  # Pillow warns about a direct conversion to RGB
        return upright.convert(mode)


def _highest(image: Image.Image) -> float | None:
    """The value of white in an image with more than 8 bits a channel; None for other images.

    Raises ValueError for pixels that are not supported.
    """
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):  # these have 16 bits too
        highest = 2.0 ** tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0] - 1
    elif image.mode == "F":
        highest = 1.0
    elif image.mode == "I":
        raise ValueError("pixels: expected 8 or 16 bits a channel, or floats from 0 to 1, got 32-bit integers")
    else:
        return None
    if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:  # Pillow inverts only 8 bits
        raise ValueError("pixels: with more than 8 bits, expected 0 as black, got 0 as white")
    return highest


def _eight_bits(image: Image.Image, highest: float) -> Image.Image:
    """``image``, whose white is ``highest``, converted to 8 bits."""
    values = np.asarray(image).astype(np.float64)
    if not ((values >= 0) & (values <= highest)).all():  # also for NaN
        expected = "expected floats from 0 to 1, or 8 or 16 bits a channel"
        raise ValueError(f"pixels: {expected}, got values from {values.min():.6g} to {values.max():.6g}")
    return Image.fromarray((values * (255 / highest)).round().astype(np.uint8))


def image_mode(channels: int) -> str:
    """PIL's mode of images for a model with this number of input channels: 1 is grey, 3 is RGB.

    Raises:
        ValueError: any other number.
    """
    if channels not in (1, 3):
        raise ValueError(f"in_chans: expected a model of images with 1 (grey) or 3 (RGB) channels, got {channels}")
    return "L" if channels == 1 else "RGB"


def check_image(path: Path, exif_orientation: bool = False) -> ImageInfo:
    """The size and orientation of an image file; ValueError if it is no image, is truncated or has unsupported pixels.

    Only the header and the end of the file are read, unless the end does not show that the file is complete.
    """
    with opened(path) as image:
        marker = _ENDS.get(image.format or "")
        if marker is None or marker not in _tail(path):
            image.load()
        _highest(image)
        orientation = orientation_of(image)
        size = image.size[::-1] if exif_orientation and orientation >= 5 else image.size
        return ImageInfo(size, orientation != 1)


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1, which changes nothing, if there is none or it cannot be read."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF data in a file whose pixels are still readable
        return 1
    return orientation if orientation in range(1, 9) else 1


def _tail(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 64))
        return file.read()


def check_each(check: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """The results of ``check`` for each of a dataset's images; its errors are collected into one ValueError."""
    faults: list[str] = []

    def attempt(item: Item) -> Result | None:
        try:
            return check(item)
        except ValueError as error:
            faults.append(str(error))
            return None

    with ThreadPoolExecutor(16) as pool:
        results: list[Any] = list(pool.map(attempt, items))
    if faults:
        raise ValueError(f"{len(faults)} of {len(items)} images cannot be used: {abbreviate(sorted(faults))}")
    return results


def orientation_note(oriented: Sequence[bool]) -> str:
    """A note about images with an EXIF orientation that is not applied; "" if there are none."""
    if not any(oriented):
        return ""
    return (
        f"{sum(oriented)} of {len(oriented)} images have an EXIF orientation, which is not applied: viewers show them "
        f"turned or mirrored; {_APPLY_ORIENTATION} does so here"
    )


def read_class_names(path: Path) -> list[str]:
    """Reads one class name per line, from UTF-8 with or without a byte order mark, and any line endings."""
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().split("\n")]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text: {error}") from error
    if names == [""]:
        raise ValueError(f"{path}: has no class names")
    if "" in names:
        raise ValueError(f"{path}: line {names.index('') + 1} has no class name, expected one name per line")
    return names
