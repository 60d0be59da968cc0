"""The `cufft` backend on a real GPU, in what CPU tensors cannot show: graphs, streams, devices, memory."""

import pytest
import torch
from cases import OPS, Case, Op, assert_within_bound, make_grad, make_inputs
from conftest import require
from torch import Tensor

from dfformer_kernels import cufft

pytestmark = pytest.mark.gpu
ALL_FILTERS = pytest.mark.parametrize("op", [op for op in OPS.values() if op.parameters], ids=lambda op: op.name)
CASE = Case(2, 14, 14, 8)


def problem(op: Op, case: Case = CASE, device: str = "cuda") -> list[Tensor | None]:
    inputs = make_inputs(op, case, torch.float32, device, requires_grad=False)
    return op.schema_order(inputs)


def step(op: Op, arguments: list[Tensor | None]) -> Tensor:
    return cufft.KERNELS[op.name](*arguments)


@ALL_FILTERS
def test_graph_capture_replays_on_new_input(op: Op) -> None:
    arguments = problem(op)
    x = arguments[0]
    assert x is not None
    step(op, arguments)  # compiles the kernels and makes the plans
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step(op, arguments)
    x.mul_(2).add_(1)
    graph.replay()
    assert torch.equal(y, step(op, arguments))


@ALL_FILTERS
def test_two_streams_at_once(op: Op) -> None:
    problems = [problem(op, Case(B, 28, 28, 64)) for B in (1, 3)]
    wanted = [step(op, arguments) for arguments in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    torch.cuda.synchronize()
    for _ in range(20):
        actual = []
        for stream, arguments in zip(streams, problems, strict=True):
            with torch.cuda.stream(stream):
                actual.append(step(op, arguments))
        torch.cuda.synchronize()
        assert all(torch.equal(a, w) for a, w in zip(actual, wanted, strict=True))


@ALL_FILTERS
def test_every_device_whatever_the_current_one(op: Op) -> None:
    require("cuda-devices", torch.cuda.device_count() > 1, "one CUDA device only")
    wanted = step(op, problem(op, device="cuda:0"))
    for index in range(1, torch.cuda.device_count()):
        y = step(op, problem(op, device=f"cuda:{index}"))
        assert y.device.index == index
        assert_within_bound("y", y.cpu(), wanted.cpu())


@ALL_FILTERS
def test_gradients_are_the_same_bits_again(op: Op) -> None:
    inputs = make_inputs(op, Case(16, 28, 28, 64), torch.float32, "cuda", requires_grad=False)
    grad_y = make_grad(op, inputs)
    first, second = (op.backward(grad_y, inputs, backend="cufft") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@ALL_FILTERS
def test_peak_memory_is_that_of_the_arrays(op: Op) -> None:
    """Beside x and y: side-by-side planes and their spectrum, and as much again for cuFFT's workspace."""
    arguments = problem(op, Case(8, 56, 56, 64))
    x = arguments[0]
    assert x is not None
    step(op, arguments)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(op, arguments)
    assert torch.cuda.max_memory_allocated() - before <= 4.2 * x.nbytes
