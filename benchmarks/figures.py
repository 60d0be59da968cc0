"""The pictures that bench_op and bench_model write of their rows."""

from collections.abc import Callable, Sequence
from typing import Any

import model_providers
import op_providers
from common import device_name
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from model_providers import PROVIDERS, mib_per_image, size_name
from op_providers import BOTH, FORWARD, OURS

COLOURS = {FORWARD: "#2c3e50", BOTH: "#c0392b"}
MARKERS = {"cpu": "o", "cuda": "o", "cufft": "^", "torch": "s"}
HATCHES = {"cpu": "", "cuda": "", "cufft": "///"}
ABOVE: dict[str, Any] = {"loc": "lower center", "bbox_to_anchor": (0.5, 1)}


def op_figure(machine: dict[str, Any], rows: Sequence[op_providers.Row]) -> Figure:
    """Of the rows of one dtype: the speed-up of our backends over torch.fft by shape, and a roofline of all."""
    ours = [name for name in OURS if name in {r.provider for r in rows}]
    shapes = list(dict.fromkeys((r.op, r.shape) for r in rows))
    picture = Figure(figsize=(13, max(5, 0.26 * len(shapes) + 1.5)), layout="constrained")
    left, right = picture.subplots(1, 2)
    _speedup_bars(left, shapes, ours, rows)
    _roofline(right, machine, ours, rows)
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    picture.suptitle(f"Filter step, {rows[0].dtype}, {device_name(machine)}", fontsize=11)
    return picture


def _speedup_bars(
    ax: Axes, shapes: list[tuple[str, str]], ours: Sequence[str], rows: Sequence[op_providers.Row]
) -> None:
    kinds = [(direction, name) for direction in COLOURS for name in ours]
    for i, (direction, name) in enumerate(kinds):
        drawn = [r for r in rows if (r.direction, r.provider) == (direction, name)]
        position = [shapes.index((r.op, r.shape)) + 0.8 * ((i + 0.5) / len(kinds) - 0.5) for r in drawn]
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
    names = [shape if len({op for op, _ in shapes}) == 1 else f"{op} {shape}" for op, shape in shapes]
    ax.set_yticks(range(len(shapes)), names, fontsize=8)
    ax.invert_yaxis()
    ax.axvline(1, color="#7f8c8d", linewidth=1)
    ax.set(xlabel="times faster than torch.fft", ylabel="B x H x W x C")
    ax.legend(title=f"{' and '.join(ours)} against torch.fft", ncols=2, frameon=False, **ABOVE)


def _roofline(ax: Axes, machine: dict[str, Any], ours: Sequence[str], rows: Sequence[op_providers.Row]) -> None:
    for name in (*ours, "torch"):
        for direction, colour in COLOURS.items():
            drawn = [r for r in rows if (r.provider, r.direction) == (name, direction)]
            ax.scatter(
                [r.gflops / r.gbps for r in drawn],
                [r.gflops for r in drawn],
                s=24,
                marker=MARKERS[name],
                edgecolors=colour,
                facecolors=colour if name in ours else "none",
                label=f"{name}, {direction}",
            )
    peak, slow, fast = rows[0].gemm_gflops, machine["copy_gbps"], max(r.copy_gbps for r in rows)
    intensities = [r.gflops / r.gbps for r in rows]
    low, high = 0.5 * min(*intensities, peak / fast), 2 * max(*intensities, peak / slow)
    for bandwidth, style, where in ((slow, "-", "memory"), (fast, "--", "cache, the fastest measured")):
        label = f"copy in {where}: {bandwidth:.0f} GB/s"
        ax.plot([low, peak / bandwidth], [bandwidth * low, peak], style, color="#7f8c8d", label=label)
    ax.axhline(peak, color="#000000", linewidth=1, label=f"matrix product: {peak:.0f} GFLOP/s")
    ax.set(xscale="log", yscale="log", xlim=(low, high), xlabel="flop per byte (nominal)", ylabel="GFLOP/s (nominal)")
    ax.grid(alpha=0.3)
    ax.legend(title="roofline", ncols=2, frameon=False, fontsize=8, **ABOVE)


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
    """A quantity against the image's pixels, a panel for each task: eager mode, the first dtype and batch there are."""
    drawn = [r for r in rows if (r.dtype, r.mode, r.batch) == (rows[0].dtype, rows[0].mode, rows[0].batch)]
    tasks = list(dict.fromkeys(r.task for r in drawn))
    picture = Figure(figsize=(6.5 * len(tasks), 5.6), layout="constrained")
    for ax, task in zip(picture.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        _curves(ax, [r for r in drawn if r.task == task], value)
        ax.set(title=task, xlabel="image size", ylabel=label)
    handles, labels = picture.axes[0].get_legend_handles_labels()
    picture.legend(handles, labels, loc="outside lower center", ncols=2 + len(tasks), frameon=False)
    batch = "single images" if rows[0].batch == 1 else f"batches of {rows[0].batch}"
    picture.suptitle(f"{batch}, {rows[0].dtype}, {rows[0].mode}, {device_name(machine)}", fontsize=11)
    return picture


def _curves(
    ax: Axes, rows: Sequence[model_providers.Row], value: Callable[[model_providers.Row], float | None]
) -> None:
    for name in dict.fromkeys(r.provider for r in rows):
        provider = PROVIDERS[name]
        points = sorted((r.problem.pixels, v) for r in rows if r.provider == name and (v := value(r)))
        ax.plot(
            [pixels for pixels, _ in points],
            [v for _, v in points],
            color=provider.colour,
            marker=provider.marker,
            linewidth=2.2 if provider.checked else 1.3,
            label=name,
        )
    ax.set(xscale="log", yscale="log")
    squares = sorted({(r.H, r.W) for r in rows if r.H == r.W})  # 427x640 is a point beside 512x512
    ax.set_xticks([H * W for H, W in squares], [size_name(size) for size in squares], rotation=40, fontsize=8)
    ax.minorticks_off()
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
