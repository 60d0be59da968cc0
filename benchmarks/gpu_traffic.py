"""Bytes that the filter step moves through a GPU's memory, by backend: computed, not measured; no GPU needed.

    python benchmarks/gpu_traffic.py  # prints the tables of docs/gpu.md and draws docs/images/gpu_traffic.png

All for dynamic filters with StarReLU. ``cuda`` moves what the emulator counts in
tests/kernels/cuda/test_cuda_kernels.py, ``cufft`` what `dfformer_kernels.backends.cufft.passes.traffic` says,
``torch`` what its operators read and write, counted by running them on tensors without memory.
"""

from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dfformer.analysis.palette import BLUE, VERMILLION
from dfformer_kernels import reference
from dfformer_kernels.backends.cufft import passes as cufft

PICTURE = Path(__file__).parent.parent / "docs" / "images" / "gpu_traffic.png"
Shape = tuple[int, int, int, int]  # (B, H, W, C)
SHAPES: tuple[Shape, ...] = ((128, 56, 56, 128), (128, 28, 28, 256), (128, 14, 14, 640), (128, 7, 7, 1024))
LARGE: Shape = (8, 256, 256, 128)  # the first stage at 1024, which ``cuda`` refuses
F = 4
BACKENDS = {"cuda": "cuda", "cufft": "cufft", "torch": "torch\n(at least)"}  # and how they are labelled
DTYPES = (torch.float32, torch.bfloat16)
DIRECTIONS = ("forward", "backward")
COLOURS = dict(zip(DIRECTIONS, (BLUE, VERMILLION), strict=True))


def bytes_per_element(backend: str, shape: Shape, dtype: torch.dtype, backward: bool) -> float:
    """Per element of x; a 2-D transform counts as its input and its output, once each."""
    if backend == "cuda":
        return float(dtype.itemsize * (4 if backward else 2))  # grad_y, x, x for StarReLU's gradient, grad_x; or x, y
    if backend == "cufft":
        moved = sum(
            size for _, size in cufft.traffic("dynamic_filter", shape, dtype, star_relu=True, backward=backward)
        )
    else:
        moved = _moved_by_operators(shape, dtype, backward)
    return moved / torch.Size(shape).numel()


class MovedBytes(TorchDispatchMode):
    """Counts the tensors that operators read and write: each once an operator, views of tensors not at all."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func.name() != "aten::_unsafe_view":
            tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
            self.total += sum(t.untyped_storage().nbytes() for t in tensors)
        return result


def _moved_by_operators(shape: Shape, dtype: torch.dtype, backward: bool) -> int:
    """Of the reference. Copies that torch.fft makes between layouts inside a transform come on top."""
    B, H, W, C = shape
    with torch.device("meta"):
        x = torch.empty(shape, dtype=dtype)
        parameters = torch.empty(B, F, C, dtype=dtype), torch.empty(H, W // 2 + 1, F, 2), torch.empty(1), torch.empty(1)
        with MovedBytes() as moved:
            if backward:
                reference.dynamic_filter_backward(x, x, *parameters, needs=[True] * 5)
            else:
                reference.dynamic_filter(x, *parameters)
    return moved.total


def draw(path: Path = PICTURE) -> None:
    shape = SHAPES[0]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for ax, dtype in zip(figure.subplots(1, 2, sharex=True, sharey=True), DTYPES, strict=True):
        for offset, direction in zip((-0.2, 0.2), DIRECTIONS, strict=True):
            moved = [bytes_per_element(name, shape, dtype, direction == "backward") for name in BACKENDS]
            positions = [i + offset for i in range(len(BACKENDS))]
            bars = ax.barh(positions, moved, 0.38, color=COLOURS[direction], label=direction)
            ax.bar_label(bars, fmt="%.0f", fontsize=9, padding=3)
        ax.set_yticks(range(len(BACKENDS)), list(BACKENDS.values()))
        ax.set(xlabel="bytes per element of x", title=_name(dtype))
        ax.margins(x=0.12)
        ax.spines[["top", "right"]].set_visible(False)
    figure.axes[0].invert_yaxis()
    figure.axes[0].set_ylabel("backend")
    figure.axes[0].legend(frameon=False, loc="center right")
    figure.suptitle(
        f"Memory traffic of a filter step, {'x'.join(map(str, shape))}: computed, not measured", fontsize=11
    )
    figure.savefig(path, dpi=110)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main() -> None:
    for shape in (*SHAPES, LARGE):
        for dtype in DTYPES:
            for backward in (False, True):
                names = [name for name in BACKENDS if name != "cuda" or shape is not LARGE]
                moved = [f"{name} {bytes_per_element(name, shape, dtype, backward):6.1f}" for name in names]
                print(f"{'x'.join(map(str, shape)):<16}{_name(dtype):<10}{DIRECTIONS[backward]:<10}{'  '.join(moved)}")
    draw()


if __name__ == "__main__":
    main()
