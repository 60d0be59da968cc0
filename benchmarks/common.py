"""Shared by the benchmark scripts: arguments, provenance, timing, rates, memory, and writing of results."""

import argparse
import csv
import ctypes
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from dfformer.analysis.palette import BLACK, BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILLION, WINE
from dfformer.cli.info import environment
from dfformer_kernels.versions import version

# The environment of a process by what glibc does with freed memory. By default it munmaps allocations of 32 MiB and
# more on free; docs/cpu_kernel.md explains how to keep them.
ALLOCATORS: dict[str, dict[str, str]] = {
    "default": {},
    "kept": {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296"},
}

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


# Colours and markers of the families of models, in all pictures that compare some.
FAMILIES = {
    "dfformer": (BLUE, "o"),
    "cdfformer": (GREEN, "s"),
    "gfformer": (PURPLE, "D"),
    "convformer": (VERMILLION, "^"),
    "caformer": (BLACK, "v"),
    "convnext": (ORANGE, "P"),
    "swin": (SKY, "*"),
    "resnet": (WINE, "p"),
}


def names(accepted: Sequence[str]) -> Callable[[str], list[str]]:
    """A parser of comma-separated names for argparse."""

    def parse(text: str) -> list[str]:
        if unknown := set(text.split(",")) - set(accepted):
            raise argparse.ArgumentTypeError(f"got {', '.join(unknown)}, expected {', '.join(accepted)}")
        return text.split(",")

    return parse


def add_run_arguments(parser: argparse.ArgumentParser, output: str) -> None:
    """Adds --threads, --device, --allocator and --output, whose default is ``output``."""
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", type=_device, choices=list(TIMERS), default="cpu")
    parser.add_argument(
        "--allocator", choices=list(ALLOCATORS), default=allocator(), help="whether freed memory is kept"
    )
    parser.add_argument("--output", type=Path, default=Path(output), help="folder for the results")


def _device(name: str) -> str:
    if name == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("got 'cuda', and torch finds no GPU")
    return name


def provenance(threads: int, device: str, libraries: Sequence[str] = ()) -> dict[str, Any]:
    """What measured times depend on: the machine, the versions, the commit."""
    root = Path(__file__).parents[1]
    return environment() | {
        "cores": os.cpu_count(),
        "caches": _caches(),
        "libraries": {name: version(name) for name in libraries},
        "commit": _git(root, "rev-parse", "HEAD"),
        # apart from the results themselves
        "dirty": _git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results") != "",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "threads": threads,
        "device": device,
        "allocator": allocator(),
    }


def device_name(machine: Mapping[str, Any]) -> str:
    """The processor or the GPU of a `provenance`, whichever was measured."""
    return str(machine["machine" if machine["device"] == "cpu" else "gpu"])


def allocator() -> str:
    """Which of ALLOCATORS this process was started with."""
    kept = all(os.environ.get(name) == value for name, value in ALLOCATORS["kept"].items())
    return "kept" if kept else "default"


def run_with(chosen: str, script: str, argv: Sequence[str] | None) -> bool:
    """Runs ``script`` in a process with another allocator, unless this process already has ``chosen``: then False.

    The allocator depends on the environment at the start of a process.
    """
    if chosen == allocator():
        return False
    others = {name: value for name, value in os.environ.items() if name not in ALLOCATORS["kept"]}
    command = [sys.executable, script, *(sys.argv[1:] if argv is None else argv)]
    subprocess.run(command, env=others | ALLOCATORS[chosen], check=True)
    return True


def _caches() -> dict[str, str]:
    """Level and type of each cache to its size, as Linux reports them for the first core."""
    folders = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"))
    read = [[(folder / name).read_text().strip() for name in ("level", "type", "size")] for folder in folders]
    return {f"L{level} {kind}": size for level, kind, size in read}


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


# By device: the times of consecutive calls that together take ``sample`` seconds; at least one call.
TIMERS: dict[str, Callable[[Callable[[], object], float], list[float]]] = {
    "cpu": _seconds_on_cpu,
    "cuda": _seconds_on_gpu,
}


def in_turns(runs: Mapping[Any, Callable[[], object]], rounds: int, seconds: float) -> dict[Any, float]:
    """The median time of a call of each of ``runs`` on the CPU, in ms. In every round, each runs for ``seconds``."""
    samples: dict[Any, list[float]] = {key: [] for key in runs}
    for run in runs.values():
        run()
    for _, (key, run) in itertools.product(range(rounds), runs.items()):
        samples[key] += TIMERS["cpu"](run, seconds)
    return {key: 1e3 * statistics.median(times) for key, times in samples.items()}


# --- rates and memory


def copy_rate(device: str, nbytes: int = 2**28) -> float:
    """GB/s of a copy that exceeds all caches; read and written bytes count."""
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / _median_seconds(lambda: target.copy_(source), device) / 1e9


def gemm_rate(device: str, dtype: torch.dtype, n: int = 1536) -> float:
    """GFLOP/s of the better of a matrix product of size n and a 1x1 convolution, without TF32."""
    random = partial(torch.randn, dtype=dtype, device=device)
    a = random(n, n)
    image = random(8, 512, 28, 28).contiguous(memory_format=torch.channels_last)
    weight = random(512, 512, 1, 1)
    runs = {
        2 * n**3: lambda: torch.mm(a, a),
        2 * image.numel() * 512: lambda: torch.nn.functional.conv2d(image, weight),
    }
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # the filters' arithmetic has full precision
        return max(count / _median_seconds(run, device) / 1e9 for count, run in runs.items())


def _median_seconds(run: Callable[[], object], device: str) -> float:
    run()
    return statistics.median(TIMERS[device](run, 0.25))


def allocated_peak(run: Callable[[], object], device: str) -> int:
    """The peak of the bytes that torch allocates during ``run``."""
    if device == "cuda":
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - held
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda e: e.start_ns())]
    return max(itertools.accumulate(sizes, initial=0))


def resident_peak(run: Callable[[], object]) -> int | None:
    """The peak growth in bytes of this process's anonymous memory during ``run``; None if it is not Linux.

    Mapped files do not count, because a library's code becomes resident only as it is used.
    """
    clear_refs = Path("/proc/self/clear_refs")
    if not clear_refs.exists():
        run()
        return None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    clear_refs.write_text("5")  # resets the peak
    held = proc_kib("/proc/self/status")["RssAnon"]
    run()
    after = proc_kib("/proc/self/status")
    return 1024 * max(0, after["VmHWM"] - after["RssFile"] - after["RssShmem"] - held)


def proc_kib(path: str) -> dict[str, int]:
    """The fields in kB of a file in /proc; {} if there is no such file."""
    if not Path(path).exists():
        return {}
    lines = [line.split() for line in Path(path).read_text().splitlines()]
    return {words[0].rstrip(":"): int(words[1]) for words in lines if words[-1] == "kB"}


# --- files


def earlier_run(path: Path, machine: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any] | None:
    """The results of an earlier run in ``path``, or None; SystemExit if its machine differs in one of ``keys``."""
    if not path.exists():
        return None
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for key in keys:
        if content["machine"][key] != machine[key]:
            raise SystemExit(
                f"--output: {path} was measured with {key} {content['machine'][key]}, this is {machine[key]}; "
                "name another folder"
            )
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def write_csv(path: Path, titles: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, titles, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
