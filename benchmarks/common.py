"""What the benchmark scripts share: what a result depends on, how a call is timed, how a table is written."""

import argparse
import csv
import itertools
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch

from dfformer.cli.info import environment

# By what a process does with memory that is freed: what its environment must hold from the start. By default glibc
# munmaps blocks of 32 MiB and more when they are freed; docs/cpu_kernel.md has the recipe to keep them.
ALLOCATORS: dict[str, dict[str, str]] = {
    "default": {},
    "kept": {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296"},
}

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def names(accepted: Sequence[str]) -> Callable[[str], list[str]]:
    """A parser of comma-separated names for argparse."""

    def parse(text: str) -> list[str]:
        if unknown := set(text.split(",")) - set(accepted):
            raise argparse.ArgumentTypeError(f"got {', '.join(unknown)}, accepted are {', '.join(accepted)}")
        return text.split(",")

    return parse


def provenance(threads: int, device: str, libraries: Sequence[str] = ()) -> dict[str, Any]:
    """What measured times depend on: the machine, the versions, the commit."""
    root = Path(__file__).parents[1]
    return environment() | {
        "cores": os.cpu_count(),
        "caches": _caches(),
        "libraries": {name: _version(name) for name in libraries},
        "commit": _git(root, "rev-parse", "HEAD"),
        # but for the results themselves
        "dirty": _git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results") != "",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "threads": threads,
        "device": device,
        "allocator": allocator(),
    }


def allocator() -> str:
    """Which of ALLOCATORS this process was started with."""
    kept = all(os.environ.get(name) == value for name, value in ALLOCATORS["kept"].items())
    return "kept" if kept else "default"


def _caches() -> dict[str, str]:
    """Level and type of each cache to its size, as Linux tells them of the first core."""
    folders = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"))
    read = [[(folder / name).read_text().strip() for name in ("level", "type", "size")] for folder in folders]
    return {f"L{level} {kind}": size for level, kind, size in read}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "absent"


def _git(root: Path, *arguments: str) -> str:
    try:
        return subprocess.run(
            ["git", "-C", root, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _seconds_on_cpu(run: Callable[[], object], sample: float) -> list[float]:
    times: list[float] = []
    end = time.perf_counter() + sample
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times


def _seconds_on_gpu(run: Callable[[], object], sample: float) -> list[float]:
    do_bench = import_module("triton.testing").do_bench
    return [1e-3 * ms for ms in do_bench(run, warmup=0, rep=1e3 * sample, return_mode="all")]


# By device: the times of consecutive calls that take ``sample`` seconds together, of one call at least.
TIMERS: dict[str, Callable[[Callable[[], object], float], list[float]]] = {
    "cpu": _seconds_on_cpu,
    "cuda": _seconds_on_gpu,
}


def in_turns(runs: Mapping[Any, Callable[[], object]], rounds: int, seconds: float) -> dict[Any, float]:
    """The median time of each on the CPU in ms: of single calls, so many seconds of them in a round."""
    samples: dict[Any, list[float]] = {key: [] for key in runs}
    for run in runs.values():
        run()
    for _, (key, run) in itertools.product(range(rounds), runs.items()):
        samples[key] += TIMERS["cpu"](run, seconds)
    return {key: 1e3 * statistics.median(times) for key, times in samples.items()}


def write_csv(path: Path, titles: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, titles)
        table.writeheader()
        table.writerows(rows)
