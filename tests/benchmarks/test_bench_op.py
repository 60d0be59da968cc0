"""The benchmark script: what it counts, which results it rejects, what it writes."""

import csv
import json
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_model
import bench_op
import common
import figures
import pytest
import torch
from bench_op import Budget
from paths import ROOT
from providers import op as op_providers
from providers.op import BOTH, FORWARD, Provider, Row, Setting, StepProblem
from torch import Tensor

from dfformer_kernels import backends, reference

pytestmark = pytest.mark.usefixtures("one_thread")

RESULTS = ROOT / "benchmarks/results"
TINY = StepProblem("dynamic_filter", torch.float32, (2, 6, 5, 3), True)
BRIEF = Budget(0, 1e-5)
ROW = Row(
    *("dynamic_filter", "float32", True, 1, 8, 8, 4, FORWARD, "cpu", "avx512", 2, 5),
    *(2.0, 3.0, 1.0, 1.0, 10.0, 100.0, 0.5, 0.0, None),
)

MACHINE = {
    "machine": "a processor",
    "gpu": "a GPU",
    "device": "cpu",
    "copy_gbps": 10.0,
    "gemm_gflops": {"float32": 100.0},
}


def test_counts() -> None:
    """By hand: N = 16, so a transform is 2.5 * 16 * 4 = 160 flops per channel; 6 channels, 12 frequencies."""
    counts = {
        ("dynamic_filter", FORWARD): 6 * (2 * 160 + 12 * (16 + 6)),
        ("dynamic_filter", BOTH): 6 * (5 * 160 + 12 * (22 + 16 + 6 + 8 + 32)),
        ("global_filter", FORWARD): 6 * (2 * 160 + 12 * 6),
        ("global_filter", BOTH): 6 * (5 * 160 + 12 * (6 + 6 + 8 + 2)),
    }
    assert {key: op_providers.flops(key[0], (2, 4, 4, 3), key[1]) for key in op_providers.FLOPS} == counts
    assert op_providers.moved_bytes((2, 4, 4, 3), torch.float32, FORWARD) == 2 * 96 * 4
    assert op_providers.moved_bytes((2, 4, 4, 3), torch.bfloat16, BOTH) == 5 * 96 * 2


def test_problems() -> None:
    found = op_providers.problems("global_filter")
    assert len(found) == len(set(found))
    by_dtype = [sum(p.dtype == dtype for p in found) for dtype in common.DTYPES.values()]
    assert by_dtype == [4 * 4 * 2 - 4 + len(op_providers.OTHER_SHAPES), 4, 4, 4]
    assert (8, 128, 128, 128) in [p.shape for p in found]
    assert (8, 256, 256, 128) not in [p.shape for p in found]
    assert not op_providers.is_measured(4096, (1, 1024, 1024, 65))


def test_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One tiny shape through everything, with every provider there is but torch.compile."""
    monkeypatch.setattr(bench_op, "problems", lambda op, quick: [TINY._replace(op=op)])
    monkeypatch.setattr(bench_op, "gemm_rate", lambda device, dtype: 100.0)
    monkeypatch.setattr(bench_op, "copy_rate", lambda device: 10.0)
    ops = ["dynamic_filter", "global_filter"]
    bench_op.main(["--quick", "--op", ",".join(ops), "--threads", "1", "--output", str(tmp_path / "new")])

    with (tmp_path / "new/op.csv").open(newline="") as file:
        table = csv.DictReader(file)
        rows = list(table)
        assert table.fieldnames == [field.name for field in fields(Row)]
    content: dict[str, Any] = json.loads((tmp_path / "new/op.json").read_text())
    assert [r["provider"] for r in content["rows"]] == [r["provider"] for r in rows]
    runnable = {name for name, reasons in backends().items() if not reasons}
    for op in ops:
        for direction in (FORWARD, BOTH):
            of_problem = [r for r in content["rows"] if (r["op"], r["direction"]) == (op, direction)]
            assert runnable <= {r["provider"] for r in of_problem}
            for r in of_problem:
                assert min(r["ms"], r["speedup"], r["gflops"], r["gbps"], r["share_of_limit"]) > 0
                assert r["rounds"] >= 5
                assert r["provider"] not in runnable or (r["extra_bytes"] is None) == (direction == BOTH)
    assert {"machine", "caches", "libraries", "commit", "dirty", "date", "threads", "torch", "dfformer"} <= set(
        content["machine"]
    )
    assert (content["machine"]["copy_gbps"], content["machine"]["gemm_gflops"]["float32"]) == (10, 100)
    assert bool(content["summary"]) == ("cpu" in runnable)
    assert (tmp_path / "new/op.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "torch.compile is left out: compiling" in printed
    assert "2x6x5x3 (stage)" in printed


def test_the_committed_results_have_the_names_of_today() -> None:
    rows = json.loads((RESULTS / "op.json").read_text())["rows"]
    assert all(list(row) == [field.name for field in fields(Row)] for row in rows)
    with (RESULTS / "op.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [list(row) for row in table] == [list(row) for row in rows]
    summary = bench_op.summarize([Row(**row) for row in rows])
    assert [s._asdict() for s in summary] == json.loads((RESULTS / "op.json").read_text())["summary"]


@pytest.mark.parametrize("script", [bench_op, bench_model])
def test_another_allocator_is_measured_in_a_process_of_its_own(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr(common.subprocess, "run", lambda command, env, check: started.append((command, env)))
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    arguments = ["--quick", "--allocator", "kept"]
    script.main(arguments)
    ((command, env),) = started
    assert command[1:] == [script.__file__, *arguments]
    for name, value in common.ALLOCATORS["kept"].items():
        assert env[name] == value
        monkeypatch.setenv(name, value)
    assert common.allocator() == "kept"
    script.main(["--quick", "--allocator", "default"])
    assert not common.ALLOCATORS["kept"].keys() & started[1][1].keys()


def wrong_result(x: Tensor, logits: Tensor, basis: Tensor) -> Tensor:
    return reference.dynamic_filter(x, logits, basis) * 1.00001


def wrong_gradient(x: Tensor, logits: Tensor, basis: Tensor) -> Tensor:
    return reference.dynamic_filter(x, logits, basis) + 1e-4 * (x - x.detach())


def not_a_number(x: Tensor, logits: Tensor, basis: Tensor) -> Tensor:
    return torch.full_like(x, float("nan"))


@pytest.mark.parametrize(("run", "calls"), [(wrong_result, 0), (wrong_gradient, 1), (not_a_number, 0)])
def test_a_wrong_provider_raises(monkeypatch: pytest.MonkeyPatch, run: Any, calls: int) -> None:
    """Before the direction it is wrong in is timed."""
    monkeypatch.setitem(op_providers.PROVIDERS, "wrong", lambda op, setting: [Provider("bad", run, setting)])
    timed = 0
    median_seconds = bench_op._median_seconds

    def counted(runs: list[op_providers.Run], budget: Budget) -> tuple[int, list[float]]:
        nonlocal timed
        timed += 1
        return median_seconds(runs, budget)

    monkeypatch.setattr(bench_op, "_median_seconds", counted)
    providers = op_providers.available_providers("dynamic_filter", Setting(1), quick=True)
    with pytest.raises(ValueError, match="bad is wrong on StepProblem"):
        bench_op.measure(TINY, providers, 100.0, BRIEF)
    assert timed == calls


def test_absent_library(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(op_providers.PROVIDERS, "ducc0", lambda op, setting: [__import__("no_such_library")])
    assert "ducc0" not in [c.name for c in op_providers.available_providers("global_filter", Setting(1), quick=True)]
    assert "ducc0 is left out: No module named 'no_such_library'" in capsys.readouterr().out


def test_providers_on_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    """Which take what they can, problem by problem; without a GPU, torch.fft is left to run there."""
    found = op_providers.available_providers("global_filter", Setting(1, device="cuda"), quick=True)
    gpu_backends = {name for name in ("cuda", "cufft") if not backends()[name]}
    assert {c.name for c in found} == {"torch", *gpu_backends}
    assert all(c.setting.device == "cuda" for c in found)
    printed = capsys.readouterr().out
    assert "cpu is left out: it runs on cpu, x is on cuda" in printed
    assert all(f"{name} is left out: " in printed for name in ("scipy", "pyfftw", "ducc0"))


def test_a_problem_a_provider_does_not_take() -> None:
    torch_alone = op_providers._torch("dynamic_filter", Setting(1))
    other = Provider("picky", not_a_number, Setting(1), supports=lambda problem: problem.shape[0] > 2)
    rows = bench_op.measure(TINY, [*torch_alone, other], 100.0, BRIEF)
    assert {r.provider for r in rows} == {"torch"}


def test_times_on_a_gpu_are_those_of_do_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    def do_bench(run: Callable[[], object], **options: object) -> list[float]:
        assert options in ({"warmup": 0, "rep": 1e3 * sample, "return_mode": "all"} for sample in (0, 1e-2))
        run()
        return [2.0, 4.0, 3.0]

    monkeypatch.setitem(sys.modules, "triton.testing", SimpleNamespace(do_bench=do_bench))
    calls: list[str] = []
    runs: list[op_providers.Run] = [
        (Setting(1, device="cuda"), partial(calls.append, "a")),
        (Setting(1, device="cuda"), partial(calls.append, "b")),
    ]
    assert bench_op._median_seconds(runs, Budget(0, 1e-2)) == (5, [0.003, 0.003])
    # a turn to see how long it takes, then round by round; the first call of a turn is not counted
    assert calls == ["a", "a", "b", "b"] * 6


def test_no_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        bench_op.main(["--device", "cuda"])
    assert "--device: got 'cuda', and torch finds no GPU" in capsys.readouterr().err


def test_out_of_memory_leaves_a_problem_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(problem: StepProblem, *args: object) -> list[Row]:
        if problem.op == "global_filter":
            raise torch.OutOfMemoryError("8 GiB more are needed")
        return [ROW]

    for name, replacement in {"problems": lambda op, quick: [TINY._replace(op=op)], "measure": measure}.items():
        monkeypatch.setattr(bench_op, name, replacement)
    monkeypatch.setattr(bench_op, "describe_machine", lambda setting: MACHINE)
    bench_op.main(["--quick", "--op", "dynamic_filter,global_filter", "--output", str(tmp_path)])
    assert "is left out: 8 GiB more are needed" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "op.json").read_text())["rows"]) == 1


def test_figure_of_two_backends() -> None:
    """A panel a use, each titled with the first backend's medians."""
    shapes = ((56, 128, True), (7, 1024, True), (48, 256, True), (31, 64, False))
    rows = [
        replace(ROW, provider=name, direction=d, H=H, W=H, C=C, stage=stage, speedup=speedup)
        for name, speedup in (("torch", 1.0), ("cuda", 7.0), ("cufft", 5.0))
        for d in (FORWARD, BOTH)
        for H, C, stage in shapes
    ]
    figure: Any = figures.op_figure(MACHINE | {"device": "cuda"}, rows)
    titles = [ax.get_title().split(":")[0] for ax in figure.axes if ax.axison]
    assert titles == ["Stages at 224x224", "Stages at 384x384", "Others", "Roofline"]
    first, roofline = figure.axes[0], figure.axes[3]
    assert first.get_title().endswith("7.0 and 7.0 times faster")
    assert "cuda and cufft against torch.fft" in figure.get_suptitle()
    places = [bar.get_y() for bar in first.patches]
    assert len(set(places)) == len(places) == 8
    labels = [text.get_text() for text in roofline.get_legend().get_texts()]
    assert {"cuda, forward", "cufft, forward+backward", "torch, forward"} <= set(labels)


def test_extra_memory() -> None:
    """One temporary of x's size beside y."""
    provider = Provider("two steps", lambda x: (x + x) * x, Setting(1))
    x = torch.ones(1000)
    assert op_providers._allocated_peak(provider, TINY, [x]) == x.nbytes


def test_rates() -> None:
    assert common.copy_rate("cpu", 2**16) > 0
    assert common.gemm_rate("cpu", torch.float32, 32) > 0


def test_summary() -> None:
    rows = [
        ROW,
        replace(ROW, stage=False, B=8, speedup=5.0),
        replace(ROW, dtype="bfloat16", ms=1.0),
        replace(ROW, provider="cpu/avx2", isa="avx2", ms=3.0),
        replace(ROW, provider="cpu/1 thread", threads=1, ms=3.5),
        replace(ROW, provider="torch", isa="", ms=6.0),
    ]
    assert {s.quantity: (s.median, s.minimum, s.problems) for s in bench_op.summarize(rows)} == {
        "times faster than torch.fft, stages": (3, 3, 1),
        "times faster than torch.fft, all": (4, 3, 2),
        "share of the limit, stages": (0.5, 0.5, 1),
        "bfloat16 / float32 time": (0.5, 0.5, 1),
        "AVX2 / AVX-512 time": (1.5, 1.5, 1),
        "1 -> 2 threads, batch 1, times faster": (1.75, 1.75, 1),
    }
