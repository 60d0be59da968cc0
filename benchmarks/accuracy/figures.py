"""Pictures of the benchmark of accuracy: a column for each set of images, means over seeds."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from common import FAMILIES
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from accuracy.dense import MEASURES
from accuracy.images import VIEWS
from accuracy.training import Result
from dfformer.models.filter_resize import RULES

VIEW_TITLES = {
    "finer": "the same scene in more or fewer pixels",
    "wider": "more or less of the scene, same pixels",
}


def learning_figure(results: Sequence[Result]) -> Figure:
    """The error against epochs (above) and against seconds of training (below)."""

    def draw(ax: Axes, found: Sequence[Result], seconds: bool) -> None:
        epochs, spent, accuracy = np.array([r.curve for r in found]).transpose(2, 0, 1)  # (seeds, looks) each
        error = 100 - accuracy
        x = (spent if seconds else epochs).mean(0)
        low, high = error.min(0), error.max(0)
        colour, marker = FAMILIES[found[0].model]
        ax.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
        ax.plot(x, error.mean(0), color=colour, marker=marker, markersize=4, label=found[0].model)

    picture = _panels(results, {False: "by epochs", True: "by seconds of training"}, draw)
    for ax in picture.axes:
        measure = MEASURES.get(ax.get_title().split(":")[0])
        error = f"100 % - {measure}" if measure else "error on part of the test images, %"
        ax.set(yscale="log", ylabel=error)
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_locator(NullLocator())
    for ax, label in zip(picture.axes, _row_labels(picture, ("epochs", "seconds of one thread")), strict=True):
        ax.set_xlabel(label)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    picture.suptitle("Speed of learning: mean over seeds, with a band from the best to the worst", fontsize=12)
    return picture


def sizes_figure(results: Sequence[Result]) -> Figure:
    """Accuracy at other sizes than the training size, for two kinds of resizing."""

    def draw(ax: Axes, found: Sequence[Result], view: str) -> None:
        colour, marker = FAMILIES[found[0].model]
        rules = RULES if f"{view} 2 {RULES[0]}" in found[0].sizes else ("",)
        for rule, line in zip(rules, ("-", "--"), strict=False):
            at = {float(k.split()[1]): k for k in found[0].sizes if k.split()[0] == view and k.endswith(rule)}
            means = {scale: np.mean([r.sizes[key] for r in found]) for scale, key in at.items()}
            means[1.0] = np.mean([r.curve[-1][-1] for r in found])
            label = f"{found[0].model}, {rule}" if rule else found[0].model
            scales = sorted(means)
            ax.plot(scales, [means[s] for s in scales], line, color=colour, marker=marker, markersize=5, label=label)

    picture = _panels(results, {view: VIEW_TITLES[view] for view in VIEWS}, draw)
    for ax in picture.axes:
        ax.set(xlabel="size of the test images, relative to training", ylabel="accuracy, %", ylim=(0, 100))
        ax.set_xticks([0.75, 1, 1.5, 2], ["0.75", "1", "1.5", "2"])
    picture.suptitle("Trained at one size, tested at others: mean over seeds", fontsize=12)
    return picture


def _row_labels(picture: Figure, labels: Sequence[str]) -> list[str]:
    return [label for label in labels for _ in range(len(picture.axes) // len(labels))]


def _panels(
    results: Sequence[Result], rows: dict[Any, str], draw: Callable[[Axes, Sequence[Result], Any], None]
) -> Figure:
    """A panel for each of ``rows``, by its title, and each set of images; one legend below."""
    sets = list(dict.fromkeys(r.images for r in results))
    models = [name for name in FAMILIES if name in {r.model for r in results}]
    picture = Figure(figsize=(1 + 4.2 * len(sets), 8.4), layout="constrained")
    for line, (row, title) in zip(picture.subplots(2, len(sets), squeeze=False), rows.items(), strict=True):
        for ax, images in zip(line, sets, strict=True):
            for name in models:
                if found := [r for r in results if (r.images, r.model) == (images, name)]:
                    draw(ax, found, row)
            ax.set_title(f"{images}: {title}", fontsize=10)
            ax.grid(alpha=0.25, which="both", linewidth=0.6)
            ax.spines[["top", "right"]].set_visible(False)
    handles, labels = picture.axes[0].get_legend_handles_labels()
    picture.legend(handles, labels, loc="outside lower center", ncols=len(models), frameon=False)
    return picture
