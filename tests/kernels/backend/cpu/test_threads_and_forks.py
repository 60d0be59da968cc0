"""The compiled core among Python threads, its own threads, forked children and data loader workers."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import pytest
import torch
from cases import OPS, Case, Inputs, Op, make_grad, make_inputs
from native_core import CODES, DYNAMIC, USUAL_FORM, assert_releases_the_gil, run_script
from torch import Tensor

pytestmark = pytest.mark.usefixtures("one_thread", "core")

# More lengths than plans are kept, so that plans come and go while others use them.
THREAD_SHAPES = [[Case(1, h, h + 8, 5) for h in range(first, 153, 16)] for first in range(1, 9)]


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_eight_threads_at_once_get_their_own_results(op: Op) -> None:

    def compute(inputs: Inputs, grad_y: Tensor) -> list[Tensor]:
        return [op.public(inputs, "cpu"), *op.backward(grad_y, inputs, backend="cpu")]

    problems = [[make_inputs(op, case, torch.float32, requires_grad=False) for case in c] for c in THREAD_SHAPES]
    grads = [[make_grad(op, inputs) for inputs in one] for one in problems]
    wanted = [[compute(*p) for p in zip(*each, strict=True)] for each in zip(problems, grads, strict=True)]
    start = threading.Barrier(len(problems))

    def work(i: int) -> list[list[Tensor]]:
        start.wait()
        return [compute(*p) for _ in range(3) for p in zip(problems[i], grads[i], strict=True)]

    with ThreadPoolExecutor(len(problems)) as pool:
        results = list(pool.map(work, range(len(problems))))
    for result, serial in zip(results, wanted, strict=True):
        for actual, expected_ in zip(result, 3 * serial, strict=True):
            assert all(torch.equal(a, w) for a, w in zip(actual, expected_, strict=True))


def test_eight_threads_at_once_may_each_have_threads_of_their_own() -> None:
    torch.set_num_threads(2)
    op = OPS["dynamic_filter+star_relu"]
    problems = [make_inputs(op, Case(1, 96 + 2 * i, 100, 20), torch.float32, requires_grad=False) for i in range(8)]
    wanted = [op.public(inputs, "cpu") for inputs in problems]

    def work(inputs: Inputs) -> Tensor:
        torch.set_num_threads(2)  # a thread begins with the number the process began with
        return op.public(inputs, "cpu")

    with ThreadPoolExecutor(8) as pool:
        assert all(torch.equal(y, w) for y, w in zip(pool.map(work, 3 * problems), 3 * wanted, strict=True))


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_other_python_threads_run_during_a_call(core: ModuleType, backward: bool) -> None:
    """Were the GIL held, no time would be read in the middle half of a call."""
    core.set_active_isa(core.supported_isas()[-1])
    inputs = make_inputs(DYNAMIC, Case(1, 512, 512, 16), torch.float32, requires_grad=False)
    x = inputs["x"]
    y, grad_y = torch.zeros_like(x), torch.ones_like(x)
    problem = (*x.shape, 4), CODES[x.dtype], None, USUAL_FORM, 1
    addresses = [t.data_ptr() for t in inputs.values()]

    def run() -> None:
        if backward:
            core.filter(*problem, *addresses, grad_y=grad_y.data_ptr(), grad_x=y.data_ptr())
        else:
            core.filter(*problem, *addresses, y.data_ptr())

    assert_releases_the_gil(run)


FORK = """
import multiprocessing, os, sys, threading
import torch
from dfformer_kernels import dynamic_filter, star_relu

torch.set_num_threads(4)
x = torch.linspace(-1, 1, 2 * 128 * 128 * 20).view(2, 128, 128, 20).requires_grad_()
logits = torch.linspace(-1, 1, 2 * 4 * 20).view(2, 4, 20).requires_grad_()
basis = torch.linspace(-1, 1, 128 * 65 * 4 * 2).view(128, 65, 4, 2).requires_grad_()
scalars = torch.tensor([0.9], requires_grad=True), torch.tensor([0.3], requires_grad=True)
grad_y = torch.ones(x.shape)  # made here: torch's own parallel operators hang in a forked child

def run():  # forward and backward, in several threads where that is allowed
    y, u = dynamic_filter(x, logits, basis, scalars, backend="cpu"), star_relu(x, *scalars, backend="cpu")
    gradients = torch.autograd.grad(y, (x, logits, basis, *scalars), grad_y)
    gradients += torch.autograd.grad(u, (x, *scalars), grad_y)
    return [t.numpy().tobytes() for t in (y.detach(), u.detach(), *gradients)]

def child():
    sys.exit(0 if run() == wanted else 3)

def new_lengths():  # plan after plan, so that a fork finds one being made
    for n in range(1000, 30000):
        if stop.is_set():
            return
        dynamic_filter(torch.ones(1, 1, n, 1), torch.ones(1, 1, 1), torch.ones(1, n // 2 + 1, 1, 2), backend="cpu")

def fork():
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(30)
    if process.exitcode != 0:
        process.kill()
        print("the forked child", "hangs" if process.exitcode is None else "is wrong", file=sys.stderr, flush=True)
        os._exit(1)

wanted = run()
fork()
stop = threading.Event()
planner = threading.Thread(target=new_lengths)
planner.start()
for _ in range(10):
    fork()
stop.set()
planner.join()
sys.exit(run() != wanted)
"""
CAN_FORK = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")


@CAN_FORK
def test_a_forked_child_computes_after_and_during_calls_of_its_parent() -> None:
    done = run_script(FORK)
    assert done.returncode == 0, done.stderr


WORKERS = """
import torch
from torch.utils.data import DataLoader, Dataset
from dfformer_kernels import dynamic_filter

torch.set_num_threads(4)
basis = torch.linspace(-1, 1, 64 * 33 * 4 * 2).view(64, 33, 4, 2)

class Filtered(Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, i):
        x = torch.linspace(-1, 1 + i, 64 * 64 * 20).view(1, 64, 64, 20)
        return dynamic_filter(x, torch.linspace(-1, 1, 80).view(1, 4, 20), basis, backend="cpu")[0]

if __name__ == "__main__":
    wanted = [Filtered()[i] for i in range(6)]
    loader = DataLoader(Filtered(), batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=60)
    for batch, first in zip(loader, range(0, 6, 2), strict=True):
        assert torch.equal(batch, torch.stack(wanted[first : first + 2]))
"""


@CAN_FORK
def test_workers_of_a_data_loader_compute() -> None:
    done = run_script(WORKERS)
    assert done.returncode == 0, done.stderr


# StarReLU


def test_other_python_threads_run_during_star_relu(core: ModuleType) -> None:
    """Were the GIL held, no time would be read in the middle half of a call."""
    core.set_active_isa(core.supported_isas()[-1])
    x = torch.zeros(2**24, dtype=torch.float16)
    y = torch.zeros_like(x)

    assert_releases_the_gil(lambda: core.star_relu(x.numel(), CODES[x.dtype], 1, 1.0, 0.0, x.data_ptr(), y.data_ptr()))
