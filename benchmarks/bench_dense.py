"""Times the products of DFFormer-S18 and its MLPs on the CPU, float32, forward and backward.

    python benchmarks/bench_dense.py [--quick] [--threads N] [--output FOLDER]

`ours` is the compiled core by way of `dfformer_kernels.backends.cpu`; `torch` the same by ``F.linear`` and ``@``,
which is MKL in PyTorch's x86 builds; `onednn` its product, which torch has for compiled graphs (not for the sum over
rows that a weight's gradient is). They take turns, and what they compute is checked before.

Writes dense.csv and dense.json.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import in_turns, provenance, write_csv
from torch import Tensor
from torch.nn import functional as F

from dfformer_kernels import reference
from dfformer_kernels.backends import cpu
from dfformer_kernels.tolerance import BOUND, relative_error

# Side of the plane and channels of each stage at 224x224.
STAGES = [(56, 64), (28, 128), (14, 320), (7, 512)]
BATCHES = (1, 8)
ROUNDINGS = 3  # of an MLP's results on their way


class Case(NamedTuple):
    """A computation: its sizes, its flops, and the ways to do it, the first being ours."""

    name: str
    sizes: tuple[int, ...]
    flops: int
    ways: dict[str, Callable[[], Tensor]]
    exact: Callable[[], Tensor]


def cases(stages: Sequence[tuple[int, int]], batches: Sequence[int]) -> Iterator[Case]:
    for batch in batches:
        for side, C in stages:
            M = batch * side * side
            for N, K in ((2 * C, C), (C, 2 * C)):
                yield from products(M, N, K)
            yield mlp(M, C)


def products(M: int, N: int, K: int) -> Iterator[Case]:
    """A projection of K channels to N, and its two gradients."""
    x, weight, grad_y = torch.randn(M, K), torch.randn(N, K), torch.randn(M, N)
    flops = 2 * M * N * K

    def onednn(x: Tensor, weight: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")

    yield Case(
        "product",
        (M, N, K),
        flops,
        {
            "ours": lambda: cpu.product(x, weight),
            "torch": lambda: F.linear(x, weight),
            "onednn": lambda: onednn(x, weight),
        },
        lambda: x.double() @ weight.double().t(),
    )
    yield Case(
        "grad_x",
        (M, N, K),
        flops,
        {
            "ours": lambda: cpu.product(grad_y, weight.t()),
            "torch": lambda: grad_y @ weight,
            "onednn": lambda: onednn(grad_y, weight.t()),
        },
        lambda: grad_y.double() @ weight.double(),
    )
    yield Case(
        "grad_weight",
        (M, N, K),
        flops,
        {"ours": lambda: cpu.weight_gradient(grad_y, x), "torch": lambda: grad_y.t() @ x},
        lambda: grad_y.double().t() @ x.double(),
    )


def mlp(M: int, C: int) -> Case:
    x, weight1, weight2 = torch.randn(M, C), torch.randn(4 * C, C) / C**0.5, torch.randn(C, 4 * C)
    scale, bias = torch.tensor([0.9]), torch.tensor([-0.4])

    def plain(x: Tensor, weight1: Tensor, weight2: Tensor) -> Tensor:
        return F.linear(reference.star_relu(F.linear(x, weight1), scale, bias), weight2)

    return Case(
        "mlp",
        (M, C, C),
        16 * M * C * C,
        {
            "ours": lambda: cpu.mlp(x, weight1, scale, bias, weight2)[0],
            "torch": lambda: plain(x, weight1, weight2),
        },
        lambda: plain(x.double(), weight1.double(), weight2.double()),
    )


def measure(case: Case, rounds: int, seconds: float) -> dict[str, Any]:
    """A line of the table; ValueError if one of the ways is wrong."""
    exact = case.exact()
    for way, run in case.ways.items():
        error = relative_error(run(), exact)
        if not error <= ROUNDINGS * BOUND[torch.float32]:  # so that NaN fails
            raise ValueError(f"{way}: {case.name} of {case.sizes} is wrong, error {error:.1e}")
    ms = in_turns(case.ways, rounds, seconds)
    row: dict[str, Any] = {"op": case.name, **dict(zip("MNK", case.sizes, strict=True))}
    row |= {f"{way}_ms": ms.get(way) for way in ("ours", "torch", "onednn")}
    return row | {
        "ours_gflops": 1e-6 * case.flops / ms["ours"],
        "faster_than_torch": ms["torch"] / ms["ours"],
        "faster_than_onednn": ms["onednn"] / ms["ours"] if "onednn" in ms else None,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Times matrix products and MLPs.")
    parser.add_argument("--quick", action="store_true", help="one small stage, in a second")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=Path("build/bench_dense"), help="folder for what is written")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rounds, seconds = (1, 0.01) if args.quick else (5, 0.05)
    rows = []
    with torch.inference_mode():
        for case in cases(STAGES[-1:], (1,)) if args.quick else cases(STAGES, BATCHES):
            rows.append(measure(case, rounds, seconds))
            print("  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items()))
    args.output.mkdir(parents=True, exist_ok=True)
    write_csv(args.output / "dense.csv", list(rows[0]), rows)
    command = shlex.join(["python", "benchmarks/bench_dense.py", *(sys.argv[1:] if argv is None else argv)])
    content = {"machine": provenance(args.threads, "cpu"), "command": command}
    (args.output / "dense.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
