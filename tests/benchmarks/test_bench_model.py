"""The benchmark of whole models: what it covers, which results it rejects, what it writes."""

import csv
import itertools
import json
import math
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import bench_model
import common
import figures
import pytest
import torch
from paths import ROOT
from providers import model as model_providers
from providers.model import AUTHORS, COMPILED, CONVFORMER, EAGER, INFERENCE, TRAINING, Entry, ModelProblem, Row
from torch import Tensor, nn

from dfformer.models.spectral import DynamicFilter
from dfformer_kernels.tolerance import BOUND

pytestmark = pytest.mark.usefixtures("one_thread")

RESULTS = ROOT / "benchmarks/results"
SMALL = ModelProblem(INFERENCE, "float32", EAGER, 1, (64, 64))
ROW = Row(INFERENCE, "float32", EAGER, 1, 64, 64, "dfformer_s18", 3, 20.0, 50.0, 2**20, None, 1e-6)
MACHINE: dict[str, Any] = {
    "machine": "a processor",
    "gpu": "a GPU",
    "device": "cpu",
    "threads": 1,
    "allocator": "default",
    "torch": "2",
    "timm": "1",
    "commit": "abc",
    "dirty": False,
}


def covered(only: list[str], device: str = "cpu", quick: bool = False) -> dict[ModelProblem, list[str]]:
    return dict(model_providers.problems(model_providers.selection(only, quick), device))


def test_selection() -> None:
    found = covered(["training", "float32", "b8", "224", "384", "dfformer_s18", "swin_tiny"])
    eager = [ModelProblem(TRAINING, "float32", EAGER, 8, (n, n)) for n in (224, 384)]
    compiled = ModelProblem(TRAINING, "float32", COMPILED, 8, (224, 224))
    assert found == {**{problem: ["dfformer_s18", "swin_tiny"] for problem in eager}, compiled: ["dfformer_s18"]}
    assert covered(["427x640", "b1", INFERENCE, "float32"]).keys() == {
        ModelProblem(INFERENCE, "float32", EAGER, 1, (427, 640))
    }


def test_quick_compiles_only_when_asked() -> None:
    names = [AUTHORS, "dfformer_s18"]
    assert {p.mode for p in covered([], quick=True)} == {EAGER}
    assert all(found == names for found in covered([], quick=True).values())
    assert {p.size for p in covered([COMPILED], quick=True)} == set(model_providers.SMALL_SIZES)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_plan(device: str) -> None:
    found = covered([], device)
    assert {p.size for p in found} == set(model_providers.SIZES)
    assert {p.batch for p in found} == ({1, 8} if device == "cpu" else {1, 8, 128})
    assert {p.size for p in found if p.batch == 128} == (set() if device == "cpu" else {(224, 224)})
    assert all(p.size in ((224, 224), (1024, 1024)) for p in found if p.mode == COMPILED)
    assert (ModelProblem(TRAINING, "float32", EAGER, 8, (1536, 1536)) in found) == (device == "cuda")


def test_an_unknown_word_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_model.main(["--only", "float23"])
    assert "got float23, expected inference, training" in capsys.readouterr().err


def test_no_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        bench_model.main(["--device", "cuda"])
    assert "--device: got 'cuda', and torch finds no GPU" in capsys.readouterr().err


def test_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A real run, in processes; then a second part of it, which keeps the first, and a third with nothing to do."""
    arguments = ["--quick", "--budget", "0", "--threads", "1", "--output", str(tmp_path)]
    bench_model.main([*arguments, "--only", "64,inference"])
    bench_model.main([*arguments, "--only", "64,training"])
    capsys.readouterr()
    bench_model.main([*arguments, "--only", "64", "--resume"])
    assert capsys.readouterr().out == ""

    content = json.loads((tmp_path / "model.json").read_text())
    with (tmp_path / "model.csv").open(newline="") as file:
        assert [r["provider"] for r in csv.DictReader(file)] == [r["provider"] for r in content["rows"]]
    seen = [(r["task"], r["H"], r["provider"]) for r in content["rows"]]
    both = [AUTHORS, "dfformer_s18"]
    problems = ((INFERENCE, 64), (TRAINING, 64))
    assert seen == [(*problem, name) for problem in problems for name in both]
    for r in content["rows"]:
        assert r["calls"] >= 3
        assert math.isclose(r["images_per_second"] * r["ms"], 1e3)
        assert r["peak_bytes"] > 0
        assert (r["saved_bytes"] is None) == (r["task"] == INFERENCE)
        assert (r["error"] is None) == (r["provider"] == AUTHORS)
        assert r["times_convformer_s18"] is None
    by_name = {r["provider"]: r for r in content["rows"] if r["task"] == INFERENCE}
    assert math.isclose(
        by_name["dfformer_s18"]["times_authors"], by_name[AUTHORS]["ms"] / by_name["dfformer_s18"]["ms"]
    )
    assert {"machine", "torch", "timm", "commit", "dirty", "date", "caches", "device"} <= content["machine"].keys()
    assert len(content["machine"]["commands"]) == 2
    assert "| dfformer_s18 |" in (tmp_path / "model.md").read_text()
    for picture in ("throughput", "memory"):
        assert (tmp_path / f"model_{picture}.png").read_bytes().startswith(b"\x89PNG")


def test_the_committed_results_can_be_continued() -> None:
    content = json.loads((RESULTS / "model.json").read_text())
    machine, rows, left_out = bench_model._continued(RESULTS, dict(content["machine"]))
    assert [asdict(r) | bench_model.ratios(r, rows) for r in rows] == content["rows"]
    assert [list(g._asdict()) for g in bench_model.growths(rows)] == [list(g) for g in content["growth"]]
    # with the values of growth, to the digits that are shown
    assert bench_model.markdown(machine, rows, left_out) == (RESULTS / "model.md").read_text()
    with (RESULTS / "model.csv").open(newline="") as file:
        assert [list(row) for row in csv.DictReader(file)] == [list(row) for row in content["rows"]]


@pytest.mark.parametrize("key", ["machine", "commit", "torch", "device", "allocator"])
def test_results_of_something_else_are_not_mixed_in(tmp_path: Path, key: str) -> None:
    bench_model.write(tmp_path, MACHINE | {"commands": ["first"]}, [ROW], [])
    machine, rows, _ = bench_model._continued(tmp_path, dict(MACHINE))
    assert (machine["commands"], rows) == (["first"], [ROW])
    with pytest.raises(SystemExit, match=f"model.json was measured with {key} .*name another folder"):
        bench_model._continued(tmp_path, MACHINE | {key: "other"})


class Biased(nn.Module):
    """A model whose logits, or only whose gradients, are off by a factor."""

    def __init__(self, model: nn.Module, logits: float, gradients: float) -> None:
        super().__init__()
        self.model, self.logits, self.gradients = model, logits, gradients

    def forward(self, x: Tensor) -> Tensor:
        y = self.model(x)
        return y.detach() * (self.logits - self.gradients) + y * self.gradients


@pytest.mark.parametrize(
    ("task", "logits", "gradients", "right"),
    [(INFERENCE, 1, 1, True), (INFERENCE, 1.0001, 1, False), (TRAINING, 1, 1, True), (TRAINING, 1, 1.0001, False)],
)
def test_a_wrong_provider_is_found(task: str, logits: float, gradients: float, right: bool) -> None:
    entry = Entry(model_providers.PROVIDERS["dfformer_s18"], SMALL._replace(task=task), "cpu")
    entry.timed = Biased(entry.model, logits, gradients)
    assert (entry.error() <= bench_model.DEPTH * BOUND[torch.float32]) == right


# Each computes a filter step from the right one and its arguments.
FILTER_STEPS: dict[str, Callable[..., Tensor]] = {
    "right": lambda step, x, logits, *rest: step(x, logits, *rest),
    "zero": lambda step, x, logits, *rest: 0 * step(x, logits, *rest),
    "without routing": lambda step, x, logits, *rest: step(x, 0 * logits, *rest),
    "zero for the last image": lambda step, x, logits, *rest: torch.cat(
        [step(x, logits, *rest)[:-1], torch.zeros_like(x[-1:])]
    ),
}


@pytest.mark.parametrize("task", [INFERENCE, TRAINING])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_filter_is_found(dtype: str, task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = SMALL._replace(task=task, dtype=dtype, batch=2)
    entry = Entry(model_providers.PROVIDERS["dfformer_s18"], problem, "cpu")
    right = DynamicFilter.filter
    accepted = []
    for name, computed in FILTER_STEPS.items():
        step = partialmethod(lambda layer, computed, *x: computed(partial(right, layer), *x), computed)
        monkeypatch.setattr(DynamicFilter, "filter", step)
        if entry.error() <= bench_model.DEPTH * BOUND[entry.dtype]:
            accepted.append(name)
    assert accepted == ["right"]


@contextmanager
def answering(name: str, problem: ModelProblem, setting: model_providers.Setting) -> Any:
    """In place of a process: the provider's name is what it does."""
    yield name


def test_refused_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(name: Any, method: str, *arguments: object) -> Any:
        if name == "swin_tiny":
            raise ChildProcessError("AssertionError: 427 is odd")
        return {"error": 1.0, "costs": model_providers.Costs(1e-3, 100, None), "times": [0.1, 0.2, 0.3]}[method]

    monkeypatch.setattr(bench_model, "provider_process", answering)
    monkeypatch.setattr(bench_model, "ask", ask)
    setting = model_providers.Setting("cpu", 1, 0)
    rows, left_out = bench_model.measure(SMALL, [AUTHORS, "swin_tiny"], setting)
    assert [(r.provider, r.calls, r.ms, r.images_per_second) for r in rows] == [(AUTHORS, 9, 200.0, 5.0)]
    assert left_out == [(SMALL, "swin_tiny", "AssertionError: 427 is odd")]
    with pytest.raises(ValueError, match="dfformer_s18 is wrong on inference, float32, eager, 1 x 64x64: error"):
        bench_model.measure(SMALL, ["dfformer_s18"], setting)


def test_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_model, "proc_kib", lambda path: {"MemAvailable": 1024})
    problem = SMALL._replace(size=(1024, 1024), batch=8)
    rows, left_out = bench_model.measure(problem, [AUTHORS], model_providers.Setting("cpu", 1, 0))
    assert not rows
    assert [(e.problem, e.provider) for e in left_out] == [(problem, AUTHORS)]
    assert left_out[0].reason.startswith("1 at once need about ")


def test_a_process_tells_why_it_failed() -> None:
    problem, setting = SMALL._replace(size=(1, 1)), model_providers.Setting("cpu", 1, 0)
    with (
        model_providers.provider_process("convnext_tiny", problem, setting) as connection,
        pytest.raises(ChildProcessError, match=r"RuntimeError: .*[Kk]ernel size"),
    ):
        model_providers.ask(connection, "costs")


def test_peak_memory() -> None:
    """Of what is held at once, not of all that is allocated; kernels may count pages a while after their return."""

    def run() -> None:
        for _ in range(10):
            torch.ones(2**24)

    peak = common.resident_peak(run)
    assert peak is not None
    assert 0.95 * 2**26 <= peak <= 5 * 2**26


def test_growth() -> None:
    """Slopes of exact power laws, from 512x512 on: the small sizes do not count."""

    def rows(name: str, exponent: float) -> list[Row]:
        sizes = [(64, 64), (512, 512), (768, 768), (1024, 1024)]
        return [
            replace(ROW, provider=name, H=H, W=W, ms=(H * W) ** exponent if H > 64 else 1e9, peak_bytes=H * W * 8)
            for H, W in sizes
        ]

    linear, square = bench_model.growths([*rows("dfformer_s18", 1), *rows("swin_tiny", 2)])
    assert [round(g.time_exponent or 0, 6) for g in (linear, square)] == [1, 2]
    assert [round(g.memory_exponent or 0, 6) for g in (linear, square)] == [1, 1]
    assert (linear.largest, linear.peak_mib) == ("1024x1024", 8)
    assert bench_model.growths(rows("dfformer_s18", 1)[:3]) == []


def test_figure_and_table() -> None:
    rows = [
        replace(ROW, provider=name, task=task, H=n, W=n, ms=float(n), images_per_second=1000 / n)
        for task in (INFERENCE, TRAINING)
        for n in (224, 1024)
        for name in (AUTHORS, CONVFORMER, "dfformer_s18")
    ]
    rows.append(replace(ROW, dtype="bfloat16", H=224, W=224))
    label, value = figures.DRAWN["memory"]
    picture: Any = figures.model_figure(MACHINE, rows, label, value)
    assert [ax.get_title() for ax in picture.axes] == [INFERENCE, TRAINING]
    drawn = {line.get_label(): list(line.get_xdata()) for line in picture.axes[0].lines if len(line.get_xdata())}
    assert drawn == {name: [224**2, 1024**2] for name in (AUTHORS, CONVFORMER, "dfformer_s18")}
    assert "a processor" in picture.get_suptitle()
    named = [(text.xyann[1], text.get_text()) for text in picture.axes[0].texts]
    assert [name for _, name in sorted(named)] == sorted(drawn)
    assert min(b - a for (a, _), (b, _) in itertools.pairwise(sorted(named))) > 0.04, "they do not overlap"

    left_out = [model_providers.LeftOut(SMALL, "swin_tiny", "it does not take it")]
    text = bench_model.markdown(MACHINE | {"commands": ["python a.py"]}, rows, left_out)
    assert "| inference | 224x224 | 1024x1024 |" in text
    assert "| dfformer_s18 | 4.46 (1.00, 1.00) | 0.977 (1.00, 1.00) |" in text
    assert "| inference | 224x224 |\n|---|---|\n| dfformer_s18 | 50 (-, -) |" in text
    assert "- swin_tiny; inference, float32, eager, 1 x 64x64: it does not take it" in text
    assert asdict(rows[0])["peak_bytes"] == 2**20


def test_an_inference_form_is_not_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is prepared with the dtype, given images of it, and checked against the model it was made from."""
    given: list[tuple[Any, ...]] = []

    def prepare(model: nn.Module, dtype: torch.dtype) -> nn.Module:
        given.append((type(model).__name__, dtype))
        return model

    served = replace(model_providers.PROVIDERS["dfformer_s18"], prepare=prepare)
    assert not model_providers._takes_part(served, SMALL._replace(task=TRAINING))
    entry = Entry(served, SMALL, "cpu")
    assert given == [("DFFormer", torch.float32)]
    assert entry.error() <= bench_model.DEPTH * BOUND[torch.float32]
