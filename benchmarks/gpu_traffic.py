"""Bytes that filter steps and whole models move through a GPU's memory: computed, not measured; no GPU needed.

    python benchmarks/gpu_traffic.py           # prints the tables of docs/gpu.md and draws docs/images/gpu_traffic.png
    python benchmarks/gpu_traffic.py --models  # writes results/gpu_traffic.csv

Filter steps are dynamic filters with StarReLU. ``cuda`` moves what the emulator counts in
tests/kernels/backend/cuda/test_cuda_kernels.py, ``cufft`` what `cufft_traffic.traffic` says,
``torch`` what its operators read and write, counted by running them on the meta device.

Whole models run on the meta device too, with the filter step as one operator. ``eager``: every operator reads its
inputs and writes its outputs. ``compiled`` is a simple model of Inductor: all operators between two of `UNFUSED` are
one kernel, which reads the results of others and writes what others need. A view costs nothing. Operations are torch's
own count, which counts the backward of a grouped convolution as that of a whole one, so ConvFormer's training has far
fewer.
"""

import argparse
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from itertools import groupby, product
from pathlib import Path
from typing import Any

import timm
import torch
from common import write_csv
from cufft_traffic import traffic
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import dfformer  # noqa: F401  # registers the models
from dfformer.analysis.palette import BLUE, VERMILLION
from dfformer_kernels import reference

PICTURE = Path(__file__).parent.parent / "docs" / "images" / "gpu_traffic.png"
RESULTS = Path(__file__).parent / "results" / "gpu_traffic.csv"
MODELS, BATCH = ("dfformer_s18", "convformer_s18"), 128
UNFUSED = {  # operators that Inductor does not fuse; StarReLU, an expression there, lies alone between two products
    **dict.fromkeys(("mm", "addmm", "bmm"), "matrix products"),
    **dict.fromkeys(("convolution", "convolution_backward"), "convolutions"),
    **dict.fromkeys(("dynamic_filter", "dynamic_filter_backward"), "filter steps"),
    **dict.fromkeys(("star_relu", "star_relu_backward"), "StarReLU"),
}
REST = "all else"
Shape = tuple[int, int, int, int]  # (B, H, W, C)
SHAPES: tuple[Shape, ...] = ((128, 56, 56, 128), (128, 28, 28, 256), (128, 14, 14, 640), (128, 7, 7, 1024))
LARGE: Shape = (8, 256, 256, 128)  # the first stage at 1024, which ``cuda`` refuses
F = 4
BACKENDS = {"cuda": "cuda", "cufft": "cufft", "torch": "torch\n(at least)"}  # with their labels
DTYPES = (torch.float32, torch.bfloat16)
DIRECTIONS = ("forward", "backward")
COLOURS = dict(zip(DIRECTIONS, (BLUE, VERMILLION), strict=True))


def bytes_per_element(backend: str, shape: Shape, dtype: torch.dtype, backward: bool) -> float:
    """Bytes moved per element of x; a 2-D transform reads its input once and writes its output once."""
    if backend == "cuda":
        return float(dtype.itemsize * (4 if backward else 2))  # grad_y, x, x for StarReLU's gradient, grad_x; or x, y
    if backend == "cufft":
        moved = sum(size for _, size in traffic("dynamic_filter", shape, dtype, star_relu=True, backward=backward))
    else:
        moved = _moved_by_operators(shape, dtype, backward)
    return moved / torch.Size(shape).numel()


class MovedBytes(TorchDispatchMode):
    """Counts the tensors that operators read and write, each once per operator. Views do not count."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func.name() != "aten::_unsafe_view":
            tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
            self.total += sum(t.untyped_storage().nbytes() for t in tensors)
        return result


def _moved_by_operators(shape: Shape, dtype: torch.dtype, backward: bool) -> int:
    """Tensors moved by the reference, without copies between layouts inside torch.fft's transforms."""
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


@dataclass(frozen=True)
class Call:
    """The memory that an operator reads and writes, by storage."""

    name: str
    read: dict[int, int]  # bytes by storage
    written: dict[int, int]


class Calls(TorchDispatchMode):
    """Records the operators that run on tensors of the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._kept: list[Any] = []  # keeps storages alive, so that no two have the same id

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func.name() not in ("aten::_unsafe_view", "aten::detach"):
            name = func.overloadpacket.__name__
            self.calls.append(Call(name, self._bytes((args, kwargs)), self._bytes(result)))
        return result

    def _bytes(self, values: Any) -> dict[int, int]:
        found: dict[int, int] = {}
        for t in tree_leaves(values):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                self._kept.append(storage)
                found[id(storage)] = t.numel() * t.element_size()
        return found


def eager(calls: list[Call]) -> Iterator[tuple[str, int]]:
    """Kernels, by kind, and the bytes they move."""
    for call in calls:
        yield UNFUSED.get(call.name, REST), sum(call.read.values()) + sum(call.written.values())


def compiled(calls: list[Call], results: set[int]) -> Iterator[tuple[str, int]]:
    """The traffic if neighbouring operators are one kernel; ``results`` are the storages that are needed at the end."""
    last_use = {storage: i for i, call in enumerate(calls) for storage in call.read}
    groups = groupby(enumerate(calls), key=lambda item: item[0] if item[1].name in UNFUSED else -1)
    for numbered in (list(group) for _, group in groups):
        read: dict[int, int] = {}
        written: dict[int, int] = {}
        for _, call in numbered:
            read |= {storage: size for storage, size in call.read.items() if storage not in written}
            written |= call.written
        last, call = numbered[-1]
        needed = (size for at, size in written.items() if last_use.get(at, -1) > last or at in results)
        yield UNFUSED.get(call.name, REST), sum(read.values()) + sum(needed)


@dataclass(frozen=True)
class Row:
    """The traffic of one kind of kernels in a model's inference or training step."""

    model: str
    dtype: str
    direction: str
    mode: str
    kind: str
    kernels: int
    gigabytes: float
    teraflops: float


def model_rows(name: str, dtype: torch.dtype, training: bool, batch: int = BATCH) -> Iterator[Row]:
    """A forward pass without gradients, or a forward and a backward, on images of 224 x 224."""
    with torch.device("meta"):
        model = timm.create_model(name).to(dtype).train(training)
        images = torch.empty(batch, 3, 224, 224, dtype=dtype)
    with torch.set_grad_enabled(training), FlopCounterMode(display=False) as flops, Calls() as recorded:
        y = model(images)
        if training:
            y.backward(torch.empty_like(y))
    results = [y, *(p.grad for p in model.parameters() if p.grad is not None)]
    kept = {id(t.untyped_storage()) for t in results}
    operations: Counter[str] = Counter()
    for operator, count in flops.get_flop_counts()["Global"].items():
        operations[UNFUSED.get(operator.__name__, REST)] += count
    for mode, kernels in (("eager", eager(recorded.calls)), ("compiled", compiled(recorded.calls, kept))):
        moved: dict[str, list[int]] = {}
        for kind, size in kernels:
            moved.setdefault(kind, []).append(size)
        for kind, sizes in moved.items():
            yield Row(
                *(name, _name(dtype), "training" if training else "inference", mode, kind, len(sizes)),
                gigabytes=round(sum(sizes) / 1e9, 3),
                teraflops=round(operations[kind] / 1e12, 4),
            )


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
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", action="store_true", help=f"whole models, to {RESULTS.name}")
    if parser.parse_args().models:
        combinations = product(MODELS, DTYPES, (False, True))
        table = [row for combination in combinations for row in model_rows(*combination)]
        write_csv(RESULTS, [field.name for field in fields(Row)], [asdict(row) for row in table])
        return
    for shape in (*SHAPES, LARGE):
        for dtype in DTYPES:
            for backward in (False, True):
                names = [name for name in BACKENDS if name != "cuda" or shape is not LARGE]
                moved = [f"{name} {bytes_per_element(name, shape, dtype, backward):6.1f}" for name in names]
                print(f"{'x'.join(map(str, shape)):<16}{_name(dtype):<10}{DIRECTIONS[backward]:<10}{'  '.join(moved)}")
    draw()


if __name__ == "__main__":
    main()
