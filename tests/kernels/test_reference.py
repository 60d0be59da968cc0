"""The reference against calculus and against sums written out, and every backend against the pinned convention."""

import math
import platform
from collections.abc import Callable

import pytest
import torch
from cases import CASES, OPS, Case, Inputs, Op, Target, assert_within_bound, expected, gradients, make_grad, make_inputs
from conftest import targets
from native_core import run_script
from torch import Tensor

from dfformer_kernels import dynamic_filter, reference
from dfformer_kernels.tolerance import relative_error

pytestmark = pytest.mark.usefixtures("one_thread")
ALL_OPS = pytest.mark.parametrize("op", OPS.values(), ids=OPS)

# Small enough for finite differences; between them an odd and an even W, and one filter and several.
DIFFERENTIATED = [Case(2, 2, 4, 1, F=2), Case(1, 3, 3, 2, F=1)]


@ALL_OPS
@pytest.mark.parametrize("case", DIFFERENTIATED, ids=str)
def test_first_and_second_derivatives_match_finite_differences(op: Op, case: Case) -> None:
    inputs = make_inputs(op, case, torch.float64)

    def function(*tensors: Tensor) -> Tensor:
        return op.public(dict(zip(inputs, tensors, strict=True)), backend="torch")

    assert torch.autograd.gradcheck(function, tuple(inputs.values()))
    assert torch.autograd.gradgradcheck(function, tuple(inputs.values()))


@ALL_OPS
@pytest.mark.parametrize("case", CASES, ids=str)
def test_explicit_backward_is_autograd_of_the_forward(op: Op, case: Case) -> None:
    inputs = make_inputs(op, case, torch.float64)
    grad_y = make_grad(op, inputs)
    _, wanted = expected(op, inputs, grad_y)
    explicit = dict(zip(inputs, op.backward(grad_y, inputs, backend="torch"), strict=True))
    errors = {name: relative_error(explicit[name], wanted[name]) for name in wanted}
    assert max(errors.values()) <= 1e-12, errors


def test_explicit_backward_of_an_infinite_gradient_where_relu_is_flat() -> None:
    """An infinite gradient at x <= 0 meets a derivative of exactly zero: autograd says 0, not 0 * inf."""
    op = OPS["star_relu"]
    x = torch.tensor([-1.0, -0.0, 0.0, 2.0], dtype=torch.float64, requires_grad=True)
    inputs = {"x": x, "scale": torch.tensor(0.9, dtype=torch.float64), "bias": torch.tensor(0.0, dtype=torch.float64)}
    grad_y = torch.full_like(x, math.inf)
    (explicit,) = op.backward(grad_y, inputs, needs=(True, False, False), backend="torch")
    assert explicit.tolist() == gradients(op.reference(inputs), inputs, grad_y)["x"].tolist() == [0, 0, 0, math.inf]


GRADIENT_OF_WIDE_PLANES = """
import torch
from dfformer_kernels import reference
torch.set_num_threads(1)
for H, W in ((2, 64), (5, 509), (2, 4608)):
    for _ in range(6):
        x = torch.randn(1, H, W, 3, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(H, W // 2 + 1, 3, 2, dtype=torch.float64)
        reference.global_filter(x, weight).square().sum().backward()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc alone checks its heap")
def test_gradients_of_wide_planes_leave_the_heap_intact() -> None:
    """In a process of its own, where glibc checks its heap: MKL's two-dimensional complex transforms do not."""
    done = run_script(
        GRADIENT_OF_WIDE_PLANES, GLIBC_TUNABLES="glibc.malloc.check=3", LD_PRELOAD="libc_malloc_debug.so.0"
    )
    assert done.returncode == 0, done.stderr


def at_odd_offset(t: Tensor) -> Tensor:
    """Contiguous, but at an odd offset in a larger tensor, as parameters in one flat buffer are."""
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


def with_odd_strides(t: Tensor) -> Tensor:
    """Every dimension, those of one element too, has an odd stride."""
    strides: list[int] = []
    step = 1
    for size in reversed(t.shape):
        strides.insert(0, step)
        step = (step * size + 1) | 1
    larger = t.new_zeros(2 * step).as_strided(t.shape, strides)
    return larger.copy_(t)


def reversed_in_memory(t: Tensor) -> Tensor:
    """The last dimension is the outermost in memory."""
    backwards = tuple(reversed(range(t.dim())))
    return t.permute(backwards).contiguous().permute(backwards)


def odd_where_it_does_not_count(t: Tensor) -> Tensor:
    """An odd stride of a dimension of one element, which counts as contiguous all the same."""
    strides = [7 if size == 1 else stride for size, stride in zip(t.shape, t.stride(), strict=True)]
    return t.as_strided(t.shape, strides)


MEMORY = (at_odd_offset, with_odd_strides, reversed_in_memory, odd_where_it_does_not_count)


@pytest.mark.parametrize("arrange", MEMORY)
@pytest.mark.parametrize("case", [Case(2, 4, 6, 3), Case(1, 3, 5, 1, F=1)], ids=str)
@ALL_OPS
def test_no_derivative_depends_on_how_tensors_lie_in_memory(op: Op, case: Case, arrange: Callable[..., Tensor]) -> None:
    dense = make_inputs(op, case, torch.float64)
    grad_y = make_grad(op, dense)
    arranged = {name: arrange(t.detach()).requires_grad_() for name, t in dense.items()}

    def derivatives(inputs: Inputs, grad_y: Tensor) -> list[Tensor]:
        leaves = list(inputs.values())
        y = op.public(inputs, backend="torch")
        first = torch.autograd.grad(y, leaves, grad_y, create_graph=True)
        squares = torch.stack([g.square().sum() for g in first]).sum()
        second = torch.autograd.grad(squares, leaves, materialize_grads=True)
        explicit = op.backward(grad_y, inputs, backend="torch")
        return [y.detach(), *(g.detach() for g in first), *second, *explicit]

    for actual, wanted in zip(derivatives(arranged, arrange(grad_y)), derivatives(dense, grad_y), strict=True):
        assert relative_error(actual, wanted) <= 1e-13


@ALL_OPS
def test_the_reference_compiles_as_one_graph_wherever_tensors_begin(op: Op) -> None:
    inputs = make_inputs(op, Case(2, 4, 6, 3), torch.float64)
    compiled = torch.compile(getattr(reference, op.name), backend="aot_eager", fullgraph=True)
    for arrange in (torch.clone, at_odd_offset):
        arranged = {name: arrange(t.detach()) for name, t in inputs.items()}
        assert relative_error(compiled(**arranged), op.reference(arranged)) <= 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_pairs_become_complex_numbers_without_a_copy_where_they_can(dtype: torch.dtype) -> None:
    pairs = torch.arange(48, dtype=dtype).view(4, 2, 3, 2)
    assert reference._complex(pairs).data_ptr() == pairs.data_ptr()
    assert reference._complex(pairs[:, :, 1:]).data_ptr() == pairs[:, :, 1:].data_ptr()
    for arrange in MEMORY:
        arranged = arrange(pairs)
        assert torch.equal(reference._complex(arranged).real, pairs[..., 0])
        assert torch.equal(reference._complex(arranged).imag, pairs[..., 1])


# Both parities of W (a column k = W/2 or none), and sides of one and two where columns coincide.
NAIVE = [
    Case(2, 4, 6, 2),
    Case(1, 5, 7, 3, F=2),
    Case(1, 6, 5, 2),
    Case(1, 1, 4, 2),
    Case(1, 3, 1, 2),
    Case(1, 2, 2, 1),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", NAIVE, ids=str)
@pytest.mark.parametrize("target", targets(lambda t: t.op_name == "dynamic_filter"), indirect=True)
def test_every_backend_keeps_the_convention_for_non_hermitian_spectra(
    target: Target, case: Case, dtype: torch.dtype
) -> None:
    inputs = make_inputs(target.op, case, dtype, target.device, requires_grad=False)
    exact = {name: t.double().cpu() for name, t in inputs.items()}
    M_re, M_im = naive_mixed_filter(exact["logits"], exact["basis"])
    X_re, X_im = naive_rfft2(exact["x"])
    wanted = naive_irfft2(X_re * M_re - X_im * M_im, X_re * M_im + X_im * M_re, case.W)
    assert_within_bound("y", target.op.public(inputs, target.backend), wanted)


@pytest.mark.parametrize("W", [4, 5])
def test_the_convention_differs_from_dropping_imaginary_parts_first(W: int) -> None:
    """The inverse along H makes real parts of column k = 0's imaginary ones, so the test above can tell the orders."""
    generator = torch.Generator().manual_seed(0)
    Z_re, Z_im = torch.randn(2, 1, 3, W // 2 + 1, 1, generator=generator, dtype=torch.float64)
    dropped = Z_im.clone()
    dropped[:, :, 0] = 0
    assert relative_error(naive_irfft2(Z_re, dropped, W), naive_irfft2(Z_re, Z_im, W)) > 1e-3


@pytest.mark.parametrize("F", [1, 2, 5])
def test_mixing_is_a_softmax_over_filters(F: int) -> None:
    """On a plane of one pixel the step is a product with the real part of the mixed filter."""
    op = OPS["dynamic_filter"]
    inputs = make_inputs(op, Case(2, 1, 1, 3, F), torch.float64, requires_grad=False)
    wanted = inputs["x"] * naive_mixed_filter(inputs["logits"], inputs["basis"])[0]
    assert_within_bound("y", op.public(inputs, "torch"), wanted)


def test_mixing_survives_logits_whose_exponential_overflows() -> None:
    logits = torch.tensor([1000.0, -1000.0]).view(1, 2, 1)
    basis = torch.tensor([[3.0, 0.0], [5.0, 0.0]]).view(1, 1, 2, 2)
    assert dynamic_filter(torch.ones(1, 1, 1, 1), logits, basis).item() == 3


def naive_mixed_filter(logits: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of ``M`` (B,H,K,C), one routed filter at a time."""
    (B, F, C), (H, K, _, _) = logits.shape, basis.shape
    M = torch.zeros(2, B, H, K, C, dtype=torch.float64)
    for b in range(B):
        for c in range(C):
            exponentials = [math.exp(logits[b, f, c]) for f in range(F)]
            for f in range(F):
                M[:, b, :, :, c] += exponentials[f] / sum(exponentials) * basis[:, :, f].movedim(-1, 0)
    return M[0], M[1]


def cos_sin(rows: int, columns: int, period: int) -> tuple[Tensor, Tensor]:
    """``cos`` and ``sin`` of ``2 pi i j / period``."""
    products = torch.outer(torch.arange(rows), torch.arange(columns)) % period
    angles = 2 * math.pi / period * products.double()
    return angles.cos(), angles.sin()


def naive_rfft2(u: Tensor) -> tuple[Tensor, Tensor]:
    """``X[q,k] = sum_hw u[h,w] exp(-2 pi i (kw/W + qh/H)) / sqrt(HW)`` for k up to W/2."""
    H, W = u.shape[1:3]
    cos_w, sin_w = cos_sin(W // 2 + 1, W, W)
    cos_h, sin_h = cos_sin(H, H, H)
    re, im = (torch.einsum("kw,bhwc->bhkc", matrix, u) for matrix in (cos_w, -sin_w))
    X_re = torch.einsum("qh,bhkc->bqkc", cos_h, re) + torch.einsum("qh,bhkc->bqkc", sin_h, im)
    X_im = torch.einsum("qh,bhkc->bqkc", cos_h, im) - torch.einsum("qh,bhkc->bqkc", sin_h, re)
    return X_re / math.sqrt(H * W), X_im / math.sqrt(H * W)


def naive_irfft2(Z_re: Tensor, Z_im: Tensor, W: int) -> Tensor:
    """Inverse along H; imaginary part of the columns k = 0 and k = W/2 dropped; then the real inverse along W."""
    H, K = Z_re.shape[1:3]
    cos_h, sin_h = cos_sin(H, H, H)
    re = torch.einsum("hq,bqkc->bhkc", cos_h, Z_re) - torch.einsum("hq,bqkc->bhkc", sin_h, Z_im)
    im = torch.einsum("hq,bqkc->bhkc", cos_h, Z_im) + torch.einsum("hq,bqkc->bhkc", sin_h, Z_re)
    own_mirror = [k for k in range(K) if 2 * k % W == 0]
    im[:, :, own_mirror] = 0
    D = torch.full((K,), 2.0, dtype=torch.float64)
    D[own_mirror] = 1
    cos_w, sin_w = cos_sin(K, W, W)
    y = torch.einsum("kw,bhkc->bhwc", D[:, None] * cos_w, re) - torch.einsum("kw,bhkc->bhwc", D[:, None] * sin_w, im)
    return y / math.sqrt(H * W)
