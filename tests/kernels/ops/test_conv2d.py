"""Convolutions as an operator of their own: values, gradients, errors, and what torch.compile makes of models."""

import re
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import timm
import torch
from cases import DTYPES
from conftest import require_compiled_graphs, require_compiler
from extent import slow
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import dfformer
from dfformer.models import layers
from dfformer_kernels import convolution
from dfformer_kernels.tolerance import BOUND, gradient_errors, relative_error

ALL_DTYPES = pytest.mark.parametrize("dtype", DTYPES, ids=str)


class Case(NamedTuple):
    x: tuple[int, int, int, int]  # (B,H,W,C)
    weight: tuple[int, int, int, int]
    bias: bool
    stride: tuple[int, int]
    padding: tuple[int, int]
    groups: int = 1

    def tensors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
        generator = torch.Generator().manual_seed(0)
        x, weight, bias = (
            torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
            for shape in (self.x, self.weight, self.weight[:1])
        )
        return x, weight, bias if self.bias else None

    def operator(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.ops.dfformer.convolution(x, weight, bias, self.stride, self.padding, self.groups)

    def definition(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, self.stride, self.padding, groups=self.groups)
        return y.permute(0, 2, 3, 1)


CASES = {
    "stem": Case((2, 33, 29, 3), (8, 3, 7, 7), True, (4, 4), (2, 2)),
    "downsampling": Case((2, 15, 14, 8), (12, 8, 3, 3), True, (2, 2), (1, 1)),
    "depthwise": Case((1, 9, 11, 6), (6, 1, 7, 7), False, (1, 1), (3, 3), 6),
    "grouped": Case((3, 7, 8, 6), (9, 2, 3, 1), True, (1, 2), (0, 1), 3),
    "one_channel": Case((1, 5, 5, 1), (1, 1, 5, 5), False, (1, 1), (0, 0)),
    "empty": Case((0, 8, 8, 4), (4, 4, 3, 3), True, (2, 2), (1, 1)),
}
ALL_CASES = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def test_the_result_may_be_changed_in_place() -> None:
    case = CASES["grouped"]
    x, weight, bias = case.tensors(torch.float64)
    case.operator(x, weight, bias).relu_().sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.autograd.grad(case.operator(x, weight, bias).relu().sum(), x)[0])


@ALL_DTYPES
@ALL_CASES
def test_result_and_gradients_are_torchs(case: Case, dtype: torch.dtype) -> None:
    tensors = case.tensors(dtype)
    y, expected_y = case.operator(*tensors), case.definition(*tensors)
    assert (y.dtype, y.shape, y.is_contiguous()) == (dtype, expected_y.shape, True)
    assert relative_error(y, expected_y.double()) <= BOUND[dtype]
    given = [t for t in tensors if t is not None]
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    gradients, expected = (torch.autograd.grad(result, given, grad_y) for result in (y, expected_y))
    assert all(error <= BOUND[dtype] for error in gradient_errors(gradients, [g.double() for g in expected]))


OPCHECKED = ("stem", "grouped", "empty")


@pytest.mark.parametrize("name", [*OPCHECKED, *slow(*(name for name in CASES if name not in OPCHECKED))])
def test_opcheck(name: str) -> None:
    case = CASES[name]
    torch.library.opcheck(torch.ops.dfformer.convolution, (*case.tensors(torch.float32), *case[3:]))


def test_gradcheck() -> None:
    case = CASES["grouped"]
    tensors: Any = case.tensors(torch.float64)
    assert torch.autograd.gradcheck(case.operator, tensors)
    assert torch.autograd.gradgradcheck(case.operator, tensors)


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_only_the_gradients_asked_for(needs: tuple[bool, ...]) -> None:
    case = CASES["downsampling"]
    tensors = case.tensors(torch.float64)
    wanted = [t.requires_grad_(need) for t, need in zip(tensors, needs, strict=True) if t is not None and need]
    for t, need in zip(tensors, needs, strict=True):
        assert t is not None
        t.requires_grad_(need)
    grads = [torch.autograd.grad(f(*tensors).sum(), wanted) for f in (case.operator, case.definition)]
    assert relative_error(grads[0][0], grads[1][0]) <= BOUND[torch.float64]


BAD: dict[str, Case] = {
    "channels": Case((1, 8, 8, 4), (4, 3, 3, 3), True, (1, 1), (1, 1)),
    "kernel": Case((1, 8, 8, 4), (4, 4, 11, 3), True, (1, 1), (1, 1)),
    "stride": Case((1, 8, 8, 4), (4, 4, 3, 3), True, (0, 1), (1, 1)),
    "padding": Case((1, 8, 8, 4), (4, 4, 3, 3), True, (1, 1), (-1, 1)),
    "groups": Case((1, 8, 8, 4), (4, 4, 3, 3), True, (1, 1), (1, 1), 3),
    "dtypes": Case((1, 8, 8, 4), (4, 4, 3, 3), True, (1, 1), (1, 1)),
}


@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
@pytest.mark.parametrize("name", BAD)
def test_errors_are_torchs(name: str, fake: bool) -> None:
    case = BAD[name]
    with FakeTensorMode() if fake else nullcontext():
        x, weight, bias = case.tensors(torch.float32)
        weight = weight.double() if name == "dtypes" else weight
        expected = _error(lambda: case.definition(x, weight, bias))
        if fake and name == "dtypes" and not expected:
            pytest.skip("this torch's fake tensors take weights of any dtype")
        assert expected
        assert expected in _error(lambda: case.operator(x, weight, bias))


def _error(call: Callable[[], object]) -> str:
    """What a call raises, "" if nothing."""
    try:
        call()
    except RuntimeError as error:
        return str(error)
    return ""


# In torch.compile's graphs


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_compiled_as_eager(autocast: bool) -> None:
    require_compiler()
    case = CASES["downsampling"]
    x, weight, bias = case.tensors(torch.float32)

    def run(x: Tensor) -> Tensor:
        return convolution(x.permute(0, 3, 1, 2), weight, bias, 2, 1)

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, compiled = run(x), torch.compile(run, fullgraph=True)(x)
    dtype = torch.bfloat16 if autocast else torch.float32
    assert (compiled.dtype, compiled.shape) == (dtype, y.shape)
    assert relative_error(compiled, y.double()) <= BOUND[dtype]
    given = [t for t in (x, weight, bias) if t is not None]
    gradients, expected = (torch.autograd.grad(result.sum(), given) for result in (compiled, y))
    assert all(error <= BOUND[dtype] for error in gradient_errors(gradients, expected))


@pytest.mark.parametrize("options", [{"padding": "same"}, {"padding": 2, "dilation": 2}, {"dilation": (1, 2)}], ids=str)
@pytest.mark.parametrize("shape", [(2, 8, 9, 7), (8, 9, 7)], ids=["batch", "unbatched"])
def test_what_the_operator_does_not_take_is_torchs(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    x, weight = torch.randn(shape), torch.randn(4, 8, 3, 3)

    def run(x: Tensor) -> Tensor:
        return convolution(x, weight, **options)

    expected = F.conv2d(x, weight, **options)
    assert torch.equal(run(x), expected)
    assert relative_error(torch.compile(run, backend="eager", fullgraph=True)(x), expected.double()) <= BOUND[x.dtype]


def test_exported_programs_hold_torchs() -> None:
    model = timm.create_model("dfformer_s18", img_size=32).eval()
    graph = torch.export.export(model, (torch.zeros(1, 3, 32, 32),)).graph
    called = [str(node.target) for node in graph.nodes if node.op == "call_function" and "conv" in str(node.target)]
    assert called == ["aten.conv2d.default"] * 4


def reordered(model: nn.Module) -> list[str]:
    """Feature maps (B,H,W,C) that a compiled training step allocates with another dimension than C last in memory."""
    images = torch.randn(2, 3, 96, 160).contiguous(memory_format=torch.channels_last)

    def step() -> None:
        torch.compile(model)(images).sum().backward()

    _, codes = run_and_get_code(step)
    assert len(codes) == 2  # forward and backward
    several_channels, strides = r"(?!1\))\d+", r"\((\d+, \d+, \d+, \d+)\)"
    planes = rf"\(2, (?:24, 40|12, 20), {several_channels}\)"
    allocated = re.findall(rf"empty_strided_cpu\({planes}, {strides}", "".join(codes))
    assert allocated
    return [strides for strides in allocated if not strides.endswith(", 1")]


def two_stages() -> nn.Module:
    mixers = [dfformer.SepConv, dfformer.DynamicFilter]
    options: dict[str, Any] = {"res_scale_init_values": (None, 1.0), "strides": (4, 2), "img_size": (96, 160)}
    return dfformer.DFFormer(depths=(1, 1), dims=(8, 16), token_mixers=mixers, **options)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_models_keep_their_layout() -> None:
    require_compiler()
    require_compiled_graphs()
    assert reordered(two_stages()) == []


@pytest.mark.usefixtures("fresh_compiler")
def test_another_layout_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    require_compiler()
    monkeypatch.setattr(layers, "convolution", F.conv2d)
    assert reordered(two_stages())
