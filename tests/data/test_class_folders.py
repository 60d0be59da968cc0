"""Class folders, on disk and in .tar files: the same classes and images from both, and what is wrong is named."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_files import noise, oriented

from dfformer.data.class_folders import ClassFolders, ClassTar
from dfformer.data.files import DatasetSpec
from dfformer.data.images import check_images, check_same_classes, open_dataset


def write(root: Path, *names: str) -> Path:
    for n, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        noise(seed=n).save(path)
    return root


def packed(folder: Path, around: str = ".") -> Path:
    path = folder.with_name(f"{folder.name}.tar")
    with tarfile.open(path, "w") as tar:
        tar.add(folder, arcname=around)
    return path


GOOD = {
    "nested": (["cat/day/1.png", "cat/night/2.png", "dog/day/3.png", "dog/4.png"], ["cat", "dog"], [0, 0, 1, 1]),
    "hidden": (["cat/1.png", "dog/2.png", ".ipynb_checkpoints/1.png", "cat/.cache/3.png", "cat/._1.png"],
               ["cat", "dog"], [0, 1]),
    "any suffix": (["cat/1.png", "cat/5.webp", "dog/2.TIFF", "fox/3.webp", "owl/4.bmp"],
                   ["cat", "dog", "fox", "owl"], [0, 0, 1, 2, 3]),
    "numbers": (["10/a.png", "9/b.png", "\u00b2/c.png", "01/d.png", "1/e.png"], ["01", "1", "9", "10", "\u00b2"],
                [0, 1, 2, 3, 4]),
    "folders like images": (["cat.png/x.png", "dog.jpg/clip.gif/y.png"], ["cat.png", "dog.jpg"], [0, 1]),
}  # fmt: skip


@pytest.mark.parametrize("archive", [False, True])
@pytest.mark.parametrize(("names", "classes", "labels"), GOOD.values(), ids=GOOD.keys())
def test_the_top_folders_are_the_classes(
    names: list[str], classes: list[str], labels: list[int], archive: bool, tmp_path: Path
) -> None:
    folder = write(tmp_path / "val", *names)
    found = ClassTar(packed(folder)) if archive else ClassFolders(folder)
    assert (found.classes, found.labels) == (classes, labels)


def test_a_tar_file_gives_the_images_of_its_folders(tmp_path: Path) -> None:
    """With a folder of its own name around them, and with a .tar a class, too."""
    folder = write(tmp_path / "val", "cat/a/1.png", "cat/2.png", "dog/3.webp")
    (tmp_path / "nested").mkdir()
    for name in ("cat", "dog"):
        packed(folder / name).rename(tmp_path / "nested" / f"{name}.tar")
    expected = [np.asarray(image) for image, _ in _all(open_dataset(DatasetSpec("", str(tmp_path), "val")))]
    (tmp_path / "elsewhere").mkdir()
    for around, source in ((".", folder), ("val", folder), (".", tmp_path / "nested")):
        split = "val" if around == "val" else "test"
        packed(source, around).rename(tmp_path / "elsewhere" / f"{split}.tar")
        dataset = open_dataset(DatasetSpec("", str(tmp_path / "elsewhere"), split))
        assert dataset.classes == ["cat", "dog"]
        assert all(np.array_equal(image, other) for (image, _), other in zip(_all(dataset), expected, strict=True))


def _all(dataset: Any) -> list[tuple[Any, int]]:
    return [dataset[n] for n in range(len(dataset))]


def test_links_are_followed(tmp_path: Path) -> None:
    folder = write(tmp_path / "val", "cat/1.png", "dog/2.png")
    store = write(tmp_path / "store", "3.png", "more/4.png")
    (folder / "fox").symlink_to(store)
    (folder / "cat" / "loop").symlink_to(folder / "cat")
    found = ClassFolders(folder)
    assert (found.classes, found.labels) == (["cat", "dog", "fox"], [0, 1, 2, 2])


def _empty(root: Path) -> None:
    (root / "val" / "eel").mkdir()
    (root / "val" / "eel" / "notes.txt").write_text("no image")


def _nothing(root: Path) -> None:
    for name in ("cat", "dog"):
        (root / "val" / name).rename(root / name)


def _file(name: str, content: bytes) -> Callable[[Path], None]:
    def write_it(root: Path) -> None:
        (root / "val" / "cat").mkdir(parents=True, exist_ok=True)
        (root / "val" / name).write_bytes(content)

    return write_it


BAD = {
    "stray": (lambda root: write(root / "val", "3.png"), "val: images must be in class folders; beside them are 3.png"),
    "empty": (_empty, "val/eel: this class folder has no images"),
    "nothing": (_nothing, "val: has no class folders"),
    "single": (lambda root: (root / "val" / "dog").rename(root / "dog"), "val: has the single class folder cat"),
    "no split": (lambda root: (root / "val").rename(root / "test"), "has neither a folder 'val' nor val.tar"),
    "unreadable": (_file("cat/x.png", b""), "1 of 3 images cannot be used: cannot identify image file '.*cat/x.png'"),
    "format": (_file("cat/x.HEIC", b""), "[.]heic images are not supported, only .*cat/x.HEIC"),
    "dangling": (lambda root: (root / "val/cat/y.png").symlink_to("nowhere"), "No such file .*cat/y.png"),
}


@pytest.mark.parametrize(("spoil", "message"), BAD.values(), ids=BAD.keys())
def test_what_is_wrong_is_named(spoil: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    write(tmp_path / "val", "cat/1.png", "dog/2.png")
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message):
        check_images(open_dataset(DatasetSpec("", str(tmp_path), "val")).images)


def test_tar_files_that_are_none(tmp_path: Path) -> None:
    write(tmp_path / "folder", "cat/1.png", "dog/2.png")
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as tar:
        tar.add(tmp_path / "folder", arcname=".")
    whole = packed(tmp_path / "folder").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 3])
    for split, message in (("packed", "expected a .tar file without compression"), ("cut", "cut.tar: ")):
        with pytest.raises(ValueError, match=message):
            open_dataset(DatasetSpec("", str(tmp_path), split))


@pytest.mark.parametrize("link", ["hard link", "link", "linked class"])
def test_links_in_a_tar_file_are_not_left_out_in_silence(link: str, tmp_path: Path) -> None:
    """A file that has two names is a hard link in a .tar file; nothing else says that an image is there."""
    folder = write(tmp_path / "val", "cat/1.png", "dog/2.png")
    if link == "hard link":
        (folder / "cat" / "3.png").hardlink_to(folder / "cat" / "1.png")
    elif link == "link":
        (folder / "cat" / "3.png").symlink_to("1.png")
    else:
        (folder / "kitten").symlink_to("cat")
    packed(folder).rename(tmp_path / "test.tar")
    with pytest.raises(ValueError, match=r"test\.tar: (cat/|kitten).* is a link, .*; expected .* without"):
        open_dataset(DatasetSpec("", str(tmp_path), "test"))


def test_images_of_other_formats_in_a_tar_file_are_not_left_out_in_silence(tmp_path: Path) -> None:
    folder = write(tmp_path / "val", "cat/1.png", "dog/2.png")
    (folder / "dog" / "3.tga").write_bytes(b"")
    packed(folder).rename(tmp_path / "test.tar")
    with pytest.raises(ValueError, match=r"[.]tga images are not supported, only .*dog/3[.]tga"):
        open_dataset(DatasetSpec("", str(tmp_path), "test"))


def test_paths_in_a_tar_file_that_leave_it(tmp_path: Path) -> None:
    write(tmp_path / "val", "cat/1.png", "dog/2.png")
    with tarfile.open(tmp_path / "test.tar", "w") as tar:
        tar.add(tmp_path / "val", arcname=".")
        tar.add(tmp_path / "val" / "cat" / "1.png", arcname="../fox/1.png")
    with pytest.raises(ValueError, match=r"test[.]tar: [.][.]/fox/1[.]png is outside"):
        open_dataset(DatasetSpec("", str(tmp_path), "test"))


def test_a_path_that_a_tar_file_has_twice_is_one_image(tmp_path: Path) -> None:
    """The last, as if the file were extracted."""
    write(tmp_path / "val", "cat/1.png", "dog/2.png")
    with tarfile.open(tmp_path / "test.tar", "w") as tar:
        for source in ("cat/1.png", "dog/2.png"):
            tar.add(tmp_path / "val" / "cat" / "1.png", arcname="cat/1.png")
            tar.add(tmp_path / "val" / source, arcname=source)
    assert len(open_dataset(DatasetSpec("", str(tmp_path), "test"))) == 2


def test_a_damaged_image_is_named_when_it_is_read(tmp_path: Path) -> None:
    """Instead of the next one in its place."""
    folder = write(tmp_path / "val", "cat/1.png", "dog/2.png")
    content = bytearray((folder / "dog" / "2.png").read_bytes())
    content[60] ^= 0x55  # its checksum is wrong now
    (folder / "dog" / "2.png").write_bytes(content)
    packed(folder).rename(tmp_path / "test.tar")
    for split in ("val", "test"):
        dataset = open_dataset(DatasetSpec("", str(tmp_path), split))
        check_images(dataset.images)
        with pytest.raises(ValueError, match=r"dog/2\.png: "):
            _all(dataset)


def test_a_failing_transform_names_the_image(tmp_path: Path) -> None:
    write(tmp_path / "val", "cat/1.png", "dog/2.png")
    dataset = open_dataset(DatasetSpec("", str(tmp_path), "val"))
    dataset.transform = lambda image: 1 / 0
    with pytest.raises(ValueError, match=r"cat/1\.png: division by zero"):
        dataset[0]


def test_splits_with_other_classes(tmp_path: Path) -> None:
    write(tmp_path, "train/cat/1.png", "train/dog/2.png", "val/cat/1.png", "val/fox/2.png")
    train, val = (open_dataset(DatasetSpec("", str(tmp_path), split)) for split in ("train", "val"))
    with pytest.raises(ValueError, match=r"here: its classes are not those of there; missing: dog; unknown: fox"):
        check_same_classes(val.classes, train.classes, "here", "there")


@pytest.mark.parametrize("name", ["imagenet", "folder", "torch", "tfds/mnist", "torch/nothing", "wds/x"])
def test_other_names_of_datasets(name: str, tmp_path: Path) -> None:
    """timm would read a folder for most of them, with other classes than ours."""
    write(tmp_path / "val", "cat/1.png", "dog/2.png")
    with pytest.raises(ValueError, match=f"dataset: expected .*, got '{name}'|Unknown torchvision"):
        open_dataset(DatasetSpec(name, str(tmp_path), "val"))


def test_orientations_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "val", "cat/1.png", "dog/2.png")
    oriented(noise(), tmp_path / "val" / "dog" / "3.jpg", 6)
    check_images(open_dataset(DatasetSpec("", str(tmp_path), "val")).images)
    assert "1 of 3 images have an EXIF orientation, which is not applied" in capsys.readouterr().err
    turned = open_dataset(DatasetSpec("", str(tmp_path), "val", exif_orientation=True))
    check_images(turned.images)
    assert not capsys.readouterr().err
    assert [image.size for image, _ in _all(turned)] == [(40, 30), (40, 30), (30, 40)]


def test_sizes_in_a_header_are_not_believed(tmp_path: Path) -> None:
    """A member that says it is larger than its file."""
    info = tarfile.TarInfo("cat/1.png")
    info.size = 10**12
    (tmp_path / "val.tar").write_bytes(info.tobuf() + io.BytesIO(bytes(2048)).getvalue())
    with pytest.raises(ValueError, match=r"val\.tar: "):
        open_dataset(DatasetSpec("", str(tmp_path), "val"))
