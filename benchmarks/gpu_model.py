"""What bounds the ``cuda`` kernels, from their machine code: a model, no GPU needed and none seen.

    python benchmarks/gpu_model.py  # writes results/gpu_model.csv and docs/images/gpu_model.png

Each kernel of DFFormer-S18's stages is compiled and disassembled (nvdisasm from Triton's package). Its loops are known
from the source, so every instruction is counted as often as warps execute it. From that, for B = 128, the time that
each resource needs if it never waits: issue slots and float32 units, shared memory's wavefronts, bytes of the L2 cache
(whole sectors, the slots of the basis' gradient, spectra that wait there), bytes of device memory. The largest is a
floor: no run is faster, and one with too few warps to hide latencies is slower. Bytes at the floor are not time at the
floor.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from functools import cache
from itertools import product
from pathlib import Path

import torch
from common import write_csv
from matplotlib.figure import Figure

from dfformer.analysis.palette import BLUE, GREEN, ORANGE, VERMILLION
from dfformer_kernels.backend.cuda import layout as cuda
from dfformer_kernels.backend.cuda import nvrtc
from dfformer_kernels.backend.cuda.layout import CHIPS, KernelSpec, Variant
from dfformer_kernels.backend.cuda.sources import cuda_sources

ROOT = Path(__file__).parents[1]
RESULTS, PICTURE = ROOT / "benchmarks/results/gpu_model.csv", ROOT / "docs/images/gpu_model.png"
STAGES = ((56, 128), (28, 256), (14, 640), (7, 1024))
B, F = 128, 4
KINDS = {"float32": "FADD|FMUL|FFMA", "shared": "LDS|STS", "device": "LDG|STG"}  # the rest: integers, moves, branches
PHASES = {False: ("rows", "columns", "inverse_rows"), True: ("rows", "grad_rows", "columns", "inverse_rows")}
ONE_SPECTRUM = ("rows", "columns", "grad_rows", "columns", "inverse_rows")  # of backward, one spectrum after the other


@dataclass(frozen=True)
class Gpu:
    """Nominal rates; of a multiprocessor a cycle: 4 instructions of warps, one wavefront of shared memory."""

    arch: str
    multiprocessors: int
    clock: float  # Hz
    float_warps: int  # warps of float32 a cycle and multiprocessor
    l2_bytes: float  # a cycle and multiprocessor
    device_bytes: float  # a second


GPUS = {
    "A100": Gpu("sm_80", 108, 1.41e9, 2, 32, 1.555e12),
    "H100": Gpu("sm_90", 132, 1.755e9, 4, 28, 3.35e12),
    "H200": Gpu("sm_90", 132, 1.755e9, 4, 28, 4.8e12),
    "RTX 4090": Gpu("sm_89", 128, 2.52e9, 4, 16, 1.008e12),
}


@dataclass(frozen=True)
class Counts:
    """Of one work item, a sample's group of channels: instructions of warps."""

    by_phase: dict[str, float]
    by_kind: dict[str, float]
    wavefronts: float  # of shared memory

    @property
    def instructions(self) -> float:
        return sum(self.by_phase.values())


@dataclass(frozen=True)
class Row:
    """Thread-instructions and wavefronts an element of x, sectors of 32 bytes an element, times in microseconds."""

    gpu: str
    H: int
    C: int
    dtype: str
    direction: str
    instructions: float
    rows: float
    grad_rows: float
    columns: float
    inverse_rows: float
    float32: float
    shared: float
    device: float
    other: float
    wavefronts: float
    sectors: float
    issue_us: float
    float32_us: float
    shared_us: float
    l2_us: float
    device_us: float
    floor_us: float
    binds: str


def disassembled(cubin: bytes) -> tuple[list[str], dict[str, int]]:
    """The instructions of a cubin's only kernel, and labels as indices into them."""
    import triton  # for its disassembler alone

    nvdisasm = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([nvdisasm, "-c", file.name], capture_output=True, text=True, check=True).stdout
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in text[text.index(".text.filter_") :].splitlines():
        if label := re.match(r"(\.L_\w+):", line.strip()):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;", line):
            code.append(instruction[1])
    return code, labels


def loops_of(code: list[str], labels: dict[str, int]) -> list[tuple[int, int]]:
    """First and last instruction of each loop, in the order of the first."""
    targets = ((re.match(r"BRA.*`\((.*)\)", line), i) for i, line in enumerate(code))
    return sorted((labels[found[1]], i) for found, i in targets if found and labels[found[1]] < i)


def warp_iterations(tasks: int, threads: int, threads_a_task: int) -> int:
    """Of a loop that gives every ``threads_a_task`` threads each (threads / threads_a_task)-th task: over all warps."""
    workers, per_warp = threads // threads_a_task, 32 // threads_a_task
    return sum(-(-max(tasks - first, 0) // workers) for first in range(0, workers, per_warp))


def count(spec: KernelSpec, variant: Variant, code: list[str], labels: dict[str, int]) -> Counts:
    """Raises ValueError where the code's loops are not the source's."""
    warps, across, loops = variant.threads / 32, variant.channels_per_cta // variant.width, loops_of(code, labels)
    fetching = [loop for loop in loops if loop[1] - loop[0] < 20 and "CCTL" in " ".join(code[loop[0] : loop[1]])]
    loops = [loop for loop in loops if loop not in fetching]
    end = next(i for i, line in enumerate(code) if line == "EXIT" and i > loops[-1][1])
    if spec.backward:
        (item, item_end), loops = loops[0], loops[1:]
        loops = [loop for loop in loops if loop[1] < item_end]
    outer = [loop for loop in loops if not any(o[0] <= loop[0] and loop[1] < o[1] for o in loops if o != loop)]
    row_tasks = spec.H if variant.rows else -(-spec.H // 2)
    one_spectrum = spec.backward and variant.spectra_in_shared == 1
    names = ONE_SPECTRUM if one_spectrum else PHASES[spec.backward]
    if len(outer) < len(names):
        raise ValueError(f"{spec}: {len(outer)} loops, expected {len(names)}")
    tasks = [spec.K if name == "columns" else row_tasks for name in names]
    weights = [warps] * len(code)
    for (first, last), n in zip(outer, tasks, strict=False):
        weights[first : last + 1] = [warp_iterations(n, variant.threads, across)] * (last + 1 - first)
    # In a column the two factors' transforms take turns: N2 of N1 points, then N1 of N2, ...
    N2 = cuda.second_factor(spec.H)
    N1 = spec.H // N2
    trips = {0: [], 2: [N2, N1], 3: [N2, N1, N2], 4: [N2, N2, N1, N2]}
    for first, last in (loop for name, loop in zip(names, outer, strict=False) if name == "columns"):
        inner = [loop for loop in loops if first <= loop[0] and loop[1] < last]
        for (begin, stop), n in zip(inner, trips[len(inner)], strict=True):
            weights[begin : stop + 1] = [w * n for w in weights[begin : stop + 1]]
    _weigh_sums(spec, variant, outer[len(names) :], weights)
    # Requests to the L2 cache for the next item: a sector each, of every tensor in a loop of its own.
    requests = spec.H * spec.W * variant.channels_per_cta * spec.dtype.itemsize / 32
    for first, last in fetching:
        weights[first : last + 1] = [requests / 32] * (last + 1 - first)

    boundaries = [last for _, last in outer[: len(names)]]
    start, stop = (item, item_end) if spec.backward else (0, end)
    by_phase, by_kind, wavefronts = dict.fromkeys(names, 0.0), dict.fromkeys([*KINDS, "other"], 0.0), 0.0
    for i in range(start, stop + 1):
        phase = names[min(sum(i > boundary for boundary in boundaries), len(names) - 1)]
        by_phase[phase] += weights[i]
        kind = next((kind for kind, pattern in KINDS.items() if re.match(pattern, code[i])), "other")
        by_kind[kind] += weights[i]
        width = 4 if ".128" in code[i] else 2 if ".64" in code[i].split()[0] else 1
        wavefronts += weights[i] * width * (kind == "shared")
    return Counts(by_phase, by_kind, wavefronts)


def _weigh_sums(spec: KernelSpec, variant: Variant, loops: list[tuple[int, int]], weights: list[float]) -> None:
    """Backward's sums over channels are in the code twice, for a CTA's first item and for the others; then come the
    sums over threads for softmax's gradient, a few iterations of one warp.
    """
    points = spec.H * spec.K
    tasks = points * cuda.slots_per_cta(points, variant.channels_per_cta, variant.threads)
    for n, (first, last) in enumerate(loops):
        weight = warp_iterations(tasks, variant.threads, 1) if n == 0 else 0 if n == 1 else 1
        weights[first : last + 1] = [weight] * (last + 1 - first)


@cache
def counted(arch: str, spec: KernelSpec) -> tuple[Counts, Variant]:
    variant = cuda.choose_variant(spec, CHIPS[arch])
    assert variant is not None
    cubin, _ = nvrtc.compile_cubin(cuda_sources(), cuda.compile_options(spec, variant), arch)
    return count(spec, variant, *disassembled(cubin)), variant


def row(name: str, spec: KernelSpec) -> Row:
    gpu = GPUS[name]
    counts, variant = counted(gpu.arch, spec)
    items, pixels = B * -(-spec.C // variant.channels_per_cta), spec.H * spec.W
    elements = pixels * variant.channels_per_cta
    size, tensors = spec.dtype.itemsize, 4 if spec.backward else 2
    sectors = tensors * pixels * -(-variant.channels_per_cta * size // 32)  # of an item
    points = spec.H * spec.K
    slots = 2 * points * spec.F * 8 if spec.backward else 0  # bytes of grad_basis, read and written
    spectra = (
        4 * points * variant.channels_per_cta * 8 if spec.backward and variant.spectra_in_shared == 1 else 0
    )  # X and P, both twice
    cycles = gpu.multiprocessors * gpu.clock / items
    times = {
        "issue": counts.instructions / 4 / cycles,
        "float32": counts.by_kind["float32"] / gpu.float_warps / cycles,
        "shared": counts.wavefronts / cycles,
        "l2": (32 * sectors + slots + spectra) / gpu.l2_bytes / cycles,
        "device": items * tensors * elements * size / gpu.device_bytes,
    }
    binds = max(times, key=lambda resource: times[resource])
    an_element = {
        **{phase: counts.by_phase.get(phase, 0) for phase in PHASES[True]},
        **counts.by_kind,
        "instructions": counts.instructions,
    }
    return Row(
        gpu=name,
        H=spec.H,
        C=spec.C,
        dtype=str(spec.dtype).removeprefix("torch."),
        direction="backward" if spec.backward else "forward",
        wavefronts=round(counts.wavefronts / elements, 3),
        sectors=round(sectors / elements, 3),
        floor_us=round(1e6 * times[binds], 1),
        binds=binds,
        **{name: round(32 * n / elements, 2) for name, n in an_element.items()},
        **{f"{resource}_us": round(1e6 * time, 1) for resource, time in times.items()},
    )


def rows() -> Iterator[Row]:
    for name, (H, C), dtype, backward in product(GPUS, STAGES, (torch.float32, torch.bfloat16), (False, True)):
        yield row(name, KernelSpec(H, H, C, F, dtype, star_relu=True, backward=backward))


def draw(table: list[Row], path: Path = PICTURE) -> None:
    resources = {
        "issue": ("issue slots", BLUE),
        "shared": ("shared memory", VERMILLION),
        "l2": ("L2 cache", GREEN),
        "device": ("device memory", ORANGE),
    }
    figure = Figure(figsize=(10, 5.6), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    for line, dtype in zip(axes, ("float32", "bfloat16"), strict=True):
        for ax, direction in zip(line, ("forward", "backward"), strict=True):
            shown = [r for r in table if (r.gpu, r.dtype, r.direction) == ("H100", dtype, direction)]
            for n, (resource, (label, colour)) in enumerate(resources.items()):
                times = [getattr(r, f"{resource}_us") for r in shown]
                ax.bar([i + 0.2 * n - 0.3 for i in range(len(shown))], times, 0.19, color=colour, label=label)
            ax.set_xticks(range(len(shown)), [f"{r.H}x{r.H}, {r.C}" for r in shown])
            ax.set(title=f"{dtype}, {direction}", ylabel="µs")
            ax.spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(frameon=False)
    figure.suptitle(
        "What each resource of an H100 needs for a filter spec, B = 128: a model, not measured", fontsize=11
    )
    figure.savefig(path, dpi=110)


def main() -> None:
    table = list(rows())
    write_csv(RESULTS, [field.name for field in fields(Row)], [asdict(r) for r in table])
    draw(table)
    for r in table:
        print(f"{r.gpu:9}{r.H:3} {r.dtype:9}{r.direction:9} floor {r.floor_us:7.1f} µs, {r.binds} binds")


if __name__ == "__main__":
    main()
