"""Figures of dense predictions: masks, boxes and their classes over images; restored details."""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from dfformer.analysis.figures import frame, literal, panels, titled

MAX_NAMED = 24  # classes in a legend: those with most pixels
_MAX_ASPECT = 8  # ratio of sides; longer strips are drawn compressed
_DETAIL = 96  # pixels along a side of an enlarged detail
_MAX_PIXELS = 1600  # along a side; a figure has fewer dots


def class_colours(classes: Sequence[str]) -> np.ndarray:
    """(256,3) uint8: a colour a class, black for the background and for pixels without a class."""
    colours = np.zeros((256, 3), dtype=np.uint8)
    step = 1 / len(classes) if len(classes) <= MAX_NAMED else 0.618034  # the golden ratio: hues never repeat closely
    for n, name in enumerate(classes):
        rgb = hsv_to_rgb((n * step % 1, (0.95, 0.6)[n % 2], (0.95, 0.75)[n % 2]))
        colours[n] = 0 if name == "background" else 255 * rgb
    return colours


def overlay(image: np.ndarray, mask: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """``image`` (H,W,3) uint8, pale and grey, under the colours of its mask (H,W); black is transparent."""
    painted = colours[mask]
    grey = 128 + image.mean(-1, keepdims=True) / 2
    share = np.where(painted.any(-1, keepdims=True), 0.75, 0.0)
    return (share * painted + (1 - share) * grey).round().astype(np.uint8)


def segmentations(
    images: Sequence[np.ndarray], masks: dict[str, Sequence[np.ndarray]], classes: Sequence[str], title: str
) -> Figure:
    """Images (H,W,3) uint8 in columns, rows of masks (H,W) over them, and a legend."""
    colours = class_colours(classes)
    thin = [_thinned(image) for image in images]
    rows = {"image": thin}
    for name, row in masks.items():
        rows[name] = [overlay(image, _thinned(mask), colours) for image, mask in zip(thin, row, strict=True)]
    figure, axes = _grid(images, list(rows), 5.0, 1.2, title)
    for cells, drawn in zip(axes, rows.values(), strict=True):
        for ax, image, pixels in zip(cells, images, drawn, strict=True):
            _show(ax, pixels, image.shape, "nearest")
    counts = np.bincount(np.concatenate([mask.ravel() for row in masks.values() for mask in row]), minlength=256)
    shown = [n for n in np.argsort(-counts, kind="stable") if counts[n] and colours[n].any()][:MAX_NAMED]
    patches = [Patch(color=colours[n] / 255) for n in sorted(shown)]
    labels = [str(n) for n in sorted(shown)]  # replaced below, because a legend leaves out names that begin with "_"
    legend = figure.legend(
        patches, labels, loc="outside lower center", ncols=max(1, int(figure.get_figwidth())), fontsize=8
    )
    for text, n in zip(legend.get_texts(), sorted(shown), strict=True):
        text.set_text(literal(classes[n]))
    return figure


def detections(
    images: Sequence[np.ndarray],
    objects: Mapping[str, Sequence[dict[str, np.ndarray]]],
    classes: Sequence[str],
    title: str,
) -> Figure:
    """Images (H,W,3) uint8 in columns, in rows with their objects: boxes, labels, and scores if there are any."""
    colours = class_colours(classes) / 255
    figure, axes = _grid(images, list(objects), 6.0, 0.7, title)
    for cells, found in zip(axes, objects.values(), strict=True):
        for ax, image, there in zip(cells, images, found, strict=True):
            _show(ax, _thinned(image), image.shape, "auto")
            for n, label in enumerate(there["labels"]):
                score = f" {100 * there['scores'][n]:.0f}%" if "scores" in there else ""
                _draw_box(ax, there["boxes"][n], f"{literal(classes[label])}{score}", colours[label])
    return figure


def restorations(images: Sequence[dict[str, np.ndarray]], title: str) -> Figure:
    """A row for each image: its last version, and the most changed detail of all versions (H,W,3) uint8, by name."""
    columns = 1 + max(map(len, images))
    figure, axes = panels(len(images), columns, 2.6 * columns, 2.8 * len(images) + 0.5)
    for cells, versions in zip(axes, images, strict=True):
        first, last, *_ = versions.values()
        top, left, side = _most_changed(first, last)
        _show(cells[0], _thinned(last), last.shape, "auto")
        frame(cells[0], left - 0.5, top - 0.5, side, side, "#e67e22", 1.5)
        for ax, (name, version) in zip(cells[1:], versions.items(), strict=True):
            detail = version[top : top + side, left : left + side]
            _show(ax, detail, detail.shape, "nearest")
            ax.set_title(name, fontsize=9)
    return titled(figure, title)


def _most_changed(first: np.ndarray, last: np.ndarray) -> tuple[int, int, int]:
    """Top, left and side of the square of at most _DETAIL pixels in which two images differ most."""
    side = min(_DETAIL, *first.shape[:2])
    change = np.abs(first.astype(np.float64) - last).mean(-1)
    sums = np.pad(change, ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    within = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
    top, left = np.unravel_index(within.argmax(), within.shape)
    return int(top), int(left), side


def _grid(
    images: Sequence[np.ndarray], rows: Sequence[str], alone: float, margin: float, title: str
) -> tuple[Figure, np.ndarray]:
    """A figure with axes for each row and image; one image is ``alone`` inches wide, several are 2."""
    width = 2.0 if len(images) > 1 else alone
    highest = max(_ratio(image.shape) for image in images)
    size = width * len(images) + 0.4, width * highest * len(rows) + margin
    figure, axes = panels(len(rows), len(images), *size)
    for ax, name in zip(axes[:, 0], rows, strict=True):
        ax.set_ylabel(name, fontsize=9)
    return titled(figure, title), axes


def _ratio(shape: tuple[int, ...]) -> float:
    """Height by width, as drawn."""
    return float(np.clip(shape[0] / shape[1], 1 / _MAX_ASPECT, _MAX_ASPECT))


def _thinned(pixels: np.ndarray) -> np.ndarray:
    """Every n-th row and column, because drawing all of a large image would take gigabytes."""
    rows, columns = (-(-side // _MAX_PIXELS) for side in pixels.shape[:2])
    return pixels[::rows, ::columns]


def _show(ax: Axes, pixels: np.ndarray, shape: tuple[int, ...], interpolation: str) -> None:
    """``pixels`` in the coordinates of an image of ``shape`` (H,W,...)."""
    H, W = shape[:2]
    aspect: Literal["equal", "auto"] = "equal" if _ratio(shape) == H / W else "auto"
    ax.imshow(pixels, interpolation=interpolation, extent=(-0.5, W - 0.5, H - 0.5, -0.5), aspect=aspect)
    ax.set(xticks=[], yticks=[])


def _draw_box(ax: Axes, box: np.ndarray, text: str, colour: np.ndarray) -> None:
    left, top, right, bottom = box - 0.5  # imshow's first pixel is centred at 0
    frame(ax, left, top, right - left, bottom - top, colour, 1.4)
    ink = "white" if colour @ (0.299, 0.587, 0.114) < 0.55 else "black"
    around = {"facecolor": colour, "edgecolor": "none", "pad": 0.8}
    place: Literal["bottom", "top"] = "bottom" if top > 0.08 * ax.get_ylim()[0] else "top"  # is there room above?
    ax.text(left, top, text, color=ink, fontsize=6, va=place, bbox=around, clip_on=True)
