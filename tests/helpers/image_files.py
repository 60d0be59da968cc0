"""Image files as people have them: of unusual kinds, damaged, and with unusual names."""

import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image


def noise(size: tuple[int, int] = (40, 30), seed: int = 0) -> Image.Image:
    """An RGB image of ``size`` (W,H)."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def ramp() -> np.ndarray:
    """Every value of 8 bits, (16,16) uint8."""
    return np.arange(256, dtype=np.uint8).reshape(16, 16)


def tiff(pixels: bytes, bits: int, is_float: bool = False, black_is_zero: bool = True) -> bytes:
    """A grey TIFF of 16x16, in forms that Pillow does not write."""
    tags = {256: 16, 257: 16, 258: bits, 259: 1, 262: int(black_is_zero), 273: 8, 277: 1, 278: 16, 279: len(pixels)}
    tags[339] = 3 if is_float else 1
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + struct.pack("<H", len(tags)) + entries + bytes(4)


def oriented(image: Image.Image, path: Path, orientation: int) -> None:
    """Writes ``image`` with an EXIF orientation."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image.save(path, exif=exif)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _animation(path: Path) -> None:
    frames = [noise(seed=n).convert("P") for n in range(3)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def _palette_with_transparency(path: Path) -> None:
    noise().quantize(8).save(path, transparency=bytes([0, 128, 255, 255, 9, 9, 9, 9]))


def _lone_profile(path: Path) -> None:
    """An empty colour profile behind the pixels, which is found when decoding ends."""
    noise().save(path)
    content = path.read_bytes()
    end = content.rfind(b"IEND") - 4
    path.write_bytes(content[:end] + _chunk(b"iCCP", b"") + content[end:])


def _bomb(path: Path) -> None:
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + _chunk(b"IDAT", zlib.compress(b"")) + _chunk(b"IEND", b""))


def _cut_off(path: Path) -> None:
    noise((200, 200)).save(path)
    path.write_bytes(path.read_bytes()[:-900])


Writer = Callable[[Path], object]

READABLE: dict[str, Writer] = {
    "plain.png": lambda path: noise().save(path),
    "animated.gif": _animation,
    "cmyk.jpg": lambda path: noise().convert("CMYK").save(path),
    "palette.png": _palette_with_transparency,
    "grey_alpha.png": lambda path: noise().convert("LA").save(path),
    "one_bit.png": lambda path: noise().convert("1").save(path),
    "deep.png": lambda path: Image.fromarray(ramp().astype(np.uint16) * 257).save(path),
    "deep_big_endian.tif": lambda path: Image.fromarray((ramp().astype(np.uint16) * 257).astype(">u2")).save(path),
    "float.tiff": lambda path: Image.fromarray(ramp().astype(np.float32) / 255).save(path),
    "lossless.webp": lambda path: noise().save(path, lossless=True),
    "strip.png": lambda path: noise((3000, 3)).save(path),
    "tall.png": lambda path: noise((1, 700)).save(path),
    "UPPER.PNG": lambda path: noise().save(path, "PNG"),
    "$price$_$x$.png": lambda path: noise().save(path),
    "two\nlines\x1b[31m.png": lambda path: noise().save(path),
    "_\u732b\u00e9.png": lambda path: noise().save(path),
    os.fsdecode(b"latin-1 \xe9.png"): lambda path: noise().save(path),
}
UNREADABLE: dict[str, Writer] = {
    "zero.png": lambda path: path.write_bytes(b""),
    "text.jpg": lambda path: path.write_text("not an image"),
    "cut_off.jpg": _cut_off,
    "cut_off.png": _cut_off,
    "lone_profile.png": _lone_profile,
    "bomb.png": _bomb,
    "integers.tif": lambda path: Image.fromarray(ramp().astype(np.int32) << 20).save(path),
    "float_to_255.tif": lambda path: Image.fromarray(ramp().astype(np.float32)).save(path),
    "nan.tif": lambda path: Image.fromarray(np.full((8, 8), np.nan, dtype=np.float32)).save(path),
    "postscript.png": lambda path: noise().save(path, "EPS"),
    "dangling.png": lambda path: path.symlink_to("nowhere.png"),
    "loop.png": lambda path: path.symlink_to("loop.png"),
    "pipe.png": lambda path: os.mkfifo(path),
}


def write_all(folder: Path, kinds: dict[str, Writer]) -> set[str]:
    """Writes ``kinds`` into ``folder``; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, write in kinds.items():
        write(folder / name)
    return {str(folder / name) for name in kinds}


def write_flipped(folder: Path, name: str, count: int) -> set[str]:
    """Copies of an image, each with a byte near its head or tail changed; some can be read, others not."""
    folder.mkdir(parents=True, exist_ok=True)
    original = folder / name
    noise((24, 20)).save(original)
    content = original.read_bytes()
    rng = np.random.default_rng(0)
    paths = {str(original)}
    for n in range(count):
        changed = bytearray(content)
        place = int(rng.integers(8, 300)) if n % 2 else len(content) - int(rng.integers(1, 200))
        changed[place] ^= int(rng.integers(1, 256))
        path = folder / f"{n}_{name}"
        path.write_bytes(changed)
        paths.add(str(path))
    return paths


CATEGORIES = {7: "dark", 3: "bright"}  # in no order, with gaps


def coco_folder(folder: Path, **counts: int) -> Path:
    """Images in COCO's layout, their number by split.

    100 is empty, 101 has crowds only, the others have an object of each category.
    """
    generator = np.random.default_rng(0)
    (folder / "annotations").mkdir(parents=True)
    for split, count in counts.items():
        (folder / split).mkdir()
        images, annotations = [], []
        for n in range(count):
            H, W = (60, 50) if n % 2 else (45, 70)
            pixels = generator.integers(100, 140, (H, W, 3), dtype=np.uint8)
            for k, category in enumerate(CATEGORIES) if n else ():
                left, top = 5 + 20 * k + n % 3, 4 + n % 5
                pixels[top : top + 18, left : left + 14] = 30 if category == 7 else 220
                entry = {"id": 10 * n + k, "image_id": 100 + n, "category_id": category, "bbox": [left, top, 14, 18]}
                annotations.append({**entry, "area": 14 * 18, "iscrowd": int(n == 1)})
            Image.fromarray(pixels).save(folder / split / f"{100 + n}.png")
            images.append({"id": 100 + n, "file_name": f"{100 + n}.png", "width": W, "height": H})
        categories = [{"id": n, "name": name} for n, name in CATEGORIES.items()]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return folder


def annotate(root: Path, change: Callable[[dict[str, Any]], object], split: str = "train") -> Path:
    """Changes the annotations of a split."""
    path = root / "annotations" / f"instances_{split}.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


def write_mask(root: Path, split: str, name: str, pixels: np.ndarray, labels: np.ndarray) -> None:
    """Writes an image and its mask in ADE20K's layout."""
    for kind, suffix, content in (("images", ".jpg", pixels), ("annotations", ".png", labels)):
        path = root / kind / split / f"{name}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(content.astype(np.uint8)).save(path)
