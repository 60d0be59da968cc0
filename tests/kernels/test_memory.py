"""Memory: large tensors and the blocks they lie in, and what a process that trains keeps of it."""

import copy
import gc
import io
import mmap
import os
import platform
import subprocess
import sys
import threading

import pytest
import torch
from cases import DTYPES
from conftest import require_backend
from torch import Tensor

from dfformer_kernels.backends import cpu
from dfformer_kernels.ops import memory

LARGE = memory.MAPPED_AFRESH // 4 + 1001  # elements of float32


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large tensors from the core's blocks, whatever was trained in this process before."""
    require_backend("cpu")
    monkeypatch.setattr(memory, "_keeps_freed", False)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return cpu.empty(shape, torch.empty(0, dtype=dtype))


def of_blocks(t: Tensor) -> bool:
    """Whether the memory is not malloc's: the storage cannot grow."""
    return not t.untyped_storage().resizable()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0,), (5,), (LARGE,), (2, LARGE // 2, 3)], ids=str)
@pytest.mark.usefixtures("blocks")
def test_large_tensors_are_ordinary_ones(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    t = empty(*shape, dtype=dtype)
    assert (t.shape, t.dtype, t.is_contiguous()) == (shape, dtype, True)
    assert of_blocks(t) == (t.nbytes >= memory.MAPPED_AFRESH)
    t.fill_(1.0)
    assert t.sum(dtype=torch.float64).item() == t.numel()
    assert not t._is_view()


@pytest.mark.usefixtures("blocks")
def test_blocks_serve_tensors_of_their_size_again() -> None:
    t = empty(LARGE)
    address = t.data_ptr()
    view = t[1:]
    del t
    other = empty(LARGE)
    assert other.data_ptr() != address  # a view still needs it
    del view
    assert empty(LARGE + 1).data_ptr() != address
    assert empty(LARGE).data_ptr() == address


MAPPED_AFTER_USE = """
from pathlib import Path
import torch
from dfformer_kernels.backends import cpu
from dfformer_kernels.ops import memory

def mapped():
    ranges = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines()]
    return [any(int(first, 16) <= address < int(end, 16) for first, end in ranges) for address in addresses]

first = memory.MAPPED_AFRESH // 4
addresses = [torch.from_dlpack(cpu.core().large_tensor([first + 2**20 * i], 0)).data_ptr() for i in range(6)]
print(mapped())
cpu.free_kept_blocks()
print(mapped())
while next(cpu._count) % 4:
    pass
addresses = [cpu.empty((first,), torch.empty(0)).data_ptr()]
for i in range(8):
    print(mapped())
    cpu.empty((1,), torch.empty(0))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone lists a process's memory in /proc")
def test_the_last_four_freed_blocks_are_kept_while_large_tensors_come() -> None:
    require_backend("cpu")
    done = subprocess.run([sys.executable, "-c", MAPPED_AFTER_USE], check=True, capture_output=True, text=True)
    wanted = [[False] * 2 + [True] * 4, [False] * 6, *[[True]] * 7, [False]]
    assert done.stdout.splitlines() == [str(mapped) for mapped in wanted]


@pytest.mark.usefixtures("blocks")
def test_tensors_shared_with_other_processes_leave_their_block() -> None:
    t = empty(LARGE).fill_(3.0)
    address = t.data_ptr()
    t.share_memory_()
    assert t.data_ptr() != address
    empty(LARGE).fill_(5.0)
    assert t.min() == t.max() == 3.0


@pytest.mark.usefixtures("blocks")
def test_copies_and_files_of_large_tensors() -> None:
    t, file = empty(LARGE).fill_(3.0), io.BytesIO()
    torch.save(t, file)
    file.seek(0)
    for same in (torch.load(file), copy.deepcopy(t), t.clone()):
        assert torch.equal(same, t)
        assert same.data_ptr() != t.data_ptr()


@pytest.mark.usefixtures("blocks")
def test_large_tensors_in_inference_mode() -> None:
    with torch.inference_mode():
        assert empty(LARGE).is_inference()
    assert not empty(LARGE).is_inference()


@pytest.mark.usefixtures("blocks")
def test_a_tensor_nobody_took_gives_its_block_back() -> None:
    address = empty(LARGE).data_ptr()
    capsule = cpu.core().large_tensor([LARGE], 0)
    other = empty(LARGE)
    assert other.data_ptr() != address
    del capsule
    gc.collect()
    assert empty(LARGE).data_ptr() == address


@pytest.mark.parametrize("shape", [[-1], [2**40, 2**40], [2**62, 2], [2**57]], ids=str)
def test_sizes_of_no_tensor_are_refused(shape: list[int]) -> None:
    require_backend("cpu")
    with pytest.raises(ValueError, match="shape: no tensor has such sizes"):
        cpu.core().large_tensor(shape, 1)


def test_more_than_there_is() -> None:
    require_backend("cpu")
    with pytest.raises(MemoryError):
        cpu.core().large_tensor([2**50], 0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
@pytest.mark.usefixtures("blocks")
def test_blocks_come_and_go_in_threads_and_forked_children() -> None:
    stop = threading.Event()
    wrong: list[float] = []

    def come_and_go(value: float) -> None:
        while not stop.is_set():
            t = empty(LARGE)
            t[:: 2**16] = value
            if not (t[:: 2**16] == value).all():
                wrong.append(value)

    threads = [threading.Thread(target=come_and_go, args=(float(i),)) for i in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(10):
        child = os.fork()
        if child == 0:
            cpu.core().large_tensor([LARGE], 0)  # no more: torch's own parallel operators hang in a forked child
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong


FAULTS_OF_A_STEP = """
import resource, sys, torch
from dfformer_kernels import dynamic_filter, mlp

def step():  # 200 MiB, of which glibc by itself would keep none
    activations = [torch.ones(int(sys.argv[2]) * 2**18) for _ in range(200 // int(sys.argv[2]))]

x = torch.ones(1, 4, 4, 8, requires_grad=True)
if sys.argv[1] == "mlp":
    mlp(x, torch.ones(32, 8), (torch.ones(1), torch.zeros(1)), torch.ones(8, 32))
elif sys.argv[1] == "filter":
    dynamic_filter(x, torch.ones(1, 2, 8), torch.ones(4, 3, 2, 2), backend="cpu").sum().backward()
for _ in range(4):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc alone is told to keep what is freed")
@pytest.mark.parametrize(
    ("trained", "mebibytes"), [("mlp", 1), ("mlp", 50), ("filter", 1), ("filter", 50), ("nothing", 50)]
)
def test_processes_that_train_keep_their_memory(trained: str, mebibytes: int) -> None:
    if trained == "filter":
        require_backend("cpu")
    command = [sys.executable, "-c", FAULTS_OF_A_STEP, trained, str(mebibytes)]
    faults = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    pages = 200 * 2**20 // mmap.PAGESIZE
    assert faults > pages // 4 if trained == "nothing" else faults < pages // 10
