"""Linear layers on either library: layouts, gradients, compiled graphs, and the rule that chooses."""

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import require_compiled_graphs, require_compiler
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from dfformer_kernels import linear
from dfformer_kernels.ops import linear as linear_module
from dfformer_kernels.tolerance import BOUND, gradient_errors, relative_error

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (6, 1), (1, 6), (2, 3, 4)], ids=str)
def test_linears_result_is_contiguous_and_may_be_changed_in_place(shape: tuple[int, ...], gradients: bool) -> None:
    x, weight = torch.randn(shape), torch.randn(3, shape[-1], requires_grad=True)
    with torch.set_grad_enabled(gradients):
        y = linear(x, weight)
    assert y.stride() == torch.empty(*shape[:-1], 3).stride()
    factor = torch.ones((), requires_grad=True)
    expected = F.linear(x, weight).sum()
    y.mul_(factor).sum().backward()
    assert factor.grad is not None
    assert torch.allclose(factor.grad, expected.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("shape", [(), (1,), (1, 3), (4, 3)], ids=str)
def test_linears_bias_may_be_broadcast(shape: tuple[int, ...]) -> None:
    x, weight, bias = torch.randn(4, 2), torch.randn(3, 2), torch.randn(shape, requires_grad=True)
    y = linear(x, weight, bias)
    assert torch.allclose(y, F.linear(x, weight, bias))
    y.sum().backward()
    assert bias.grad is not None


@pytest.mark.usefixtures("library")
def test_second_derivatives_of_either_library() -> None:
    inputs = [torch.randn(shape, requires_grad=True) for shape in ((2, 3, 4), (5, 4), (5,))]

    def derivatives(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
        first = torch.autograd.grad(function(*inputs).square().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(torch.stack([g.square().sum() for g in first]).sum(), inputs)
        return [*first, *second]

    wanted = derivatives(F.linear, [t.detach().double().requires_grad_() for t in inputs])
    assert max(gradient_errors(derivatives(linear, inputs), wanted)) <= 4 * BOUND[torch.float32]


@pytest.mark.parametrize(
    ("rows", "K", "N", "is_onednns"),
    [
        (7, 2**8, 2**9, False),
        (8, 2**8, 2**9, True),
        (1, 2**10, 2**10, False),
        (2, 2**10, 2**9, True),
        (2**15, 2**5, 7, False),
        (2**12, 2**5, 8, True),
        (2**15, 1, 2**5, False),
        (2**14, 2, 2**5, True),
    ],
)
def test_small_and_thin_products_are_not_onednns(
    rows: int, K: int, N: int, is_onednns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_module, "MKL_IS_SLOW", True)
    assert linear_module.prefers_onednn(torch.empty(rows, K), torch.empty(N, K)) == is_onednns


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [False, True])
def test_opcheck_of_the_operator_in_compiled_graphs(dtype: torch.dtype, bias: bool) -> None:
    tensors = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in ((2, 3, 4), (5, 4), (5,))]
    torch.library.opcheck(torch.ops.dfformer.linear, (*tensors[:2], tensors[2] if bias else None))


@pytest.mark.usefixtures("library")
def test_linear_multiplies_by_weights_of_any_layout() -> None:
    x, large, b = torch.randn(3, 4), torch.randn(10, 8), torch.randn(10)
    layouts = (large[:5, :4], large[::2, ::2], large.t()[:5, :4], large[:1, :4].expand(5, 4), large[5:, 4:].flip(0))
    for weight in layouts:
        for bias in (b[:5], b[::2], b[:1].expand(5)):
            expected = F.linear(*(t.double() for t in (x, weight, bias)))
            assert relative_error(linear(x, weight, bias), expected) <= BOUND[torch.float32]


@pytest.mark.usefixtures("fresh_compiler")
def test_one_compiled_graph_multiplies_few_and_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    require_compiler()
    require_compiled_graphs()
    monkeypatch.setattr(linear_module, "MKL_IS_SLOW", True)
    monkeypatch.setattr(linear_module, "MANY_MULTIPLICATIONS", 100 * 8 * 16)
    calls: list[int] = []

    def counted(x: Tensor, *others: Any) -> Tensor:
        calls.append(len(x))
        return F.linear(x, *others)

    monkeypatch.setattr(linear_module, "by_onednn", counted)
    compiled = torch.compile(linear, fullgraph=True, dynamic=True)
    for rows in (33, 333):
        tensors = [torch.randn(shape, requires_grad=True) for shape in ((rows, 8), (16, 8), (16,))]
        exact = [t.detach().double().requires_grad_() for t in tensors]
        gradients = torch.autograd.grad(compiled(*tensors).square().sum(), tensors)
        wanted = torch.autograd.grad(F.linear(*exact).square().sum(), exact)
        assert max(gradient_errors(gradients, wanted)) <= 2 * BOUND[torch.float32]
    assert calls == [333, 333]  # with the gradient of x


@pytest.mark.usefixtures("library")
def test_tracers_record_an_operator_that_has_a_derivative() -> None:
    x, weight = torch.randn(3, 4), torch.randn(5, 4, requires_grad=True)
    traced = make_fx(lambda x, weight: linear(x, weight))(x, weight)
    traced(x, weight).sum().backward()
    assert weight.grad is not None
    assert torch.allclose(weight.grad, x.sum(0).expand(5, 4))


def test_exported_programs_have_no_operator_of_their_own_for_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_module, "MKL_IS_SLOW", True)
    layer = torch.nn.Module()
    layer.forward = lambda x: linear(x, torch.ones(3, 4))
    program = torch.export.export(layer, (torch.ones(200, 4),))
    assert "aten.linear.default" in {str(node.target) for node in program.graph.nodes}


def test_a_processor_that_may_not_be_read_has_the_name_that_python_gives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "open", refuse)
    assert linear_module._processor() == platform.processor()
