"""``dfformer doctor``: what it checks, reports, and survives."""

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dfformer.cli import doctor
from dfformer.cli.main import main
from dfformer_kernels import dispatch
from dfformer_kernels.problem import Problem
from dfformer_kernels.tolerance import BOUND

SHAPE = "1x4x4x3"


class Here(doctor.Worker):
    """Runs everything in this process, where a test's patches are."""

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "DEVICES", {"cpu": doctor.DEVICES["cpu"]})


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "Worker", Here)
    monkeypatch.setattr(doctor, "QUICK_SHAPES", [(1, 4, 4, 3)])


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Sets the backends there are."""

    def only(*backends: dispatch.Backend) -> None:
        monkeypatch.setattr(dispatch, "TABLE", backends)
        monkeypatch.setattr(dispatch, "_BY_NAME", {backend.name: backend for backend in backends})
        dispatch.select.cache_clear()

    yield only
    monkeypatch.undo()
    dispatch.select.cache_clear()


def failing(name: str, kernel: Callable[..., Any]) -> dispatch.Backend:
    """The torch backend with another global filter."""
    return dispatch.Backend(name, None, {**dispatch.by_name("torch").kernels, "global_filter": kernel}, list)


def test_every_backend_passes_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a process of its own, on every quick shape."""
    report = tmp_path / "new" / "doctor.json"
    assert main(["doctor", "--quick", "--json", str(report)]) == 0
    content, printed = json.loads(report.read_text()), capsys.readouterr().out
    here = [b.name for b in dispatch.TABLE if b.device in (None, "cpu") and not b.unavailable_reasons()]
    assert content["passed"]
    assert content["environment"]["torch"] == torch.__version__
    assert content["unavailable"].keys() == {b.name for b in dispatch.TABLE} - set(here)
    assert len(content["checks"]) == len(here) * len(doctor.QUICK_SHAPES) * 2 * 3
    assert {c["backend"] for c in content["checks"] if c["default"]} == {here[0]}
    bounds = {str(dtype).removeprefix("torch."): bound for dtype, bound in BOUND.items()}
    assert all(0 < max(c["error_y"], c["error_grad"]) <= bounds[c["dtype"]] for c in content["checks"])
    assert f"{len(content['checks'])} of {len(content['checks'])} checks passed" == printed.splitlines()[-1]


@pytest.mark.usefixtures("here")
def test_a_wrong_kernel_fails(table: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    right = dispatch.by_name("torch").kernels["global_filter"]
    # Right in float64, where the reference is, and off by 1e-4 in what is checked.
    wrong = failing("torch", lambda x, *args: right(x, *args) * (1 if x.dtype == torch.float64 else 1.0001))
    table(wrong)
    assert main(["doctor", "--quick"]) == 1
    printed = capsys.readouterr().out
    [failed] = [line for line in printed.splitlines() if "FAILED: the bound" in line]
    assert failed.split()[:5] == ["torch", "cpu", "global_filter", "float32", SHAPE]
    assert "5 of 6 checks passed, 1 FAILED" in printed.splitlines()[-1]


@pytest.mark.usefixtures("here")
def test_an_error_is_reported_and_the_rest_goes_on(
    table: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def crash(*args: Any) -> None:
        raise RuntimeError("an illegal memory access\nof this thread")

    table(failing("broken", crash), dispatch.by_name("torch"))
    report = tmp_path / "doctor.json"
    assert main(["doctor", "--quick", "--json", str(report)]) == 1
    lines = capsys.readouterr().out.splitlines()
    failed = [line.split()[:3] for line in lines if "FAILED: RuntimeError: an illegal memory access" in line]
    assert failed == 2 * [["broken", "cpu", "global_filter"]]
    assert lines[-1] == "10 of 12 checks passed, 2 FAILED"
    content = json.loads(report.read_text())
    assert not content["passed"]
    assert {c["failure"] for c in content["checks"]} == {"", "RuntimeError: an illegal memory access\nof this thread"}


@pytest.mark.usefixtures("here")
def test_all_dtypes_of_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The CPU examined as if it were a GPU."""
    monkeypatch.setattr(doctor, "DEVICES", {"cpu": (tuple(BOUND), 1)})
    monkeypatch.setattr(doctor, "PLANES", [(6, 5, 3)] * 3)
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    here = [b.name for b in dispatch.TABLE if b.device in (None, "cpu") and not b.unavailable_reasons()]
    assert lines[-1] == f"{len(here) * 4 * 4 * 3} of {len(here) * 4 * 4 * 3} checks passed"


class Killer:
    """Unpickling it kills the process."""

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return os.abort, ()


def test_a_process_that_crashes_and_one_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem("star_relu", "cpu", torch.float32, (1, 4, 4, 3), 0, True)
    with doctor.Worker() as worker:
        with pytest.raises(doctor.WorkerError, match="its process crashed"):
            worker.run(doctor.check_backend, Killer(), problem)
        monkeypatch.setattr(doctor, "LIMIT_S", 0.5)
        with pytest.raises(doctor.WorkerError, match=r"it hangs: no result after 0\.5 s"):
            worker.run(time.sleep, 1000)
        monkeypatch.undo()
        assert worker.run(os.getpid) != os.getpid()
        checked = worker.run(doctor.check_backend, "torch", problem)
    assert checked[2] == ""
    assert checked[0] <= 1e-6


def test_a_lost_process_is_a_failed_check() -> None:
    class Lost(Here):
        def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            raise doctor.WorkerError("it hangs")

    problem = Problem("star_relu", "cpu", torch.float32, (1, 4, 4, 3), 0, True)
    check = doctor._isolated_check(Lost(), "torch", problem)
    assert (check.failure, check.shape) == ("it hangs", SHAPE)


def test_a_report_that_cannot_be_written_is_refused_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--quick", "--json", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == f"dfformer doctor: expected the name of a file, got the folder {tmp_path}\n"
