"""What the GPU kernels need of a chip, as the compilers say, for all that a model of the family runs: no GPU needed.

    python benchmarks/gpu_resources.py [--backend cuda] [--target sm_80,sm_90]

Compiles each kernel for each target and writes its rows of ``benchmarks/results/gpu_resources.csv``; those of other
targets stay. A row that is not dispatched is a plane that the backend refuses on that chip.
"""

import argparse
import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

import torch
from common import write_csv

from dfformer_kernels.backend.cuda import layout as cuda
from dfformer_kernels.backend.cuda import nvrtc
from dfformer_kernels.backend.cuda.layout import CHIPS, Chip, KernelSpec
from dfformer_kernels.backend.cuda.sources import cuda_sources

RESULTS = Path(__file__).parent / "results" / "gpu_resources.csv"
SIZES = (224, 384, 512, 1024)  # of square images
STAGES = ((4, 128), (8, 256), (16, 640), (32, 1024))  # of DFFormer-S18 and S36: stride, C
# of M36 and B36, at 224 only: C is in offsets, which takes a few registers more or less, and in no layout
WIDER_STAGES = ((4, 192), (8, 384), (16, 768), (32, 1152), (4, 256), (8, 512), (16, 1024), (32, 1536))
DTYPES = (torch.float32, torch.bfloat16)
F = 4
DIRECTIONS = ("forward", "backward")


@dataclass(frozen=True)
class Row:
    """A kernel on a chip. Numbers are None where the backend refuses the plane; ``spill_bytes`` is all the memory that
    a thread has for what does not fit its registers.
    """

    backend: str
    kernel: str
    target: str
    H: int
    W: int
    dtype: str
    direction: str
    regs: int | None
    spill_bytes: int | None
    smem_bytes: int | None
    ctas_per_sm: int | None
    dispatched: bool


def specs() -> Iterator[KernelSpec]:
    """The dynamic filters with StarReLU of the DFFormers, and their gradients."""
    planes = [*product(SIZES, STAGES), *product(SIZES[:1], WIDER_STAGES)]
    for (size, (stride, C)), dtype, direction in product(planes, DTYPES, DIRECTIONS):
        side = size // stride
        yield KernelSpec(side, side, C, F, dtype, star_relu=True, backward=direction == "backward")


def cuda_row(spec: KernelSpec, chip: Chip) -> Row:
    direction = DIRECTIONS[spec.backward]
    problem = ("cuda", f"filter_{direction}, C={spec.C}", chip.arch, spec.H, spec.W,
               str(spec.dtype).removeprefix("torch."), direction)  # fmt: skip
    variant = None if cuda.unsupported_reasons(spec, chip) else cuda.choose_variant(spec, chip)
    if variant is None:
        return Row(*problem, None, None, None, None, dispatched=False)
    options = [*cuda.compile_options(spec, variant), "--ptxas-options=-v"]
    _, log = nvrtc.compile_cubin(cuda_sources(), options, chip.arch)
    registers, stack = _number(r"Used (\d+) registers", log), _number(r"(\d+) bytes stack frame", log)
    ctas = chip.resident_ctas(variant.threads, registers, variant.shared_bytes)
    return Row(*problem, registers, stack, variant.shared_bytes, ctas, dispatched=True)


def _number(pattern: str, log: str) -> int:
    found = re.search(pattern, log)
    if found is None:
        raise RuntimeError(f"no {pattern!r} in the compiler's log:\n{log}")
    return int(found[1])


def write(rows: Sequence[Row], path: Path = RESULTS) -> None:
    """Puts ``rows`` in place of those of the same backends and targets."""
    replaced = {(row.backend, row.target) for row in rows}
    kept: list[dict[str, Any]] = [row for row in read(path) if (row["backend"], row["target"]) not in replaced]
    written = sorted(kept + [asdict(row) for row in rows], key=lambda row: (row["backend"], row["target"]))
    write_csv(path, [field.name for field in fields(Row)], written)


def read(path: Path = RESULTS) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def cuda_rows(target: str) -> list[Row]:
    return [cuda_row(spec, CHIPS[target]) for spec in specs()]


def cufft_rows(target: str) -> list[Row]:
    import triton_resources  # it needs Triton, the rest here does not

    values: list[dict[str, Any]] = list(triton_resources.rows([target]))
    return [Row(**row | {"dispatched": bool(row["dispatched"])}) for row in values]


BACKENDS = {"cuda": (cuda_rows, tuple(CHIPS)), "cufft": (cufft_rows, (*CHIPS, "gfx90a", "gfx942"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--backend", choices=BACKENDS, help="this one only")
    parser.add_argument("--target", help="comma-separated; by default all that a backend has kernels for")
    arguments = parser.parse_args()
    for backend in [arguments.backend] if arguments.backend else BACKENDS:
        rows_for, targets = BACKENDS[backend]
        for target in arguments.target.split(",") if arguments.target else targets:
            rows = rows_for(target)
            write(rows)
            spilled = sum(bool(row.spill_bytes) for row in rows)
            print(
                f"{backend}, {target}: {sum(row.dispatched for row in rows)} of {len(rows)} dispatched, {spilled} spill"
            )


if __name__ == "__main__":
    main()
