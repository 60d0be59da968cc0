"""How kernels are compiled, kept, loaded and launched, without a GPU; which errors lead to another backend."""

import ctypes
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_cuda import FakeDriver, Result

from dfformer_kernels.backend.cuda import nvrtc
from dfformer_kernels.backend.cuda.layout import CHIPS
from dfformer_kernels.problem import KernelBuildError

TINY = {"tiny.cu": '#include "tiny.h"\nextern "C" __global__ void tiny(float* x) { *x = VALUE + OFFSET; }'}
TINY["tiny.h"] = "#define OFFSET 1"


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Targets of what is compiled."""
    targets: list[str] = []
    real = nvrtc.compile_cubin

    def counted(*args: Any) -> tuple[bytes, str]:
        targets.append(args[2])
        return real(*args)

    monkeypatch.setattr(nvrtc, "compile_cubin", counted)
    return targets


# Compiling


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("arch", CHIPS)
def test_compiles_for_a_chip_that_is_not_there(arch: str) -> None:
    cubin, log = nvrtc.compile_cubin(TINY, ["-DVALUE=2", "--ptxas-options=-v"], arch)
    assert cubin.startswith(b"\x7fELF")
    assert f"'tiny' for '{arch}'" in log


@pytest.mark.usefixtures("compiler")
def test_an_empty_log_overwrites_no_shared_bytes() -> None:
    assert nvrtc.compile_cubin(TINY, ["-DVALUE=2"], "sm_90")[1] == ""
    assert [bytes([value])[0] for value in range(256)] == list(range(256))


@pytest.mark.usefixtures("compiler")
def test_a_mistake_raises_with_the_compilers_log() -> None:
    with pytest.raises(
        KernelBuildError, match=r"(?s)NVRTC_ERROR_COMPILATION for tiny\.cu on sm_90:\ntiny\.cu.*\"VALUE\" is undefined"
    ):
        nvrtc.compile_cubin(TINY, [], "sm_90")
    with pytest.raises(
        KernelBuildError, match=r"NVRTC_ERROR_INVALID_OPTION for tiny\.cu on sm_1:\n.*--gpu-architecture"
    ):
        nvrtc.compile_cubin(TINY, ["-DVALUE=2"], "sm_1")


def test_missing_bindings_are_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise ModuleNotFoundError("No module named 'cuda'")

    monkeypatch.setattr(nvrtc, "_nvrtc", missing)
    nvrtc.unavailable_reasons.cache_clear()
    (reason,) = nvrtc.unavailable_reasons()
    nvrtc.unavailable_reasons.cache_clear()
    assert reason == (
        "NVRTC cannot be reached through cuda-bindings (No module named 'cuda'); pip install cuda-bindings"
    )


# Keeping what was compiled


@pytest.mark.usefixtures("compiler")
def test_a_cubin_is_compiled_once_for_all_it_depends_on(
    folder: Path, compilations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    two = nvrtc.cached_cubin(TINY, ["-DVALUE=2"], "sm_90")
    assert nvrtc.cached_cubin(TINY, ["-DVALUE=2"], "sm_90") == two
    assert len(compilations) == 1
    header = TINY | {"tiny.h": "#define OFFSET 2"}
    for sources, options, arch in (
        (TINY, ["-DVALUE=3"], "sm_90"),
        (TINY, ["-DVALUE=2"], "sm_80"),
        (header, ["-DVALUE=2"], "sm_90"),
    ):
        assert nvrtc.cached_cubin(sources, options, arch) != two
    assert len(compilations) == 4
    monkeypatch.setattr(nvrtc, "version", lambda: (99, 0))
    nvrtc.cached_cubin(TINY, ["-DVALUE=2"], "sm_90")
    assert len(compilations) == len(list(folder.iterdir())) == 5


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    "damage",
    [lambda data: b"", lambda data: data[:20], lambda data: data[:-1], lambda data: data[:-1] + b"\xff"],
    ids=["empty", "short", "truncated", "flipped"],
)
def test_a_damaged_cubin_is_compiled_again(
    folder: Path, compilations: list[str], damage: Callable[[bytes], bytes]
) -> None:
    cubin = nvrtc.cached_cubin(TINY, ["-DVALUE=2"], "sm_90")
    (file,) = folder.iterdir()
    good = file.read_bytes()
    file.write_bytes(damage(good))
    assert nvrtc.cached_cubin(TINY, ["-DVALUE=2"], "sm_90") == cubin
    assert file.read_bytes() == good
    assert len(compilations) == 2


@pytest.mark.usefixtures("compiler", "folder")
def test_compiling_is_told_once(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    nvrtc._announce.cache_clear()
    for value in (2, 3):
        nvrtc.cached_cubin(TINY, [f"-DVALUE={value}"], "sm_90")
    (record,) = caplog.records
    assert "compiles CUDA kernels" in record.message
    assert str(tmp_path) in record.message


@pytest.mark.usefixtures("compiler", "folder")
def test_a_folder_that_cannot_be_written_is_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Warnings are errors in this test run, so a second one would raise."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("DFFORMER_CACHE_DIR", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot keep files in .*file"):
        assert nvrtc.cached_cubin(TINY, ["-DVALUE=2"], "sm_90")
    assert nvrtc.cached_cubin(TINY, ["-DVALUE=3"], "sm_90")


@pytest.mark.usefixtures("compiler")
def test_processes_may_compile_the_same_at_once(folder: Path) -> None:
    script = (
        "import hashlib, sys; from dfformer_kernels.backend.cuda import nvrtc; sys.stdin.readline()\n"
        f"cubins = [nvrtc.cached_cubin({TINY!r}, [f'-DVALUE={{i}}'], 'sm_90') for i in range(9)]\n"
        "print(hashlib.sha256(b''.join(cubins)).hexdigest())"
    )
    run = [sys.executable, "-c", script]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [subprocess.Popen(run, text=True, **pipes) for _ in range(2)]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    assert len(list(folder.iterdir())) == 9


# Loading and launching


def launch(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "_driver", lambda: driver)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=70 + device))
    kernel = nvrtc.load(b"cubin", "name", device=1, threads=96, shared_bytes=100_000)
    kernel.launch(2**31 - 1, 0, 2**62, -1)


def test_a_kernel_is_loaded_in_torchs_context_and_launched_on_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver()
    launch(driver, monkeypatch)
    assert driver.calls == [
        ("cuDeviceGet", 1),
        ("cuDevicePrimaryCtxRetain", "<cuDeviceGet>"),
        ("cuCtxSetCurrent", "<cuDevicePrimaryCtxRetain>"),
        ("cuModuleLoadData", b"cubin"),
        ("cuModuleGetFunction", "<cuModuleLoadData>", b"name"),
        ("cuFuncSetAttribute", "<cuModuleGetFunction>", "shared", 100_000),
        ("cuCtxSetCurrent", "<cuDevicePrimaryCtxRetain>"),
        ("cuLaunchKernel", "<cuModuleGetFunction>", 2**31 - 1, 1, 1, 96, 1, 1, 100_000, 71, [0, 2**62, -1], 0),
    ]


CALLS = (
    *("cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent"),
    *("cuModuleLoadData", "cuModuleGetFunction", "cuFuncSetAttribute"),
    "cuLaunchKernel",
)
LOADING = CALLS[3:6]


@pytest.mark.parametrize("call", CALLS)
def test_every_error_of_the_driver_is_raised_by_name(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """What is wrong with the kernel lets another backend run, and only that."""
    driver = FakeDriver(failing=call)
    with pytest.raises(RuntimeError, match=f"{call} returned CUDA_ERROR_NO_BINARY_FOR_GPU") as info:
        launch(driver, monkeypatch)
    assert type(info.value) is (KernelBuildError if call in LOADING else RuntimeError)
    assert driver.calls[-1][0] == call


@pytest.mark.parametrize("call", CALLS)
def test_an_earlier_kernels_error_is_not_taken_for_a_broken_kernel(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    with pytest.raises(RuntimeError, match=f"{call} returned CUDA_ERROR_ILLEGAL_ADDRESS") as info:
        launch(FakeDriver(call, Result.CUDA_ERROR_ILLEGAL_ADDRESS), monkeypatch)
    assert type(info.value) is RuntimeError


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("enough", [True, False], ids=["enough then", "too little"])
def test_memory_that_torch_holds_is_released_for_the_driver(
    monkeypatch: pytest.MonkeyPatch, call: str, enough: bool
) -> None:
    driver = FakeDriver(call, Result.CUDA_ERROR_OUT_OF_MEMORY)
    released: list[str] = []

    def release() -> None:
        released.append(call)
        driver.failing = "" if enough else call

    monkeypatch.setattr(torch.cuda, "empty_cache", release)
    error = pytest.raises(torch.OutOfMemoryError, match=f"{call} returned CUDA_ERROR_OUT_OF_MEMORY")
    with nullcontext() if enough else error:
        launch(driver, monkeypatch)
    assert released == [call]
    assert driver.calls[-1][0] == ("cuLaunchKernel" if enough else call)


def test_a_lack_of_the_hosts_memory_is_no_broken_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(name: str) -> tuple[Any, ...]:
        code = SimpleNamespace(name="NVRTC_ERROR_OUT_OF_MEMORY") if name == "nvrtcCompileProgram" else 0
        return (code,) if name == "nvrtcCompileProgram" else (code, 1)

    class Nvrtc:
        def __getattr__(self, name: str) -> Callable[..., Any]:
            return lambda *args: answer(name)

    monkeypatch.setattr(nvrtc, "_nvrtc", Nvrtc)
    monkeypatch.setattr(nvrtc, "_text_of", lambda program: "")
    with pytest.raises(MemoryError, match=r"NVRTC ran out of host memory for tiny\.cu"):
        nvrtc.compile_cubin(TINY, [], "sm_90")


@pytest.mark.usefixtures("compiler")
def test_the_real_bindings_take_what_is_passed_to_them() -> None:
    """They convert arguments before they look for the driver's library, which is missing here."""
    driver = pytest.importorskip("cuda.bindings.driver")
    if torch.cuda.is_available():
        return  # every GPU test launches kernels
    values = (ctypes.c_void_p * 1)()
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    for call in (
        lambda: driver.cuLaunchKernel(driver.CUfunction(0), 1, 1, 1, 32, 1, 1, 0, 77, ctypes.addressof(values), 0),
        lambda: driver.cuFuncSetAttribute(driver.CUfunction(0), attribute, 100_000),
        lambda: driver.cuModuleLoadData(b"cubin"),
    ):
        with pytest.raises(RuntimeError, match="driver"):
            call()
