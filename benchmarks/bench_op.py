"""Times the filter steps, forward and forward+backward, against torch.fft and other FFT libraries.

    python benchmarks/bench_op.py [--quick] [--op dynamic_filter,global_filter] [--dtype float32] [--threads N]
                                  [--device cpu|cuda] [--allocator default|kept]

All providers run in turns, round by round, in one process, each for a while after one call that does not count. Medians
of single calls are reported; on a GPU those of triton.testing.do_bench, which empties the L2 cache before every call.
A result outside ``dfformer_kernels.tolerance`` of the float64 reference is an error, and is found before anything is
timed. Steps have no StarReLU. ``--allocator kept`` measures in a sub-process that keeps freed memory, by the recipe in
docs/cpu_kernel.md; op.json names the allocator.

Providers: every backend that can run here; ``cpu`` also on each instruction set and on one thread; ``torch``, the
reference in torch.fft, called directly; the same under torch.compile; the same with the transforms of scipy.fft, pyfftw
and ducc0 (forward only, on a CPU).

The counts, for x (B,H,W,C), N = HW, K = W//2 + 1:

- flops: B C (T 2.5 N log2 N + H K q). Forward: T = 2 transforms; q = 4F to mix the filter (0 for a global filter) + 6
  for the product. Forward and backward: T = 5 (x twice, as only inputs are saved, y, grad_y, grad_x); q = 6 + 4F
  forward, then 4F to mix again, 6 for grad_x's product, 8 for the weighted product P, and 8F for P's sums over channels
  and frequencies (2, its sum over the batch, for a global filter).
- bytes: 2 tensors like x forward (x, y), 5 forward and backward (x, y; x, grad_y, grad_x).
- limit: the larger of bytes / copy bandwidth (``copy_`` of a tensor like x in the same rounds, N threads) and
  flops / GEMM rate (the better of torch.mm and a 1x1 convolution, N threads; without TF32). The share of the
  limit is that time over the measured one.
- extra memory of a forward, without its arguments and y: for ``cpu`` its workspace; for torch.fft and torch.compile the
  peak of allocations in torch's profiler (without the transform library's own scratch); on a GPU the peak of torch's
  allocator.

Writes op.csv, op.json and op.png.
"""

import argparse
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import (
    DTYPES,
    TIMERS,
    add_run_arguments,
    copy_rate,
    gemm_rate,
    names,
    provenance,
    run_with,
    write_csv,
    write_json,
)
from figures import write_op
from providers.op import (
    BOTH,
    FORWARD,
    OPS,
    OURS,
    Provider,
    Row,
    Run,
    Setting,
    StepProblem,
    available_providers,
    flops,
    moved_bytes,
    problems,
    under,
)
from torch import Tensor

from dfformer_kernels import reference
from dfformer_kernels.tolerance import BOUND, gradient_errors, relative_error


class Budget(NamedTuple):
    """How long to measure: seconds for a problem and direction, least seconds of a sample, least number of rounds."""

    seconds: float
    sample: float
    rounds: int = 5


class Summary(NamedTuple):
    """A ratio of one of our backends over problems."""

    provider: str
    op: str
    direction: str
    quantity: str
    median: float
    minimum: float
    problems: int


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments(argv)
    if run_with(args.allocator, __file__, argv):
        return
    torch.set_num_threads(args.threads)
    setting = Setting(args.threads, device=args.device)
    machine = describe_machine(setting)
    budget = Budget(0.2, 1e-3) if args.quick else Budget(1.5, 1e-2)
    rows: list[Row] = []
    for op in args.op:
        providers = available_providers(op, setting, args.quick)
        for problem in problems(op, args.quick):
            if problem.dtype in [DTYPES[name] for name in args.dtype]:
                rate = machine["gemm_gflops"][_name(reference.compute_dtype(problem.dtype))]
                try:
                    rows += _reported(measure(problem, providers, rate, budget))
                except torch.OutOfMemoryError as error:
                    print(f"\n{problem} is left out: {error}")
    summary = summarize(rows)
    print_summary(summary)
    write(args.output, machine, rows, summary)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Times the filter steps against torch.fft and other FFT libraries.")
    parser.add_argument("--quick", action="store_true", help="a few shapes, less than a minute")
    parser.add_argument("--op", type=names(OPS), default=["dynamic_filter"], help=f"of {','.join(OPS)}")
    parser.add_argument("--dtype", type=names(list(DTYPES)), default=list(DTYPES), help=f"of {','.join(DTYPES)}")
    add_run_arguments(parser, "build/bench_op")
    return parser.parse_args(argv)


# --- measuring


def measure(problem: StepProblem, providers: Sequence[Provider], gemm_gflops: float, budget: Budget) -> list[Row]:
    """Checks every provider on ``problem``, then times them; ValueError for a wrong result."""
    torch._dynamo.reset()  # each problem is compiled separately
    providers = [p for p in providers if p.supports(problem)]
    forward = _measure(problem, FORWARD, providers, gemm_gflops, budget)
    return forward + _measure(problem, BOTH, [p for p in providers if p.differentiable], gemm_gflops, budget)


def _measure(
    problem: StepProblem, direction: str, providers: Sequence[Provider], gemm_gflops: float, budget: Budget
) -> list[Row]:
    setting = Setting(torch.get_num_threads(), device=providers[0].setting.device)
    inputs, grad_y = problem.inputs(setting.device), problem.grad_y(setting.device)
    expected = _step(getattr(reference, problem.op), [t.double() for t in inputs], grad_y.double(), direction)()
    steps = [_step(p.run, inputs, grad_y, direction) for p in providers]
    errors = [_checked_error(p, problem, step, expected) for p, step in zip(providers, steps, strict=True)]
    like_x = torch.empty_like(inputs[0])
    runs: list[Run] = [(setting, lambda: like_x.copy_(inputs[0]))]
    runs += [(p.setting, step) for p, step in zip(providers, steps, strict=True)]
    rounds, (copy_seconds, *seconds) = _median_seconds(runs, budget)

    copy_gbps = 2 * like_x.nbytes / copy_seconds / 1e9
    count = flops(problem.op, problem.shape, direction)
    nbytes = moved_bytes(problem.shape, problem.dtype, direction)
    limit = max(nbytes / copy_gbps, count / gemm_gflops) / 1e9  # seconds
    of_torch = seconds[[p.name for p in providers].index("torch")]
    return [
        Row(
            problem.op,
            _name(problem.dtype),
            problem.stage,
            *problem.shape,
            direction,
            p.name,
            p.setting.isa,
            p.setting.threads,
            rounds,
            ms=1e3 * t,
            speedup=of_torch / t,
            gflops=count / t / 1e9,
            gbps=nbytes / t / 1e9,
            copy_gbps=copy_gbps,
            gemm_gflops=gemm_gflops,
            share_of_limit=limit / t,
            error=error,
            extra_bytes=p.extra_memory(p, problem, inputs) if p.extra_memory and direction == FORWARD else None,
        )
        for p, error, t in zip(providers, errors, seconds, strict=True)
    ]


def _step(
    run: Callable[..., Tensor], inputs: list[Tensor], grad_y: Tensor, direction: str
) -> Callable[[], list[Tensor]]:
    """Computes y, and for the direction ``BOTH`` also the gradients of all inputs."""
    if direction == FORWARD:
        return lambda: [run(*inputs)]
    leaves = [t.detach().requires_grad_() for t in inputs]

    def both() -> list[Tensor]:
        y = run(*leaves)
        return [y, *torch.autograd.grad(y, leaves, grad_y)]

    return both


def _checked_error(
    provider: Provider, problem: StepProblem, step: Callable[[], list[Tensor]], expected: list[Tensor]
) -> float:
    """The largest relative error of the results of ``step``; ValueError if it is not within tolerance."""
    with under(provider.setting):
        y, *gradients = step()
    error = max(relative_error(y, expected[0]), *gradient_errors(gradients, expected[1:]), 0.0)
    if not error <= BOUND[problem.dtype]:  # also fails for NaN
        raise ValueError(f"{provider.name} is wrong on {problem}: error {error:.1e}, bound {BOUND[problem.dtype]:.1e}")
    return error


def _median_seconds(runs: Sequence[Run], budget: Budget) -> tuple[int, list[float]]:
    """The number of rounds, and the median time of a call of each run, which is called for a while in every round."""
    once = [min(_seconds(*run, 0)) for run in runs]
    round_seconds = sum(t + max(t, budget.sample) for t in once)
    rounds = max(budget.rounds, int(budget.seconds / round_seconds))
    samples: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for times, run in zip(samples, runs, strict=True):
            times += _seconds(*run, budget.sample)
    return rounds, [statistics.median(times) for times in samples]


def _seconds(setting: Setting, run: Callable[[], object], sample: float) -> list[float]:
    """Times of consecutive calls that take ``sample`` seconds together, of one call at least.

    The call before them does not count, because its caches were filled by another provider. If a call is longer than a
    sample, it is the only other one.
    """
    with under(setting):
        run()
        return TIMERS[setting.device](run, sample)


def describe_machine(setting: Setting) -> dict[str, Any]:
    """The provenance of the times, and the two rates that they are compared with."""
    return provenance(setting.threads, setting.device, ("numpy", "scipy", "pyfftw", "ducc0")) | {
        "copy_gbps": copy_rate(setting.device),
        "gemm_gflops": {_name(dtype): gemm_rate(setting.device, dtype) for dtype in (torch.float32, torch.float64)},
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- reporting


def _reported(rows: list[Row]) -> list[Row]:
    """Prints the rows of a problem."""
    first = rows[0]
    print(f"\n{first.op} {first.dtype} {first.shape}{' (stage)' if first.stage else ''}")
    print(f"  {'direction':<18}{'provider':<15}{'ms':>10}{'speed-up':>10}{'GFLOP/s':>9}{'GB/s':>8}{'limit':>7}"
          f"{'error':>9}{'extra MiB':>11}")  # fmt: skip
    for r in rows:
        extra = "" if r.extra_bytes is None else f"{r.extra_bytes / 2**20:.2f}"
        print(f"  {r.direction:<18}{r.provider:<15}{r.ms:>10.3f}{r.speedup:>10.2f}{r.gflops:>9.1f}{r.gbps:>8.2f}"
              f"{r.share_of_limit:>7.0%}{r.error:>9.1e}{extra:>11}", flush=True)  # fmt: skip
    return rows


def summarize(rows: Sequence[Row]) -> list[Summary]:
    """Ratios of our backends: speed-up over torch.fft, share of the limit, times between dtypes, ISAs and threads."""
    return [summary for name in OURS for summary in _summary_of(name, rows)]


def _summary_of(name: str, rows: Sequence[Row]) -> list[Summary]:
    ours = [r for r in rows if r.provider == name]
    single = [r for r in ours if r.dtype == "float32"]
    stages = [r for r in single if r.stage]

    def on(provider: str) -> list[Row]:
        return [r for r in rows if r.provider == provider and r.dtype == "float32"]

    threads = max((r.threads for r in ours), default=0)
    quantities = {
        "times faster than torch.fft, stages": [(r, r.speedup) for r in stages],
        "times faster than torch.fft, all": [(r, r.speedup) for r in single],
        "share of the limit, stages": [(r, r.share_of_limit) for r in stages],
        "bfloat16 / float32 time": _time_ratios([r for r in ours if r.dtype == "bfloat16"], single),
        "AVX2 / AVX-512 time": _time_ratios(on(f"{name}/avx2"), [r for r in single if r.isa == "avx512"]),
    }
    for B in sorted({r.B for r in ours}):
        alone = [r for r in on(f"{name}/1 thread") if r.B == B]
        quantities[f"1 -> {threads} threads, batch {B}, times faster"] = _time_ratios(alone, single)
    return [
        Summary(name, op, direction, quantity, statistics.median(values), min(values), len(values))
        for op in OPS
        for quantity, pairs in quantities.items()
        for direction in (FORWARD, BOTH)
        if (values := [value for r, value in pairs if (r.op, r.direction) == (op, direction)])
    ]


def _time_ratios(rows: Sequence[Row], baselines: Sequence[Row]) -> list[tuple[Row, float]]:
    """Times of ``rows`` divided by those of ``baselines``, for the problems that both have."""
    times = {r.problem: r.ms for r in baselines}
    return [(r, r.ms / times[r.problem]) for r in rows if r.problem in times]


def print_summary(summary: Sequence[Summary]) -> None:
    print(f"\n{'summary':<8}{'':<40}{'operator':<16}{'direction':<18}{'median':>8}{'minimum':>9}{'problems':>10}")
    for s in summary:
        print(f"{s.provider:<8}{s.quantity:<40}{s.op:<16}{s.direction:<18}{s.median:>8.2f}{s.minimum:>9.2f}"
              f"{s.problems:>10}")  # fmt: skip


def write(folder: Path, machine: dict[str, Any], rows: Sequence[Row], summary: Sequence[Summary]) -> None:
    """Writes op.csv, op.json and op.png."""
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / "op.csv", [field.name for field in fields(Row)], [asdict(r) for r in rows])
    content = {"machine": machine, "summary": [s._asdict() for s in summary], "rows": [asdict(r) for r in rows]}
    write_json(folder / "op.json", content)
    write_op(folder, machine, rows)
    print(f"\nwritten: {folder}/op.csv, op.json, op.png")


if __name__ == "__main__":
    # Otherwise the profiler prints messages to stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    main()
