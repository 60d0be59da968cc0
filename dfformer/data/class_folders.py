"""Class folders, on disk or in a .tar file: one top-level folder of images per class."""

import io
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

from dfformer.data.files import ImageDataset, check_each, check_image, image_files, is_image, natural_key
from dfformer.utils.text import abbreviate


class Member(NamedTuple):
    """An image inside a .tar file: its path there, and the position of its bytes."""

    path: PurePosixPath
    offset: int
    size: int


class ClassFolders(ImageDataset[tuple[Path, int, str]]):
    """``folder/CLASS/...``, images at any depth; hidden files and folders are left out.

    Raises:
        ValueError: naming the folder: images beside the class folders, a class without images, fewer than two classes.
    """

    def __init__(self, folder: Path) -> None:
        files = sorted(image_files([folder]), key=lambda path: natural_key(str(path)))
        names = [entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
        depth = len(folder.parts)
        self.classes, self.labels = _labelled([path.parts[depth:] for path in files], folder, names)
        self.images = [str(path) for path in files]  # strings are smaller, and workers may copy the list

    def __getitem__(self, index: int) -> tuple[Path, int, str]:
        """The file, its label, and its name for errors."""
        return Path(self.images[index]), self.labels[index], self.images[index]

    def check(self) -> list[bool]:
        return [info.has_orientation for info in check_each(check_image, [Path(name) for name in self.images])]


class ClassTar(ImageDataset[tuple[IO[bytes], int, str]]):
    """Class folders in an uncompressed .tar file. A .tar inside it counts as a folder of its name.

    A single folder around the classes with the name of the file is ignored. `check` finds nothing, because the images
    are only read when they are used.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            members = {member.path: member for member in _members(file, PurePosixPath(), 0)}
        found = list(members.values())  # of members with the same path the last, as if they were extracted
        if found and all(len(member.path.parts) > 2 and member.path.parts[0] == path.stem for member in found):
            found = [member._replace(path=PurePosixPath(*member.path.parts[1:])) for member in found]
        self.images = sorted(found, key=lambda member: natural_key(str(member.path)))
        self.classes, self.labels = _labelled([member.path.parts for member in self.images], path, [])

    def __getitem__(self, index: int) -> tuple[IO[bytes], int, str]:
        """The file, its label, and its name for errors."""
        member = self.images[index]
        with self.path.open("rb") as file:
            file.seek(member.offset)
            content = io.BytesIO(file.read(member.size))
        return content, self.labels[index], f"{self.path}/{member.path}"


def _members(file: IO[bytes], inside: PurePosixPath, start: int) -> Iterator[Member]:
    """The images of a .tar file that begins at byte ``start`` of another, below the folder ``inside``."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for entry in tar:
            path = inside / PurePosixPath(entry.name.lstrip("/"))
            is_link = entry.islnk() or entry.issym() or entry.sparse
            if ".." in path.parts:
                raise tarfile.ReadError(f"{path} is outside of the file's folder")
            if any(part.startswith(".") for part in path.parts) or not (entry.isreg() or is_link):
                continue
            if is_link and (is_image(path) or not path.suffix):  # a folder has no suffix
                raise tarfile.ReadError(f"{path} is a link, or a file with holes")
            nested: Any = tar.extractfile(entry) if path.suffix.lower() == ".tar" else None
            if nested is not None:
                yield from _members(nested, path.with_suffix(""), start + entry.offset_data)
            elif is_image(path):
                yield Member(path, start + entry.offset_data, entry.size)


def _labelled(paths: Sequence[tuple[str, ...]], where: Path, folders: Iterable[str]) -> tuple[list[str], list[int]]:
    """The classes, and the label of each path, whose first part is its class; all ``folders`` must have images."""
    if stray := ["/".join(path) for path in paths if len(path) < 2]:
        raise ValueError(f"{where}: images must be in class folders; beside them are {abbreviate(stray)}")
    classes = sorted({path[0] for path in paths}, key=natural_key)
    if empty := sorted(set(folders) - set(classes)):
        raise ValueError(f"{where / empty[0]}: this class folder has no images")
    if not classes:
        raise ValueError(f"{where}: has no class folders with images")
    if len(classes) < 2:
        raise ValueError(f"{where}: has the single class folder {classes[0]}, expected two or more")
    label = {name: n for n, name in enumerate(classes)}
    return classes, [label[path[0]] for path in paths]
