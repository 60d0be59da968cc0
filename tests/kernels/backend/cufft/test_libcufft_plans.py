"""What becomes of cuFFT's plans: after errors, when there are many, in graphs and in threads."""

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from fake_cufft import (
    DTYPES,
    EXECUTE,
    Fake,
    clear_plans,
    host_memory,
    kept_plans,
    library_plans,
    planes,
    run_one,
    spectra,
)
from torch import Tensor

from dfformer_kernels import device as device_module
from dfformer_kernels.backend.cufft import libcufft
from dfformer_kernels.backend.cufft.plans import PLANS_PER_DEVICE, PlanSpec
from dfformer_kernels.problem import KernelBuildError
from dfformer_kernels.tolerance import BOUND, relative_error

# cuFFT's functions, and whether a failure comes before there is a plan to keep.
CALLS = {
    "cufftCreate": True,
    "cufftSetAutoAllocation": True,
    "cufftMakePlanMany64": True,
    "cufftSetWorkArea": False,
    "cufftSetStream": False,
    "cufftExec": False,
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


# Errors of the library


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
    assert (fake.live_plans, kept_plans(0)) == (kept, kept)
    assert run_one(dtype, inverse).isfinite().all()
    assert (fake.live_plans, kept_plans(0)) == (1, 1)


@pytest.mark.parametrize(("code", "name"), RESULTS.items())
def test_errors_have_the_names_of_cuffts_header(code: int, name: str, fake: Fake) -> None:
    fake.fail("cufftMakePlanMany64", code)
    with pytest.raises(RuntimeError, match=f"^cufftMakePlanMany64 returned {name} for rfft2"):
        library_plans().get(PlanSpec(0, (6, 10, 4), torch.float32, inverse=False))


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
@pytest.mark.parametrize(("function", "code"), [*((f, 2) for f in CALLS), *((f, 5) for f in CALLS if CALLS[f])])
def test_a_call_that_lacks_memory_is_made_again_once_torchs_is_released(
    function: str, code: int, inverse: bool, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for an inverse that was launched: it may have overwritten its input."""
    name = EXECUTE[torch.float32, inverse] if function == "cufftExec" else function
    wanted = run_one(torch.float32, inverse)
    clear_plans()
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


@pytest.mark.parametrize("function", [function for function in CALLS if not CALLS[function]])
def test_an_internal_error_of_a_launch_is_no_lack_of_memory(
    function: str, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: pytest.fail("memory is not lacking"))
    name = EXECUTE[torch.float32, False] if function == "cufftExec" else function
    fake.fail(name, 5)
    with pytest.raises(RuntimeError, match=f"{name} returned CUFFT_INTERNAL_ERROR"):
        run_one(torch.float32, False)


def test_memory_is_not_released_during_capture(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    run_one(torch.float32, False)
    monkeypatch.setattr(device_module, "capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: pytest.fail("nothing can be freed now"))
    fake.fail("cufftExecR2C", 2)
    with pytest.raises(torch.OutOfMemoryError, match="cufftExecR2C returned CUFFT_ALLOC_FAILED"):
        run_one(torch.float32, False)


def test_an_error_of_a_plans_destruction_is_not_raised(fake: Fake) -> None:
    run_one(torch.float32, False)
    fake.fail("cufftDestroy", 6)
    clear_plans()
    assert (fake.calls("cufftDestroy"), fake.live_plans) == (1, 0)


# Plans


def test_a_plan_is_made_once_for_each_kind_of_transform(fake: Fake) -> None:
    kinds = [(dtype, inverse) for dtype in DTYPES for inverse in (False, True)]
    for _ in range(3):
        for dtype, inverse in kinds:
            run_one(dtype, inverse)
    assert fake.calls("cufftMakePlanMany64") == fake.live_plans == len(kinds)


def test_plans_used_last_are_kept(fake: Fake) -> None:
    most = PLANS_PER_DEVICE

    def transform(N: int) -> None:
        libcufft.rfft2(planes((1, 2, N), torch.float32))

    def planned() -> int:
        return fake.calls("cufftMakePlanMany64")

    for N in range(1, most + 1):
        transform(N)
    transform(1)
    assert (planned(), fake.live_plans) == (most, most)
    transform(most + 1)  # takes the place of 2
    assert (planned(), fake.live_plans, kept_plans(0)) == (most + 1, most, most)
    transform(1)
    assert planned() == most + 1
    transform(2)
    assert planned() == most + 2


def test_each_device_has_plans_of_its_own(fake: Fake) -> None:
    for index in (0, 1):
        host_memory().here.device = index
        run_one(torch.float32, False)
        run_one(torch.float32, False)
    assert (fake.live_plans, kept_plans(0), kept_plans(1)) == (2, 1, 1)
    host_memory().here.device = 0
    clear_plans()
    assert (fake.live_plans, kept_plans(0), kept_plans(1)) == (1, 0, 1)


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


def test_a_captured_plan_outlives_all_others(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    run_one(torch.float32, False)
    monkeypatch.setattr(device_module, "capturing", lambda: True)
    run_one(torch.float32, False)
    with pytest.raises(RuntimeError, match="while a CUDA graph is captured"):
        run_one(torch.float32, True)
    monkeypatch.setattr(device_module, "capturing", lambda: False)
    clear_plans()
    assert fake.live_plans == 1
    for N in range(PLANS_PER_DEVICE + 1):
        libcufft.rfft2(planes((1, 2, N + 1), torch.float32))
    assert fake.live_plans == PLANS_PER_DEVICE + 1


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
    clear_plans(device)
    for given in inputs:
        u.copy_(given)
        graph.replay()
        assert relative_error(Z, spectra(given.double())) <= BOUND[torch.float32]
        assert relative_error(back / 140, given) <= BOUND[torch.float32]


# Threads


def test_eight_threads_at_once_get_their_own_results(fake: Fake) -> None:
    """On two devices, with more transforms than plans are kept, so that plans are dropped while they are in use."""
    count = PLANS_PER_DEVICE + 6
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
    assert [kept_plans(device) for device in (0, 1)] == [PLANS_PER_DEVICE] * 2
    assert fake.live_plans == 2 * PLANS_PER_DEVICE


def test_different_transforms_run_at_the_same_time(fake: Fake) -> None:
    """The fake waits until both are there: neither the GIL nor the cache is held during a call."""
    inputs = [planes((4, 4, N), torch.float32) for N in (1, 2)]
    for u in inputs:
        libcufft.rfft2(u)
    fake.library.fake_cufft_meet(2)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(libcufft.rfft2, inputs))
