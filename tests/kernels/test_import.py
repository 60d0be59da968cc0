"""What an import costs, what it drags in, and life without the compiled core; each in a process of its own."""

import json
from typing import Any

import pytest
from native_core import run_script

import dfformer_kernels

COST = 0.3  # seconds of processor time that an import may add to that of the library it stands on
UNWANTED = {
    "dfformer_kernels": ["triton", "timm", "torch._dynamo", "dfformer", "dfformer_kernels._C"],
    "dfformer": ["matplotlib", "sklearn", "torch._dynamo", "dfformer_kernels._C"],
}

MEASURE = """
import importlib, json, os, sys, time
import torch

def measure(name, unwanted):
    before = set(sys.modules)
    start = time.process_time()
    importlib.import_module(name)
    return {
        "seconds": time.process_time() - start,
        "dragged_in": sorted(set(unwanted) & (set(sys.modules) - before)),
        "cuda": torch.cuda.is_initialized(),
    }

unwanted = json.loads(os.environ["UNWANTED"])
reports = {"dfformer_kernels": measure("dfformer_kernels", unwanted["dfformer_kernels"])}
import timm
reports["dfformer"] = measure("dfformer", unwanted["dfformer"])
reports["dfformer"]["seconds"] += reports["dfformer_kernels"]["seconds"]  # it imports that too
print(json.dumps(reports))
"""

WITHOUT_CORE = """
import json, sys, warnings
sys.modules["dfformer_kernels._C"] = None
import torch
from dfformer_kernels import backends, dynamic_filter, global_filter, star_relu
reasons = backends()
x = torch.ones(2, 4, 6, 3, requires_grad=True)
scale, bias = torch.ones(1), torch.zeros(1)
logits, basis, weight = torch.zeros(2, 4, 3), torch.ones(4, 4, 4, 2), torch.ones(4, 4, 3, 2)
calls = {
    "star_relu": lambda **kw: star_relu(x, scale, bias, **kw),
    "dynamic_filter": lambda **kw: dynamic_filter(x, logits, basis, (scale, bias), **kw),
    "global_filter": lambda **kw: global_filter(x, weight, **kw),
}
def run(call, **kw):
    y = call(**kw)
    return y, *torch.autograd.grad(y, x, y.detach())
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    results = {name: run(call) for name, call in calls.items()}
equal = {
    name: all(torch.equal(a, b) for a, b in zip(results[name], run(call, backend="torch")))
    for name, call in calls.items()
}
print(json.dumps({"reasons": reasons, "equal": equal, "warnings": [str(w.message) for w in seen]}))
"""


def test_every_exported_name_has_a_docstring() -> None:
    assert [name for name in dfformer_kernels.__all__ if not getattr(dfformer_kernels, name).__doc__] == []


def report_of(script: str, unwanted: str = "") -> Any:
    done = run_script(script, UNWANTED=unwanted)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def reports() -> list[dict[str, dict[str, Any]]]:
    """Of up to three processes: one that took too long may tell how busy the machine was."""
    reports: list[dict[str, dict[str, Any]]] = []
    while len(reports) < 3 and not (reports and all(report["seconds"] < COST for report in reports[-1].values())):
        reports.append(report_of(MEASURE, json.dumps(UNWANTED)))
    return reports


@pytest.mark.parametrize("name", UNWANTED)
def test_import_is_light(reports: list[dict[str, dict[str, Any]]], name: str) -> None:
    assert not any(report[name]["dragged_in"] or report[name]["cuda"] for report in reports)
    assert min(report[name]["seconds"] for report in reports) < COST


def test_everything_works_without_the_compiled_core_and_says_so_once() -> None:
    report = report_of(WITHOUT_CORE)
    (reason,) = report["reasons"]["cpu"]
    assert "the compiled core dfformer_kernels._C cannot be imported" in reason
    assert report["equal"] == {"star_relu": True, "dynamic_filter": True, "global_filter": True}
    (warning,) = report["warnings"]
    assert "'cpu' backend is not available and torch.fft is used instead" in warning
    assert reason in warning
