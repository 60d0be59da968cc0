"""Every operator on every backend: values, gradients, memory layouts, determinism, autocast."""

import math
from collections.abc import Callable
from itertools import product

import pytest
import torch
from cases import (
    CASES,
    DTYPES,
    EMPTY_CASES,
    LAYOUTS,
    OPS,
    SMALL,
    TARGETS,
    Case,
    Inputs,
    Op,
    Target,
    assert_all_within_bound,
    assert_same_bits,
    assert_within_bound,
    expected,
    gradients,
    make_grad,
    make_inputs,
    saved_for_backward,
)
from conftest import require_backend, require_support, targets
from extent import FULL, pairwise
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dfformer_kernels import dynamic_filter, global_filter
from dfformer_kernels.problem import is_channels_first

pytestmark = pytest.mark.usefixtures("one_thread")
FILTERS: dict[str, Callable[..., Tensor]] = {"dynamic_filter": dynamic_filter, "global_filter": global_filter}


# Several of the compiled core's 16384-element chunks, the last one partial.
SEVERAL_CHUNKS = Case(2, 14, 14, 90)


def run(target: Target, inputs: Inputs, grad_y: Tensor) -> tuple[Tensor, Inputs]:
    require_support(target.backend, target.op.name, target.op.schema_order(inputs))
    y = target.op.public(inputs, target.backend)
    return y.detach(), gradients(y, inputs, grad_y)


# Values


# Every case in float32, and in one other dtype.
CASES_AND_DTYPES = [(c, d) for i, c in enumerate(CASES) for j, d in enumerate(DTYPES) if FULL or j in (0, 1 + i % 3)]


@pytest.mark.parametrize(("case", "dtype"), CASES_AND_DTYPES, ids=str)
def test_result_and_gradients_are_within_the_bound(target: Target, dtype: torch.dtype, case: Case) -> None:
    inputs = make_inputs(target.op, case, dtype, target.device)
    grad_y = make_grad(target.op, inputs)
    y, grads = run(target, inputs, grad_y)
    assert_all_within_bound(y, grads, expected(target.op, inputs, grad_y))
    assert (y.dtype, y.shape, y.is_contiguous()) == (dtype, inputs["x"].shape, True)
    for name, gradient in grads.items():
        assert (gradient.dtype, gradient.shape) == (inputs[name].dtype, inputs[name].shape), name


@pytest.mark.parametrize(
    ("dtype", "parameter_dtype"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float16),
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.float32),
    ],
    ids=str,
)
def test_parameters_may_be_stored_in_another_dtype(
    target: Target, dtype: torch.dtype, parameter_dtype: torch.dtype
) -> None:
    inputs = make_inputs(target.op, SMALL, dtype, target.device, parameter_dtype)
    grad_y = make_grad(target.op, inputs)
    y, grads = run(target, inputs, grad_y)
    assert_all_within_bound(y, grads, expected(target.op, inputs, grad_y))
    assert {name: g.dtype for name, g in grads.items()} == {name: t.dtype for name, t in inputs.items()}


@pytest.mark.parametrize(**pairwise(target=targets(), dtype=DTYPES, layout=list(LAYOUTS)))
def test_memory_layout_of_x_and_grad_y_does_not_matter(target: Target, dtype: torch.dtype, layout: str) -> None:
    inputs = make_inputs(target.op, SMALL, dtype, target.device)
    inputs["x"] = LAYOUTS[layout](inputs["x"]).requires_grad_()
    grad_y = LAYOUTS[layout](make_grad(target.op, inputs))
    y, grads = run(target, inputs, grad_y)
    assert_all_within_bound(y, grads, expected(target.op, inputs, grad_y))
    assert is_channels_first(y) if layout == "channels_first" else y.is_contiguous()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("target", targets(lambda t: t.op.parameters), indirect=True)
def test_memory_layout_of_parameters_does_not_matter(target: Target, layout: str) -> None:
    inputs = make_inputs(target.op, SMALL, torch.float32, target.device)
    for name in target.op.parameters:
        inputs[name] = LAYOUTS[layout](inputs[name]).requires_grad_()
    grad_y = make_grad(target.op, inputs)
    assert_all_within_bound(*run(target, inputs, grad_y), expected(target.op, inputs, grad_y))


# Not on cpu, for which tests/kernels/backend/cpu has more such cases.
ELSEWHERE = [t.backend for t in TARGETS if (t.op_name, t.device) == ("dynamic_filter", "cpu") and t.backend != "cpu"]


@pytest.mark.parametrize("backend", ELSEWHERE)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    B=st.integers(1, 2),
    H=st.integers(1, 24),
    W=st.integers(1, 24),
    C=st.integers(1, 20),
    F=st.integers(1, 6),
    layout=st.sampled_from(sorted(LAYOUTS)),
)
def test_dynamic_filter_of_any_shape(backend: str, B: int, H: int, W: int, C: int, F: int, layout: str) -> None:
    require_backend(backend)
    op = OPS["dynamic_filter"]
    inputs = make_inputs(op, Case(B, H, W, C, F), torch.float32, requires_grad=False)
    inputs["x"] = LAYOUTS[layout](inputs["x"]).requires_grad_()
    grad_y = make_grad(op, inputs)
    y = op.public(inputs, backend)
    assert_all_within_bound(y, gradients(y, inputs, grad_y), expected(op, inputs, grad_y))


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (2, 3, 4, 5, 6)], ids=str)
@pytest.mark.parametrize("target", targets(lambda t: t.op_name == "star_relu"), indirect=True)
def test_star_relu_keeps_the_shape_of_x(target: Target, shape: tuple[int, ...]) -> None:
    inputs = make_inputs(target.op, SMALL, torch.float32, target.device)
    x = torch.linspace(0.5, 2, math.prod(shape), device=target.device).reshape(shape)
    inputs["x"] = x.requires_grad_()
    grad_y = torch.ones_like(x)
    assert_all_within_bound(*run(target, inputs, grad_y), expected(target.op, inputs, grad_y))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("target", targets(lambda t: t.op.scalars), indirect=True)
def test_a_scalar_has_one_element_in_any_shape(target: Target, shape: tuple[int, ...]) -> None:
    inputs = make_inputs(target.op, SMALL, torch.float32, target.device)
    grad_y = make_grad(target.op, inputs)
    wanted = run(target, inputs, grad_y)
    reshaped = {name: inputs[name].detach().reshape(shape).requires_grad_() for name in target.op.scalars}
    y, grads = run(target, inputs | reshaped, grad_y)
    assert torch.equal(y, wanted[0])
    for name, gradient in grads.items():
        assert torch.equal(gradient, wanted[1][name].reshape((inputs | reshaped)[name].shape)), name


@pytest.mark.parametrize("conjugate", [False, True], ids=["plain", "conjugated"])
@pytest.mark.parametrize("name", FILTERS)
def test_filters_may_be_complex(name: str, conjugate: bool) -> None:
    """Conjugated lazily, as ``Tensor.conj`` does."""
    inputs = make_inputs(OPS[name], SMALL, torch.float32)
    *others, real = inputs.values()
    filters = torch.view_as_complex(real.detach()).requires_grad_()
    y = FILTERS[name](*others, filters.conj() if conjugate else filters)
    y.backward(make_grad(OPS[name], inputs))
    sign = torch.tensor([1.0, -1.0 if conjugate else 1.0])
    resolved = (real.detach() * sign).requires_grad_()
    wanted = FILTERS[name](*others, resolved)
    wanted.backward(make_grad(OPS[name], inputs))
    assert torch.equal(y, wanted)
    assert filters.grad is not None
    assert resolved.grad is not None
    assert torch.equal(torch.view_as_real(filters.grad.resolve_conj()), resolved.grad * sign)


@pytest.mark.parametrize("case", EMPTY_CASES, ids=str)
def test_an_empty_x_gives_an_empty_result_and_zero_gradients(target: Target, case: Case) -> None:
    inputs = make_inputs(target.op, case, torch.float32, target.device)
    y, grads = run(target, inputs, torch.empty_like(inputs["x"]))
    assert (y.shape, y.dtype) == (inputs["x"].shape, torch.float32)
    for name, gradient in grads.items():
        assert torch.equal(gradient, torch.zeros_like(inputs[name])), name


# Gradients: which, what is kept for them, second ones


def test_each_subset_of_gradients_is_computed_alone(target: Target) -> None:
    inputs = make_inputs(target.op, SMALL, torch.float32, target.device)
    grad_y = make_grad(target.op, inputs)
    _, wanted = expected(target.op, inputs, grad_y)
    for wants in product([False, True], repeat=len(inputs)):
        if not any(wants):
            continue
        leaves = {n: t.detach().requires_grad_(want) for (n, t), want in zip(inputs.items(), wants, strict=True)}
        target.op.public(leaves, target.backend).backward(grad_y)
        for name, leaf in leaves.items():
            if leaf.requires_grad:
                assert leaf.grad is not None, (name, wants)
                assert_within_bound(f"grad_{name} of {wants}", leaf.grad, wanted[name])
            else:
                assert leaf.grad is None, (name, wants)


def test_backward_operator_returns_what_is_asked_for(target: Target) -> None:
    inputs = make_inputs(target.op, SMALL, torch.float32, target.device, requires_grad=False)
    grad_y = make_grad(target.op, inputs)
    everything = dict(zip(inputs, target.op.backward(grad_y, inputs, backend=target.backend), strict=True))
    for wants in product([False, True], repeat=len(inputs)):
        wanted = dict(zip(inputs, wants, strict=True))
        needs = [wanted.get(name, False) for name in target.op.names]
        alone = target.op.backward(grad_y, inputs, needs, target.backend)
        names = [name for name, want in wanted.items() if want]
        assert [g.shape for g in alone] == [inputs[name].shape for name in names]
        assert all(torch.equal(g, everything[name]) for name, g in zip(names, alone, strict=True)), wants


def test_only_the_inputs_are_saved_for_backward(target: Target) -> None:
    inputs = make_inputs(target.op, SMALL, torch.float32, target.device)
    inputs["x"] = LAYOUTS["channels_first"](inputs["x"]).requires_grad_()  # and no contiguous copy of x
    with saved_for_backward() as saved:
        target.op.public(inputs, target.backend)
    assert sorted(t.data_ptr() for t in saved) == sorted(t.data_ptr() for t in inputs.values())
    assert sum(t.numel() for t in saved) == sum(t.numel() for t in inputs.values())


def test_second_derivatives_are_right_on_every_backend(target: Target) -> None:
    assert_second_derivatives_within_bound(target, make_inputs(target.op, SMALL, torch.float32, target.device))


def assert_second_derivatives_within_bound(target: Target, inputs: Inputs) -> None:
    exact = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
    grad_y = make_grad(target.op, inputs)
    actual = second_derivatives(target.op.public(inputs, target.backend), inputs, grad_y)
    wanted = second_derivatives(target.op.reference(exact), exact, grad_y.double())
    for name, gradient in actual.items():
        assert_within_bound(name, gradient, wanted[name])


def second_derivatives(y: Tensor, inputs: Inputs, grad_y: Tensor) -> Inputs:
    """Gradients of the gradient penalty ``sum over inputs of |grad|^2``."""
    first = torch.autograd.grad(y, list(inputs.values()), grad_y, create_graph=True)
    penalty = torch.stack([g.square().sum() for g in first]).sum()
    second = torch.autograd.grad(penalty, list(inputs.values()), materialize_grads=True)
    return dict(zip(inputs, second, strict=True))


def test_autograd_function_can_be_applied_directly(target: Target) -> None:
    inputs = make_inputs(target.op, SMALL, torch.float32, target.device)
    grad_y = make_grad(target.op, inputs)
    wanted = run(target, inputs, grad_y)
    assert target.op.function.__name__.lower() == target.op.name.replace("_", "") + "function"
    y = target.op.apply(inputs, target.backend)
    assert_same_bits((y.detach(), gradients(y, inputs, grad_y)), wanted)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_an_infinite_input_stays_in_its_sample(op: Op) -> None:
    inputs = make_inputs(op, SMALL, torch.float32, requires_grad=False)
    wanted = op.public(inputs)
    inputs["x"][0, 0, 0, 0] = math.inf
    y = op.public(inputs)
    assert not y[0].isfinite().all()
    assert torch.equal(y[1], wanted[1])


# Determinism


def test_results_have_the_same_bits_from_run_to_run(target: Target) -> None:
    torch.set_num_threads(2)
    inputs = make_inputs(target.op, SEVERAL_CHUNKS, torch.float32, target.device)
    grad_y = make_grad(target.op, inputs)
    first = run(target, inputs, grad_y)
    for _ in range(3):
        assert_same_bits(run(target, inputs, grad_y), first)


# Autocast


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_neither_dtype_nor_accuracy(target: Target, autocast_dtype: torch.dtype) -> None:
    inputs = make_inputs(target.op, SMALL, torch.float32, target.device)
    grad_y = make_grad(target.op, inputs)
    with torch.autocast(target.device, autocast_dtype):
        y, grads = run(target, inputs, grad_y)
    assert y.dtype == torch.float32
    assert_all_within_bound(y, grads, expected(target.op, inputs, grad_y))


def test_autocast_does_not_reach_second_derivatives(target: Target) -> None:
    inputs = make_inputs(target.op, SMALL, torch.float32, target.device)
    with torch.autocast(target.device, torch.bfloat16):
        assert_second_derivatives_within_bound(target, inputs)
