"""Times the filter step of DFFormer-S18's stages on a GPU: the first measurement to make on a new one.

    python benchmarks/bench_gpu.py [--dtype float32,bfloat16] [--batch 128] [--against] [--variants] [--output results]

Each provider computes the dynamic filter with StarReLU, forward and backward, on every stage's plane at 224:

- ``cuda`` and ``cufft``: this library's backends;
- ``--against``: ``torch.fft`` (the reference), ``torch.compile`` (the same, compiled), and ``subquadratic-ops``, whose
  rows say so where it is not installed. The last is another operation, a long convolution with zero padding on planes
  of (B,C,H,W), without mixing and StarReLU. It shows the speed of another fused FFT kernel, and has no error here. Its
  time includes copies between layouts, and its backward includes a forward;
- ``--variants``: ``cuda`` with other numbers of channels per CTA, threads and spectra in shared memory.

Each row is written to ``bench_gpu.csv`` at once, so that a failure loses nothing. Its columns:

- error: the largest relative error of a result for 3 samples against the float64 reference;
- gpu_us: the median time of replays of a CUDA graph with one call, without the host's work;
- share_of_copy: the time in which a copy would move the step's least bytes, divided by gpu_us;
- host_us: the host's time for a call of the smallest problem, whose GPU time is negligible;
- failure: the error instead of a result; a wrong result is an error.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from common import DTYPES, names, provenance, write_csv, write_json
from torch import Tensor

from dfformer_kernels import reference
from dfformer_kernels.backend.cuda import launch, layout
from dfformer_kernels.backend.cuda.layout import Chip, KernelSpec, Variant
from dfformer_kernels.tolerance import BOUND, gradient_errors, relative_error

STAGES = ((56, 128), (28, 256), (14, 640), (7, 1024))  # side, C
F = 4
DIRECTIONS = ("forward", "backward")
# The least number of tensors like x that a step moves: x, y; grad_y, x twice, grad_x.
TENSORS = {"forward": 2, "backward": 4}
OTHER_OPERATION = "subquadratic-ops (another operation)"
NO_GPU = "bench_gpu: no CUDA device; nothing is timed without one"

# (channels per CTA, threads, spectra in shared memory) that `layout.choose_variant` could have chosen, by side and
# direction
VARIANTS: dict[tuple[int, str], tuple[tuple[int, int, int], ...]] = {
    (56, "forward"): ((8, 256, 1), (8, 320, 1), (4, 128, 1)),
    (56, "backward"): ((8, 256, 2), (8, 512, 2), (8, 256, 1), (4, 256, 2), (4, 128, 1), (2, 64, 2)),
    (28, "forward"): ((8, 128, 1), (16, 256, 1)),
    (28, "backward"): ((8, 128, 2), (16, 256, 2), (8, 128, 1)),
    (14, "forward"): ((16, 64, 1), (32, 128, 1)),
    (14, "backward"): ((16, 128, 2), (32, 256, 2), (8, 64, 2)),
    (7, "forward"): ((32, 64, 1), (16, 32, 1)),
    (7, "backward"): ((32, 64, 2), (16, 32, 2)),
}


@dataclass(frozen=True)
class Row:
    """A provider's step on one plane; None if it was not measured."""

    provider: str
    H: int
    C: int
    B: int
    dtype: str
    direction: str
    error: float | None = None
    gpu_us: float | None = None
    share_of_copy: float | None = None
    host_us: float | None = None
    failure: str = ""


@dataclass(frozen=True)
class Provider:
    name: str
    run: Callable[[Tensor | None, list[Tensor]], list[Tensor]]  # backward if there is a grad_y
    variant: Callable[[KernelSpec, Chip], Variant | None] | None = (
        None  # of the cuda kernels, instead of the chosen one
    )
    has_error: bool = True  # computes this operation


def inputs(H: int, C: int, dtype: torch.dtype, B: int, device: str) -> list[Tensor]:
    """x, logits, basis, scale, bias."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, H, H, C), (B, F, C), (H, H // 2 + 1, F, 2))
    x, logits, basis = (torch.randn(shape, generator=generator) for shape in shapes)
    scalars = torch.tensor([0.9]), torch.tensor([-0.3])
    return [x.to(device, dtype), logits.to(device, dtype), *(t.to(device) for t in (basis, *scalars))]


def of_backend(backend: str, grad_y: Tensor | None, arguments: list[Tensor]) -> list[Tensor]:
    ops = torch.ops.dfformer
    if grad_y is None:
        return [ops.dynamic_filter(*arguments, backend)]
    return list(ops.dynamic_filter_backward(grad_y, *arguments, [True] * 5, backend))


def of_reference(grad_y: Tensor | None, arguments: list[Tensor]) -> list[Tensor]:
    x, logits, basis, scale, bias = arguments
    if grad_y is None:
        return [reference.dynamic_filter(x, logits, basis, scale, bias)]
    return list(reference.dynamic_filter_backward(grad_y, x, logits, basis, scale, bias, [True] * 5))


def long_convolution(grad_y: Tensor | None, arguments: list[Tensor]) -> list[Tensor]:
    """subquadratic-ops' fused convolution of each channel's plane with a filter of its size; backward by autograd."""
    fused_fft_conv2d = import_module("subquadratic_ops_torch.fused_fft_conv2d").fused_fft_conv2d
    x = arguments[0].permute(0, 3, 1, 2).contiguous()
    leaves = [x.requires_grad_(grad_y is not None), torch.ones_like(x[0]).requires_grad_(grad_y is not None)]
    y = fused_fft_conv2d(*leaves)
    return [y] if grad_y is None else list(torch.autograd.grad(y, leaves, grad_y.permute(0, 3, 1, 2).contiguous()))


def providers(H: int, direction: str, against: bool, variants: bool) -> Iterator[Provider]:
    yield from (Provider(name, partial(of_backend, name)) for name in ("cuda", "cufft"))
    for name, variant in other_variants(H, direction) if variants else ():
        yield Provider(f"cuda, {name}", partial(of_backend, "cuda"), variant)
    if against:
        yield Provider("torch.fft", of_reference)
        yield Provider("torch.compile", torch.compile(of_reference, dynamic=False))
        yield Provider(OTHER_OPERATION, long_convolution, has_error=False)


def other_variants(H: int, direction: str) -> Iterator[tuple[str, Callable[[KernelSpec, Chip], Variant | None]]]:
    for channels, threads, spectra in VARIANTS[H, direction]:
        variant = partial(layout.variant_of, channels_per_cta=channels, threads=threads, spectra_in_shared=spectra)
        yield f"{channels} channels per CTA, {threads} threads, {spectra} spectra", variant
    if layout.longest_in_registers(direction == "backward") < H:
        yield "unrolled columns", with_unrolled_columns


def with_unrolled_columns(step: KernelSpec, chip: Chip) -> Variant | None:
    """The chosen variant, but its columns are not in loops: fewer instructions, and two or three times the code."""
    variant = layout.choose_variant(step, chip)
    return variant and replace(variant, columns=layout.COLUMNS_UNROLLED)


@contextmanager
def chosen(variant: Callable[[KernelSpec, Chip], Variant | None] | None, direction: str) -> Iterator[None]:
    """Makes ``cuda`` compile this variant of the direction's kernels instead of the chosen one."""
    if variant is None:
        yield
        return

    def choose(step: KernelSpec, chip: Chip) -> Variant | None:
        in_question = step.backward == (direction == "backward")
        return (variant if in_question else layout.choose_variant)(step, chip)

    with patch.object(launch, "choose_variant", choose), patch.object(launch, "_loaded", {}):
        launch.prepare.cache_clear()
        try:
            yield
        finally:
            launch.prepare.cache_clear()


def largest_error(provider: Provider, H: int, C: int, dtype: torch.dtype, direction: str, device: str) -> float:
    arguments = inputs(H, C, dtype, 3, device)
    exact = [t.double() for t in arguments]
    if direction == "forward":
        return relative_error(provider.run(None, arguments)[0], of_reference(None, exact)[0])
    # Its mean is not 0, so no gradient is a sum that cancels.
    grad_y = torch.rand(arguments[0].shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    return max(gradient_errors(provider.run(grad_y, arguments), of_reference(grad_y.double(), exact)))


def graph_us(run: Callable[[], object], replays: int = 30) -> float:
    """The median time of replays of a CUDA graph of one call, in microseconds."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()  # the graph writes into it
    events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    graph.replay()
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    del kept
    return 1e3 * statistics.median(a.elapsed_time(b) for a, b in pairwise(events))


def host_us(run: Callable[[], object], rounds: int = 10, calls: int = 20) -> float:
    """The host's time of a call in the fastest round, in microseconds, without waiting for the GPU."""
    for _ in range(5):
        run()
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        times.append((time.perf_counter() - start) / calls)
    torch.cuda.synchronize()
    return 1e6 * min(times)


def measure(provider: Provider, H: int, C: int, dtype: torch.dtype, direction: str, B: int) -> Row:
    """The provider's row; an error is recorded in it."""
    row = Row(provider.name, H, C, B, str(dtype).removeprefix("torch."), direction)
    values: dict[str, Any] = {}
    try:
        with chosen(provider.variant, direction):
            if provider.has_error:
                values["error"] = largest_error(provider, H, C, dtype, direction, "cuda")
                if not values["error"] <= BOUND[dtype]:
                    raise ValueError(f"relative error {values['error']:.2e}, allowed {BOUND[dtype]:.2e}")
            arguments = inputs(H, C, dtype, B, "cuda")
            x, like = arguments[0], torch.empty_like(arguments[0])
            grad_y = torch.randn_like(x) if direction == "backward" else None
            copy = graph_us(lambda: like.copy_(x))
            values["gpu_us"] = graph_us(lambda: provider.run(grad_y, arguments))
            values["share_of_copy"] = copy * TENSORS[direction] / 2 / values["gpu_us"]
            small = inputs(7, 32, dtype, 1, "cuda")
            small_grad = None if grad_y is None else small[0]
            values["host_us"] = host_us(lambda: provider.run(small_grad, small))
    except Exception as error:  # a failed row does not stop the others
        return replace(row, **values, failure=f"{type(error).__name__}: {error}".partition("\n")[0])
    return replace(row, **values)


def line(row: Row) -> str:
    times = " ".join(
        f"{name} {value:{form}}"
        for name, value, form in (
            ("error", row.error, ".1e"),
            ("gpu", row.gpu_us, ".1f"),
            ("of a copy", row.share_of_copy, ".0%"),
            ("host", row.host_us, ".1f"),
        )
        if value is not None
    )
    return f"{row.H:3} {row.C:5} {row.dtype:9} {row.direction:9} {row.provider:32} {times} {row.failure}".rstrip()


def run(dtypes: Sequence[str], B: int, against: bool, variants: bool, output: Path) -> list[Row]:
    output.mkdir(parents=True, exist_ok=True)
    machine = provenance(torch.get_num_threads(), torch.cuda.get_device_name(), ("triton", "cuda-bindings"))
    write_json(output / "bench_gpu.json", machine)
    rows: list[Row] = []
    for H, C in STAGES:
        for dtype in dtypes:
            for direction in DIRECTIONS:
                for provider in providers(H, direction, against, variants):
                    rows.append(measure(provider, H, C, DTYPES[dtype], direction, B))
                    print(line(rows[-1]), flush=True)
                    write_csv(output / "bench_gpu.csv", [f.name for f in fields(Row)], [asdict(r) for r in rows])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    accepted = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", type=names(accepted), default=["float32", "bfloat16"], help="comma-separated")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--against", action="store_true", help="torch.fft, torch.compile and subquadratic-ops too")
    parser.add_argument("--variants", action="store_true", help="other layouts of the cuda kernels too")
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder for bench_gpu.csv and .json")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit(NO_GPU)
    run(arguments.dtype, arguments.batch, arguments.against, arguments.variants, arguments.output)


if __name__ == "__main__":
    main()
