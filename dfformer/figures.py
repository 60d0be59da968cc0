"""Pictures of training and of filters. Every figure can stand alone: axes, units, colour bars, a title."""

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor

WRONG, RIGHT = "#c0392b", "#2c3e50"


def predictions_grid(
    images: Tensor, labels: Sequence[str], predicted: Sequence[str], confidence: Sequence[float], title: str
) -> Figure:
    """Images (N,H,W) in a grid with what was predicted; mistakes are framed in red with the true label beside."""
    columns = 10
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(columns * 0.95, rows * 1.2 + 0.6), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax, image, label, guess, p in zip(axes, images, labels, predicted, confidence, strict=False):
        right = label == guess
        ax.imshow(image.numpy(), cmap="gray_r")
        ax.set_title(
            f"{guess}  {100 * p:.0f}%" if right else f"{guess}, is {label}",
            fontsize=8,
            color=RIGHT if right else WRONG,
            fontweight="normal" if right else "bold",
        )
        for spine in ax.spines.values():
            spine.set(color="#d0d0d0" if right else WRONG, linewidth=1 if right else 3)
    for ax in axes:
        ax.set(xticks=[], yticks=[])
    for ax in axes[len(images) :]:
        ax.set_axis_off()
    figure.suptitle(title, fontsize=11)
    return figure


def learning_curve(loss: Sequence[float], train_accuracy: Sequence[float], test_accuracy: Sequence[float]) -> Figure:
    """Loss and accuracies (fractions) by epoch."""
    epochs = np.arange(1, len(loss) + 1)
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(epochs, loss, color=RIGHT)
    left.set(xlabel="epoch", ylabel="training loss (cross entropy)", ylim=(0, None))
    right.plot(epochs, 100 * np.array(train_accuracy), color="#7f8c8d", label="training (augmented)")
    right.plot(epochs, 100 * np.array(test_accuracy), color=WRONG, label="test")
    right.set(xlabel="epoch", ylabel="accuracy (%)")
    right.annotate(
        f"{100 * test_accuracy[-1]:.1f} %",
        (epochs[-1], 100 * test_accuracy[-1]),
        xytext=(0, -14),
        textcoords="offset points",
        ha="right",
        color=WRONG,
    )
    right.legend(loc="lower right", frameon=False)
    for ax in (left, right):
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    return figure


def filter_basis(basis: Tensor, width: int, title: str) -> Figure:
    """A basis (H,K,F,2) for planes of ``width``: log magnitude and phase of each filter, frequency 0 in the middle."""
    filters = full_spectrum(torch.view_as_complex(basis.detach().float().contiguous()), width)
    magnitude, phase = np.log10(np.abs(filters) + 1e-12), np.angle(filters)
    count = filters.shape[-1]
    figure = Figure(figsize=(2.3 * count + 1, 5.2), layout="constrained")
    axes = figure.subplots(2, count, squeeze=False)
    low, high = np.percentile(magnitude, [1, 100])
    for f in range(count):
        top = _spectrum(axes[0, f], magnitude[..., f], "magma", low, high)
        bottom = _spectrum(axes[1, f], phase[..., f], "twilight", -np.pi, np.pi)
        axes[0, f].set_title(f"filter {f + 1}", fontsize=10)
    axes[0, 0].set_ylabel("log magnitude\n\nvertical frequency", fontsize=9)
    axes[1, 0].set_ylabel("phase\n\nvertical frequency", fontsize=9)
    for ax in axes[1]:
        ax.set_xlabel("horizontal frequency", fontsize=9)
    figure.colorbar(top, ax=axes[0], shrink=0.85, label="log10 |filter|")
    bar = figure.colorbar(bottom, ax=axes[1], shrink=0.85, label="phase (rad)")
    bar.set_ticks([-np.pi, 0, np.pi], labels=["-π", "0", "π"])
    figure.suptitle(title, fontsize=11)
    return figure


def mixed_filters(images: Tensor, labels: Sequence[str], filters: Tensor, width: int, title: str) -> Figure:
    """Images (N,H,W) and, below each, how its mixed filter differs from the average one, in a few channels.

    ``filters`` is complex (N,H,K,channels) for planes of ``width``. The first column is the average filter.
    """
    count, channels = len(images), filters.shape[-1]
    spectra = np.stack([np.abs(full_spectrum(f, width)) + 1e-12 for f in filters])
    average = spectra.mean(0)
    gain = 20 * np.log10(spectra / average)
    limit = max(float(np.percentile(np.abs(gain), 99)), 1e-3)
    figure = Figure(figsize=(1.2 * (count + 1) + 1.6, 1.25 * (channels + 1) + 0.7), layout="constrained")
    axes = figure.subplots(channels + 1, count + 1, squeeze=False)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    axes[0, 0].set_axis_off()
    for n in range(count):
        axes[0, n + 1].imshow(images[n].numpy(), cmap="gray_r")
        axes[0, n + 1].set_title(labels[n], fontsize=9)
    low, high = np.percentile(np.log10(average), [1, 100])
    for c in range(channels):
        mean = _spectrum(axes[c + 1, 0], np.log10(average[..., c]), "magma", low, high)
        axes[c + 1, 0].set_ylabel(f"channel {c + 1}", fontsize=9)
        for n in range(count):
            change = _spectrum(axes[c + 1, n + 1], gain[n, ..., c], "RdBu_r", -limit, limit)
    for ax in axes[1:].flat:
        ax.set(xticks=[], yticks=[])
    axes[1, 0].set_title("average", fontsize=9)
    figure.colorbar(mean, ax=axes[1:, 0], shrink=0.7, location="left", label="log10 |average filter|")
    figure.colorbar(change, ax=axes[1:, -1], shrink=0.7, label="gain against the average (dB)")
    figure.suptitle(title, fontsize=11)
    return figure


def comparison_bars(
    rows: Sequence[tuple[str, float, float]], names: tuple[str, str], ylabel: str, title: str
) -> Figure:
    """Pairs of bars: rows of (label, first value, second value)."""
    figure = Figure(figsize=(1.6 * len(rows) + 2.5, 3.4), layout="constrained")
    ax = figure.subplots()
    position = np.arange(len(rows))
    for offset, index, color in ((-0.2, 1, "#95a5a6"), (0.2, 2, RIGHT)):
        bars = ax.bar(position + offset, [float(row[index]) for row in rows], 0.38, color=color, label=names[index - 1])
        ax.bar_label(bars, fmt="%.3g", fontsize=8)
    ax.set_xticks(position, [row[0] for row in rows])
    ax.set(ylabel=ylabel, title=title)
    ax.margins(y=0.15)
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    return figure


def full_spectrum(half: Tensor, width: int) -> np.ndarray:
    """Complex (H,K,...) half spectrum of a real kernel to all of it (H,width,...), zero frequency in the middle."""
    H, K = half.shape[:2]
    columns = torch.arange(width)
    mirrored = columns >= K
    rows = (-torch.arange(H)) % H
    other_half = half[rows][:, torch.where(mirrored, width - columns, 0)].conj()
    own_half = half[:, torch.where(mirrored, 0, columns)]
    selector = mirrored.view(1, -1, *[1] * (half.dim() - 2))
    return np.fft.fftshift(torch.where(selector, other_half, own_half).resolve_conj().numpy(), axes=(0, 1))


def _spectrum(ax: Axes, values: np.ndarray, colours: str, low: float, high: float) -> AxesImage:
    H, W = values.shape
    extent = (-(W // 2) - 0.5, W - W // 2 - 0.5, H - H // 2 - 0.5, -(H // 2) - 0.5)
    return ax.imshow(values, cmap=colours, vmin=low, vmax=high, extent=extent, interpolation="nearest")
