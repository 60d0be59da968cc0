"""Which backend a GPU's problems run on: measured with a clock that only fake kernels advance, so without a GPU."""

import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dfformer_kernels import autotune, dispatch
from dfformer_kernels import disk_cache as cache
from dfformer_kernels.autotune import Autotuner, Gpu
from dfformer_kernels.dispatch import Backend, Problem

PROBLEM = Problem("dynamic_filter", "cuda", torch.float32, (8, 14, 14, 640), 4, True)
SPEEDS: dict[str, float | Exception] = {"cuda": 2.0, "cufft": 1.0, "torch": 3.0}  # seconds a call


class FakeGpu(Gpu):
    """Kernels that do nothing but take time, or fail."""

    def __init__(self, **speeds: float | Exception) -> None:
        self.speeds = SPEEDS | speeds
        self.clock, self.calls, self.measured = 0.0, list[str](), list[str]()
        self.in_capture, self.model, self.installed = False, "H100", "1.0"

    def name(self, device: int) -> str:
        return self.model

    def capturing(self) -> bool:
        return self.in_capture

    def seconds(self, call: Callable[[], object], device: int) -> float:
        assert not self.in_capture
        start = self.clock
        call()
        self.measured.append(self.calls.pop())
        return self.clock - start

    def versions(self) -> dict[str, str]:
        return {"torch": self.installed}

    def backend(self, name: str, prepared: bool = False) -> Backend:
        def kernel(*args: object) -> tuple[object, ...]:
            self.calls.append(name)
            speed = self.speeds[name]
            if isinstance(speed, Exception):
                self.calls.pop()
                raise speed
            self.clock += speed
            return (name, *args)

        kernels = dict.fromkeys(("dynamic_filter", "dynamic_filter_backward", "star_relu"), kernel)
        return Backend(name, "cuda", kernels, list, prepared=lambda problem: prepared)

    def run(self, tuner: Autotuner, problem: Problem = PROBLEM, prepared: Sequence[str] = ("torch",)) -> Any:
        table = tuple(self.backend(name, name in prepared) for name in SPEEDS)
        return tuner.kernel(problem, lambda problem: table)("argument")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where winners are kept; nothing warned about yet."""
    monkeypatch.setenv("DFFORMER_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("DFFORMER_AUTOTUNE", raising=False)
    for warn in (autotune._warn_dropped, autotune._warn_corrupted, cache._warn_unwritable):
        warn.cache_clear()
    return tmp_path


def test_the_fastest_is_measured_once_and_runs_from_then_on() -> None:
    gpu = FakeGpu()
    tuner = Autotuner(gpu)
    assert tuner.choice(PROBLEM) is None
    assert gpu.run(tuner) == ("cufft", "argument")
    assert gpu.measured == ["cuda", "cufft", "torch"]
    choice = tuner.choice(PROBLEM)
    assert choice is not None
    assert choice.name == "cufft"
    gpu.run(tuner)
    assert gpu.calls == ["cufft", "cufft"]
    assert gpu.measured == ["cuda", "cufft", "torch"]


@pytest.mark.parametrize(
    ("change", "model", "measured_again"),
    [
        ({"shape": (5, 14, 14, 640)}, "H100", False),
        ({"device_index": 1}, "H100", False),
        ({"shape": (4, 14, 14, 640)}, "H100", True),
        ({"shape": (9, 14, 14, 640)}, "H100", True),
        ({"shape": (8, 7, 28, 640)}, "H100", True),
        ({"shape": (8, 14, 14, 320)}, "H100", True),
        ({"filters": 2}, "H100", True),
        ({"star_relu": False}, "H100", True),
        ({"dtype": torch.bfloat16}, "H100", True),
        ({"op": "dynamic_filter_backward"}, "H100", True),
        ({}, "A100", True),
    ],
)
def test_a_winner_is_of_a_class_of_problems(change: dict[str, Any], model: str, measured_again: bool) -> None:
    gpu = FakeGpu()
    gpu.run(Autotuner(gpu))
    gpu.measured.clear()
    gpu.model = model
    assert gpu.run(Autotuner(gpu), PROBLEM._replace(**change))[0] == "cufft"
    assert bool(gpu.measured) == measured_again


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (2, 3, 4, 5, 6)])
def test_star_relu_takes_any_shape(shape: tuple[int, ...]) -> None:
    gpu = FakeGpu()
    assert gpu.run(Autotuner(gpu), PROBLEM._replace(op="star_relu", shape=shape))[0] == "cufft"


def test_winners_outlive_the_process_with_the_versions_they_were_measured_with(folder: Path) -> None:
    gpu = FakeGpu()
    gpu.run(Autotuner(gpu))
    (file,) = folder.iterdir()
    assert json.loads(file.read_text()) == {
        "versions": {"torch": "1.0"},
        "winners": {"H100, dynamic_filter, 8x14x14x640, F=4, float32, star_relu": "cufft"},
    }
    gpu.installed, gpu.speeds = "2.0", {"cuda": 0.5, "cufft": 1.0, "torch": 3.0}
    assert gpu.run(Autotuner(gpu))[0] == "cuda"
    gpu.installed = "1.0"
    assert gpu.run(Autotuner(gpu))[0] == "cufft"
    assert gpu.measured == 2 * ["cuda", "cufft", "torch"]


def test_processes_add_to_each_others_winners() -> None:
    gpu, other = FakeGpu(), PROBLEM._replace(filters=2)
    first, second = Autotuner(gpu), Autotuner(gpu)
    for tuner, problem in ((first, PROBLEM), (second, PROBLEM._replace(filters=1)), (first, other)):
        gpu.run(tuner, problem)
    gpu.measured.clear()
    for problem in (PROBLEM, PROBLEM._replace(filters=1), other):
        gpu.run(Autotuner(gpu), problem)
    assert gpu.measured == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"versions": {"torch"',
        b"\xff\xfe",
        b"[]",
        b"{}",
        b'{"versions": {"torch": "0.9"}, "winners": {}}',
        b'{"versions": {"torch": "1.0"}, "winners": [1]}',
        b'{"versions": {"torch": "1.0"}, "winners": {"a": 1}}',
    ],
)
def test_a_corrupted_file_is_ignored_with_a_warning_and_replaced(folder: Path, content: bytes) -> None:
    """Warnings are errors in this test run, so a second one would raise."""
    gpu = FakeGpu()
    gpu.run(Autotuner(gpu))
    (file,) = folder.iterdir()
    good = file.read_bytes()
    file.write_bytes(content)
    with pytest.warns(UserWarning, match=f"ignores {file}"):
        assert gpu.run(Autotuner(gpu))[0] == "cufft"
    assert file.read_bytes() == good


def test_a_folder_that_cannot_be_written_is_one_warning(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "file").touch()
    monkeypatch.setenv("DFFORMER_CACHE_DIR", str(folder / "file" / "inside"))
    gpu = FakeGpu()
    tuner = Autotuner(gpu)
    with pytest.warns(UserWarning, match="cannot keep files in .*inside"):
        assert gpu.run(tuner)[0] == "cufft"
    assert gpu.run(tuner, PROBLEM._replace(filters=2))[0] == "cufft"


def test_a_winner_nobody_knows_any_more_is_measured_again(folder: Path) -> None:
    gpu = FakeGpu()
    gpu.run(Autotuner(gpu))
    (file,) = folder.iterdir()
    file.write_text(file.read_text().replace('"cufft"', '"abandoned"'))
    assert gpu.run(Autotuner(gpu))[0] == "cufft"
    assert gpu.measured == 2 * ["cuda", "cufft", "torch"]


def test_without_measuring_the_tables_first_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu()
    tuner = Autotuner(gpu)
    gpu.run(tuner)
    monkeypatch.setenv("DFFORMER_AUTOTUNE", "0")
    assert gpu.run(tuner)[0] == "cuda"
    assert gpu.run(tuner)[0] == "cuda"
    monkeypatch.delenv("DFFORMER_AUTOTUNE")
    assert gpu.run(tuner)[0] == "cufft"
    assert gpu.measured == ["cuda", "cufft", "torch"]


@pytest.mark.parametrize("static", [False, True], ids=["measured", "static"])
def test_a_backend_that_fails_is_dropped_with_one_warning(monkeypatch: pytest.MonkeyPatch, static: bool) -> None:
    """Warnings are errors in this test run, so a second one would raise."""
    if static:
        monkeypatch.setenv("DFFORMER_AUTOTUNE", "0")
    gpu = FakeGpu(cuda=RuntimeError("ptxas is unhappy"))
    tuner = Autotuner(gpu)
    with pytest.warns(UserWarning, match="'cuda' backend failed .* RuntimeError: ptxas is unhappy"):
        assert gpu.run(tuner)[0] == "cufft"
    gpu.speeds["cuda"] = 0.1
    for B in (8, 7):  # of one class, in which it is not tried again
        assert gpu.run(tuner, PROBLEM._replace(shape=(B, 14, 14, 640)))[0] == "cufft"
    assert "cuda" not in gpu.calls + gpu.measured
    assert gpu.run(tuner, PROBLEM._replace(filters=2))[0] == "cuda"


def test_a_remembered_winner_that_fails_is_dropped() -> None:
    gpu = FakeGpu()
    gpu.run(Autotuner(gpu))
    gpu.speeds["cufft"] = OSError("no such library")
    tuner = Autotuner(gpu)
    with pytest.warns(UserWarning, match="'cufft' backend failed .* OSError: no such library"):
        assert gpu.run(tuner)[0] == "cuda"
    assert gpu.run(tuner)[0] == "cuda"


def test_where_all_fail_the_last_ones_error_is_raised() -> None:
    gpu = FakeGpu(cuda=RuntimeError("1"), cufft=RuntimeError("2"), torch=ZeroDivisionError("3"))
    tuner = Autotuner(gpu)
    with pytest.warns(UserWarning, match="failed") as seen, pytest.raises(ZeroDivisionError, match="3"):
        gpu.run(tuner)
    reasons = [str(warning.message).split(": ", 1)[1] for warning in seen]
    assert reasons == ["RuntimeError: 1", "RuntimeError: 2", "ZeroDivisionError: 3"]


def test_memory_that_ran_out_is_no_failure() -> None:
    """While measuring, it is not chosen; afterwards, it is the caller's. Warnings are errors in this test run."""
    gpu = FakeGpu(cufft=torch.OutOfMemoryError("full"))
    tuner = Autotuner(gpu)
    assert gpu.run(tuner)[0] == "cuda"
    gpu.speeds["cuda"] = torch.OutOfMemoryError("full")
    with pytest.raises(torch.OutOfMemoryError):
        gpu.run(tuner, PROBLEM._replace(shape=(7, 14, 14, 640)))
    gpu.speeds["cuda"] = 2.0
    assert gpu.run(tuner, PROBLEM._replace(shape=(7, 14, 14, 640)))[0] == "cuda"


@pytest.mark.parametrize(
    ("before", "prepared", "expected"),
    [
        (PROBLEM, (), "cufft"),  # it ran, so it is prepared whatever it says
        (PROBLEM._replace(shape=(7, 14, 14, 640)), ("cuda", "cufft", "torch"), "cufft"),  # the class's winner
        (PROBLEM._replace(shape=(7, 14, 14, 640)), ("cuda", "torch"), "cuda"),
        (None, ("cuda", "cufft", "torch"), "cuda"),
        (None, ("torch",), "torch"),
    ],
)
def test_nothing_is_measured_or_prepared_while_a_graph_is_captured(
    before: Problem | None, prepared: tuple[str, ...], expected: str
) -> None:
    gpu = FakeGpu()
    tuner = Autotuner(gpu)
    if before is not None:
        gpu.run(tuner, before, prepared)
    gpu.calls.clear()
    gpu.measured.clear()
    gpu.in_capture = True
    assert gpu.run(tuner, PROBLEM, prepared)[0] == expected
    assert gpu.calls == [expected]
    assert gpu.measured == []
    gpu.in_capture = False  # what a capture had to take is not remembered
    assert gpu.run(tuner, PROBLEM, prepared)[0] == "cufft"


def test_a_capture_without_anything_prepared_says_what_to_do() -> None:
    gpu = FakeGpu()
    gpu.in_capture = True
    with pytest.raises(RuntimeError, match=r"call the operator once before capturing .* cuda, cufft, torch"):
        gpu.run(Autotuner(gpu), prepared=())


def test_threads_that_ask_at_once_measure_once() -> None:
    gpu = FakeGpu()
    tuner = Autotuner(gpu)
    results: list[str] = []
    barrier = threading.Barrier(8)

    def ask() -> None:
        barrier.wait()
        results.append(gpu.run(tuner)[0])

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == 8 * ["cufft"]
    assert gpu.measured == ["cuda", "cufft", "torch"]


@pytest.mark.parametrize(("backend", "chosen"), [(None, "cufft"), ("torch", "torch")])
def test_the_dispatcher_measures_on_a_gpu_unless_a_backend_is_named(
    monkeypatch: pytest.MonkeyPatch, backend: str | None, chosen: str
) -> None:
    gpu = FakeGpu()
    table = tuple(gpu.backend(name) for name in SPEEDS)
    monkeypatch.setattr(dispatch, "TABLE", table)
    monkeypatch.setattr(dispatch, "_BY_NAME", {entry.name: entry for entry in table})
    monkeypatch.setattr(dispatch, "autotuner", Autotuner(gpu))
    dispatch.select.cache_clear()
    x = SimpleNamespace(device=torch.device("cuda", 1), dtype=torch.float32, shape=(2, 4, 4, 3))
    tensors: list[Any] = [x, torch.zeros(2, 5, 3), torch.zeros(4, 3, 5, 2), None, None]
    assert Problem.of("dynamic_filter", tensors) == Problem(
        "dynamic_filter", "cuda", torch.float32, (2, 4, 4, 3), filters=5, star_relu=False, device_index=1
    )
    assert dispatch.kernel_for("dynamic_filter", backend, tensors)()[0] == chosen
    assert bool(gpu.measured) == (backend is None)
    dispatch.select.cache_clear()


@pytest.mark.gpu
def test_a_gpu_is_measured() -> None:
    x = torch.ones(1 << 24, device="cuda")
    gpu = Gpu()
    assert 0 < gpu.seconds(lambda: x[:1024] + 1, 0) < gpu.seconds(lambda: [x + 1 for _ in range(20)], 0) < 1
    assert gpu.name(0)
    assert not gpu.capturing()
