"""What has not run yet meets a CUDA graph's capture: it says what to do and prepares nothing. Without a GPU."""

import subprocess
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from dfformer_kernels import device
from dfformer_kernels.backend import torch_fft
from dfformer_kernels.problem import KernelBuildError

ADVICE = "call the operator once with the same shapes, dtypes and layouts before capturing"


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Begins or ends a capture; nothing has run before."""
    monkeypatch.setattr(torch_fft, "_ran", device.Prepared())
    return lambda on: monkeypatch.setattr(device, "capturing", lambda: on)


# torch.fft


def dynamic_filter(transposed: bool = False, C: int = 6, backward: bool = False, need_x: bool = True) -> object:
    x, logits, basis = torch.ones(2, 4, 4, C), torch.ones(2, 3, C), torch.ones(4, 3, 3, 2)
    x = x.transpose(1, 2) if transposed else x
    if backward:
        return torch_fft.KERNELS["dynamic_filter_backward"](
            x, x, logits, basis, None, None, [need_x, True, *[False] * 3]
        )
    return torch_fft.KERNELS["dynamic_filter"](x, logits, basis, None, None)


@pytest.mark.parametrize(
    "change", [{}, {"transposed": True}, {"C": 5}, {"backward": True}, {"backward": True, "need_x": False}], ids=str
)
def test_torch_fft_plans_nothing_during_capture(capture: Callable[[bool], None], change: dict[str, Any]) -> None:
    with FakeTensorMode(), torch.device("cuda"):
        capture(False)
        for other in ({}, {"transposed": True}, {"C": 5}, {"backward": True}, {"backward": True, "need_x": False}):
            if other != change:
                dynamic_filter(**other)
        capture(True)
        with pytest.raises(RuntimeError, match=f"dynamic_filter.* on torch.fft has not run yet.*{ADVICE}"):
            dynamic_filter(**change)
        capture(False)
        dynamic_filter(**change)
        capture(True)
        dynamic_filter(**change)


def test_what_failed_has_not_run(capture: Callable[[bool], None]) -> None:
    def fail(x: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("full")

    with FakeTensorMode(), torch.device("cuda"):
        x = torch.ones(3)
        capture(False)
        with pytest.raises(torch.OutOfMemoryError):
            torch_fft.run(fail, "op", x)
        capture(True)
        with pytest.raises(RuntimeError, match=ADVICE):
            torch_fft.run(fail, "op", x)


def test_of_very_many_the_first_are_forgotten(capture: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_MOST_REMEMBERED", 3)
    capture(False)
    prepared = device.Prepared()
    for key in range(4):
        assert prepared.is_new(key, "it")
        prepared.add(key)
    assert [prepared.is_new(key, "it") for key in range(4)] == [True, False, False, False]


# Triton


class Kernel:
    """A Triton kernel that records what is asked of it, and fails in the step named ``failing``."""

    __name__ = "mix_kernel"

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.errors: dict[str, list[Exception]] = {}

    def _step(self, name: str) -> None:
        self.steps.append(name)
        if self.errors.get(name):
            raise self.errors[name].pop()

    def warmup(self, *args: Any, grid: Any, num_warps: int) -> Any:
        self._step("compile")
        return Compiled(self)

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, num_warps: self._step("launch")


class Compiled:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> None:
        self.kernel._step("load")


@pytest.fixture
def launch(capture: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    triton_launch = pytest.importorskip("dfformer_kernels.backend.cufft.triton_launch")
    monkeypatch.setattr(triton_launch, "_prepared", device.Prepared())
    capture(False)
    return lambda kernel, *args: triton_launch._launch(kernel, (1,), *args)


X = torch.zeros(64)
VARIANTS = {
    "alignment": (X[1:], 7),
    "dtype": (X.double(), 7),
    "integer": (X, 8),
    "no tensor": (None, 7),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_triton_variant_is_not_compiled_during_capture(
    launch: Callable[..., None], capture: Callable[[bool], None], variant: str
) -> None:
    kernel = Kernel()
    launch(kernel, X, 7)
    launch(kernel, X, 7)
    assert kernel.steps == ["compile", "load", "launch", "launch"]
    capture(True)
    launch(kernel, X, 7)
    with pytest.raises(RuntimeError, match=f"a variant of the Triton kernel mix_kernel has not run yet.*{ADVICE}"):
        launch(kernel, *VARIANTS[variant])
    assert kernel.steps[4:] == ["launch"]


@pytest.mark.parametrize("step", ["compile", "load"])
@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("PassManager::run failed"),
        RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
        subprocess.CalledProcessError(1, "gcc"),
        FileNotFoundError("ptxas"),
        "OutOfResources",
    ],
    ids=repr,
)
def test_what_cannot_be_compiled_or_loaded_is_told_from_other_errors(
    launch: Callable[..., None], step: str, error: Any
) -> None:
    if error == "OutOfResources":
        error = pytest.importorskip("triton").OutOfResources(300_000, 232_448, "shared memory")
    kernel = Kernel()
    kernel.errors[step] = [error]
    with pytest.raises(KernelBuildError, match=f"Triton's mix_kernel: {type(error).__name__}: "):
        launch(kernel, X, 7)
    launch(kernel, X, 7)
    assert kernel.steps[-3:] == ["compile", "load", "launch"]


@pytest.mark.parametrize("step", ["compile", "load", "launch"])
def test_an_earlier_kernels_error_is_the_callers(launch: Callable[..., None], step: str) -> None:
    kernel = Kernel()
    kernel.errors[step] = [RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")]
    with pytest.raises(RuntimeError, match="illegal memory access") as info:
        launch(kernel, X, 7)
    assert type(info.value) is RuntimeError


def test_memory_that_torch_holds_is_released_for_triton(
    launch: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    released: list[int] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: released.append(1))
    full = RuntimeError("Triton Error [CUDA]: out of memory")
    kernel = Kernel()
    kernel.errors["load"] = [full]
    launch(kernel, X, 7)
    assert kernel.steps == ["compile", "load", "load", "launch"]
    kernel.errors["load"] = [full, full]
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        launch(kernel, X, 8)
    assert len(released) == 2
