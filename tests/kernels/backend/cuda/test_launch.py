"""The ``cuda`` backend's functions without a GPU: what they pass to kernels, and where they refuse.

The kernels themselves are tested in test_cuda_kernels.py.
"""

import os
import subprocess
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import CASES, Case, Op, Operators, make_grad, make_inputs
from cases import OPS as ALL_OPS
from conftest import require_compiler
from extent import pairwise, slow
from fake_cuda import FakeKernel, HostDriver
from paths import ROOT
from torch import Tensor

from dfformer_kernels import device, dispatch, dynamic_filter, reference
from dfformer_kernels.backend.cuda import launch as cuda
from dfformer_kernels.backend.cuda import layout, nvrtc
from dfformer_kernels.backend.cuda.layout import CHIPS, KernelSpec, choose_variant
from dfformer_kernels.problem import Problem
from dfformer_kernels.tolerance import BOUND, gradient_errors, relative_error

OPS = {name: op for name, op in ALL_OPS.items() if op.name in cuda.KERNELS}


H100 = CHIPS["sm_90"]


# The backend's functions, with the reference in place of the kernels


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The backend on CPU tensors, with fake kernels that run two channels per CTA and at most five CTAs at once."""
    launched: list[tuple[int, ...]] = []

    def prepare(problem: Problem) -> cuda.LoadedKernel:
        step = KernelSpec.of(problem)
        items_per_sample = -(-step.C // 2)
        kernel: Any = FakeKernel(step, items_per_sample, launched)
        return cuda.LoadedKernel(kernel, items_per_sample, resident_ctas=5, kept=0, slots=2)

    monkeypatch.setattr(cuda, "prepare", prepare)
    monkeypatch.setattr(cuda, "_current", nullcontext)
    return launched


def compare_with_reference(op: Op, inputs: dict[str, Tensor], grad_y: Tensor) -> None:
    tensors = op.schema_order(inputs)
    present = [t for t in tensors if t is not None]
    exact = [None if t is None else t.double() for t in tensors]
    y = cuda.KERNELS[op.name](*tensors)
    assert y.dtype == grad_y.dtype
    assert relative_error(y, reference.KERNELS[op.name](*exact)) <= BOUND[y.dtype]
    backward, needs = f"{op.name}_backward", [t is not None for t in tensors]
    gradients = cuda.KERNELS[backward](grad_y, *tensors, needs)
    assert [(g.dtype, g.shape) for g in gradients] == [(t.dtype, t.shape) for t in present]
    wanted = reference.KERNELS[backward](grad_y.double(), *exact, needs)
    assert max(gradient_errors(gradients, wanted)) <= BOUND[y.dtype]


@pytest.mark.usefixtures("launched")
@pytest.mark.parametrize(
    **pairwise(
        op=list(OPS),
        case=[Case(2, 4, 6, 3), Case(3, 5, 3, 12, F=3)],
        dtype=[torch.float32, torch.bfloat16, torch.float16],
    )
)
def test_results_and_gradients_through_the_kernels_arguments(op: str, case: Case, dtype: torch.dtype) -> None:
    inputs = make_inputs(OPS[op], case, dtype, requires_grad=False)
    grad_y = make_grad(OPS[op], inputs)
    compare_with_reference(OPS[op], inputs, grad_y)
    strided = {name: torch.stack([t, t], dim=-1)[..., 0] for name, t in inputs.items()}
    compare_with_reference(OPS[op], strided, torch.stack([grad_y, grad_y], dim=-1)[..., 0])


def test_what_is_not_needed_is_not_asked_of_the_kernel(launched: list[tuple[int, ...]]) -> None:
    inputs = make_inputs(OPS["dynamic_filter+star_relu"], Case(2, 4, 6, 3), torch.float32, requires_grad=False)
    backward = partial(cuda.KERNELS["dynamic_filter_backward"], torch.ones(2, 4, 6, 3), *inputs.values())
    everything = backward([True] * 5)
    for needs in product((False, True), repeat=5):
        launched.clear()
        gradients = backward(needs)
        wanted = [gradient for gradient, need in zip(everything, needs, strict=True) if need]
        assert len(gradients) == len(wanted)
        assert all(torch.equal(a, b) for a, b in zip(gradients, wanted, strict=True))
        ((_, *arguments, _),) = launched
        need_x, need_logits, need_basis, need_scale, need_bias = needs
        assert [bool(p) for p in arguments[6:]] == [need_x, need_logits, need_basis, need_scale or need_bias, False]


# Views and allocations; all else that torch runs is a kernel on a GPU.
NO_LAUNCHES = {f"aten::{name}" for name in ("empty_like", "new_empty", "empty", "view", "unbind", "detach", "fill_")}


def test_torch_launches_nothing_beside_the_kernel_but_sums_of_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel: Any = SimpleNamespace(launch=lambda *arguments: None)
    monkeypatch.setattr(cuda, "prepare", lambda problem: cuda.LoadedKernel(kernel, 2, 5, 0, 1))
    monkeypatch.setattr(cuda, "_current", nullcontext)
    inputs = make_inputs(OPS["dynamic_filter+star_relu"], Case(2, 4, 6, 3), torch.float32, requires_grad=False)
    with torch.no_grad(), Operators() as forward:
        cuda.KERNELS["dynamic_filter"](*inputs.values())
    grad_y = torch.ones(2, 4, 6, 3)
    with torch.no_grad(), Operators() as backward:
        cuda.KERNELS["dynamic_filter_backward"](grad_y, *inputs.values(), [True] * 5)
    launches = [[name for name in seen.names if name not in NO_LAUNCHES] for seen in (forward, backward)]
    assert launches == [[], ["aten::sum", "aten::sum"]]


@pytest.mark.parametrize(
    ("B", "items_per_sample", "resident_ctas", "per_channel", "expected"),
    [
        (128, 16, 264, False, (264, 528)),
        (2, 16, 264, False, (32, 64)),
        (128, 16, 264, True, (256, 16)),
        (3, 16, 264, True, (48, 3)),
        (128, 300, 264, True, (300, 1)),
    ],
)
def test_the_backwards_ctas(
    B: int, items_per_sample: int, resident_ctas: int, per_channel: bool, expected: tuple[int, int]
) -> None:
    loaded = cuda.LoadedKernel(Any, items_per_sample, resident_ctas, 0, 2)  # type: ignore[arg-type]
    assert loaded.launch_size(B, per_channel) == expected


def test_a_wrong_tensor_never_reaches_a_kernel() -> None:
    contiguous = torch.zeros(2, 3)
    device = contiguous.device
    assert cuda._addresses(device, torch.float32, contiguous, None) == [contiguous.data_ptr(), 0]
    for wrong in (contiguous.t(), contiguous.half(), contiguous.to("meta")):
        with pytest.raises(RuntimeError, match=r"the kernel: expected contiguous torch\.float32 tensors on cpu, got"):
            cuda._addresses(device, torch.float32, contiguous, wrong)


# The backend's functions with the kernels' source, compiled for this machine instead of a GPU


@pytest.fixture
def on_the_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A chip of one multiprocessor that runs two CTAs: a CTA of the backward has several work items."""
    require_compiler()

    def compile_library(sources: object, options: list[str], arch: str) -> bytes:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.so"
        includes = [f"-I{ROOT / folder}" for folder in ("csrc/fft", "csrc/cuda", "tests/native")]
        macros = [option for option in options if option.startswith("-D")]
        command = [os.environ.get("CXX", "g++"), "-std=c++20", "-O0", "-shared", "-fPIC", *includes, *macros]
        source = ROOT / "tests/native/launch_cuda_shim.cpp"
        done = subprocess.run([*command, source, "-o", path], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return str(path).encode()

    small = replace(H100, multiprocessors=1, ctas_per_multiprocessor=2)
    driver = HostDriver()
    monkeypatch.setattr(nvrtc, "cached_cubin", compile_library)
    monkeypatch.setattr(nvrtc, "_driver", lambda: driver)
    monkeypatch.setattr(cuda, "chip_of", lambda device: small)
    monkeypatch.setattr(cuda, "_loaded", {})
    cuda.prepare.cache_clear()
    monkeypatch.setattr(cuda, "_current", nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    yield
    cuda.prepare.cache_clear()


ON_THE_HOST: list[Any] = [
    ("dynamic_filter+star_relu", Case(3, 7, 7, 40), torch.float32),
    ("dynamic_filter", Case(3, 5, 9, 40, F=3), torch.float16),
    ("global_filter+star_relu", Case(3, 10, 6, 40), torch.bfloat16),
]
ON_THE_HOST += slow(*product(OPS, CASES, [torch.float32]))


@pytest.mark.usefixtures("on_the_host")
@pytest.mark.parametrize("op", ["dynamic_filter+star_relu", "global_filter"])
def test_two_half_spectra_one_after_the_other(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a chip whose shared memory has room for one."""
    chip = replace(cuda.chip_of(0), shared_per_cta=1500)
    monkeypatch.setattr(cuda, "chip_of", lambda device: chip)
    case = Case(3, 8, 6, 5)
    variant = choose_variant(KernelSpec(case.H, case.W, case.C, case.F, torch.float32, True, True), chip)
    assert variant is not None
    assert (variant.spectra_in_shared, variant.shared_bytes) == (1, 8 * 8 * 5 * 2 + 4 * (4 * 2 + 4 * 32))
    inputs = make_inputs(OPS[op], case, torch.float32, requires_grad=False)
    compare_with_reference(OPS[op], inputs, make_grad(OPS[op], inputs))


@pytest.mark.usefixtures("on_the_host")
@pytest.mark.parametrize(("op", "case", "dtype"), ON_THE_HOST, ids=str)
def test_results_and_gradients_of_the_kernels_source(op: str, case: Case, dtype: torch.dtype) -> None:
    for backward in (False, True):
        step = KernelSpec(case.H, case.W, case.C, case.F if op.startswith("dynamic") else 0, dtype, True, backward)
        if reasons := layout.unsupported_reasons(step, H100):
            pytest.skip("; ".join(reasons))
    inputs = make_inputs(OPS[op], case, dtype, requires_grad=False)
    compare_with_reference(OPS[op], inputs, make_grad(OPS[op], inputs))


# Where it cannot run


@pytest.mark.parametrize(
    ("machine", "reason"),
    [
        ({"hip": "6.4"}, "its kernels are CUDA, torch is built for ROCm"),
        ({"cuda": None}, "torch is built without CUDA"),
        ({"available": False}, "no CUDA device"),
        ({"capabilities": [(7, 5), (6, 1)]}, "compute capability is 7.5, it needs 8.0"),
        ({"bindings": ("no bindings",)}, "no bindings"),
        ({"capabilities": [(7, 5), (9, 0)]}, None),
    ],
)
def test_why_it_is_not_available(monkeypatch: pytest.MonkeyPatch, machine: dict[str, Any], reason: str | None) -> None:
    monkeypatch.setattr(torch.version, "hip", machine.get("hip"))
    monkeypatch.setattr(torch.version, "cuda", machine.get("cuda", "13.0"))
    capabilities = machine.get("capabilities", [(9, 0)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: machine.get("available", True))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device])
    monkeypatch.setattr(nvrtc, "unavailable_reasons", lambda: machine.get("bindings", ()))
    assert cuda.unavailable_reasons() == ([] if reason is None else [reason])


def test_an_old_chip_beside_a_new_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: [(7, 5), (9, 0)][device])
    monkeypatch.setattr(cuda, "chip_of", lambda device: H100)
    problem = Problem("dynamic_filter_backward", "cuda", torch.float32, (8, 14, 14, 640), 4, True)
    assert cuda.unsupported_reasons(problem) == ["compute capability is 7.5, it needs 8.0"]
    assert cuda.unsupported_reasons(problem._replace(device_index=1)) == []
    assert cuda.unsupported_reasons(problem._replace(device_index=1, filters=17)) == [
        "it mixes at most 16 filters, there are 17"
    ]
    assert KernelSpec.of(problem) == KernelSpec(14, 14, 640, 4, torch.float32, star_relu=True, backward=True)


def test_a_kernel_is_not_loaded_into_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is loaded serves any batch size."""
    problem = Problem("dynamic_filter", "cuda", torch.float32, (8, 14, 14, 640), 4, True)
    monkeypatch.setattr(device, "capturing", lambda: True)
    monkeypatch.setattr(cuda, "_loaded", {(KernelSpec.of(problem), 0): "loaded"})
    cuda.prepare.cache_clear()
    for B in (8, 1):
        assert cuda.prepare(problem._replace(shape=(B, 14, 14, 640))) == "loaded"
    for other in (problem._replace(filters=5), problem._replace(device_index=1)):
        with pytest.raises(RuntimeError, match=r"dynamic_filter on .* call the operator once .* before capturing"):
            cuda.prepare(other)
    cuda.prepare.cache_clear()


def test_forcing_it_without_a_gpu_says_why() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(RuntimeError, match=r"cuda: .*it runs on cuda, x is on cpu"):
        dynamic_filter(torch.ones(1, 4, 4, 2), torch.zeros(1, 3, 2), torch.ones(4, 3, 3, 2), backend="cuda")
    assert [name for name in dispatch.backends() if name in ("cpu", "cuda", "torch")] == ["cpu", "cuda", "torch"]


def test_the_cpu_path_does_not_ask_the_gpus_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    def touched() -> list[str]:
        raise AssertionError("this may load libraries")

    table = tuple(replace(b, unavailable_reasons=touched) if b.device == "cuda" else b for b in dispatch.TABLE)
    assert table != dispatch.TABLE
    monkeypatch.setattr(dispatch, "TABLE", table)
    dispatch.select.cache_clear()
    dynamic_filter(torch.ones(1, 4, 4, 2), torch.zeros(1, 3, 2), torch.ones(4, 3, 3, 2))
    dispatch.select.cache_clear()
