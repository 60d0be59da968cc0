"""Pointwise projections and the MLP: values, gradients, layouts, chunks, errors, and torch's transformations."""

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from cases import DTYPES, LAYOUTS
from conftest import require_compiled_graphs, require_compiler
from torch import Tensor
from torch.nn import functional as F

from dfformer_kernels import linear, mlp, reference
from dfformer_kernels.ops import linear as linear_module
from dfformer_kernels.ops import mlp as mlp_module
from dfformer_kernels.tolerance import BOUND, gradient_errors, relative_error

pytestmark = pytest.mark.usefixtures("one_thread")
ALL_DTYPES = pytest.mark.parametrize("dtype", DTYPES, ids=str)


class Op(NamedTuple):
    """A function of x and parameters, its definition, and the parameters' shapes given channels K of x."""

    run: Callable[..., Tensor]
    definition: Callable[..., Tensor]
    shapes: Callable[[int], tuple[tuple[int, ...], ...]]
    # Results that are rounded to the dtype on the way to y or a gradient, in units of its bound.
    units: float


def run_mlp(x: Tensor, weight1: Tensor, scale: Tensor, bias: Tensor, weight2: Tensor) -> Tensor:
    return mlp(x, weight1, (scale, bias), weight2)


def define_mlp(x: Tensor, weight1: Tensor, scale: Tensor, bias: Tensor, weight2: Tensor) -> Tensor:
    return F.linear(reference.star_relu(F.linear(x, weight1), scale, bias), weight2)


OPS = {
    "linear": Op(linear, F.linear, lambda K: ((2 * K, K),), 1),
    "linear_bias": Op(linear, F.linear, lambda K: ((2 * K, K), (2 * K,)), 1),
    "linear_narrow": Op(linear, F.linear, lambda K: ((K // 2 + 1, K),), 1),
    # hidden activations, StarReLU's result and y
    "mlp": Op(run_mlp, define_mlp, lambda K: ((4 * K, K), (1,), (), (K, 4 * K)), 3),
}
ALL_OPS = pytest.mark.parametrize("op", OPS.values(), ids=OPS)
# Fewer rows than, exactly as many as and more than where the sum over rows changes its road; odd channels; no batch.
SHAPES = [(2, 7, 7, 16), (1, 28, 28, 8), (3, 17, 19, 9), (5, 33), (1, 1), (64,), (2, 3, 4, 5, 6)]


def make(op: Op, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor]:
    """x and parameters, and a gradient that leans towards the result, as a loss's does."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    K = shape[-1]
    parameters = [normal(*size) / (size[-1] ** 0.5 if len(size) == 2 else 1) for size in op.shapes(K)]
    if op.run is run_mlp:
        parameters[1:3] = torch.tensor([0.9]), torch.tensor(0.3)
    tensors = [t.to(dtype).requires_grad_() for t in (normal(*shape), *parameters)]
    with torch.no_grad():
        y = op.definition(*(t.double() for t in tensors))
    return tensors, (y + 0.5 * normal(*y.shape)).to(dtype)


def register_gradient(f: Callable[..., Tensor], tensors: list[Tensor], grad_y: Tensor) -> tuple[Tensor, list[Tensor]]:
    y = f(*tensors)
    return y.detach(), list(torch.autograd.grad(y, tensors, grad_y))


def assert_correct(op: Op, tensors: list[Tensor], grad_y: Tensor) -> None:
    exact = [t.detach().double().requires_grad_() for t in tensors]
    wanted_y, wanted = register_gradient(op.definition, exact, grad_y.double())
    y, gradients = register_gradient(op.run, tensors, grad_y)
    assert (y.shape, y.dtype) == (wanted_y.shape, tensors[0].dtype)
    assert [(g.shape, g.dtype) for g in gradients] == [(t.shape, t.dtype) for t in tensors]
    bound = op.units * BOUND[tensors[0].dtype]
    for error in (relative_error(y, wanted_y), *gradient_errors(gradients, wanted)):
        assert error <= bound


# Values


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@ALL_DTYPES
@ALL_OPS
def test_result_and_gradients_are_within_the_bound(op: Op, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    assert_correct(op, *make(op, shape, dtype))


# Not where every element is the same: over equal terms the roundings of a float32 sum all go one way.
@pytest.mark.parametrize("layout", sorted(LAYOUTS.keys() - {"expanded_all"}))
@ALL_OPS
def test_memory_layout_does_not_matter(op: Op, layout: str) -> None:
    tensors, grad_y = make(op, (2, 20, 20, 8))
    tensors[0] = LAYOUTS[layout](tensors[0]).requires_grad_()
    assert_correct(op, tensors, LAYOUTS[layout](grad_y))


@pytest.mark.parametrize("rows", [784, 100])
@ALL_OPS
def test_transposed_and_sliced_weights(op: Op, rows: int) -> None:
    tensors, grad_y = make(op, (rows, 8))
    for i, t in enumerate(tensors[1:], start=1):
        if t.dim() == 2:
            layout = (lambda t: t.detach().t().contiguous().t()) if i == 1 else LAYOUTS["sliced"]
            tensors[i] = layout(t).requires_grad_()
    assert_correct(op, tensors, grad_y)


@pytest.mark.parametrize("bytes_at_once", [1, 3000, 10**9])
@ALL_DTYPES
def test_chunks_do_not_change_the_mlp(dtype: torch.dtype, bytes_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlp_module, "CHUNK_BYTES", bytes_at_once)
    assert_correct(OPS["mlp"], *make(OPS["mlp"], (2, 5, 7, 8), dtype))


@pytest.mark.parametrize("rows", [0, 1, 10, 1000, 99991])
def test_chunks_are_of_about_one_size(rows: int) -> None:
    sizes: list[int] = []

    def layers(x: torch.Tensor) -> torch.Tensor:
        sizes.append(len(x))
        return x

    x = torch.randn(rows, 8)
    assert torch.equal(mlp_module.in_chunks(x, 1024, 8, layers), x)
    assert sum(sizes) == rows
    assert max(sizes, default=0) * 1024 * 4 <= mlp_module.CHUNK_BYTES
    assert max(sizes, default=0) - min(sizes, default=0) <= len(sizes)


@ALL_OPS
def test_with_two_threads(op: Op) -> None:
    torch.set_num_threads(2)
    assert_correct(op, *make(op, (1, 28, 28, 8)))


@pytest.fixture(params=["mkl", "onednn"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What ordinary float32 products are, whoever made this processor."""
    if request.param == "onednn":
        require_onednn()
    monkeypatch.setattr(linear_module, "MKL_IS_SLOW", request.param == "onednn")
    monkeypatch.setattr(linear_module, "MANY_MULTIPLICATIONS", 1)
    return request.param


def require_onednn() -> None:
    if not linear_module.HAS_ONEDNN:
        pytest.skip("this build of torch has no oneDNN")


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


@pytest.mark.parametrize("rows", [7, 8])
def test_small_products_are_not_onednns(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_module, "MKL_IS_SLOW", True)
    x, weight = torch.empty(rows, 2**8), torch.empty(2**9, 2**8)
    assert linear_module.prefers_onednn(x, weight) == (rows == 8)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@ALL_OPS
def test_either_library_is_within_the_bound(op: Op, shape: tuple[int, ...], library: str) -> None:
    tensors, grad_y = make(op, shape)
    assert linear_module.prefers_onednn(tensors[0], tensors[1]) == (library == "onednn")
    last = tensors[4 if op.run is run_mlp else 1]
    assert linear_module.prefers_onednn(grad_y, last.t()) == (library == "onednn")
    assert_correct(op, tensors, grad_y)


@ALL_OPS
def test_either_library_takes_any_memory_layout(op: Op, library: str) -> None:
    for layout in ("channels_first", "sliced", "expanded_batch"):
        tensors, grad_y = make(op, (2, 20, 20, 8))
        tensors[0] = LAYOUTS[layout](tensors[0]).requires_grad_()
        assert_correct(op, tensors, LAYOUTS[layout](grad_y))


@pytest.mark.usefixtures("library")
@ALL_OPS
def test_torchs_transforms(op: Op) -> None:
    tensors, _ = make(op, (2, 3, 4))
    inputs, tangents = (tuple(t.detach() for t in tensors), tuple(torch.randn_like(t) for t in tensors))
    for transformed in (
        lambda f: torch.func.jvp(f, inputs, tangents)[1],
        lambda f: torch.func.grad(lambda *t: f(*t).square().sum())(*inputs),
        lambda f: torch.func.vmap(f, (0, *[None] * (len(inputs) - 1)))(*inputs),
        lambda f: torch.func.hessian(lambda x: f(x, *inputs[1:]).square().sum())(inputs[0]),
    ):
        assert relative_error(transformed(op.run), transformed(op.definition)) <= 4 * op.units * BOUND[torch.float32]


@ALL_OPS
def test_without_onednn(op: Op) -> None:
    with torch.backends.mkldnn.flags(enabled=False):
        assert_correct(op, *make(op, (2, 20, 20, 8)))


@ALL_OPS
def test_same_bits_every_time(op: Op) -> None:
    tensors, grad_y = make(op, (4, 28, 28, 16))
    first, again = (register_gradient(op.run, tensors, grad_y) for _ in range(2))
    assert torch.equal(first[0], again[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], again[1], strict=True))


@ALL_OPS
def test_empty(op: Op) -> None:
    tensors, grad_y = make(op, (0, 7, 7, 8))
    y, gradients = register_gradient(op.run, tensors, grad_y)
    assert (y.shape, gradients[0].shape) == (grad_y.shape, tensors[0].shape)
    assert not any(g.any() for g in gradients)


@ALL_OPS
def test_inference_computes_what_training_does(op: Op) -> None:
    tensors, _ = make(op, (2, 14, 14, 16))
    with torch.inference_mode():
        y = op.run(*tensors)
    assert relative_error(y, op.run(*tensors)) <= BOUND[torch.float32]


# Gradients


@ALL_OPS
def test_gradcheck(op: Op) -> None:
    tensors, _ = make(op, (2, 3, 4), torch.float64)
    assert torch.autograd.gradcheck(op.run, tensors)
    assert torch.autograd.gradgradcheck(op.run, tensors)


@pytest.mark.parametrize("bits", range(1, 32))
def test_only_the_gradients_asked_for(bits: int) -> None:
    tensors, grad_y = make(OPS["mlp"], (6, 4), torch.float64)
    needs = [bool(bits >> i & 1) for i in range(5)]
    for t, need in zip(tensors, needs, strict=True):
        t.requires_grad_(need)
    wanted = [t for t in tensors if t.requires_grad]
    gradients = torch.autograd.grad(run_mlp(*tensors), wanted, grad_y)
    expected = torch.autograd.grad(define_mlp(*tensors), wanted, grad_y)
    assert all(relative_error(g, e) <= BOUND[torch.float64] for g, e in zip(gradients, expected, strict=True))


def test_the_mlp_saves_its_input_and_the_hidden_activations() -> None:
    tensors, _ = make(OPS["mlp"], (2, 14, 14, 16))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore
        run_mlp(*tensors)
    activations = sum(t.numel() for t in saved if t.shape in ((2, 14, 14, 16), (2, 14, 14, 64)))
    assert activations == 2 * 14 * 14 * (16 + 64)


# torch's transformations


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@ALL_OPS
def test_autocast_casts_as_it_does_for_linear(op: Op, dtype: torch.dtype) -> None:
    tensors, grad_y = make(op, (2, 14, 14, 16))
    with torch.autocast("cpu", dtype):
        y = op.run(*tensors)
    assert y.dtype == dtype
    gradients = torch.autograd.grad(y, tensors, grad_y.to(dtype))
    assert {g.dtype for g in gradients} == {torch.float32}
    exact = [t.detach().double().requires_grad_() for t in tensors]
    wanted_y, wanted = register_gradient(op.definition, exact, grad_y.double())
    # input, weights and the incoming gradient are rounded too
    bound = (op.units + 3) * BOUND[dtype]
    for error in (relative_error(y, wanted_y), *gradient_errors(gradients, wanted)):
        assert error <= bound


@ALL_OPS
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_for_any_batch(op: Op) -> None:
    require_compiler()
    compiled = torch.compile(op.run, fullgraph=True, dynamic=True)
    for batch in (2, 3, 7):
        assert_correct(op._replace(run=compiled), *make(op, (batch, 14, 14, 8)))


# Errors

X, W1, SCALAR, W2 = torch.zeros(6, 4), torch.zeros(8, 4), torch.zeros(1), torch.zeros(3, 8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: mlp(X, W1, (SCALAR, None), W2), TypeError, "mlp: bias: expected a tensor, got NoneType"),  # type: ignore[arg-type]
        (lambda: mlp(X, W2, (SCALAR, SCALAR), W2), ValueError, r"mlp: weight1: expected shape \(N, 4\)"),
        (lambda: mlp(X, W1, (SCALAR, SCALAR), W1), ValueError, r"mlp: weight2: expected shape \(N, 8\)"),
        (lambda: mlp(X, W1.double(), (SCALAR, SCALAR), W2), TypeError, "mlp: weight1: expected dtype float32"),
        (lambda: mlp(X, W1, (W2, SCALAR), W2), ValueError, "mlp: scale: expected one element"),
        (lambda: mlp(SCALAR[0], W1, (SCALAR, SCALAR), W2), ValueError, r"mlp: x: expected shape \(\.\.\.,K\)"),
        (lambda: mlp(X.long(), W1, (SCALAR, SCALAR), W2), TypeError, "mlp: x: expected dtype float32, float64"),
        (lambda: mlp(X, W1.to("meta"), (SCALAR, SCALAR), W2), ValueError, "mlp: weight1: expected a tensor on cpu"),
        (lambda: linear(X, W2), (ValueError, RuntimeError), "weight: expected shape|mat1 and mat2"),
    ],
)
def test_bad_arguments(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("bytes_at_once", [1, 10**9])
def test_what_is_made_without_gradients_can_be_changed_in_place_with_them(
    bytes_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no view of the matrix that a product makes, as what F.linear makes without a bias is none."""
    monkeypatch.setattr(mlp_module, "CHUNK_BYTES", bytes_at_once)
    tensors, _ = make(OPS["mlp"], (2, 3, 4))
    with torch.no_grad():
        y = run_mlp(*tensors)
    expected, factor = y.sum(), torch.ones((), requires_grad=True)
    y.mul_(factor).sum().backward()
    assert factor.grad == expected


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
    require_onednn()
    monkeypatch.setattr(linear_module, "MKL_IS_SLOW", True)
    monkeypatch.setattr(linear_module, "MANY_MULTIPLICATIONS", 100 * 8 * 8)
    calls: list[int] = []
    by_onednn = linear_module._by_onednn

    def counted(x: Tensor, *others: Any) -> Tensor:
        calls.append(len(x))
        return by_onednn(x, *others)

    monkeypatch.setattr(linear_module, "_by_onednn", counted)
    op = OPS["linear_bias"]
    compiled = torch.compile(op.run, fullgraph=True, dynamic=True)
    for rows in (33, 333):
        assert_correct(op._replace(run=compiled), *make(op, (rows, 8)))
    assert calls == [333, 333]  # with the gradient of x


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
