"""Times whole models: inference and training steps over image sizes, with the memory they take.

    python benchmarks/bench_model.py [--quick] [--only inference,float32,224,b8] [--resume] [--budget SECONDS]
                                     [--threads N] [--device cpu|cuda] [--output FOLDER]

A problem is a task, a dtype, eager or torch.compile, a batch and an image size. On each, every contestant gets a fresh
process that holds its model and nothing else; they take turns, round by round, and one computes at a time. What a
contestant computes is checked before it is timed. docs/model_speed.md says how each column is measured.

``--only`` takes any values of any of these and of the contestants; where it names none, all are meant. Results join
those of the same commit and machine in the folder, so that a run can be made in parts; with ``--resume`` a problem that
is there already is not measured again.

Writes model.csv, model.json, model.md, model_throughput.png and model_memory.png.
"""

import argparse
import ctypes
import gc
import itertools
import json
import math
import multiprocessing
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from common import DTYPES, TIMERS, names, provenance, write_csv
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from torch import Tensor, nn
from torch.nn import functional as F

import dfformer
from dfformer.utils.eager_baseline import eager_baseline
from dfformer.utils.profile import saved_for_backward
from dfformer_kernels.tolerance import BOUND, relative_error

INFERENCE, TRAINING = "inference", "training"
EAGER, COMPILED = "eager", "torch.compile"
SMALL_SIZES = ((64, 64), (128, 128))
SIZES = ((224, 224), (384, 384), (512, 512), (427, 640), (768, 768), (1024, 1024), (1536, 1536))
CLASSES = 1000


class Problem(NamedTuple):
    """What all contestants are given: ``batch`` images of (H, W)."""

    task: str
    dtype: str
    mode: str
    batch: int
    size: tuple[int, int]

    @property
    def pixels(self) -> int:
        """Of one image."""
        return math.prod(self.size)

    def __str__(self) -> str:
        return f"{self.task}, {self.dtype}, {self.mode}, {self.batch} x {_size_name(self.size)}"


@dataclass(frozen=True)
class Contestant:
    """A timm model, what is done to it, and how it is drawn."""

    architecture: str
    colour: str
    marker: str
    sized: bool = False  # built for an image size
    checked: bool = False  # against the authors' formulation, with the same weights
    compiled: bool = False  # also run under torch.compile
    eager: bool = False  # the authors' formulation
    prepare: Callable[[nn.Module, torch.dtype], nn.Module] | None = None  # for inference only; instead of autocast


AUTHORS, CONVFORMER = "authors", "convformer_s18"
CONTESTANTS = {
    AUTHORS: Contestant("dfformer_s18", "#7f8c8d", "X", sized=True, compiled=True, eager=True),
    "dfformer_s18": Contestant("dfformer_s18", "#c0392b", "o", sized=True, checked=True, compiled=True),
    "cdfformer_s18": Contestant("cdfformer_s18", "#e67e22", "^", sized=True, checked=True),
    "gfformer_s18": Contestant("gfformer_s18", "#d4ac0d", "v", sized=True, checked=True),
    CONVFORMER: Contestant("convformer_s18", "#2980b9", "s", compiled=True),
    "caformer_s18": Contestant("caformer_s18", "#8e44ad", "D", compiled=True),
    "convnext_tiny": Contestant("convnext_tiny", "#27ae60", "P"),
    "swin_tiny": Contestant("swin_tiny_patch4_window7_224", "#34495e", "*", sized=True),
}
if optimize := getattr(dfformer, "optimize_for_inference", None):
    CONTESTANTS["dfformer_s18 optimized"] = Contestant(
        "dfformer_s18", "#e84393", "h", sized=True, checked=True, compiled=True, prepare=optimize
    )

# What a run can be restricted to, and what it is without that. Quick runs are smaller.
AXES: dict[str, dict[str, Any]] = {
    "task": {name: name for name in (INFERENCE, TRAINING)},
    "dtype": {name: name for name in ("float32", "bfloat16")},
    "mode": {name: name for name in (EAGER, COMPILED)},
    "batch": {f"b{B}": B for B in (1, 8)},
    "size": {f"{H}" if H == W else f"{H}x{W}": (H, W) for H, W in (*SMALL_SIZES, *SIZES)},
    "contestant": {name: name for name in CONTESTANTS},
}
FULL = {name: list(values.values()) for name, values in AXES.items()} | {"size": list(SIZES)}
QUICK = FULL | {
    "dtype": ["float32"],
    "mode": [EAGER],
    "batch": [1],
    "size": list(SMALL_SIZES),
    "contestant": [AUTHORS, "dfformer_s18"],
}
ALL = {name: list(values.values()) for name, values in AXES.items()}
# Growth is fitted to images of at least this size.
LARGE = (512, 512)


def _up_to(side: int) -> list[tuple[int, int]]:
    return [size for size in (*SMALL_SIZES, *SIZES) if math.prod(size) <= side**2]


# By device, task, dtype and mode: the image sizes for each batch. On a CPU fewer, for time; compiling alone takes half
# a minute to a minute for each contestant and problem.
COMPILED_SIZES = {8: [(224, 224)], 1: [*SMALL_SIZES, (1024, 1024)]}
PLANS: dict[str, dict[tuple[str, str, str], dict[int, list[tuple[int, int]]]]] = {
    "cpu": {
        (INFERENCE, "float32", EAGER): {1: _up_to(1536), 8: _up_to(512)},
        (INFERENCE, "float32", COMPILED): COMPILED_SIZES,
        (INFERENCE, "bfloat16", EAGER): {1: _up_to(1536), 8: _up_to(512)},
        (INFERENCE, "bfloat16", COMPILED): {8: COMPILED_SIZES[8]},
        (TRAINING, "float32", EAGER): {1: _up_to(1536), 8: _up_to(384)},
        (TRAINING, "float32", COMPILED): COMPILED_SIZES,
        (TRAINING, "bfloat16", EAGER): {1: _up_to(1024), 8: _up_to(224)},
    },
    "cuda": {
        (task, dtype, mode): {B: _up_to(1536) if mode == EAGER else [(224, 224), (1024, 1024)] for B in (1, 8)}
        for task, dtype, mode in itertools.product((INFERENCE, TRAINING), ("float32", "bfloat16"), (EAGER, COMPILED))
    },
}
# What no contestant takes beside its model for a pixel of a batch, and keeps while the others have their turns.
BYTES_A_PIXEL = {INFERENCE: 1000, TRAINING: 6000}
# From this many pixels on, a training problem's outputs are checked, but not its gradients.
GRADIENT_PIXELS = 2**19
# A model's outputs and gradients may differ by this many times what one step of it may.
DEPTH = 5


@dataclass(frozen=True)
class Row:
    """One contestant on one problem, as in model.csv."""

    task: str
    dtype: str
    mode: str
    batch: int
    H: int
    W: int
    contestant: str
    calls: int
    ms: float  # median of a call
    images_per_second: float
    peak_bytes: int | None  # beside model and optimizer; None where the system does not tell
    saved_bytes: int | None  # for backward; None where it is not measured
    error: float | None  # largest relative error; None for those that are not checked

    @property
    def problem(self) -> Problem:
        return Problem(self.task, self.dtype, self.mode, self.batch, (self.H, self.W))


class LeftOut(NamedTuple):
    """A contestant that was not measured on a problem."""

    problem: Problem
    contestant: str
    reason: str


class Growth(NamedTuple):
    """How a contestant's cost of an image grows with its pixels: exponents fitted to sizes from `LARGE` on."""

    task: str
    dtype: str
    contestant: str
    time_exponent: float | None
    memory_exponent: float | None
    largest: str
    ms: float  # an image of the largest size
    peak_mib: float | None  # the same


class Setting(NamedTuple):
    """How to measure: ``budget`` is seconds a contestant and problem."""

    device: str
    threads: int
    budget: float


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments(argv)
    setting = Setting(args.device, args.threads, args.budget)
    torch.set_num_threads(args.threads)
    command = shlex.join(["python", "benchmarks/bench_model.py", *(sys.argv[1:] if argv is None else argv)])
    machine, rows, left_out = _continued(args.output, provenance(args.threads, args.device))
    machine["commands"] = [*machine.get("commands", []), command]
    for problem, contestants in problems(selection(args.only, args.quick), args.device):
        known = {r.contestant for r in rows if r.problem == problem}
        known |= {entry.contestant for entry in left_out if entry.problem == problem}
        if args.resume and known >= set(contestants):
            continue
        new_rows, new_left_out = measure(problem, contestants, setting)
        _report(problem, new_rows, new_left_out)
        rows = [r for r in rows if r.problem != problem or r.contestant not in contestants] + new_rows
        left_out = [e for e in left_out if e.problem != problem or e.contestant not in contestants] + new_left_out
        write(args.output, machine, rows, left_out)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    words = [word for values in AXES.values() for word in values]
    parser = argparse.ArgumentParser(description="Times whole models, and measures the memory they take.")
    parser.add_argument("--quick", action="store_true", help="two contestants on small images, in a minute")
    parser.add_argument("--only", type=names(words), default=[], help=f"of {', '.join(words)}")
    parser.add_argument("--resume", action="store_true", help="do not measure again what --output has")
    parser.add_argument("--budget", type=float, help="seconds for a contestant and problem (default: 2, quick: 0.2)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--output", type=Path, default=Path("build/bench_model"), help="folder for what is written")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: got 'cuda', and torch finds no GPU")
    if args.budget is None:
        args.budget = 0.2 if args.quick else 2.0
    return args


# --- what is measured


def selection(only: Sequence[str], quick: bool = False) -> dict[str, list[Any]]:
    """The values of each axis that a run covers."""
    defaults = QUICK if quick else FULL
    return {
        axis: [value for word, value in values.items() if word in only] or defaults[axis]
        for axis, values in AXES.items()
    }


def problems(selected: dict[str, list[Any]], device: str) -> Iterator[tuple[Problem, list[str]]]:
    """Each problem of a run with the names of its contestants."""
    axes = [selected[name] for name in ("task", "dtype", "mode", "batch", "size")]
    for problem in itertools.starmap(Problem, itertools.product(*axes)):
        contestants = [name for name in selected["contestant"] if _takes_part(CONTESTANTS[name], problem)]
        planned = PLANS[device].get(problem[:3], {}).get(problem.batch, [])
        if contestants and problem.size in planned:
            yield problem, contestants


def _takes_part(contestant: Contestant, problem: Problem) -> bool:
    for_task = problem.task == INFERENCE or contestant.prepare is None
    return for_task and (problem.mode == EAGER or contestant.compiled)


def _lacking_memory(problem: Problem, contestants: int, device: str) -> str:
    """Why so many contestants at once do not fit into the memory that is there, or ""."""
    needed = BYTES_A_PIXEL[problem.task] * problem.batch * problem.pixels * contestants
    if device == "cpu" and (available := _kib("/proc/meminfo").get("MemAvailable")) and needed > 1024 * available:
        together = f"{contestants} at once need about {needed / 2**30:.0f} GiB"
        return f"{together}, {available / 2**20:.0f} GiB are free; --only takes fewer"
    return ""


# --- measuring


def measure(problem: Problem, contestants: Sequence[str], setting: Setting) -> tuple[list[Row], list[LeftOut]]:
    """Checks every contestant on ``problem``, then times them in turns; ValueError for a wrong result."""
    if reason := _lacking_memory(problem, len(contestants), setting.device):
        return [], [LeftOut(problem, name, reason) for name in contestants]
    left_out: list[LeftOut] = []
    running: dict[str, tuple[Connection, Costs, float | None]] = {}
    with ExitStack() as processes:
        for name in contestants:
            try:
                error = _checked_error(name, problem, setting)
                connection = processes.enter_context(_process(name, problem, setting))
                running[name] = connection, _ask(connection, "costs"), error
            except ChildProcessError as failure:
                left_out.append(LeftOut(problem, name, str(failure)))
        slowest = max((costs.seconds for _, costs, _ in running.values()), default=0.0)
        rounds = max(3, min(7, int(setting.budget / max(slowest, 1e-9))))
        samples: dict[str, list[float]] = {name: [] for name in running}
        for _, (name, (connection, *_)) in itertools.product(range(rounds), running.items()):
            samples[name] += _ask(connection, "times", setting.budget / rounds)
    rows = [_row(problem, name, samples[name], costs, error) for name, (_, costs, error) in running.items()]
    return rows, left_out


def _checked_error(name: str, problem: Problem, setting: Setting) -> float | None:
    """See `Entry.error`; ValueError if it is too large.

    Found in a process of its own: what the authors' formulation leaves in the allocator would speed up later calls.
    """
    if not CONTESTANTS[name].checked:
        return None
    with _process(name, problem, setting) as connection:
        error: float = _ask(connection, "error")
    bound = DEPTH * BOUND[DTYPES[problem.dtype]]
    if not error <= bound:  # so that NaN fails
        raise ValueError(f"{name} is wrong on {problem}: error {error:.1e}, bound {bound:.1e}")
    return error


def _row(problem: Problem, name: str, seconds: list[float], costs: "Costs", error: float | None) -> Row:
    median = statistics.median(seconds)
    return Row(
        *problem[:4],
        *problem.size,
        contestant=name,
        calls=len(seconds),
        ms=1e3 * median,
        images_per_second=problem.batch / median,
        peak_bytes=costs.peak_bytes,
        saved_bytes=costs.saved_bytes,
        error=error,
    )


@contextmanager
def _process(name: str, problem: Problem, setting: Setting) -> Iterator[Connection]:
    """A fresh process with a contestant, made ready for a problem, which answers `_ask`."""
    # Forked from one that has imported torch and timm and done nothing else: a new interpreter takes seconds for that.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "timm", "matplotlib.figure"])
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, name, problem, setting), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()  # at which the process ends
        process.join()


def _ask(connection: Connection, method: str, *arguments: object) -> Any:
    """What a method of the process's `Entry` returns; ChildProcessError with the reason where it failed."""
    with suppress(OSError):  # it may have ended, and said why
        connection.send((method, arguments))
    try:
        answer = connection.recv()
    except (EOFError, OSError):
        raise ChildProcessError("its process was killed") from None
    if isinstance(answer, Exception):
        raise ChildProcessError(str(answer))
    return answer


def _serve(connection: Connection, name: str, problem: Problem, setting: Setting) -> None:
    torch.set_num_threads(setting.threads)
    try:
        entry = Entry(CONTESTANTS[name], problem, setting.device)
        while True:
            method, arguments = connection.recv()
            connection.send(getattr(entry, method)(*arguments))
    except EOFError:  # nobody asks any more
        pass
    except Exception as error:
        connection.send(RuntimeError(f"{type(error).__name__}: {error}".splitlines()[0]))


class Costs(NamedTuple):
    """What a call takes; see `Row`."""

    seconds: float
    peak_bytes: int | None
    saved_bytes: int | None


class Entry:
    """A contestant with everything that a call on a problem needs."""

    def __init__(self, contestant: Contestant, problem: Problem, device: str) -> None:
        self.contestant, self.problem, self.device = contestant, problem, device
        torch.manual_seed(0)
        options = {"img_size": problem.size} if contestant.sized else {}
        model = timm.create_model(contestant.architecture, num_classes=CLASSES, drop_path_rate=0.0, **options)
        model = eager_baseline(model) if contestant.eager else model
        # All in the memory format that convolutions need not reorder.
        self.plain = model.to(device, memory_format=torch.channels_last).train(problem.task == TRAINING)
        self.dtype = DTYPES[problem.dtype]
        self.model = contestant.prepare(self.plain, self.dtype) if contestant.prepare else self.plain
        if problem.mode == COMPILED:
            self.model = torch.compile(self.model, dynamic=False)
        self.x = torch.randn(problem.batch, 3, *problem.size).to(device, memory_format=torch.channels_last)
        self.target = torch.randint(CLASSES, (problem.batch,)).to(device)
        if problem.task == TRAINING:
            self.optimizer = torch.optim.AdamW(self.plain.parameters(), lr=1e-4, fused=True)
            self._allocate_moments()
        self.run = self.infer if problem.task == INFERENCE else self.train

    def _allocate_moments(self) -> None:
        for p in self.plain.parameters():
            p.grad = torch.zeros_like(p)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def infer(self) -> Tensor:
        with torch.inference_mode():
            return self.forward(self.x)

    def train(self) -> None:
        F.cross_entropy(self.forward(self.x).float(), self.target).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def forward(self, x: Tensor) -> Tensor:
        if self.contestant.prepare:  # it casts by itself
            return self.model(x)
        with self.autocast():
            return self.model(x)

    def autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def costs(self) -> Costs:
        if self.problem.mode == COMPILED or self.contestant.prepare:
            self.run()  # what compiling and packing weights take is not a call's
        measure_peak = _resident_peak if self.device == "cpu" else _allocated_peak
        seconds: list[float] = []
        peak = measure_peak(lambda: seconds.extend(self.times(0)))
        saved = None
        if (self.problem.task, self.problem.mode) == (TRAINING, EAGER):
            with self.autocast():
                saved = saved_for_backward(self.plain, self.x)
        self._logits()
        return Costs(min(seconds), peak, saved)

    def times(self, sample: float) -> list[float]:
        """Of calls that take ``sample`` seconds together, at least one."""
        return TIMERS[self.device](self.run, sample)

    def error(self) -> float:
        """The largest relative error of logits and gradients against the authors' formulation in float32."""
        logits = self._logits()
        baseline = eager_baseline(self.plain)
        with torch.inference_mode(self.problem.task == INFERENCE):
            errors = [relative_error(logits[:1], baseline(self.x[:1]))]
        if self.problem.task == TRAINING and self.problem.batch * self.problem.pixels < GRADIENT_PIXELS:
            gradients = self._gradients(self.forward, self.plain)
            errors.append(relative_error(gradients, self._gradients(baseline, baseline)))
        return max(errors)

    def _logits(self) -> Tensor:
        """ValueError if they are none."""
        with torch.inference_mode(self.problem.task == INFERENCE):
            y = self.forward(self.x).detach()
        if y.shape != (self.problem.batch, CLASSES) or not y.isfinite().all():
            raise ValueError(f"no logits but {tuple(y.shape)}, {y.isfinite().sum()} of them finite numbers")
        return y

    def _gradients(self, forward: Callable[[Tensor], Tensor], model: nn.Module) -> Tensor:
        """Of all the model's parameters, one after the other."""
        loss = F.cross_entropy(forward(self.x).float(), self.target)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def _resident_peak(run: Callable[[], object]) -> int | None:
    """By how much the memory that this process has to itself grows while ``run`` runs; None where Linux does not tell.

    Mapped files are left out: a library's code is not the model's, and becomes resident as it is used.
    """
    clear_refs = Path("/proc/self/clear_refs")
    if not clear_refs.exists():
        run()
        return None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    clear_refs.write_text("5")  # the peak so far is forgotten
    held = _kib("/proc/self/status")["RssAnon"]
    run()
    after = _kib("/proc/self/status")
    return 1024 * max(0, after["VmHWM"] - after["RssFile"] - after["RssShmem"] - held)


def _allocated_peak(run: Callable[[], object]) -> int | None:
    """By how much torch's allocations on the GPU grow while ``run`` runs."""
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - held


def _kib(path: str) -> dict[str, int]:
    """What a file of /proc gives in kB; nothing if there is none."""
    if not Path(path).exists():
        return {}
    lines = [line.split() for line in Path(path).read_text().splitlines()]
    return {words[0].rstrip(":"): int(words[1]) for words in lines if words[-1] == "kB"}


# --- results


def _continued(folder: Path, machine: dict[str, Any]) -> tuple[dict[str, Any], list[Row], list[LeftOut]]:
    """What the folder has; SystemExit if that was measured elsewhere or with other code."""
    path = folder / "model.json"
    if not path.exists():
        return machine, [], []
    content = json.loads(path.read_text(encoding="utf-8"))
    for key in ("machine", "commit", "torch", "timm", "device", "threads"):
        if content["machine"][key] != machine[key]:
            raise SystemExit(
                f"--output: {path} was measured with {key} {content['machine'][key]}, this is {machine[key]}; "
                "name another folder"
            )
    rows = [Row(**{field.name: row[field.name] for field in fields(Row)}) for row in content["rows"]]
    left_out = [
        LeftOut(_problem(entry["problem"]), entry["contestant"], entry["reason"]) for entry in content["left_out"]
    ]
    machine["dirty"] |= content["machine"]["dirty"]
    return machine | {"commands": content["machine"]["commands"]}, rows, left_out


def _problem(stored: list[Any]) -> Problem:
    task, dtype, mode, batch, (H, W) = stored
    return Problem(task, dtype, mode, batch, (H, W))


def ratios(row: Row, rows: Sequence[Row]) -> dict[str, float | None]:
    """How many times faster ``row`` is than the two it is compared with, on the same problem."""
    rates = {r.contestant: r.images_per_second for r in rows if r.problem == row.problem}
    return {
        f"times_{name}": row.images_per_second / rates[name] if name in rates else None
        for name in (AUTHORS, CONVFORMER)
    }


def growths(rows: Sequence[Row]) -> list[Growth]:
    """Of single images in eager mode; least squares of logarithms."""
    found = []
    for task, dtype, name in dict.fromkeys((r.task, r.dtype, r.contestant) for r in rows):
        large = [
            r
            for r in rows
            if (r.task, r.dtype, r.contestant, r.mode, r.batch) == (task, dtype, name, EAGER, 1)
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
                    largest=_size_name(largest.problem.size),
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


def _size_name(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _report(problem: Problem, rows: Sequence[Row], left_out: Sequence[LeftOut]) -> None:
    print(f"\n{problem}")
    print(f"  {'contestant':<23}{'images/s':>9}{'ms':>10}{'calls':>6}{'x authors':>10}{'x convformer':>13}"
          f"{'peak MiB':>9}{'saved MiB':>10}{'error':>9}")  # fmt: skip
    for r in rows:
        times = ratios(r, rows).values()
        cells = [_cell(value, ".2f") for value in times] + [
            _cell(_mib(value), ".0f") for value in (r.peak_bytes, r.saved_bytes)
        ]
        print(f"  {r.contestant:<23}{r.images_per_second:>9.2f}{r.ms:>10.1f}{r.calls:>6}{cells[0]:>10}{cells[1]:>13}"
              f"{cells[2]:>9}{cells[3]:>10}{_cell(r.error, '.1e'):>9}")  # fmt: skip
    for entry in left_out:
        print(f"  {entry.contestant} is left out: {entry.reason}")
    sys.stdout.flush()


def _cell(value: float | str | None, form: str) -> str:
    return "" if value is None else value if isinstance(value, str) else format(value, form)


def write(folder: Path, machine: dict[str, Any], rows: Sequence[Row], left_out: Sequence[LeftOut]) -> None:
    """model.csv, model.json, model.md and the two pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    order = {problem: i for i, (problem, _) in enumerate(problems(ALL, machine["device"]))}
    rows = sorted(rows, key=lambda r: (order[r.problem], list(CONTESTANTS).index(r.contestant)))
    table = [asdict(r) | ratios(r, rows) for r in rows]
    content = {
        "machine": machine,
        "growth": [g._asdict() for g in growths(rows)],
        "left_out": [entry._asdict() for entry in left_out],
        "rows": table,
    }
    (folder / "model.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    if rows:
        write_csv(folder / "model.csv", list(table[0]), table)
        (folder / "model.md").write_text(markdown(machine, rows, left_out), encoding="utf-8")
        for quantity, (label, value) in DRAWN.items():
            figure(machine, rows, label, value).savefig(folder / f"model_{quantity}.png", dpi=120)


def markdown(machine: dict[str, Any], rows: Sequence[Row], left_out: Sequence[LeftOut]) -> str:
    """A table for each task, dtype, mode and batch, sizes from left to right."""
    parts = [
        f"# Whole models\n\n{_where(machine)}; torch {machine['torch']}, timm {machine['timm']}; commit "
        f"{machine['commit']}{', changed' if machine['dirty'] else ''}. Measured by\n"
    ]
    parts += [f"    {command}" for command in machine["commands"]]
    for group in dict.fromkeys(r.problem[:4] for r in rows):
        members = [r for r in rows if r.problem[:4] == group]
        task, dtype, mode, batch = group
        parts.append(f"\n## {task.capitalize()}, {dtype}, {mode}, batch {batch}")
        for title, form in _TABLES:
            cells = {(r.contestant, r.problem.size): form(r, ratios(r, members)) for r in members}
            if any(cells.values()):
                sizes = sorted({r.problem.size for r in members}, key=math.prod)
                contestants = list(dict.fromkeys(r.contestant for r in members))
                parts += [f"\n{title}\n", _row_of([task, *map(_size_name, sizes)]), "|---" * (len(sizes) + 1) + "|"]
                parts += [_row_of([name, *(cells.get((name, size), "") for size in sizes)]) for name in contestants]
    parts += _growth_table(growths(rows))
    if left_out:
        parts += ["\n## Not measured\n", *(f"- {e.contestant}; {e.problem}: {e.reason}" for e in left_out)]
    return "\n".join(parts) + "\n"


def _speed(r: Row, times: dict[str, float | None]) -> str:
    against = ", ".join("-" if value is None else f"{value:.2f}" for value in times.values())
    return f"{r.images_per_second:.3g} ({against})"


_TABLES: list[tuple[str, Callable[[Row, dict[str, float | None]], str]]] = [
    (f"Images a second (times {AUTHORS}, times {CONVFORMER}):", _speed),
    ("Peak memory beside the model, MiB an image:", lambda r, _: _cell(_mib_an_image(r, r.peak_bytes), ".0f")),
    ("Saved for backward, MiB an image:", lambda r, _: _cell(_mib_an_image(r, r.saved_bytes), ".1f")),
]


def _mib_an_image(r: Row, nbytes: int | None) -> float | None:
    return None if nbytes is None else nbytes / 2**20 / r.batch


def _row_of(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _growth_table(found: Sequence[Growth]) -> list[str]:
    if not found:
        return []
    titles = ["task", "dtype", "contestant", "time", "memory", "largest", "ms", "peak MiB"]
    return [
        f"\n## Growth with pixels\n\ntime ~ pixels^a and peak memory ~ pixels^b of one image, eager, from "
        f"{_size_name(LARGE)} on; and what an image of the largest size takes.\n",
        _row_of(titles),
        "|---" * len(titles) + "|",
        *(
            _row_of([_cell(v, ".2f" if "exponent" in name else ".0f") for name, v in g._asdict().items()])
            for g in found
        ),
    ]


def _where(machine: dict[str, Any]) -> str:
    return str(machine["machine" if machine["device"] == "cpu" else "gpu"])


DRAWN: dict[str, tuple[str, Callable[[Row], float | None]]] = {
    "throughput": ("images/s", lambda r: r.images_per_second),
    "memory": ("peak memory beside the model, MiB an image", lambda r: _mib_an_image(r, r.peak_bytes)),
}


def figure(machine: dict[str, Any], rows: Sequence[Row], label: str, value: Callable[[Row], float | None]) -> Figure:
    """A quantity against the image's pixels, a panel for each task: eager mode, the first dtype and batch there are."""
    drawn = [r for r in rows if (r.dtype, r.mode, r.batch) == (rows[0].dtype, rows[0].mode, rows[0].batch)]
    tasks = list(dict.fromkeys(r.task for r in drawn))
    picture = Figure(figsize=(6.5 * len(tasks), 5.6), layout="constrained")
    for ax, task in zip(picture.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        _curves(ax, [r for r in drawn if r.task == task], value)
        ax.set(title=task, xlabel="image size", ylabel=label)
    handles, labels = picture.axes[0].get_legend_handles_labels()
    picture.legend(handles, labels, loc="outside lower center", ncols=2 + len(tasks), frameon=False)
    batch = "single images" if rows[0].batch == 1 else f"batches of {rows[0].batch}"
    picture.suptitle(f"{batch}, {rows[0].dtype}, {rows[0].mode}, {_where(machine)}", fontsize=11)
    return picture


def _curves(ax: Axes, rows: Sequence[Row], value: Callable[[Row], float | None]) -> None:
    for name in dict.fromkeys(r.contestant for r in rows):
        contestant = CONTESTANTS[name]
        points = sorted((r.problem.pixels, v) for r in rows if r.contestant == name and (v := value(r)))
        ax.plot(
            [pixels for pixels, _ in points],
            [v for _, v in points],
            color=contestant.colour,
            marker=contestant.marker,
            linewidth=2.2 if contestant.checked else 1.3,
            label=name,
        )
    ax.set(xscale="log", yscale="log")
    squares = sorted({(r.H, r.W) for r in rows if r.H == r.W})  # 427x640 is a point beside 512x512
    ax.set_xticks([H * W for H, W in squares], [_size_name(size) for size in squares], rotation=40, fontsize=8)
    ax.minorticks_off()
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
