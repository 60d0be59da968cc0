"""The pictures that bench_op and bench_model draw of their rows. Redraws them from the committed results:

python benchmarks/figures.py
"""

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from common import device_name
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from providers import model as model_providers
from providers import op as op_providers
from providers.model import PROVIDERS, mib_per_image, size_name
from providers.op import BOTH, FORWARD, OURS, STAGES

from dfformer.analysis.palette import BLACK, BLUE, GREY, VERMILLION

RESULTS = Path(__file__).parent / "results"
COLOURS = {FORWARD: BLUE, BOTH: VERMILLION}
MARKERS = {"cpu": "o", "cuda": "o", "cufft": "^", "torch": "s"}
HATCHES = {"cpu": "", "cuda": "", "cufft": "///"}
COLUMNS = 3


def op_figure(machine: dict[str, Any], rows: Sequence[op_providers.Row]) -> Figure:
    """A picture of the rows of one dtype: a panel of speed-ups over torch.fft for each use, and a roofline."""
    ours = [name for name in OURS if name in {r.provider for r in rows}]
    uses = {use: [r for r in rows if _use(r) == use] for use in dict.fromkeys(map(_use, rows))}
    most = max(len({r.shape for r in own}) for own in uses.values())
    lines = -(-(len(uses) + 1) // COLUMNS)
    picture = Figure(figsize=(13, lines * (0.2 * most * len(ours) + 2.6) + 0.6), layout="constrained")
    axes = list(picture.subplots(lines, COLUMNS, squeeze=False).flat)
    longest = max(r.speedup for r in rows if r.provider in ours)
    for ax, (use, own) in zip(axes, uses.items(), strict=False):
        _speedup_bars(ax, use, ours, own)
        ax.set(xlim=(0, 1.12 * longest), ylim=(most - 0.5, -0.5))
    _roofline(axes[len(uses)], machine, ours, rows)
    for ax in axes[len(uses) + 1 :]:
        ax.set_axis_off()
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    picture.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    names = " and ".join(ours)
    picture.suptitle(f"Filter step, {names} against torch.fft, {rows[0].dtype}, {device_name(machine)}", fontsize=12)
    return picture


def _use(row: op_providers.Row) -> str:
    strides = {C: stride for stride, C in STAGES}
    use = f"Stages at {row.H * strides[row.C]}x{row.W * strides[row.C]}" if row.stage and row.C in strides else "Others"
    return use if row.op == "dynamic_filter" else f"{row.op}, {use}"


def _speedup_bars(ax: Axes, use: str, ours: Sequence[str], rows: Sequence[op_providers.Row]) -> None:
    """Draws the speed-ups; the title has the medians of the first of ``ours``."""
    shapes = list(dict.fromkeys(r.shape for r in rows))
    kinds = [(direction, name) for direction in COLOURS for name in ours]
    for i, (direction, name) in enumerate(kinds):
        drawn = [r for r in rows if (r.direction, r.provider) == (direction, name)]
        position = [shapes.index(r.shape) + 0.8 * ((i + 0.5) / len(kinds) - 0.5) for r in drawn]
        bars = ax.barh(
            position,
            [r.speedup for r in drawn],
            0.76 / len(kinds),
            color=COLOURS[direction],
            hatch=HATCHES[name],
            edgecolor="white",
            linewidth=0,
            label=direction if len(ours) == 1 else f"{name}, {direction}",
        )
        ax.bar_label(bars, fmt="%.1f", fontsize=7, padding=2)
    ax.set_yticks(range(len(shapes)), shapes, fontsize=8)
    ax.axvline(1, color=GREY, linewidth=1)
    ax.set(xlabel="times faster than torch.fft", ylabel="B x H x W x C")
    medians = _medians(rows, ours[0], lambda r: r.speedup, "{:.1f}")
    ax.set_title(f"{use}: {medians} times faster", fontsize=10)


def _medians(rows: Sequence[op_providers.Row], name: str, value: Callable[[op_providers.Row], float], form: str) -> str:
    """Draws forward, and forward+backward if it was measured, under the roofline."""
    found = [[value(r) for r in rows if (r.provider, r.direction) == (name, d)] for d in COLOURS]
    return " and ".join(form.format(statistics.median(own)) for own in found if own)


def _roofline(ax: Axes, machine: dict[str, Any], ours: Sequence[str], rows: Sequence[op_providers.Row]) -> None:
    for name in (*ours, "torch"):
        for direction, colour in COLOURS.items():
            drawn = [r for r in rows if (r.provider, r.direction) == (name, direction)]
            ax.scatter(
                [r.gflops / r.gbps for r in drawn],
                [r.gflops for r in drawn],
                s=20,
                marker=MARKERS[name],
                edgecolors=colour,
                facecolors=colour if name in ours else "none",
                label=f"{name}, {direction}",
            )
    peak, slow, fast = rows[0].gemm_gflops, machine["copy_gbps"], max(r.copy_gbps for r in rows)
    intensities = [r.gflops / r.gbps for r in rows]
    low, high = 0.12 * min(*intensities, peak / fast), 2 * max(*intensities, peak / slow)
    for bandwidth, style, where in ((slow, "-", "memory"), (fast, "--", "cache")):
        label = f"copy in {where},\n{bandwidth:.0f} GB/s"
        ax.plot([low, peak / bandwidth], [bandwidth * low, peak], style, color=GREY, label=label)
    ax.axhline(peak, color=BLACK, linewidth=1, label=f"matrix product,\n{peak:.0f} GFLOP/s")
    ax.set(xscale="log", yscale="log", xlim=(low, high), xlabel="flop per byte (nominal)", ylabel="GFLOP/s (nominal)")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=7, loc="lower left", framealpha=0.9, edgecolor="none")
    shares = [_medians(rows, name, lambda r: r.share_of_limit, "{:.0%}") for name in (ours[0], "torch")]
    ax.set_title(f"Roofline: {shares[0]} of the limit,\ntorch.fft {shares[1]}", fontsize=10)


DRAWN: dict[str, tuple[str, Callable[[model_providers.Row], float | None]]] = {
    "throughput": ("images/s", lambda r: r.images_per_second),
    "memory": ("peak memory beside the model, MiB an image", lambda r: mib_per_image(r, r.peak_bytes)),
}


def model_figure(
    machine: dict[str, Any],
    rows: Sequence[model_providers.Row],
    label: str,
    value: Callable[[model_providers.Row], float | None],
) -> Figure:
    """A quantity against an image's pixels, a panel for each task: eager mode, the first measured dtype and batch."""
    drawn = [r for r in rows if (r.dtype, r.mode, r.batch) == (rows[0].dtype, rows[0].mode, rows[0].batch)]
    tasks = list(dict.fromkeys(r.task for r in drawn))
    picture = Figure(figsize=(6.5 * len(tasks), 5.6), layout="constrained")
    for ax, task in zip(picture.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        _curves(ax, [r for r in drawn if r.task == task], value)
        ax.set(title=task, xlabel="image size", ylabel=label)
    batch = "single images" if rows[0].batch == 1 else f"batches of {rows[0].batch}"
    picture.suptitle(f"{batch}, {rows[0].dtype}, {rows[0].mode}, {device_name(machine)}", fontsize=11)
    return picture


def _curves(
    ax: Axes, rows: Sequence[model_providers.Row], value: Callable[[model_providers.Row], float | None]
) -> None:
    """Draws a line for each provider, with its name at the end."""
    ends: list[tuple[float, float, str]] = []  # value, pixels, provider
    for name in dict.fromkeys(r.provider for r in rows):
        provider = PROVIDERS[name]
        points = sorted((r.problem.pixels, v) for r in rows if r.provider == name and (v := value(r)))
        ax.plot(
            [pixels for pixels, _ in points],
            [v for _, v in points],
            color=provider.colour,
            marker=provider.marker,
            linewidth=2.2 if provider.checked else 1.3,
            linestyle="--" if provider.prepare else "-",
            label=name,
        )
        if points:
            ends.append((points[-1][1], points[-1][0], name))
    ax.set(xscale="log", yscale="log")
    squares = sorted({(r.H, r.W) for r in rows if r.H == r.W})  # 427x640 would be a point beside 512x512
    ax.set_xticks([H * W for H, W in squares], [size_name(size) for size in squares], rotation=40, fontsize=8)
    ax.minorticks_off()
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    _name_lines(ax, ends)


def _name_lines(ax: Axes, ends: list[tuple[float, float, str]]) -> None:
    """Writes the names to the right of the axes, in the order of the lines' ends and without overlap.

    A line that ends earlier has its name beside its end.
    """
    largest = max((pixels for _, pixels, _ in ends), default=0)
    whole = sorted(end for end in ends if end[1] == largest)
    for value, pixels, name in set(ends) - set(whole):
        at = (pixels, value)
        ax.annotate(name, at, xytext=(-8, 0), textcoords="offset points", ha="right", va="center", **_text(name))
    low, high = np.log10(ax.get_ylim())
    places = (np.log10([value for value, *_ in whole]) - low) / (high - low)
    least = 0.048  # height of a line of text, as a share of the axes
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + least)
    places -= max(places.max(initial=0) - 1, 0)
    for (value, pixels, name), place in zip(whole, places, strict=True):
        tie = {"arrowstyle": "-", "color": PROVIDERS[name].colour, "linewidth": 0.7, "relpos": (0, 0.5)}
        at, to = (pixels, value), (1.06, float(place))
        ax.annotate(name, at, xytext=to, textcoords="axes fraction", va="center", arrowprops=tie, **_text(name))


def _text(name: str) -> dict[str, Any]:
    return {"color": PROVIDERS[name].colour, "fontsize": 9, "annotation_clip": False}


def write_op(folder: Path, machine: dict[str, Any], rows: Sequence[op_providers.Row]) -> None:
    op_figure(machine, [r for r in rows if r.dtype == rows[0].dtype]).savefig(folder / "op.png", dpi=120)


def write_model(folder: Path, machine: dict[str, Any], rows: Sequence[model_providers.Row]) -> None:
    for quantity, (label, value) in DRAWN.items():
        model_figure(machine, rows, label, value).savefig(folder / f"model_{quantity}.png", dpi=120)


def main() -> None:
    kinds: dict[str, tuple[Any, Callable[..., None]]] = {
        "op": (op_providers.Row, write_op),
        "model": (model_providers.Row, write_model),
    }
    for name, (row, write) in kinds.items():
        content = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))
        columns = [field.name for field in fields(row)]
        write(RESULTS, content["machine"], [row(**{key: own[key] for key in columns}) for own in content["rows"]])


if __name__ == "__main__":
    main()
