"""Figures of training and of models, each with axes, units and colour bars; `titled` adds a title and a caption."""

import textwrap
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import BoundaryNorm, Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, ScalarFormatter
from torch import Tensor

from dfformer.analysis.metrics import Spectrum
from dfformer.analysis.palette import BLUE, CYCLE, GREY, VERMILLION
from dfformer.utils.text import printable

WRONG, RIGHT = VERMILLION, BLUE
# Axis and colour ranges cover at least this much, so that meaningless differences do not look large.
MIN_POINTS = 10.0  # percentage points of an accuracy
MIN_DECADES = 1.0  # of a filter's magnitude
MIN_GAIN = 1.0  # dB, in both directions
MIN_SHARE = 0.5  # of an even share, in both directions
MIN_BITS = 0.5
MIN_LOG = 1.0  # of a natural logarithm
MIN_CKA = 0.5
NO_TICKS: dict[str, list[float]] = {"xticks": [], "yticks": []}
MAX_WRITTEN = 150  # cells of a matrix whose numbers can be read


def predictions_grid(
    images: Tensor, labels: Sequence[str], predicted: Sequence[str], confidence: Sequence[float]
) -> Figure:
    """Images (N,H,W) in a grid with what was predicted; mistakes are framed, with the true label beside."""
    columns = 10
    rows = -(-len(images) // columns)
    figure, axes = panels(rows, columns, columns * 0.95, rows * 1.2 + 0.6, subplot_kw=NO_TICKS)
    for ax, image, label, guess, p in zip(axes.flat, images, labels, predicted, confidence, strict=False):
        ax.imshow(image.numpy(), cmap="gray_r")
        if label == guess:
            ax.set_title(f"{literal(guess)}  {100 * p:.0f}%", fontsize=8, color=RIGHT)
            ax.spines[:].set(color="#d0d0d0", linewidth=1)
        else:
            ax.set_title(
                f"predicted {literal(guess)}\ntrue {literal(label)}", fontsize=8, color=WRONG, fontweight="bold"
            )
            ax.spines[:].set(color=WRONG, linewidth=3)
    for ax in axes.flat[len(images) :]:
        ax.set_axis_off()
    return figure


def learning_curve(
    loss: Sequence[float],
    accuracy: Sequence[float],
    measure: str = "accuracy",
    images: str = "test",
    unit: str = "%",
) -> Figure:
    """Training loss, and accuracy on ``images``, by epoch. ``measure`` is a share of 1, or has another unit than %."""
    factor, most, least = (100, 100.0, MIN_POINTS) if unit == "%" else (1, np.inf, MIN_GAIN)
    epochs = np.arange(1, len(loss) + 1)
    figure, [[left, right]] = panels(1, 2, 8, 3.4)
    left.plot(epochs, loss, ".-", color=RIGHT)  # with dots, because one epoch makes no line
    left.set(xlabel="epoch", ylabel="training loss", ylim=(min(0, *loss), None))
    last = f"{images}, in the end {factor * accuracy[-1]:.1f} {unit}"
    right.plot(epochs, factor * np.array(accuracy), ".-", color=WRONG, label=last)
    limits = _limits(factor * np.array(accuracy), least, 0, most)
    right.set(xlabel="epoch", ylabel=f"{measure} ({unit})", ylim=limits)
    right.legend(loc="lower right", frameon=False)
    for ax in (left, right):
        ax.set_xlim(0.5, len(loss) + 0.5)
        _whole_ticks(9, ax.xaxis)
        _clear(ax)
    return figure


def filter_basis(filters: Tensor, width: int, names: Sequence[str]) -> Figure:
    """Filters (H,K,n), complex, for planes of ``width``: log magnitude and phase of each, frequency 0 in the middle."""
    spectra = full_spectrum(filters, width)
    magnitude, phase = np.log10(np.abs(spectra) + 1e-12), np.angle(spectra)
    count = spectra.shape[-1]
    figure, axes = panels(2, count, 2.3 * count + 1, 5.2)
    low, high = at_least(np.percentile(magnitude, [1, 100]), MIN_DECADES)
    for f in range(count):
        top = _spectrum(axes[0, f], magnitude[..., f], "magma", low, high)
        bottom = _spectrum(axes[1, f], phase[..., f], "twilight", -np.pi, np.pi)
        axes[0, f].set_title(names[f], fontsize=10)
        axes[1, f].set_xlabel("horizontal frequency\n(cycles/plane)", fontsize=9)
    for ax in axes[:, 0]:
        ax.set_ylabel("vertical frequency\n(cycles/plane)", fontsize=9)
    _colour_bar(figure, top, axes[0], "log10 |filter|", shrink=0.85)
    bar = _colour_bar(figure, bottom, axes[1], "phase (rad)", shrink=0.85)
    bar.set_ticks([-np.pi, 0, np.pi], labels=["-π", "0", "π"])
    return figure


def mixed_filters(
    images: Sequence[np.ndarray], labels: Sequence[str], filters: Tensor, channels: Sequence[int], width: int
) -> Figure:
    """Images (H,W) or (H,W,3) and, below each, how its mixed filter differs from the average one, in a few channels.

    ``filters`` is complex (N,H,K,n) for planes of ``width``; ``channels`` says which n channels they are. The first
    column is the average filter.
    """
    count = len(images)
    spectra = np.stack([np.abs(full_spectrum(f, width)) + 1e-12 for f in filters])
    average = spectra.mean(0)
    gain = 20 * np.log10(spectra / average)
    limit = max(float(np.percentile(np.abs(gain), 99)), MIN_GAIN)
    rows, columns = len(channels) + 1, count + 1
    figure, axes = panels(rows, columns, 1.2 * columns + 1.6, 1.25 * rows + 0.7)
    axes[0, 0].set_axis_off()
    for n in range(count):
        axes[0, n + 1].imshow(images[n], cmap="gray")
        axes[0, n + 1].set_title(literal(labels[n]), fontsize=9)
    low, high = at_least(np.percentile(np.log10(average), [1, 100]), MIN_DECADES)
    for row, channel in enumerate(channels):
        mean = _spectrum(axes[row + 1, 0], np.log10(average[..., row]), "magma", low, high)
        axes[row + 1, 0].set_ylabel(f"channel {channel}", fontsize=9)
        for n in range(count):
            change = _spectrum(axes[row + 1, n + 1], gain[n, ..., row], "RdBu_r", -limit, limit)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    axes[1, 0].set_title("average", fontsize=9)
    _colour_bar(figure, mean, axes[1:, 0], "log10 |average filter|", shrink=0.7, location="left")
    _colour_bar(figure, change, axes[1:, -1], "gain against the average (dB)", shrink=0.7)
    return figure


def routing(shares: Tensor, bits: Tensor, labels: Sequence[str], row: str) -> Figure:
    """The share of each filter in each channel, (N,F,C), a panel a filter, and its entropy ``bits`` (N,C).

    ``row`` says what a row is: an image or a class. Channels are sorted by their strongest filter.
    """
    count, filters, _ = shares.shape
    mean = shares.mean(0).numpy()
    order = np.lexsort((-mean.max(0), mean.argmax(0)))
    even = 1 / filters
    limit = max(float((shares - even).abs().max()), MIN_SHARE * even)
    norm = TwoSlopeNorm(even, max(even - limit, 0), even + limit)
    figure, [axes] = panels(1, filters + 1, 2.4 * filters + 3.2, 0.22 * count + 2.2, sharey=True)
    for f in range(filters):
        drawn = shares[:, f, order].numpy()
        image = axes[f].imshow(drawn, cmap="RdBu_r", norm=norm, aspect="auto", interpolation="nearest")
        _whole_ticks(4, axes[f].xaxis)
        axes[f].set_title(f"filter {f}", fontsize=10)
        axes[f].set_xlabel("channel (sorted)", fontsize=9)
    names = [literal(label) for label in labels]
    axes[0].set_yticks(range(count), names, fontsize=8)
    axes[0].set_ylabel(row, fontsize=9)
    _colour_bar(figure, image, axes[:filters], f"share of the filter (white: 1/{filters})", shrink=0.9)
    axes[filters].boxplot(list(bits.numpy()), positions=range(count), orientation="horizontal", showfliers=False)
    axes[filters].axvline(np.log2(filters), color=WRONG, linestyle=":", label="all filters alike")
    axes[filters].set_yticks(range(count), names, fontsize=8)
    axes[filters].set_xlim(_limits(bits.numpy(), MIN_BITS, 0, float(np.log2(filters)) or MIN_BITS))
    axes[filters].set_xlabel("entropy of the shares (bits)", fontsize=9)
    axes[filters].legend(fontsize=7, loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
    return figure


def responses(maps: Sequence[Sequence[Tensor]], rows: Sequence[str], columns: Sequence[str]) -> Figure:
    """Planes (H,W), a row for each input: the input, and its responses to filters with their gains.

    Every plane is drawn in units of its own standard deviation around its mean; the gain is the ratio of standard
    deviations, response to input. A plane that is constant up to rounding is drawn grey and has no gain.
    """
    H, W = maps[0][0].shape
    width, height = 1.65 * len(columns) + 1.5, 1.65 * len(rows) * H / W + 0.3 * len(rows) + 0.9
    figure, axes = panels(len(rows), len(columns), width, height, subplot_kw=NO_TICKS)
    for r, planes in enumerate(maps):
        spreads = [_spread(plane, planes[0]) for plane in planes]
        axes[r, 0].set_ylabel(literal(rows[r]), fontsize=9)
        for c, (plane, spread) in enumerate(zip(planes, spreads, strict=True)):
            values = (plane - plane.mean()) / spread if spread else torch.zeros_like(plane)
            image = axes[r, c].imshow(values.numpy(), cmap="gray", vmin=-3, vmax=3, interpolation="nearest")
            gain = f"{20 * np.log10(spread / spreads[0]):+.0f} dB" if spread and spreads[0] else "constant"
            above = columns[c] if r == 0 else ""
            below = gain if c or not spread else ""
            axes[r, c].set_title("\n".join(filter(None, (above, below))), fontsize=8)
    _colour_bar(figure, image, axes, "value (standard deviations from the mean)", shrink=0.6)
    return figure


def spectra_by_depth(spectra: dict[str, Spectrum]) -> Figure:
    """Relative log amplitude against frequency, a curve for each layer; that of the highest frequency against depth."""
    names, count = list(spectra), len(spectra)
    figure, [[left, right]] = panels(1, 2, 9, 4, width_ratios=(1.2, 1))
    colours = [colormaps["viridis"](depth / max(count - 1, 1)) for depth in range(count)]
    for colour, spectrum in zip(colours, spectra.values(), strict=True):
        left.plot(spectrum.frequency, spectrum.amplitude, color=colour, marker=".", markersize=4, linewidth=1.2)
    left.set(xlabel="frequency (rad/pixel of the feature map)", ylabel="Δ log amplitude", xlim=(0, 1.02))
    left.set_xticks([0, 0.25, 0.5, 0.75, 1], labels=["0", "π/4", "π/2", "3π/4", "π"])
    norm = BoundaryNorm(np.arange(count + 1) + 0.5, 256) if count > 1 else Normalize(0.5, 1.5)
    bar = figure.colorbar(ScalarMappable(norm, "viridis"), ax=left, label="depth (layer)")
    bar.set_ticks(np.unique(np.linspace(1, count, min(count, 9)).round()).tolist())
    highest = [float(s.amplitude[-1]) for s in spectra.values()]
    right.plot(range(1, count + 1), highest, color=GREY, linewidth=1)
    right.scatter(range(1, count + 1), highest, color=colours, zorder=3)
    right.set(ylabel="Δ log amplitude, highest frequency")
    right.set_xticks(range(1, count + 1), names, rotation=90, fontsize=7)
    for ax, values in ((left, torch.cat([s.amplitude for s in spectra.values()])), (right, highest)):
        ax.set_ylim(_limits(np.asarray(values), MIN_LOG))
        _clear(ax)
    return figure


def receptive_fields(fields: dict[str, Tensor]) -> Figure:
    """Receptive fields (H,W) by model, and the area that holds any share of each."""
    count = len(fields)
    figure, [axes] = panels(1, count + 1, 3.3 * count + 4, 3.8)
    axes[-1].set_prop_cycle(color=CYCLE)
    for ax, (name, field) in zip(axes, fields.items(), strict=False):
        relative = (field / field.max() + 1e-12).log10().numpy()
        image = ax.imshow(relative, cmap="magma", vmin=-4, vmax=0, interpolation="nearest")
        ax.set(xlabel="column (pixel)", ylabel="row (pixel)")
        _whole_ticks(5, ax.xaxis, ax.yaxis)
        ax.set_title(literal(name), fontsize=9)
        share = field.flatten().sort(descending=True).values.cumsum(0)
        axes[-1].plot(100 * np.arange(1, len(share) + 1) / len(share), 100 * share, label=literal(name))
    _colour_bar(figure, image, axes[:count], "log10 (contribution / largest)", shrink=0.8)
    axes[-1].set(xlabel="pixels that contribute most\n(% of the image)", ylabel="their share of all contributions (%)")
    axes[-1].set(xlim=(0, 100), ylim=(0, 101))
    axes[-1].legend(frameon=False, fontsize=8, loc="lower right")
    _clear(axes[-1])
    return figure


def similarity_matrix(cka: Tensor, layers: Sequence[Sequence[str]], models: Sequence[str]) -> Figure:
    """CKA (a,b) of the ``layers`` of two ``models`` (rows, columns)."""
    rows, columns = layers
    figure, [[ax]] = panels(1, 1, 0.34 * len(columns) + 3, 0.34 * len(rows) + 2.2)
    lowest = min(np.floor(10 * np.nan_to_num(cka.numpy(), nan=1).min()) / 10, 1 - MIN_CKA)
    image = ax.imshow(cka.numpy(), cmap="magma", vmin=lowest, vmax=1, interpolation="nearest")
    ax.set_xticks(range(len(columns)), columns, rotation=90, fontsize=7)
    ax.set_yticks(range(len(rows)), rows, fontsize=7)
    ax.set_ylabel(f"{literal(models[0])}\nlayer", fontsize=9)
    ax.set_xlabel(f"layer\n{literal(models[1])}", fontsize=9)
    if cka.numel() <= MAX_WRITTEN:
        for (a, b), value in np.ndenumerate(cka.numpy()):
            color = "white" if value <= (lowest + 1) / 2 else "black"  # black where there is no value
            ax.text(b, a, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)
    _colour_bar(figure, image, ax, "CKA (linear)", shrink=0.9)
    return figure


def comparison_bars(
    rows: Sequence[tuple[str, float, float]], names: tuple[str, str], ylabel: str, title: str
) -> Figure:
    """Pairs of bars: rows of (label, first value, second value)."""
    figure, [[ax]] = panels(1, 1, 1.6 * len(rows) + 2.5, 3.4)
    labels, *values = zip(*rows, strict=True)
    position = np.arange(len(rows))
    for offset, heights, name, color in zip((-0.2, 0.2), values, names, (GREY, RIGHT), strict=True):
        bars = ax.bar(position + offset, heights, 0.38, color=color, label=name)
        ax.bar_label(bars, [f"{height:.0f}" if height >= 1000 else f"{height:.3g}" for height in heights], fontsize=8)
    ax.set_xticks(position, labels)
    ax.set(ylabel=ylabel, title=title)
    ax.margins(y=0.15)
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    return figure


def panels(rows: int, columns: int, width: float, height: float, **options: Any) -> tuple[Figure, np.ndarray]:
    """A figure of a size in inches, and its axes (rows,columns)."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def titled(figure: Figure, title: str, caption: str = "") -> Figure:
    """``figure`` with a title above, and a caption in small print below."""
    figure.suptitle(literal(title), fontsize=11)
    letters_an_inch = 17  # of 8 points
    lines = textwrap.wrap(caption, int(letters_an_inch * figure.get_figwidth()))
    if lines:
        figure.supxlabel("\n".join(map(literal, lines)), x=0.01, ha="left", fontsize=8, color="#404040")
    return figure


def frame(ax: Axes, left: float, top: float, width: float, height: float, colour: Any, line: float) -> None:
    """Outlines a part of an image."""
    ax.add_patch(Rectangle((left, top), width, height, fill=False, edgecolor=colour, linewidth=line))


@cache
def _glyphs() -> frozenset[int]:
    return frozenset(get_font(findfont(FontProperties())).get_charmap())


def literal(text: str) -> str:
    """``text`` as matplotlib draws it on one line: no part is a formula, and a square is what the font lacks."""
    drawn = "".join(c if ord(c) in _glyphs() else "\N{WHITE SQUARE}" for c in printable(text))
    return drawn.replace("$", r"\$")


def at_least(values: np.ndarray, span: float, low: float = -np.inf, high: float = np.inf) -> tuple[float, float]:
    """The range of ``values``, widened around its middle to ``span`` and moved to lie between ``low`` and ``high``."""
    finite = values[np.isfinite(values)]
    least, most = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    missing = max(span - (most - least), 0) / 2
    least, most = least - missing, most + missing
    shift = max(low - least, 0) - max(most - high, 0)
    return least + shift, most + shift


def full_spectrum(half: Tensor, width: int) -> np.ndarray:
    """The full spectrum (H,width,...) for the half spectrum (H,K,...) of a real kernel, frequency 0 in the middle."""
    right = half.resolve_conj().numpy()
    H, K = right.shape[:2]
    left = right[-np.arange(H) % H][:, width - np.arange(K, width)].conj()
    return np.fft.fftshift(np.concatenate([right, left], axis=1), axes=(0, 1))


def _limits(values: np.ndarray, span: float, low: float = -np.inf, high: float = np.inf) -> tuple[float, float]:
    """`at_least`, with a margin."""
    least, most = at_least(values, span, low, high)
    margin = 0.05 * (most - least)
    return least - margin, most + margin


def _clear(ax: Axes) -> None:
    """A light grid, no frame, and ticks with full values instead of offsets."""
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    for axis in (ax.xaxis, ax.yaxis):
        if isinstance(formatter := axis.get_major_formatter(), ScalarFormatter):
            formatter.set_useOffset(False)


def _colour_bar(figure: Figure, image: AxesImage, axes: Any, label: str, **options: Any) -> Colorbar:
    return figure.colorbar(image, ax=axes, label=label, format=ScalarFormatter(useOffset=False), **options)


def _spread(plane: Tensor, given: Tensor) -> float:
    """The standard deviation; 0 if it is only the rounding error of ``plane`` or of its input."""
    spread = float(plane.std(correction=0))
    return spread if spread > 1e-6 * float(torch.maximum(plane.abs().max(), given.abs().max())) else 0.0


def _spectrum(ax: Axes, values: np.ndarray, colours: str, low: float, high: float) -> AxesImage:
    H, W = values.shape
    extent = (-(W // 2) - 0.5, W - W // 2 - 0.5, H - H // 2 - 0.5, -(H // 2) - 0.5)
    image = ax.imshow(values, cmap=colours, vmin=low, vmax=high, extent=extent, interpolation="nearest")
    _whole_ticks(4, ax.xaxis, ax.yaxis)  # there are no frequencies in between
    return image


def _whole_ticks(most: int, *axes: Axis) -> None:
    for axis in axes:
        axis.set_major_locator(MaxNLocator(most, integer=True, min_n_ticks=1))
