"""Times whole models and measures their memory: inference and training steps over image sizes.

    python benchmarks/bench_model.py [--quick] [--only inference,float32,224,b8] [--resume] [--budget SECONDS]
                                     [--threads N] [--device cpu|cuda] [--allocator default|kept] [--output FOLDER]

A problem is a task, a dtype, eager or torch.compile, a batch and an image size. For each, every provider gets a
new process with its model and nothing else. They run in turns, round by round, one at a time. Results are checked
before they are timed. docs/model_speed.md explains how each column is measured.

``--only`` takes values of these axes, and providers; an axis without a value is not restricted. Results are added to
those of the same commit and machine in the folder, so a run can be split. With ``--resume``, problems that are already
there are not measured again. ``--allocator kept`` measures processes that keep freed memory, by the recipe in
docs/cpu_kernel.md.

Writes model.csv, model.json, model.md, model_throughput.png and model_memory.png.
"""

import argparse
import itertools
import math
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, fields
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from common import (
    DTYPES,
    add_run_arguments,
    device_name,
    earlier_run,
    names,
    proc_kib,
    provenance,
    run_with,
    write_csv,
    write_json,
)
from figures import write_model
from providers.model import (
    ALL,
    AUTHORS,
    AXES,
    CONVFORMER,
    EAGER,
    INFERENCE,
    PROVIDERS,
    TRAINING,
    Costs,
    LeftOut,
    ModelProblem,
    Row,
    Setting,
    ask,
    mib_per_image,
    problems,
    provider_process,
    selection,
    size_name,
)

from dfformer_kernels.tolerance import BOUND

# Growth is fitted to images of at least this size.
LARGE = (512, 512)
# An upper bound of the memory that a provider holds between turns, without its model, per pixel of a batch.
BYTES_PER_PIXEL = {INFERENCE: 1000, TRAINING: 6000}
# The tolerance of a model's outputs and gradients, in multiples of that of one step.
DEPTH = 5


class Growth(NamedTuple):
    """How a provider's cost per image grows with pixels: exponents fitted to sizes from `LARGE` on."""

    task: str
    dtype: str
    provider: str
    time_exponent: float | None
    memory_exponent: float | None
    largest: str
    ms: float  # per image of the largest size
    peak_mib: float | None  # the same


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments(argv)
    if run_with(args.allocator, __file__, argv):
        return
    setting = Setting(args.device, args.threads, args.budget)
    torch.set_num_threads(args.threads)
    command = shlex.join(["python", "benchmarks/bench_model.py", *(sys.argv[1:] if argv is None else argv)])
    machine, rows, left_out = _continued(args.output, provenance(args.threads, args.device))
    machine["commands"] = [*machine.get("commands", []), command]
    for problem, providers in problems(selection(args.only, args.quick), args.device):
        known = {r.provider for r in rows if r.problem == problem}
        known |= {entry.provider for entry in left_out if entry.problem == problem}
        if args.resume and known >= set(providers):
            continue
        new_rows, new_left_out = measure(problem, providers, setting)
        _report(problem, new_rows, new_left_out)
        rows = [r for r in rows if r.problem != problem or r.provider not in providers] + new_rows
        left_out = [e for e in left_out if e.problem != problem or e.provider not in providers] + new_left_out
        write(args.output, machine, rows, left_out)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    words = [word for values in AXES.values() for word in values]
    parser = argparse.ArgumentParser(description="Times whole models, and measures the memory they take.")
    parser.add_argument("--quick", action="store_true", help="two providers on small images, in about a minute")
    parser.add_argument("--only", type=names(words), default=[], help=f"of {', '.join(words)}")
    parser.add_argument("--resume", action="store_true", help="do not measure again what --output has")
    parser.add_argument("--budget", type=float, help="seconds for a provider and problem (default: 2, quick: 0.2)")
    add_run_arguments(parser, "build/bench_model")
    args = parser.parse_args(argv)
    if args.budget is None:
        args.budget = 0.2 if args.quick else 2.0
    return args


def _lacking_memory(problem: ModelProblem, providers: int, device: str) -> str:
    """Why so many providers at once do not fit into the available memory; "" if they do."""
    needed = BYTES_PER_PIXEL[problem.task] * problem.batch * problem.pixels * providers
    if device == "cpu" and (available := proc_kib("/proc/meminfo").get("MemAvailable")) and needed > 1024 * available:
        together = f"{providers} at once need about {needed / 2**30:.0f} GiB"
        return f"{together}, {available / 2**20:.0f} GiB are free; --only takes fewer"
    return ""


# --- measuring


def measure(problem: ModelProblem, providers: Sequence[str], setting: Setting) -> tuple[list[Row], list[LeftOut]]:
    """Checks every provider on ``problem``, then times them in turns; ValueError for a wrong result."""
    if reason := _lacking_memory(problem, len(providers), setting.device):
        return [], [LeftOut(problem, name, reason) for name in providers]
    left_out: list[LeftOut] = []
    running: dict[str, tuple[Connection, Costs, float | None]] = {}
    with ExitStack() as processes:
        for name in providers:
            try:
                error = _checked_error(name, problem, setting)
                connection = processes.enter_context(provider_process(name, problem, setting))
                running[name] = connection, ask(connection, "costs"), error
            except ChildProcessError as failure:
                left_out.append(LeftOut(problem, name, str(failure)))
        slowest = max((costs.seconds for _, costs, _ in running.values()), default=0.0)
        rounds = max(3, min(7, int(setting.budget / max(slowest, 1e-9))))
        samples: dict[str, list[float]] = {name: [] for name in running}
        for _, (name, (connection, *_)) in itertools.product(range(rounds), running.items()):
            samples[name] += ask(connection, "times", setting.budget / rounds)
    rows = [_row(problem, name, samples[name], costs, error) for name, (_, costs, error) in running.items()]
    return rows, left_out


def _checked_error(name: str, problem: ModelProblem, setting: Setting) -> float | None:
    """See `Entry.error`; ValueError if it is too large.

    It is computed in a separate process, because the memory that the authors' formulation leaves in the allocator would
    speed up later calls.
    """
    if not PROVIDERS[name].checked:
        return None
    with provider_process(name, problem, setting) as connection:
        error: float = ask(connection, "error")
    bound = DEPTH * BOUND[DTYPES[problem.dtype]]
    if not error <= bound:  # also fails for NaN
        raise ValueError(f"{name} is wrong on {problem}: error {error:.1e}, bound {bound:.1e}")
    return error


def _row(problem: ModelProblem, name: str, seconds: list[float], costs: Costs, error: float | None) -> Row:
    median = statistics.median(seconds)
    return Row(
        *problem[:4],
        *problem.size,
        provider=name,
        calls=len(seconds),
        ms=1e3 * median,
        images_per_second=problem.batch / median,
        peak_bytes=costs.peak_bytes,
        saved_bytes=costs.saved_bytes,
        error=error,
    )


# --- results


def _continued(folder: Path, machine: dict[str, Any]) -> tuple[dict[str, Any], list[Row], list[LeftOut]]:
    """The folder's results; SystemExit if they are of another machine or other code."""
    keys = ("machine", "commit", "torch", "timm", "device", "threads", "allocator")
    content = earlier_run(folder / "model.json", machine, keys)
    if content is None:
        return machine, [], []
    rows = [Row(**{field.name: row[field.name] for field in fields(Row)}) for row in content["rows"]]
    left_out = [
        LeftOut(_problem(entry["problem"]), entry["provider"], entry["reason"]) for entry in content["left_out"]
    ]
    machine["dirty"] |= content["machine"]["dirty"]
    return machine | {"commands": content["machine"]["commands"]}, rows, left_out


def _problem(stored: list[Any]) -> ModelProblem:
    task, dtype, mode, batch, (H, W) = stored
    return ModelProblem(task, dtype, mode, batch, (H, W))


def ratios(row: Row, rows: Sequence[Row]) -> dict[str, float | None]:
    """The speed of ``row``, relative to the two baselines on the same problem."""
    rates = {r.provider: r.images_per_second for r in rows if r.problem == row.problem}
    return {
        f"times_{name}": row.images_per_second / rates[name] if name in rates else None
        for name in (AUTHORS, CONVFORMER)
    }


def growths(rows: Sequence[Row]) -> list[Growth]:
    """The growth for single images in eager mode, by least squares of logarithms."""
    found = []
    for task, dtype, name in dict.fromkeys((r.task, r.dtype, r.provider) for r in rows):
        large = [
            r
            for r in rows
            if (r.task, r.dtype, r.provider, r.mode, r.batch) == (task, dtype, name, EAGER, 1)
            and r.problem.pixels >= math.prod(LARGE)
        ]
        if len(large) >= 3:
            largest = max(large, key=lambda r: r.problem.pixels)
            pixels = [r.problem.pixels for r in large]
            found.append(
                Growth(
                    *(task, dtype, name),
                    time_exponent=_exponent(pixels, [r.ms for r in large]),
                    memory_exponent=_exponent(pixels, [r.peak_bytes or 0 for r in large]),
                    largest=size_name(largest.problem.size),
                    ms=largest.ms,
                    peak_mib=_mib(largest.peak_bytes),
                )
            )
    return found


def _exponent(pixels: Sequence[int], costs: Sequence[float]) -> float | None:
    if min(costs) <= 0:
        return None
    return float(np.polyfit(np.log(pixels), np.log(costs), 1)[0])


def _mib(nbytes: int | None) -> float | None:
    return None if nbytes is None else nbytes / 2**20


def _report(problem: ModelProblem, rows: Sequence[Row], left_out: Sequence[LeftOut]) -> None:
    print(f"\n{problem}")
    print(f"  {'provider':<23}{'images/s':>9}{'ms':>10}{'calls':>6}{'x authors':>10}{'x convformer':>13}"
          f"{'peak MiB':>9}{'saved MiB':>10}{'error':>9}")  # fmt: skip
    for r in rows:
        times = ratios(r, rows).values()
        cells = [_cell(value, ".2f") for value in times] + [
            _cell(_mib(value), ".0f") for value in (r.peak_bytes, r.saved_bytes)
        ]
        print(f"  {r.provider:<23}{r.images_per_second:>9.2f}{r.ms:>10.1f}{r.calls:>6}{cells[0]:>10}{cells[1]:>13}"
              f"{cells[2]:>9}{cells[3]:>10}{_cell(r.error, '.1e'):>9}")  # fmt: skip
    for entry in left_out:
        print(f"  {entry.provider} is left out: {entry.reason}")
    sys.stdout.flush()


def _cell(value: float | str | None, form: str) -> str:
    return "" if value is None else value if isinstance(value, str) else format(value, form)


def write(folder: Path, machine: dict[str, Any], rows: Sequence[Row], left_out: Sequence[LeftOut]) -> None:
    """Writes model.csv, model.json, model.md and the two pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    order = {problem: i for i, (problem, _) in enumerate(problems(ALL, machine["device"]))}
    rows = sorted(rows, key=lambda r: (order[r.problem], list(PROVIDERS).index(r.provider)))
    table = [asdict(r) | ratios(r, rows) for r in rows]
    content = {
        "machine": machine,
        "growth": [g._asdict() for g in growths(rows)],
        "left_out": [entry._asdict() for entry in left_out],
        "rows": table,
    }
    write_json(folder / "model.json", content)
    if rows:
        write_csv(folder / "model.csv", list(table[0]), table)
        (folder / "model.md").write_text(markdown(machine, rows, left_out), encoding="utf-8")
        write_model(folder, machine, rows)


def markdown(machine: dict[str, Any], rows: Sequence[Row], left_out: Sequence[LeftOut]) -> str:
    """A table for each task, dtype, mode and batch, with sizes from left to right."""
    parts = [
        f"# Whole models\n\n{device_name(machine)}; torch {machine['torch']}, timm {machine['timm']}; commit "
        f"{machine['commit']}{', changed' if machine['dirty'] else ''}; allocator {machine['allocator']}. "
        "Measured by\n"
    ]
    parts += [f"    {command}" for command in machine["commands"]]
    for group in dict.fromkeys(r.problem[:4] for r in rows):
        members = [r for r in rows if r.problem[:4] == group]
        task, dtype, mode, batch = group
        parts.append(f"\n## {task.capitalize()}, {dtype}, {mode}, batch {batch}")
        for title, form in _TABLES:
            cells = {(r.provider, r.problem.size): form(r, ratios(r, members)) for r in members}
            if any(cells.values()):
                sizes = sorted({r.problem.size for r in members}, key=math.prod)
                providers = list(dict.fromkeys(r.provider for r in members))
                parts += [f"\n{title}\n", _row_of([task, *map(size_name, sizes)]), "|---" * (len(sizes) + 1) + "|"]
                parts += [_row_of([name, *(cells.get((name, size), "") for size in sizes)]) for name in providers]
    parts += _growth_table(growths(rows))
    if left_out:
        parts += ["\n## Not measured\n", *(f"- {e.provider}; {e.problem}: {e.reason}" for e in left_out)]
    return "\n".join(parts) + "\n"


def _speed(r: Row, times: dict[str, float | None]) -> str:
    against = ", ".join("-" if value is None else f"{value:.2f}" for value in times.values())
    return f"{r.images_per_second:.3g} ({against})"


_TABLES: list[tuple[str, Callable[[Row, dict[str, float | None]], str]]] = [
    (f"Images a second (times {AUTHORS}, times {CONVFORMER}):", _speed),
    ("Peak memory beside the model, MiB an image:", lambda r, _: _cell(mib_per_image(r, r.peak_bytes), ".0f")),
    ("Saved for backward, MiB an image:", lambda r, _: _cell(mib_per_image(r, r.saved_bytes), ".1f")),
]


def _row_of(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _growth_table(found: Sequence[Growth]) -> list[str]:
    if not found:
        return []
    titles = ["task", "dtype", "provider", "time", "memory", "largest", "ms", "peak MiB"]
    return [
        f"\n## Growth with pixels\n\ntime ~ pixels^a and peak memory ~ pixels^b of one image, eager, from "
        f"{size_name(LARGE)} on; and the cost of an image of the largest size.\n",
        _row_of(titles),
        "|---" * len(titles) + "|",
        *(
            _row_of([_cell(v, ".2f" if "exponent" in name else ".0f") for name, v in g._asdict().items()])
            for g in found
        ),
    ]


if __name__ == "__main__":
    main()
