"""Image files: which are found, what is read from them, and what is said of those that cannot be read."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_files import READABLE, UNREADABLE, noise, oriented, ramp, tiff, write_all, write_flipped
from PIL import ExifTags, Image, ImageOps

from dfformer.data.files import check_each, check_image, image_files, orientation_note, read_class_names, read_image
from dfformer.utils.text import abbreviate, printable


def same(one: Any, other: Any) -> bool:
    return np.array_equal(np.asarray(one), np.asarray(other))


def test_which_files_are_found(tmp_path: Path) -> None:
    """At any depth and behind links, once each; not what is hidden; folders named like images are folders."""
    store = tmp_path / "store"
    for name in (
        "a.jpg",
        "b.JPEG",
        "clip.jpg/c.png",
        "d/e/f.webp",
        "d/g.tiff",
        "notes.txt",
        ".hidden.png",
        ".cache/h.png",
    ):
        (store / name).parent.mkdir(parents=True, exist_ok=True)
        (store / name).write_bytes(b"")
    other = tmp_path / "other"
    other.mkdir()
    (other / "i.png").write_bytes(b"")
    (store / "linked").symlink_to(other)
    (store / "loop").symlink_to(store)
    (other / "back").symlink_to(store)
    (store / "dangling.png").symlink_to(tmp_path / "nowhere")
    found = [str(path.relative_to(store)) for path in image_files([store])]
    assert found == ["a.jpg", "b.JPEG", "clip.jpg/c.png", "d/e/f.webp", "d/g.tiff", "dangling.png", "linked/i.png"]
    assert image_files([store / "d", store / "d" / "g.tiff", store / "d" / "." / "e"]) == image_files([store / "d"])
    assert image_files([store / ".cache", tmp_path / "no.txt"]) == [store / ".cache" / "h.png", tmp_path / "no.txt"]


def test_folders_that_go_while_they_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that may not be listed are told alike."""
    (tmp_path / "locked").mkdir()
    (tmp_path / "a.png").write_bytes(b"")
    scandir = os.scandir

    def refuse(folder: Path) -> object:
        if Path(folder).name == "locked":
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    errors: list[OSError] = []
    assert image_files([tmp_path], errors.append) == [tmp_path / "a.png"]
    assert [error.filename for error in errors] == [str(tmp_path / "locked")]
    with pytest.raises(PermissionError, match="locked"):
        image_files([tmp_path])


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_every_readable_kind(mode: str, tmp_path: Path) -> None:
    for path in map(Path, write_all(tmp_path, READABLE)):
        image = read_image(path, mode)
        assert (image.mode, image.size) == (mode, check_image(path).size), path.name


def test_every_unreadable_kind_is_named(tmp_path: Path) -> None:
    for path in map(Path, write_all(tmp_path, UNREADABLE)):
        with pytest.raises(ValueError, match=path.name):
            read_image(path, "RGB")


@pytest.mark.parametrize("name", ["a.tif", "a.png", "a.gif", "a.webp", "a.jpg", "a.bmp"])
def test_damaged_files_raise_nothing_else(name: str, tmp_path: Path) -> None:
    for path in map(Path, write_flipped(tmp_path, name, 60)):
        try:
            said = ""
            assert read_image(path, "RGB").mode == "RGB"
        except ValueError as error:
            said = str(error)
        assert not said or str(path) in said


def test_sixteen_bits_and_floats_are_scaled(tmp_path: Path) -> None:
    Image.fromarray(ramp()).save(tmp_path / "8.png")
    deep = ramp().astype(np.uint16) * 257
    for name, pixels in (("a.png", deep), ("b.tif", deep), ("c.tif", deep.astype(">u2")), ("d.pgm", deep)):
        Image.fromarray(pixels).save(tmp_path / name)
        assert same(read_image(tmp_path / name, "L"), ramp()), name
    Image.fromarray(ramp().astype(np.float32) / 255).save(tmp_path / "e.tif")
    assert same(read_image(tmp_path / "e.tif", "L"), ramp())
    assert same(read_image(tmp_path / "e.tif", "RGB"), np.asarray(Image.fromarray(ramp()).convert("RGB")))
    Image.fromarray(np.array([[1200, 4000]], dtype=np.uint16)).save(tmp_path / "dark.png")
    assert np.asarray(read_image(tmp_path / "dark.png", "L")).tolist() == [[5, 16]]


def test_twelve_bits_are_scaled(tmp_path: Path) -> None:
    deep = (ramp().astype(np.uint32) * 4095 + 127) // 255
    first, second = deep.ravel()[::2], deep.ravel()[1::2]
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1).astype(np.uint8)
    (tmp_path / "x.tif").write_bytes(tiff(packed.tobytes(), bits=12))
    assert same(read_image(tmp_path / "x.tif", "L"), ramp())


@pytest.mark.parametrize("pixels", [ramp().astype(np.uint16) * 257, ramp().astype(np.float32) / 255], ids=["16", "f"])
def test_zero_as_white_is_inverted_or_refused(pixels: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "8.tif").write_bytes(tiff((255 - ramp()).tobytes(), bits=8, black_is_zero=False))
    assert same(read_image(tmp_path / "8.tif", "L"), ramp())
    content = tiff(pixels.tobytes(), 8 * pixels.itemsize, is_float=pixels.itemsize == 4, black_is_zero=False)
    (tmp_path / "x.tif").write_bytes(content)
    for read in (check_image, lambda path: read_image(path, "L")):
        with pytest.raises(ValueError, match=r"x\.tif: pixels: with more than 8 bits, expected 0 as black"):
            read(tmp_path / "x.tif")


@pytest.mark.parametrize(
    "pixels", [ramp().astype(np.float32), np.array([[-0.5, 1]], np.float32), ramp().astype(np.int32)]
)
def test_other_pixels_say_what_they_are(pixels: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(pixels).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match=r"x\.tif: pixels: expected .*floats from 0 to 1.*, got "):
        read_image(tmp_path / "x.tif", "RGB")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_exif_orientations(suffix: str, tmp_path: Path) -> None:
    """Taken as stored, or as viewers show them."""
    for orientation in range(1, 9):
        path = tmp_path / f"{orientation}.{suffix}"
        oriented(noise(), path, orientation)
        with Image.open(path) as image:
            stored, shown = image.convert("RGB"), ImageOps.exif_transpose(image).convert("RGB")
        assert same(read_image(path, "RGB"), stored)
        assert same(read_image(path, "RGB", exif_orientation=True), shown)
        assert check_image(path) == ((40, 30), orientation != 1)
        assert check_image(path, exif_orientation=True).size == shown.size
    assert orientation_note([True, False, True]).startswith("2 of 3 images have an EXIF orientation")
    assert orientation_note([False]) == ""


@pytest.mark.parametrize("factor", [np.uint8(1), np.uint16(257)], ids=["8", "16"])
def test_a_turned_tiff_is_what_viewers_show(factor: Any, tmp_path: Path) -> None:
    """Pillow turns it by itself, whatever is asked for."""
    grey, exif = np.asarray(noise().convert("L")), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(grey * factor).save(tmp_path / "x.tif", exif=exif)
    assert same(read_image(tmp_path / "x.tif", "L"), np.rot90(grey, -1))
    assert check_image(tmp_path / "x.tif") == (grey.shape, False)


def test_complete_images_pass_and_others_do_not(tmp_path: Path) -> None:
    for suffix in ("jpg", "png", "bmp", "gif", "webp", "tif"):
        noise().save(tmp_path / f"whole.{suffix}")
    (tmp_path / "more.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes() + bytes(300))
    assert {check_image(path) for path in tmp_path.iterdir()} == {((40, 30), False)}
    cut = [tmp_path / f"cut.{suffix}" for suffix in ("jpg", "png", "bmp", "gif", "webp", "tif")]
    for path in cut:
        path.write_bytes((tmp_path / f"whole{path.suffix}").read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"6 of 6 images cannot be used: .*cut\.bmp.* and 1 more"):
        check_each(check_image, cut)


LISTS = {
    b"wall\nsky\n": ["wall", "sky"],
    b"\xef\xbb\xbfwall\nsky": ["wall", "sky"],
    b"wall\r\nsky\r\n\r\n": ["wall", "sky"],
    "US$\nd\u00e9j\u00e0\u2028vu".encode(): ["US$", "d\u00e9j\u00e0\u2028vu"],
}


@pytest.mark.parametrize(("content", "names"), LISTS.items())
def test_class_names(content: bytes, names: list[str], tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_bytes(content)
    assert read_class_names(tmp_path / "classes.txt") == names


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no class names"),
        (b"a\n\nb", "line 2 has no class name"),
        (b"caf\xe9", "is not UTF-8"),
        ("a\nb".encode("utf-16"), "is not UTF-8"),
    ],
)
def test_lists_without_class_names(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"classes\.txt: {message}"):
        read_class_names(tmp_path / "classes.txt")


def test_names_on_one_line() -> None:
    assert printable("a\nb\t\x1b[31m\udce9 \u732b") == "a\\nb\\t\\x1b[31m\\udce9 \u732b"
    assert abbreviate(["a", "b\n", "c"], 2) == "a, b\\n and 1 more"
