"""cuFFT's host side against a libcufft that transforms host memory by the definition, and on a GPU against torch.fft.

The fake library (tests/native/fake_cufft.cpp) knows cuFFT's rules and remembers the first that was broken.
"""

import ctypes
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import require, require_backend, require_compiler
from paths import NATIVE
from torch import Tensor

from dfformer_kernels import device as device_module
from dfformer_kernels.backends import cpu
from dfformer_kernels.backends.cufft import libcufft
from dfformer_kernels.problem import KernelBuildError
from dfformer_kernels.tolerance import BOUND, relative_error

DTYPES = [torch.float32, torch.float64]
SHAPES = [
    (1, 1, 1),
    (1, 1, 5),
    (1, 2, 3),
    (2, 1, 3),
    (1, 16, 2),
    (16, 1, 2),
    (5, 1, 1),
    (1, 13, 4),
    (7, 7, 8),
    (8, 8, 1),
    (6, 9, 5),
    (9, 6, 5),
    (11, 13, 3),
    (14, 14, 8),
    (12, 20, 3),
    (31, 4, 2),
    (28, 28, 3),
    (56, 56, 1),
]
# cuFFT's functions, and whether a failure comes before there is a plan to keep.
CALLS = {
    "cufftCreate": True,
    "cufftSetAutoAllocation": True,
    "cufftMakePlanMany64": True,
    "cufftSetWorkArea": False,
    "cufftSetStream": False,
    "cufftExec": False,
}
EXECUTE = {
    (torch.float32, False): "cufftExecR2C",
    (torch.float32, True): "cufftExecC2R",
    (torch.float64, False): "cufftExecD2Z",
    (torch.float64, True): "cufftExecZ2D",
}
RESULTS = {
    1: "CUFFT_INVALID_PLAN",
    2: "CUFFT_ALLOC_FAILED",
    3: "CUFFT_INVALID_TYPE",
    4: "CUFFT_INVALID_VALUE",
    5: "CUFFT_INTERNAL_ERROR",
    6: "CUFFT_EXEC_FAILED",
    7: "CUFFT_SETUP_FAILED",
    8: "CUFFT_INVALID_SIZE",
    9: "CUFFT_UNALIGNED_DATA",
    10: "CUFFT_INCOMPLETE_PARAMETER_LIST",
    11: "CUFFT_INVALID_DEVICE",
    12: "CUFFT_PARSE_ERROR",
    13: "CUFFT_NO_WORKSPACE",
    14: "CUFFT_NOT_IMPLEMENTED",
    15: "CUFFT_LICENSE_ERROR",
    16: "CUFFT_NOT_SUPPORTED",
    17: "CUFFT_MISSING_DEPENDENCY",
    18: "CUFFT_NVRTC_FAILURE",
    19: "CUFFT_NVJITLINK_FAILURE",
    20: "CUFFT_NVSHMEM_FAILURE",
    21: "code 21",
    -1: "code -1",
}


class Fake:
    """The fake library's controls, and host memory in a GPU's place."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.library: Any = ctypes.CDLL(str(path))
        for name in ("last_work_area", "last_stream"):
            getattr(self.library, f"fake_cufft_{name}").restype = ctypes.c_void_p
        self.library.fake_cufft_violation.restype = ctypes.c_char_p

    def fail(self, function: str, code: int) -> None:
        self.library.fake_cufft_fail(function.encode(), code)

    def calls(self, function: str) -> int:
        return self.library.fake_cufft_calls(function.encode())

    @property
    def live_plans(self) -> int:
        return self.library.fake_cufft_live_plans()

    def assert_no_violation(self) -> None:
        assert self.library.fake_cufft_violation() == b""


class HostMemory(libcufft.Cuda):
    """Each thread's CPU tensors are on the device and stream it says."""

    device_type = "cpu"
    is_capturing = False

    def __init__(self, fake: Fake) -> None:
        self.fake = fake
        self.here = threading.local()

    def index(self, device: torch.device) -> int:
        return getattr(self.here, "device", 0)

    @contextmanager
    def guard(self, device: torch.device) -> Iterator[None]:
        previous = self.fake.library.fake_cufft_set_device(self.index(device))
        try:
            yield
        finally:
            self.fake.library.fake_cufft_set_device(previous)

    def stream(self, device: torch.device) -> int:
        return getattr(self.here, "stream", 0)

    def capturing(self) -> bool:
        return self.is_capturing


@pytest.fixture(scope="session")
def fake_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require_backend("cpu")
    require_compiler()
    path = tmp_path_factory.mktemp("fake") / "libcufft.so"
    compiler = os.environ.get("CXX", "g++")
    subprocess.run(
        [compiler, "-std=c++20", "-O2", "-shared", "-fPIC", NATIVE / "fake_cufft.cpp", "-o", path], check=True
    )
    return path


@pytest.fixture
def fake(fake_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    """libcufft is the fake, without plans; in the end its rules have been kept and all plans can be destroyed."""
    fake = Fake(fake_path)
    fake.library.fake_cufft_reset()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(libcufft, "_candidates", lambda soname: [str(fake_path)])
    monkeypatch.setattr(libcufft, "_cuda", HostMemory(fake))
    libcufft._open.cache_clear()
    assert libcufft.unavailable_reasons() == []
    assert fake.live_plans == 0
    yield fake
    libcufft._open.cache_clear()
    fake.assert_no_violation()
    for device in (0, 1):  # each device's plans while it is the current one
        host_memory().here.device = device
        libcufft.clear_plans(torch.device("cpu"))
    cpu.core().cufft_open(str(fake_path))  # drops what was captured
    assert fake.live_plans == 0


def host_memory() -> HostMemory:
    assert isinstance(libcufft._cuda, HostMemory)
    return libcufft._cuda


@pytest.fixture(params=["fake", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where a test's tensors are: host memory with the fake library, or a GPU with the real one."""
    if request.param == "cuda":
        require("cuda", not libcufft.unavailable_reasons(), "; ".join(libcufft.unavailable_reasons()))
        return torch.device("cuda", torch.cuda.current_device())
    request.getfixturevalue("fake")
    return torch.device("cpu")


def planes(shape: tuple[int, int, int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def spectra(u: Tensor) -> Tensor:
    return torch.view_as_real(torch.fft.rfft2(u.double(), dim=(0, 1))).to(u.dtype).contiguous()


# Layouts


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_transforms_agree_with_their_definition(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> None:
    u = planes(shape, dtype)
    Z = libcufft.rfft2(u.to(device))
    assert Z.device == device
    assert relative_error(Z, spectra(u.double())) <= BOUND[dtype]
    back = libcufft.irfft2(spectra(u).to(device), shape[1])
    assert back.dtype == dtype
    assert relative_error(back, u.double() * shape[0] * shape[1]) <= BOUND[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sample_inside_a_batch_needs_no_copy_unless_it_is_not_aligned(
    dtype: torch.dtype, device: torch.device
) -> None:
    """x[b] of odd size begins at an odd element for odd b, which the library would refuse."""
    x = torch.stack([planes((3, 5, 7), dtype, seed) for seed in range(4)])
    for b in range(4):
        assert relative_error(libcufft.rfft2(x.to(device)[b]), spectra(x[b].double())) <= BOUND[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_of_several_arrays_is_a_transform(dtype: torch.dtype, fake: Fake) -> None:
    u = torch.stack([planes((6, 9, 5), dtype, seed) for seed in range(4)]).view(2, 2, 6, 9, 5)
    Z = libcufft.rfft2(u)
    back = libcufft.irfft2(Z.clone(), 9)
    for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
        assert relative_error(Z[i, j], spectra(u[i, j].double())) <= BOUND[dtype]
    assert relative_error(back / 54, u) <= BOUND[dtype]
    assert [fake.calls(EXECUTE[dtype, inverse]) for inverse in (False, True)] == [4, 4]
    assert fake.live_plans == 2


@pytest.mark.usefixtures("fake")
def test_several_arrays_of_an_odd_size_are_refused() -> None:
    for transform in (
        lambda: libcufft.rfft2(torch.zeros(2, 3, 5, 7)),
        lambda: libcufft.irfft2(torch.zeros(2, 3, 3, 7, 2), 5),
    ):
        with pytest.raises(ValueError, match=r"of 2 real arrays \(3, 5, 7\) every second one begins at an odd element"):
            transform()


def test_the_input_of_rfft2_stays_as_it_is(device: torch.device) -> None:
    u = planes((6, 10, 4), torch.float32)
    on_device = u.to(device)
    libcufft.rfft2(on_device)
    assert torch.equal(on_device.cpu(), u)


@pytest.mark.parametrize("shape", [(6, 8, 3), (7, 9, 2), (5, 1, 2)], ids=str)
def test_spectra_of_real_planes_do_not_depend_on_what_a_library_does_with_others(
    shape: tuple[int, int, int], fake: Fake
) -> None:
    Z = spectra(planes(shape, torch.float64))
    other = Z.clone()
    other[1:, 0, :, 1] += 1.0  # column k = 0 is no longer conjugate to itself
    results = []
    for mixes in (False, True):
        fake.library.fake_cufft_mix_imaginary_parts(mixes)
        results.append([libcufft.irfft2(z.clone(), shape[1]) for z in (Z, other)])
    (real, dropped), (real_mixed, mixed) = results
    assert relative_error(real_mixed, real) <= BOUND[torch.float64]
    assert relative_error(mixed, dropped) > 1e-3


# Bad input


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    ("u", "given"),
    [
        (torch.zeros(4, 4), r"\(4, 4\)"),
        (torch.zeros(4, 4, 0), r"\(4, 4, 0\)"),
        (torch.zeros(4, 4, 2, dtype=torch.bfloat16), "bfloat16"),
        (torch.zeros(4, 4, 2, dtype=torch.complex64), "complex64"),
        (torch.zeros(2, 4, 4).permute(1, 2, 0), r"strides \(4, 1, 16\)"),
        (torch.zeros(4, 4, 2, device="meta"), "on meta"),
    ],
    ids=lambda value: value if isinstance(value, str) else "u",
)
def test_rfft2_takes_dense_planes_only(u: Tensor, given: str) -> None:
    with pytest.raises(
        ValueError, match=rf"libcufft: u must be contiguous \(\.\.\.,H,W,N\) float32 or float64 .*got.*{given}"
    ):
        libcufft.rfft2(u)


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    ("shape", "W"), [((4, 3, 2, 2), 6), ((4, 3, 2, 2), 3), ((4, 3, 2), 4), ((4, 3, 2, 1), 4), ((4, 1, 2, 2), 0)]
)
def test_irfft2_takes_the_spectra_of_planes_that_wide(shape: tuple[int, ...], W: int) -> None:
    with pytest.raises(ValueError, match=rf"Z must be contiguous \(\.\.\.,H,K,N,2\), K = {W}//2 \+ 1,"):
        libcufft.irfft2(torch.zeros(shape), W)


@pytest.fixture
def core(fake: Fake) -> ModuleType:
    return cpu.core()


TRANSFORM = {"device": 0, "shape": (4, 4, 2), "dtype": 0, "inverse": False, "capturing": False}
BUFFERS = {"input": 64, "output": 128, "workspace": 256, "workspace_bytes": 1 << 20, "stream": 0}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"device": -1}, "device: got -1"),
        ({"shape": (0, 4, 2)}, "shape: got H, W, N = 0, 4, 2"),
        ({"shape": (4, 0, 2)}, "shape: got H, W, N = 4, 0, 2"),
        ({"shape": (4, 4, 0)}, "shape: got H, W, N = 4, 4, 0"),
        ({"shape": (4, 32769, 2)}, "sides of 1 to 32768"),
        ({"shape": (4, 4, 2**61)}, "more bytes than 64 bits count"),
        ({"dtype": 2}, "dtype: got code 2, accepted are 0 and 1"),
        ({"dtype": -1}, "dtype: got code -1"),
        ({"input": 0}, "input: got a null pointer"),
        ({"output": 0}, "output: got a null pointer"),
        ({"workspace": 0}, "workspace: got a null pointer"),
        ({"workspace_bytes": -1}, "workspace_bytes: got -1, rfft2 of float32 4x4 planes"),
        ({"workspace_bytes": 4 * 3 * 2 * 16 - 1}, "N=2, on device 0 needs 384"),
    ],
    ids=str,
)
def test_the_core_is_not_reached_with_wrong_sizes_or_pointers(
    wrong: dict[str, Any], message: str, core: ModuleType, fake: Fake
) -> None:
    with pytest.raises(ValueError, match=message):
        core.cufft_run(**(TRANSFORM | BUFFERS | wrong))
    if wrong.keys() <= TRANSFORM.keys():
        with pytest.raises(ValueError, match=message):
            core.cufft_plan(**(TRANSFORM | wrong))
    assert fake.calls("cufftExecR2C") == 0


# Errors of the library


def run_one(dtype: torch.dtype, inverse: bool) -> Tensor:
    u = planes((6, 10, 4), dtype)
    return libcufft.irfft2(spectra(u), 10) if inverse else libcufft.rfft2(u)


@pytest.mark.parametrize("inverse", [False, True], ids=["rfft2", "irfft2"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", CALLS)
def test_an_error_of_any_call_is_raised_and_no_plan_is_lost(
    function: str, dtype: torch.dtype, inverse: bool, fake: Fake
) -> None:
    name = EXECUTE[dtype, inverse] if function == "cufftExec" else function
    fake.fail(name, 6)
    transform = f"{'irfft2' if inverse else 'rfft2'} of {str(dtype)[6:]} 6x10 planes, N=4, on device 0"
    with pytest.raises(RuntimeError, match=f"^{name} returned CUFFT_EXEC_FAILED for {transform}$"):
        run_one(dtype, inverse)
    kept = 0 if CALLS[function] else 1
    assert (fake.live_plans, cpu.core().cufft_plan_count(0)) == (kept, kept)
    assert run_one(dtype, inverse).isfinite().all()
    assert (fake.live_plans, cpu.core().cufft_plan_count(0)) == (1, 1)


@pytest.mark.parametrize(("code", "name"), RESULTS.items())
def test_errors_have_the_names_of_cuffts_header(code: int, name: str, fake: Fake) -> None:
    fake.fail("cufftMakePlanMany64", code)
    with pytest.raises(RuntimeError, match=f"^cufftMakePlanMany64 returned {name} for rfft2"):
        cpu.core().cufft_plan(device=0, shape=(6, 10, 4), dtype=0, inverse=False, capturing=False)


# What a failure to make a plan is: the library's or the plan's fault, memory that is lacking, or somebody else's.
NOT_BUILT = {7, 8, 14, 15, 16, 17, 18, 19}
NO_MEMORY = {2, 5}


@pytest.mark.parametrize("code", RESULTS)
def test_a_plan_that_cannot_be_made_is_told_from_other_faults(
    code: int, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", partial(fake.fail, "cufftMakePlanMany64", code))
    fake.fail("cufftMakePlanMany64", code)
    with pytest.raises(RuntimeError, match=f"returned {RESULTS[code]} for rfft2") as info:
        run_one(torch.float32, False)
    expected = KernelBuildError if code in NOT_BUILT else torch.OutOfMemoryError if code in NO_MEMORY else RuntimeError
    assert type(info.value) is expected
    assert run_one(torch.float32, False).isfinite().all()  # the backend stays


@pytest.mark.parametrize("inverse", [False, True], ids=["rfft2", "irfft2"])
@pytest.mark.parametrize("code", NO_MEMORY)
@pytest.mark.parametrize("function", CALLS)
def test_a_call_that_lacks_memory_is_made_again_once_torchs_is_released(
    function: str, code: int, inverse: bool, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for an inverse that was launched: it may have overwritten its input."""
    name = EXECUTE[torch.float32, inverse] if function == "cufftExec" else function
    wanted = run_one(torch.float32, inverse)
    libcufft.clear_plans(torch.device("cpu"))
    released: list[int] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: released.append(fake.calls(name)))
    fake.fail(name, code)
    if inverse and not CALLS[function]:
        with pytest.raises(torch.OutOfMemoryError, match=f"{name} returned {RESULTS[code]}"):
            run_one(torch.float32, inverse)
        assert released == []
    else:
        assert torch.equal(run_one(torch.float32, inverse), wanted)
        assert len(released) == 1
    assert torch.equal(run_one(torch.float32, inverse), wanted)


def test_memory_is_not_released_during_capture(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    run_one(torch.float32, False)
    monkeypatch.setattr(device_module, "_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: pytest.fail("nothing can be freed now"))
    fake.fail("cufftExecR2C", 2)
    with pytest.raises(torch.OutOfMemoryError, match="cufftExecR2C returned CUFFT_ALLOC_FAILED"):
        run_one(torch.float32, False)


def test_an_error_of_a_plans_destruction_is_not_raised(fake: Fake) -> None:
    run_one(torch.float32, False)
    fake.fail("cufftDestroy", 6)
    libcufft.clear_plans(torch.device("cpu"))
    assert (fake.calls("cufftDestroy"), fake.live_plans) == (1, 0)


# Plans


def test_a_plan_is_made_once_for_each_kind_of_transform(fake: Fake) -> None:
    kinds = [(dtype, inverse) for dtype in DTYPES for inverse in (False, True)]
    for _ in range(3):
        for dtype, inverse in kinds:
            run_one(dtype, inverse)
    assert fake.calls("cufftMakePlanMany64") == fake.live_plans == len(kinds)


def test_plans_used_last_are_kept(fake: Fake) -> None:
    most = cpu.core().cufft_plans_per_device

    def transform(N: int) -> None:
        libcufft.rfft2(planes((1, 2, N), torch.float32))

    def planned() -> int:
        return fake.calls("cufftMakePlanMany64")

    for N in range(1, most + 1):
        transform(N)
    transform(1)
    assert (planned(), fake.live_plans) == (most, most)
    transform(most + 1)  # takes the place of 2
    assert (planned(), fake.live_plans, cpu.core().cufft_plan_count(0)) == (most + 1, most, most)
    transform(1)
    assert planned() == most + 1
    transform(2)
    assert planned() == most + 2


def test_each_device_has_plans_of_its_own(fake: Fake) -> None:
    cpu_device, count = torch.device("cpu"), cpu.core().cufft_plan_count
    for index in (0, 1):
        host_memory().here.device = index
        run_one(torch.float32, False)
        run_one(torch.float32, False)
    assert (fake.live_plans, count(0), count(1)) == (2, 1, 1)
    host_memory().here.device = 0
    libcufft.clear_plans(cpu_device)
    assert (fake.live_plans, count(0), count(1)) == (1, 0, 1)


def test_the_library_works_in_torchs_memory_and_on_torchs_stream(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    allocated: list[Tensor] = []
    new_empty = Tensor.new_empty

    def recorded(*args: Any, **kwargs: Any) -> Tensor:
        allocated.append(new_empty(*args, **kwargs))
        return allocated[-1]

    monkeypatch.setattr(Tensor, "new_empty", recorded)
    host_memory().here.stream = 0x5EA
    libcufft.rfft2(planes((6, 10, 4), torch.float32))
    (workspace,) = [t for t in allocated if t.dtype == torch.uint8]
    assert workspace.numel() == 6 * 6 * 4 * 16  # what the fake asks for
    assert fake.library.fake_cufft_last_work_area() == workspace.data_ptr()
    assert fake.library.fake_cufft_last_stream() == 0x5EA


def test_a_captured_plan_outlives_all_others(fake: Fake) -> None:
    run_one(torch.float32, False)
    host_memory().is_capturing = True
    run_one(torch.float32, False)
    with pytest.raises(RuntimeError, match="while a CUDA graph is captured"):
        run_one(torch.float32, True)
    host_memory().is_capturing = False
    libcufft.clear_plans(torch.device("cpu"))
    assert fake.live_plans == 1
    for N in range(cpu.core().cufft_plans_per_device + 1):
        libcufft.rfft2(planes((1, 2, N + 1), torch.float32))
    assert fake.live_plans == cpu.core().cufft_plans_per_device + 1


@pytest.mark.gpu
def test_a_graph_replays_when_its_plans_have_been_dropped() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    inputs = [planes((14, 10, 6), torch.float32, seed) for seed in (0, 1)]
    u = inputs[0].to(device)
    libcufft.irfft2(libcufft.rfft2(u), 10)  # plans
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        Z = libcufft.rfft2(u)
        back = libcufft.irfft2(Z.clone(), 10)
    libcufft.clear_plans(device)
    for given in inputs:
        u.copy_(given)
        graph.replay()
        assert relative_error(Z, spectra(given.double())) <= BOUND[torch.float32]
        assert relative_error(back / 140, given) <= BOUND[torch.float32]


# Threads and forks


def test_eight_threads_at_once_get_their_own_results(fake: Fake) -> None:
    """On two devices, with more transforms than plans are kept, so that plans are dropped while they are in use."""
    count = cpu.core().cufft_plans_per_device + 6
    inputs = [planes((1 + n % 3, 2 + n % 5, 1 + n), torch.float32, n) for n in range(count)]
    wanted = [spectra(u.double()) for u in inputs]
    start = threading.Barrier(8)

    def run(thread: int) -> float:
        host_memory().here.device, host_memory().here.stream = thread % 2, thread + 1
        start.wait()
        worst = 0.0
        for i in range(2 * count):
            n = (thread // 4 * count // 2 + (i if thread % 4 < 2 else -i)) % count  # they meet at the same plans
            Z = libcufft.rfft2(inputs[n])
            worst = max(worst, relative_error(Z, wanted[n]))
            worst = max(
                worst, relative_error(libcufft.irfft2(Z, inputs[n].shape[1]) / inputs[n][..., 0].numel(), inputs[n])
            )
        return worst

    with ThreadPoolExecutor(8) as pool:
        errors = list(pool.map(run, range(8)))
    assert max(errors) <= BOUND[torch.float32]
    assert [cpu.core().cufft_plan_count(device) for device in (0, 1)] == [cpu.core().cufft_plans_per_device] * 2
    assert fake.live_plans == 2 * cpu.core().cufft_plans_per_device


def test_different_transforms_run_at_the_same_time(fake: Fake) -> None:
    """The fake waits until both are there: neither the GIL nor the cache is held during a call."""
    inputs = [planes((4, 4, N), torch.float32) for N in (1, 2)]
    for u in inputs:
        libcufft.rfft2(u)
    fake.library.fake_cufft_meet(2)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(libcufft.rfft2, inputs))


FORK = """
import os, signal, sys, threading, time
import torch
from dfformer_kernels import _C
import ctypes

_C_RUN = dict(device=0, dtype=0, inverse=False, capturing=False)
try:
    _C.cufft_plan(shape=(4, 4, 2), **_C_RUN)
except RuntimeError as error:
    assert str(error) == "libcufft has not been opened", error
_C.cufft_open(sys.argv[1])
fake = ctypes.CDLL(sys.argv[1])
u, Z, workspace = torch.ones(4, 4, 2), torch.empty(4, 3, 2, 2), torch.empty(4 * 3 * 2 * 16, dtype=torch.uint8)

def run(N, u, Z, workspace):
    _C.cufft_run(shape=(4, 4, N), input=u.data_ptr(), output=Z.data_ptr(), workspace=workspace.data_ptr(),
                 workspace_bytes=workspace.numel(), stream=0, **_C_RUN)

run(2, u, Z, workspace)
captured = _C_RUN | {"capturing": True}
_C.cufft_plan(shape=(4, 4, 2), **captured)
assert (_C.cufft_plan_count(0), fake.fake_cufft_live_plans()) == (1, 1)
child = os.fork()
if child == 0:
    assert (_C.cufft_plan_count(0), fake.fake_cufft_live_plans()) == (0, 1)
    run(2, u, Z, workspace)  # plans anew
    _C.cufft_clear(0)
    _C.cufft_open(sys.argv[1])
    assert fake.fake_cufft_live_plans() == 1  # the parent's
    os._exit(0 if Z[0, 0, 0, 0] == 16 else 3)

for _ in range(300):
    pid, status = os.waitpid(child, os.WNOHANG)
    if pid:
        break
    time.sleep(0.1)
else:
    os.kill(child, signal.SIGKILL)
    sys.exit("the forked child hangs")
assert os.waitstatus_to_exitcode(status) == 0, status
run(2, u, Z, workspace)
assert (_C.cufft_plan_count(0), fake.fake_cufft_live_plans()) == (1, 1)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_a_forked_child_leaves_its_parents_plans_alone(fake_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FORK, fake_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="the harness is written for Linux")
def test_the_host_code_is_clean_under_sanitizers() -> None:
    require_compiler()
    require("cpu", shutil.which("make") is not None, "make not installed")
    done = subprocess.run([NATIVE / "run.sh", "cufft"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# Finding the library


def test_a_library_that_is_not_there_or_another_one_is_refused_and_the_old_one_stays(fake: Fake) -> None:
    with pytest.raises(RuntimeError, match=r"/nowhere/libcufft\.so"):
        cpu.core().cufft_open("/nowhere/libcufft.so")
    libc = next(name for name in ("libc.so.6", "libSystem.dylib", "libc.so") if _can_load(name))
    with pytest.raises(RuntimeError, match=f"{libc} has no function cufftCreate"):
        cpu.core().cufft_open(libc)
    run_one(torch.float32, False)
    assert fake.live_plans == 1


def _can_load(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    ("version", "candidates", "reason"),
    [
        (None, [], "this torch is not built for CUDA"),
        ("99.1", [], "which libcufft belongs to CUDA 99 is not known, only to CUDA 12 and 13"),
        ("12.8", ["/nowhere/a.so", "/nowhere/b.so"], r"libcufft cannot be opened: /nowhere/a.so: .*, /nowhere/b.so: "),
    ],
)
def test_there_is_a_reason_where_there_is_no_library(
    version: str | None, candidates: list[str], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(libcufft, "_candidates", lambda soname: candidates)
    libcufft._open.cache_clear()
    for transform in (
        lambda: libcufft.rfft2(torch.zeros(2, 2, 1)),
        lambda: libcufft.irfft2(torch.zeros(2, 2, 1, 2), 2),
    ):
        with pytest.raises(RuntimeError, match=reason):
            transform()
    assert len(libcufft.unavailable_reasons()) == 1


def test_the_soname_is_tried_before_the_copies_in_wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "nvidia" / "cu13" / "lib" / "libcufft.so.12"
    library.parent.mkdir(parents=True)
    library.touch()
    library.with_name("libcufft.so.11").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in [name for name in sys.modules if name.split(".")[0] == "nvidia"]:
        monkeypatch.delitem(sys.modules, name)
    assert libcufft._candidates("libcufft.so.12") == ["libcufft.so.12", str(library)]


def test_torchs_own_libcufft_opens_and_says_what_it_lacks_without_a_driver() -> None:
    require_backend("cpu")
    require("cuda", torch.backends.cuda.is_built(), "this torch is not built for CUDA")
    if torch.cuda.is_available():
        pytest.skip("there is a driver")
    assert libcufft.unavailable_reasons() == []
    with pytest.raises(RuntimeError, match=r"^cufftCreate returned CUFFT_[A-Z_]+ for rfft2 of float32 8x8 planes, N=4"):
        cpu.core().cufft_plan(device=0, shape=(8, 8, 4), dtype=0, inverse=False, capturing=False)
    assert cpu.core().cufft_plan_count(0) == 0
