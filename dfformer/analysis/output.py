"""The results of ``dfformer show`` and ``dfformer demo``: figures, tables, and one page with all of them."""

import base64
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from dfformer.analysis.figures import titled
from dfformer.utils.io import as_csv, finite, write_atomically
from dfformer.utils.text import echo

MAX_ROWS = 1000  # of a table on the page; longer tables are only written as CSV
MAX_PIXELS = 160  # along the longer side of an image beside its filters


class Output:
    """A folder for results; prints what it has written."""

    def __init__(self, folder: Path, dpi: int = 110) -> None:
        self.folder, self.dpi = folder, dpi
        self._page: dict[str, list[Any]] = {"figures": [], "tables": [], "images": [], "layers": []}
        folder.mkdir(parents=True, exist_ok=True)

    def figure(self, name: str, figure: Figure, title: str = "", caption: str = "") -> None:
        """Writes a figure as PNG, with a title and a caption if they are given."""
        if title:
            titled(figure, title, caption)
        png = io.BytesIO()
        figure.savefig(png, dpi=self.dpi)
        self._page["figures"].append({"name": name, "src": _data_url(png)})
        self._write(f"{name}.png", png.getvalue())

    def table(self, name: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Writes a table as CSV. Nine digits of a float are enough to restore a float32 exactly."""
        rows = list(rows)
        exact = ([f"{v:.9g}" if isinstance(v, float) else v for v in row] for row in rows)
        if len(rows) <= MAX_ROWS:
            self._page["tables"].append({"name": name, "header": list(header), "rows": finite(rows)})
        self._write(f"{name}.csv", as_csv(header, (dict(zip(header, row, strict=True)) for row in exact)))

    def filters(
        self, images: Mapping[str, Tensor], layers: Mapping[str, tuple[Tensor, Tensor | None, tuple[int, int]]]
    ) -> None:
        """Adds the images and filters that the page's sliders select.

        Args:
            images: by name, (in_chans,H,W) from 0 to 1.
            layers: by name, a basis (H,K,F); its shares (N,F,C) for the N images, or None if channel c has filter c;
                and the plane (H,W).
        """
        self._page["images"] = [{"name": name, "src": _thumbnail(pixels)} for name, pixels in images.items()]
        for name, (basis, shares, (H, W)) in layers.items():
            F = basis.shape[2]
            N, C = (1, F) if shares is None else (len(shares), shares.shape[2])
            layer = {"name": name, "H": H, "W": W, "F": F, "C": C, "N": N, "basis": _floats(torch.view_as_real(basis))}
            self._page["layers"].append(layer | {"shares": None if shares is None else _floats(shares)})

    def report(self, title: str, facts: Sequence[str] = (), name: str = "report") -> None:
        """Writes ``name``.html: all results so far in one page that needs no other file and no network."""
        content = json.dumps({"title": title, "facts": list(facts), **self._page}, allow_nan=False)
        template = files("dfformer.analysis").joinpath("report.html").read_text(encoding="utf-8")
        # Names of files and layers are untrusted; only "<" can end a script element.
        self._write(f"{name}.html", template.replace("{{data}}", content.replace("<", "\\u003c")).encode())

    def _write(self, name: str, content: bytes) -> None:
        write_atomically(self.folder / name, content)
        echo(f"wrote {self.folder / name}")


def _floats(values: Tensor) -> str:
    return base64.b64encode(values.float().contiguous().numpy().astype("<f4").tobytes()).decode()


def _data_url(png: io.BytesIO) -> str:
    return f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"


def _thumbnail(pixels: Tensor) -> str:
    image = to_pil_image((255 * pixels).round().to(torch.uint8))
    image.thumbnail((MAX_PIXELS, MAX_PIXELS))
    png = io.BytesIO()
    image.save(png, "PNG")
    return _data_url(png)
