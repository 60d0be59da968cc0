"""What only a GPU shows: graphs, streams, several devices, memory, synchronisation, and the commands as users run them.

Results are tested with all other operators' in test_ops.py, whose targets include the GPU's.
"""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import bench_op
import pytest
import torch
from cases import OPS, Case, Inputs, assert_all_within_bound, expected, gradients, make_grad, make_inputs
from conftest import require, require_backend

import dfformer_kernels
from dfformer.cli.main import main
from dfformer.models import layers
from dfformer.models.layers import StarReLU
from dfformer.models.metaformer import MetaFormerBlock
from dfformer.models.spectral import DynamicFilter
from dfformer_kernels import dispatch
from dfformer_kernels.autotune import Autotuner
from dfformer_kernels.problem import Problem

pytestmark = pytest.mark.gpu

OP = OPS["dynamic_filter+star_relu"]
STAGE = Case(8, 28, 28, 64)
# What a forward step may allocate beside x and y, in tensors like x: parameters in float32; and for cuFFT planes of all
# samples side by side, their spectrum, and the library's workspace, taken to be at most two spectra.
EXTRA = {"cuda": 0.01, "cufft": 4.2}


@pytest.fixture(params=EXTRA)
def backend(request: pytest.FixtureRequest) -> str:
    require_backend(request.param)
    return request.param


@pytest.fixture
def no_synchronisation() -> Iterator[Callable[[], None]]:
    """From its call on, whatever waits for the device raises."""
    yield partial(torch.cuda.set_sync_debug_mode, "error")
    torch.cuda.set_sync_debug_mode("default")


def step(inputs: Inputs, grad_y: torch.Tensor, backend: str) -> list[torch.Tensor]:
    y = OP.public(inputs, backend)
    return [y.detach(), *gradients(y, inputs, grad_y).values()]


def test_block_in_a_cuda_graph(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "dynamic_filter", partial(dfformer_kernels.dynamic_filter, backend=backend))
    torch.manual_seed(0)
    block = MetaFormerBlock(64, (14, 14), DynamicFilter, StarReLU, 0.0, None).cuda().eval()
    first, second = torch.randn(2, 4, 14, 14, 64, device="cuda")
    x = first.clone()
    with torch.no_grad():
        expected_first, expected_second = block(first), block(second)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = block(x)
        for given, wanted in ((second, expected_second), (first, expected_first)):
            x.copy_(given)
            graph.replay()
            assert torch.equal(y, wanted)


def test_training_step_in_a_cuda_graph(backend: str) -> None:
    inputs = make_inputs(OP, STAGE, torch.float32, "cuda")
    grad_y = make_grad(OP, inputs)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # autograd's own state belongs to the stream that is captured
        wanted = step(inputs, grad_y, backend)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        got = step(inputs, grad_y, backend)
    for t in got:
        t.zero_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_two_streams_at_once(backend: str) -> None:
    first = make_inputs(OP, STAGE, torch.float32, "cuda", requires_grad=False)
    second = {name: 0.5 * t for name, t in first.items()}
    pairs = [(inputs, OP.public(inputs, backend), torch.cuda.Stream()) for inputs in (first, second)]
    torch.cuda.synchronize()
    results = []
    for _ in range(20):
        for inputs, wanted, stream in pairs:
            with torch.cuda.stream(stream):
                results.append((OP.public(inputs, backend), wanted))
    torch.cuda.synchronize()
    assert all(torch.equal(y, wanted) for y, wanted in results)


def test_a_device_that_is_not_the_current_one(backend: str) -> None:
    require("several GPUs", torch.cuda.device_count() > 1, "there is one GPU only")
    inputs = make_inputs(OP, STAGE, torch.float32, "cuda:1")
    grad_y = make_grad(OP, inputs)
    y, *grads = step(inputs, grad_y, backend)
    assert torch.cuda.current_device() == 0
    assert_all_within_bound(y, dict(zip(inputs, grads, strict=True)), expected(OP, inputs, grad_y))


def test_peak_memory(backend: str) -> None:
    inputs = make_inputs(OP, Case(16, 56, 56, 128), torch.float32, "cuda", requires_grad=False)
    OP.public(inputs, backend)
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = OP.public(inputs, backend)
    extra = torch.cuda.max_memory_allocated() - held - y.nbytes
    assert extra <= EXTRA[backend] * y.nbytes


def test_nothing_waits_for_the_device(backend: str, no_synchronisation: Callable[[], None]) -> None:
    inputs = make_inputs(OP, STAGE, torch.bfloat16, "cuda")
    grad_y = make_grad(OP, inputs)
    step(inputs, grad_y, backend)
    no_synchronisation()
    step(inputs, grad_y, backend)


def test_automatic_choice_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DFFORMER_AUTOTUNE", "1")
    monkeypatch.setattr(dispatch, "autotuner", Autotuner())
    inputs = make_inputs(OP, STAGE, torch.float32, "cuda", requires_grad=False)
    problem = Problem.of(OP.name, OP.schema_order(inputs))
    assert dispatch.autotuner.choice(problem) is None
    OP.public(inputs)
    chosen = dispatch.autotuner.choice(problem)
    assert chosen in [backend.name for backend in dispatch.candidates(problem)]


def test_doctor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("DFFORMER_CACHE_DIR", str(tmp_path))
    status = main(["doctor", "--quick", "--json", str(tmp_path / "doctor.json")])
    assert status == 0, capsys.readouterr().out
    content: dict[str, Any] = json.loads((tmp_path / "doctor.json").read_text())
    here = set(dfformer_kernels.backends()) - set(content["unavailable"]) - {"cpu"}
    assert {c["backend"] for c in content["checks"] if c["device"] == "cuda"} == here
    assert {c["backend"] for c in content["checks"] if c["default"]} <= {*here, "cpu"}


def test_benchmark(tmp_path: Path) -> None:
    arguments = ["--device", "cuda", "--quick", "--op", "dynamic_filter,global_filter"]
    bench_op.main([*arguments, "--output", str(tmp_path)])
    rows = json.loads((tmp_path / "op.json").read_text())["rows"]
    here = {name for name, reasons in dfformer_kernels.backends().items() if not reasons} - {"cpu"}
    assert {r["provider"] for r in rows} == here
    assert all(r["extra_bytes"] >= 0 for r in rows if r["direction"] == "forward")
