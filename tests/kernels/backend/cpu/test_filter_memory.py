"""Memory of the compiled core's filter step: workspace, offsets, non-temporal stores, and a lack of it."""

import math
import mmap
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from cases import DTYPES, Case, make_grad, make_inputs
from conftest import require
from extent import pairwise
from native_core import CODES, DYNAMIC, ISAS, USUAL_FORM, VECTOR_BYTES, run, run_script
from torch import Tensor

from dfformer_kernels import reference
from dfformer_kernels.backend import cpu

pytestmark = pytest.mark.usefixtures("one_thread", "core")

WIDE_DTYPES = [torch.float32, torch.float64]
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads and limits memory as Linux does")

STAGES = [(56, 64), (28, 128), (14, 320), (7, 512)]
MEBI = 2**20
# Spectra and partial sums are each rounded up to large pages of 2 MiB, where they take more than one.
ROUNDING = 2 * 2 * MEBI


@pytest.mark.parametrize(**pairwise(isa=ISAS, dtype=DTYPES, stage=STAGES))
@pytest.mark.usefixtures("isa")
def test_a_forward_step_needs_at_most_4_mebibytes_per_thread(stage: tuple[int, int], dtype: torch.dtype) -> None:
    side, C = stage
    for threads in (1, 2):
        torch.set_num_threads(threads)
        workspace = cpu.filter_workspace_bytes((8, side, side, C), 4, dtype)
        assert 0 < workspace <= 4 * MEBI * threads
        assert cpu.filter_workspace_bytes((64, side, side, C), 4, dtype) == workspace  # whatever the batch


SHARED_SHAPES = [(1, 128, 128, 16), (1, 192, 160, 20), (2, 256, 256, 16), (2, 1024, 1024, 64)]


@pytest.mark.parametrize(**pairwise(isa=ISAS, dtype=DTYPES, backward=[False, True]))
@pytest.mark.usefixtures("isa")
def test_workspace_grows_no_faster_than_threads(dtype: torch.dtype, backward: bool) -> None:
    for shape in [(8, side, side, C) for side, C in STAGES] + SHARED_SHAPES:
        for F in (0, 4):
            alone = cpu.filter_workspace_bytes(shape, F, dtype, backward)
            for threads in range(2, 9):
                torch.set_num_threads(threads)
                # a group of tiles for each thread, and a tile that they share
                together = cpu.filter_workspace_bytes(shape, F, dtype, backward)
                assert alone / 4 < together <= (threads + 1) * alone + ROUNDING, (shape, F, threads)
            torch.set_num_threads(1)


@pytest.mark.parametrize(**pairwise(isa=ISAS, dtype=DTYPES, threads=[1, 2, 7]))
def test_workspace_of_a_large_plane_is_that_of_its_spectra(isa: str, dtype: torch.dtype, threads: int) -> None:
    side = 1024
    torch.set_num_threads(threads)
    tile = side * side * VECTOR_BYTES[isa]
    tiles = threads + 1 if threads > 1 else 1
    for F in (0, 4):
        forward, backward = (cpu.filter_workspace_bytes((2, side, side, 64), F, dtype, b) for b in (False, True))
        basis = side * (side // 2 + 1) * F * 2 * reference.compute_dtype(dtype).itemsize
        assert tile + basis <= forward <= 1.05 * tile * tiles + basis + ROUNDING
        assert 2 * tile + basis <= backward <= 2.1 * tile * tiles + basis + max(16 * MEBI, basis) + ROUNDING


def last_level_cache_bytes() -> int:
    """Total size of this machine's last-level caches, where Linux tells."""
    folders = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/"))
    if not folders:
        pytest.skip("the system does not list its caches")
    size = (folders[-1] / "size").read_text().strip()
    sharing = int((folders[-1] / "shared_cpu_map").read_text().replace(",", ""), 16).bit_count()
    return int(size.removesuffix("K")) * 1024 * -(-(os.cpu_count() or 1) // sharing)


def test_threads_share_a_tile_if_one_each_would_not_fit_the_last_level_caches(isa: str) -> None:
    side = 512
    tile = side * (side + 1) * VECTOR_BYTES[isa]
    fitting = max(1, last_level_cache_bytes() // tile)
    for threads, tiles in ((fitting, fitting), (fitting + 1, 1)):
        torch.set_num_threads(threads)
        workspace = cpu.filter_workspace_bytes((threads, side, side, 1), 0, torch.float32)
        assert tile * tiles <= workspace <= tile * tiles + threads * MEBI / 4 + ROUNDING


NON_TEMPORAL = 16 * MEBI  # results of so many bytes


@pytest.mark.parametrize(
    **pairwise(
        dtype=WIDE_DTYPES,
        case=[Case(5, 129, 128, 64), Case(3, 257, 354, 16), Case(5, 128, 128, 70)],
        threads=[1, 2],
        offset=[0, 1],
    )
)
def test_large_results_are_those_of_their_samples(
    core: ModuleType, dtype: torch.dtype, case: Case, threads: int, offset: int
) -> None:
    inputs = make_inputs(DYNAMIC, replace(case, C=case.C * 4 // dtype.itemsize), dtype, requires_grad=False)
    x, logits, basis = inputs.values()
    grad_y = make_grad(DYNAMIC, inputs).contiguous()
    y, grad_x = (torch.full((x.numel() + offset,), math.nan, dtype=dtype) for _ in range(2))
    assert x.numel() * x.itemsize >= NON_TEMPORAL > x[0].numel() * x.itemsize
    problem = (*x.shape, case.F), CODES[dtype], None, USUAL_FORM, threads
    addresses = [t.data_ptr() for t in inputs.values()]
    core.filter(*problem, *addresses, y[offset:].data_ptr())
    core.filter(*problem, *addresses, grad_y=grad_y.data_ptr(), grad_x=grad_x[offset:].data_ptr())
    for i in range(case.B):
        alone = x[i : i + 1].clone().requires_grad_()
        wanted = DYNAMIC.public({"x": alone, "logits": logits[i : i + 1], "basis": basis}, "cpu")
        (wanted_grad,) = torch.autograd.grad(wanted, alone, grad_y[i : i + 1])
        assert torch.equal(y[offset:].view(x.shape)[i], wanted[0])
        assert torch.equal(grad_x[offset:].view(x.shape)[i], wanted_grad[0])


PEAK = """
import torch
from dfformer_kernels.backend import cpu

def peak():  # getrusage's may be that of the process this one was started by
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM"))

torch.set_num_threads(1)
problem = (1, 1024, 1024, 16, 4), 0, None, (True, False, False), 1
x, y, grad_y = torch.ones(3, 1, 1024, 1024, 16).unbind()
logits, grad_logits = torch.ones(2, 1, 4, 16).unbind()
basis, grad_basis = torch.ones(2, 1024, 513, 4, 2).unbind()
inputs = [t.data_ptr() for t in (x, logits, basis)]
results = [t.data_ptr() for t in (y, grad_logits, grad_basis)]
# Had more been in use before than is now, new memory would not raise the peak.
ballast = torch.ones(2**27, dtype=torch.uint8)
before = peak()
cpu.core().filter(*problem, *inputs, y.data_ptr())
print(peak() - before, cpu.filter_workspace_bytes(x.shape, 4, x.dtype))
cpu.core().filter(*problem, *inputs, 0, grad_y.data_ptr(), *results)
print(peak() - before, cpu.filter_workspace_bytes(x.shape, 4, x.dtype, backward=True))
"""


@LINUX
def test_a_call_allocates_what_filter_workspace_says() -> None:
    done = run_script(PEAK)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        taken, said = map(int, line.split())
        assert 0.9 * said <= taken <= said + 2 * MEBI  # plans, and pages of code


NO_MEMORY = """
import resource, sys
import torch
from dfformer_kernels.backend import cpu

core = cpu.core()
x, y, grad_y = torch.ones(3, 1, 2048, 2048, 1).unbind()
weight, grad_weight = torch.tensor([1.0, 0.0]).repeat(2, 2048, 1025, 1, 1).unbind()
problem = (*x.shape, 0), 0, None, (True, False, False), 1

def forward():
    core.filter(*problem, x.data_ptr(), 0, weight.data_ptr(), y.data_ptr())

def backward():
    addresses = x, None, weight, None, grad_y, y, None, grad_weight
    core.filter(*problem, *(0 if t is None else t.data_ptr() for t in addresses))

with open("/proc/self/statm") as file:
    in_use = int(file.read().split()[0]) * resource.getpagesize()
for step in forward, backward:
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (in_use + 4 * 2**20, limits[1]))
    try:
        step()
    except MemoryError:
        pass
    else:
        sys.exit(f"{step} found memory")
    resource.setrlimit(resource.RLIMIT_AS, limits)
    y.zero_()
    step()
    if (y - x).abs().max() > 1e-5:
        sys.exit(f"{step} is wrong afterwards")
"""


@LINUX
def test_a_workspace_that_cannot_be_had_is_a_memory_error() -> None:
    done = run_script(NO_MEMORY)
    assert done.returncode == 0, done.stderr


def zeros_of_unused_memory(*shape: int) -> Tensor:
    """bfloat16 zeros that take memory where they are written to only."""
    return torch.frombuffer(mmap.mmap(-1, 2 * math.prod(shape), mmap.MAP_PRIVATE), dtype=torch.bfloat16).view(shape)


@LINUX
def test_offsets_beyond_2_to_the_31(core: ModuleType) -> None:
    """Only the last sample, whose elements are all beyond, is looked at."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    require("memory", free >= 16 * 2**30, "less than 16 GiB of free memory")
    last = make_inputs(DYNAMIC, Case(1, 32, 32, 1024, F=2), torch.bfloat16, parameter_dtype=torch.float32)
    grad_y = last["x"].detach()
    wanted_y, wanted = run(DYNAMIC, last, grad_y)

    B = 2**11 + 1
    x, result = (zeros_of_unused_memory(B, 32, 32, 1024) for _ in range(2))
    logits, grad_logits = torch.zeros(2, B, 2, 1024).unbind()
    x[-1:], logits[-1:] = grad_y, last["logits"].detach()
    problem = (*x.shape, 2), CODES[x.dtype], None, USUAL_FORM, 2
    addresses = [t.data_ptr() for t in (x, logits, last["basis"])]
    core.filter(*problem, *addresses, result.data_ptr())
    assert torch.equal(result[-1:], wanted_y)
    results = result.data_ptr(), grad_logits.data_ptr(), 0
    core.filter(*problem, *addresses, 0, x.data_ptr(), *results)
    assert torch.equal(result[-1:], wanted["x"])
    assert torch.equal(grad_logits[-1:], wanted["logits"])
