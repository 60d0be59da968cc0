"""Where ``predict`` writes: results never replace an image, each other, or other people's files."""

import io
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, PngImagePlugin

from dfformer.data.files import opened
from dfformer.utils.io import write_atomically
from dfformer.utils.text import abbreviate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SOFTWARE = "dfformer predict"  # in the metadata of every PNG it writes; only such files may be replaced


def is_result(path: Path) -> bool:
    """Whether an existing file is a picture that ``predict`` wrote."""
    try:
        with opened(path) as image:
            return image.info.get("Software") == SOFTWARE
    except (OSError, ValueError):
        return False


def result_names(paths: Sequence[Path], endings: Sequence[str] = ("",)) -> list[str]:
    """A name for the results of each image, such that no two of ``name + ending`` are the same.

    The name is that of the file without its suffix. If that is not unique, it also has the suffix, and as many parent
    folders as needed, joined by ``_``. Names that differ only in case count as equal, because some systems treat them
    so.
    """
    levels = [0] * len(paths)
    while True:
        names = [_candidate(path, level, n) for n, (path, level) in enumerate(zip(paths, levels, strict=True))]
        owners: dict[str, list[int]] = {}
        for n, name in enumerate(names):
            for ending in endings:
                owners.setdefault(unicodedata.normalize("NFC", name + ending).casefold(), []).append(n)
        clashing = {n for group in owners.values() if len(group) > 1 for n in group}
        if not clashing:
            return names
        for n in clashing:
            levels[n] += 1


def _candidate(path: Path, level: int, number: int) -> str:
    """A name that gets longer with each level, and finally has a number of its own."""
    parts = path.parts[len(path.anchor) > 0 :]
    depth, with_suffix = divmod(level, 2)
    if depth >= len(parts):
        return f"{number}_{path.stem}"
    return "_".join([*parts[-depth - 1 : -1], parts[-1] if with_suffix else path.stem])


def result_paths(paths: Sequence[Path], folder: Path, endings: Sequence[str], of_all: str = "") -> dict[Path, Path]:
    """For each image, the path of its results in ``folder``, to which ``endings`` are appended.

    ``of_all`` is the name of a JSON list about all images. It counts as written by ``predict`` if it is empty or if the
    folder has a picture that ``predict`` wrote.

    Raises:
        ValueError: a result would replace an image, or a file that ``predict`` did not write.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output: expected a folder, got the file {folder}")
    names = result_names(paths, endings)
    inputs = {_identity(path) for path in paths}
    targets = [folder / f"{name}{ending}" for name in names for ending in endings]
    foreign = [str(path) for path in targets if _identity(path) and (_identity(path) in inputs or not is_result(path))]
    report = folder / of_all
    if report.is_file() and report.read_bytes() != b"[]" and not any(map(is_result, folder.glob("*.png"))):
        foreign.append(str(report))
    if foreign:
        raise ValueError(
            f"--output: choose another folder: in {folder}, results would replace files that are not earlier results: "
            f"{abbreviate(foreign)}"
        )
    return {path: folder / name for path, name in zip(paths, names, strict=True)}


def write_results(stem: Path, pictures: "Mapping[str, Image.Image | Figure]") -> None:
    """Writes each picture to ``stem`` plus its ending, as a PNG that `is_result` accepts, once all are drawn."""
    contents = {ending: _png(picture) for ending, picture in pictures.items()}
    for ending, content in contents.items():
        write_atomically(stem.with_name(stem.name + ending), content)


def _png(picture: "Image.Image | Figure") -> bytes:
    content = io.BytesIO()
    if isinstance(picture, Image.Image):
        by = PngImagePlugin.PngInfo()
        by.add_text("Software", SOFTWARE)
        picture.save(content, "PNG", pnginfo=by)
    else:
        picture.savefig(content, format="png", dpi=110, metadata={"Software": SOFTWARE})
    return content.getvalue()


def _identity(path: Path) -> tuple[int, int] | None:
    """The identity of the file behind ``path``, the same for all its names; None if there is no file."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino
