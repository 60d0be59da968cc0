"""Which backend a GPU's problems run on, without a GPU: fake kernels advance the only clock that measures them."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dfformer_kernels import device, dispatch
from dfformer_kernels.autotune import Autotuner, Gpu
from dfformer_kernels.dispatch import Backend
from dfformer_kernels.problem import KernelBuildError, Problem
from dfformer_kernels.warn_once import warn_once

PROBLEM = Problem("dynamic_filter", "cuda", torch.float32, (8, 14, 14, 640), 4, True)
SPEEDS: dict[str, float | Exception] = {"cuda": 2.0, "cufft": 1.0, "torch": 3.0}  # seconds a call


class FakeGpu(Gpu):
    """Kernels that do nothing but take time, or fail."""

    def __init__(self) -> None:
        self.speeds = dict(SPEEDS)
        self.clock, self.calls, self.measured = 0.0, list[str](), list[str]()
        self.model = "H100"

    def name(self, device: int) -> str:
        return self.model

    def seconds(self, call: Callable[[], object], device: int) -> float:
        start = self.clock
        call()
        self.measured.append(self.calls.pop())
        return self.clock - start

    def backend(self, name: str) -> Backend:
        def kernel(*args: object) -> tuple[object, ...]:
            speed = self.speeds[name]
            if isinstance(speed, Exception):
                raise speed
            self.calls.append(name)
            self.clock += speed
            return (name, *args)

        kernels = dict.fromkeys(("dynamic_filter", "dynamic_filter_backward", "star_relu"), kernel)
        return Backend(name, "cuda", kernels, list)


def restart(gpu: FakeGpu) -> None:
    """As a new process begins."""
    dispatch.autotuner = Autotuner(gpu)
    dispatch._build_errors.clear()
    dispatch.select.cache_clear()
    warn_once.cache_clear()


def run(problem: Problem = PROBLEM) -> Any:
    """What the dispatcher does for a problem on a GPU."""
    return dispatch._run_on_gpu(problem, "argument")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    """A table of fake backends."""
    monkeypatch.delenv("DFFORMER_AUTOTUNE", raising=False)
    gpu = FakeGpu()
    table = tuple(gpu.backend(name) for name in SPEEDS)
    monkeypatch.setattr(dispatch, "TABLE", table)
    monkeypatch.setattr(dispatch, "_BY_NAME", {entry.name: entry for entry in table})
    monkeypatch.setattr(dispatch, "autotuner", dispatch.autotuner)  # for the end
    restart(gpu)
    yield gpu
    restart(gpu)


@pytest.fixture
def tuned(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    """The same, with autotuning asked for."""
    monkeypatch.setenv("DFFORMER_AUTOTUNE", "1")
    return gpu


# Without autotuning


@pytest.mark.parametrize("value", [None, "", "0"])
def test_by_default_the_tables_first_runs_and_nothing_is_measured(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    if value is not None:
        monkeypatch.setenv("DFFORMER_AUTOTUNE", value)
    assert dispatch.select(PROBLEM) is dispatch.TABLE[0]
    assert run() == ("cuda", "argument")
    assert (gpu.calls, gpu.measured) == (["cuda"], [])


def test_another_value_of_the_variable_is_an_error(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DFFORMER_AUTOTUNE", "yes")
    with pytest.raises(ValueError, match="DFFORMER_AUTOTUNE: expected '0' or '1', got 'yes'"):
        run()


BUILD_ERROR = KernelBuildError("ptxas is unhappy")
OTHER_ERRORS = [
    RuntimeError("cuLaunchKernel returned CUDA_ERROR_ILLEGAL_ADDRESS"),
    torch.OutOfMemoryError("full"),
    OSError("no such library"),
    ValueError("a bad argument"),
]


@pytest.mark.parametrize("autotune", [False, True], ids=["table", "autotune"])
def test_a_kernel_that_cannot_be_built_makes_way_with_one_warning(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, autotune: bool
) -> None:
    """Warnings are errors in this test run, so a second one would raise."""
    if autotune:
        monkeypatch.setenv("DFFORMER_AUTOTUNE", "1")
    gpu.speeds["cuda"] = BUILD_ERROR
    with pytest.warns(UserWarning, match="'cuda' backend cannot build its kernel .* ptxas is unhappy"):
        assert run()[0] == "cufft"
    gpu.speeds["cuda"] = 0.1  # it is not tried again, whatever the batch size
    for B in (8, 1, 100):
        assert run(PROBLEM._replace(shape=(B, 14, 14, 640)))[0] == "cufft"
    assert run(PROBLEM._replace(filters=2))[0] == "cuda"


@pytest.mark.parametrize("autotune", [False, True], ids=["table", "autotune"])
@pytest.mark.parametrize("error", OTHER_ERRORS, ids=repr)
def test_any_other_error_is_the_callers(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, error: Exception, autotune: bool
) -> None:
    if autotune:
        monkeypatch.setenv("DFFORMER_AUTOTUNE", "1")
        gpu.speeds["torch"] = gpu.speeds["cufft"] = 100.0
        run()
    gpu.speeds["cuda"] = error
    with pytest.raises(type(error)) as info:
        run()
    assert info.value is error
    gpu.speeds["cuda"] = 2.0
    assert run()[0] == "cuda"


def test_a_named_backend_that_cannot_build_its_kernel_raises_every_time(gpu: FakeGpu) -> None:
    gpu.speeds["cuda"] = BUILD_ERROR
    with pytest.warns(UserWarning, match="cannot build"):
        run()
    kernel = dispatch.select(PROBLEM, "cuda").kernels[PROBLEM.op]
    for _ in range(2):
        with pytest.raises(KernelBuildError, match="ptxas is unhappy"):
            kernel()
    gpu.speeds["cuda"] = 2.0
    assert kernel()[0] == "cuda"


@pytest.mark.parametrize("autotune", [False, True], ids=["table", "autotune"])
def test_where_no_kernel_can_be_built_every_reason_is_raised(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, autotune: bool
) -> None:
    if autotune:
        monkeypatch.setenv("DFFORMER_AUTOTUNE", "1")
    gpu.speeds = {name: KernelBuildError(f"{name} is broken") for name in SPEEDS}
    with pytest.warns(UserWarning, match="cannot build") as seen, pytest.raises(RuntimeError) as info:
        run()
    assert len(seen) == len(SPEEDS)
    for name in SPEEDS:
        assert f"{name}: {name} is broken" in str(info.value)


# With autotuning


def test_the_fastest_is_measured_once_and_runs_from_then_on(tuned: FakeGpu) -> None:
    assert dispatch.autotuner.choice(PROBLEM) is None
    assert run() == ("cufft", "argument")
    assert tuned.measured == ["cuda", "cufft", "torch"]
    assert dispatch.autotuner.choice(PROBLEM) == dispatch.TABLE[1].name
    run()
    assert tuned.calls == ["cufft", "cufft"]
    assert tuned.measured == ["cuda", "cufft", "torch"]


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
        ({"device_index": 1}, "A100", True),
    ],
)
def test_a_winner_is_of_a_class_of_problems(
    tuned: FakeGpu, change: dict[str, Any], model: str, measured_again: bool
) -> None:
    run()
    tuned.measured.clear()
    tuned.model = model
    assert run(PROBLEM._replace(**change))[0] == "cufft"
    assert bool(tuned.measured) == measured_again


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (2, 3, 4, 5, 6)])
def test_star_relu_takes_any_shape(tuned: FakeGpu, shape: tuple[int, ...]) -> None:
    assert run(PROBLEM._replace(op="star_relu", shape=shape))[0] == "cufft"


def test_every_process_measures_again(tuned: FakeGpu, folder: Path) -> None:
    run()
    tuned.speeds["cuda"] = 0.5
    restart(tuned)
    assert run()[0] == "cuda"
    assert list(folder.iterdir()) == []


def test_a_winner_whose_kernel_cannot_be_built_is_measured_no_more(tuned: FakeGpu) -> None:
    run()
    tuned.speeds["cufft"] = BUILD_ERROR
    with pytest.warns(UserWarning, match="'cufft' backend cannot build its kernel"):
        assert run()[0] == "cuda"
    assert run()[0] == "cuda"
    assert tuned.measured == ["cuda", "cufft", "torch", "cuda", "torch"]


def test_memory_that_runs_out_in_a_measurement_is_no_time(tuned: FakeGpu) -> None:
    tuned.speeds["cufft"] = torch.OutOfMemoryError("full")
    assert run()[0] == "cuda"


def test_memory_that_runs_out_in_every_measurement_is_the_callers_and_nothing_is_remembered(tuned: FakeGpu) -> None:
    tuned.speeds = {name: torch.OutOfMemoryError("full") for name in SPEEDS}
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        run()
    tuned.speeds = dict(SPEEDS)
    assert run()[0] == "cufft"


def test_any_other_error_of_a_measurement_is_the_callers(tuned: FakeGpu) -> None:
    tuned.speeds["cufft"] = RuntimeError("an illegal access")
    with pytest.raises(RuntimeError, match="an illegal access"):
        run()


@pytest.mark.parametrize("remembered", [False, True])
def test_nothing_is_measured_while_a_graph_is_captured(
    tuned: FakeGpu, monkeypatch: pytest.MonkeyPatch, remembered: bool
) -> None:
    """Not even by a winner of its class, which has yet to prepare itself."""
    if remembered:
        run(PROBLEM._replace(shape=(5, 14, 14, 640)))
        tuned.calls.clear()
    monkeypatch.setattr(device, "capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"dynamic_filter on \(8, 14, 14, 640\).* call the operator once .* before"):
        run()
    assert tuned.calls == []
    monkeypatch.setattr(device, "capturing", lambda: False)
    run()
    monkeypatch.setattr(device, "capturing", lambda: True)
    assert run()[0] == "cufft"


def test_threads_that_ask_at_once_measure_once(tuned: FakeGpu) -> None:
    results: list[str] = []
    barrier = threading.Barrier(8)

    def ask() -> None:
        barrier.wait()
        results.append(run()[0])

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == 8 * ["cufft"]
    assert tuned.measured == ["cuda", "cufft", "torch"]


@pytest.mark.parametrize(("backend", "chosen"), [(None, "cufft"), ("torch", "torch")])
def test_the_dispatcher_measures_on_a_gpu_unless_a_backend_is_named(
    tuned: FakeGpu, backend: str | None, chosen: str
) -> None:
    x = SimpleNamespace(device=torch.device("cuda", 1), dtype=torch.float32, shape=(2, 4, 4, 3))
    tensors: list[Any] = [x, torch.zeros(2, 5, 3), torch.zeros(4, 3, 5, 2), None, None]
    assert Problem.of("dynamic_filter", tensors) == Problem(
        "dynamic_filter", "cuda", torch.float32, (2, 4, 4, 3), filters=5, star_relu=False, device_index=1
    )
    assert dispatch.kernel_for("dynamic_filter", backend, tensors)()[0] == chosen
    assert bool(tuned.measured) == (backend is None)


@pytest.mark.gpu
def test_a_gpu_is_measured() -> None:
    gpu = Gpu()
    x = torch.ones(1 << 24, device="cuda")
    gpu = Gpu()
    assert 0 < gpu.seconds(lambda: x[:1024] + 1, 0) < gpu.seconds(lambda: [x + 1 for _ in range(20)], 0) < 1
    assert gpu.name(0)
