"""Pointwise projections and the MLP: values, gradients, layouts, chunks, errors, and torch's transformations."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from cases import DTYPES, LAYOUTS
from conftest import require_compiler
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
