"""Every operator on every backend: values, gradients, layouts, errors, and life under torch's transformations."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from cases import (
    CASES,
    DTYPES,
    EMPTY_CASES,
    LAYOUTS,
    OPS,
    TARGETS,
    Case,
    Inputs,
    Op,
    Operators,
    Target,
    assert_all_within_bound,
    assert_within_bound,
    expected,
    gradients,
    make_grad,
    make_inputs,
)
from conftest import require_backend, require_compiler, require_support, targets
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dfformer_kernels import dynamic_filter, global_filter, star_relu
from dfformer_kernels.problem import is_channels_first

pytestmark = pytest.mark.usefixtures("one_thread")
ALL_OPS = pytest.mark.parametrize("op", OPS.values(), ids=OPS)
ALL_DTYPES = pytest.mark.parametrize("dtype", DTYPES, ids=str)
FILTERS: dict[str, Callable[..., Tensor]] = {"dynamic_filter": dynamic_filter, "global_filter": global_filter}
SMALL = Case(2, 4, 6, 3)
# Several of the compiled core's 16384-element chunks, the last one partial.
SEVERAL_CHUNKS = Case(2, 14, 14, 90)


def run(target: Target, inputs: Inputs, grad_y: Tensor) -> tuple[Tensor, Inputs]:
    require_support(target.backend, target.op.name, target.op.schema_order(inputs))
    y = target.op.public(inputs, target.backend)
    return y.detach(), gradients(y, inputs, grad_y)


def assert_same_bits(actual: tuple[Tensor, Inputs], wanted: tuple[Tensor, Inputs]) -> None:
    assert torch.equal(actual[0], wanted[0])
    assert actual[1].keys() == wanted[1].keys()
    for name, gradient in actual[1].items():
        assert torch.equal(gradient, wanted[1][name]), name


# Values


@pytest.mark.parametrize("case", CASES, ids=str)
@ALL_DTYPES
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


@pytest.mark.parametrize("layout", LAYOUTS)
@ALL_DTYPES
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


@pytest.mark.parametrize("backend", [t.backend for t in TARGETS if (t.op_name, t.device) == ("dynamic_filter", "cpu")])
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
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
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
    y = target.op.apply(inputs, target.backend)
    assert_same_bits((y.detach(), gradients(y, inputs, grad_y)), wanted)


# Determinism


def test_results_have_the_same_bits_from_run_to_run(target: Target) -> None:
    torch.set_num_threads(2)
    inputs = make_inputs(target.op, SEVERAL_CHUNKS, torch.float32, target.device)
    grad_y = make_grad(target.op, inputs)
    first = run(target, inputs, grad_y)
    for _ in range(3):
        assert_same_bits(run(target, inputs, grad_y), first)


@ALL_DTYPES
@pytest.mark.parametrize("target", targets(lambda t: t.backend == "cpu"), indirect=True)
def test_cpu_results_have_the_same_bits_for_any_number_of_threads(target: Target, dtype: torch.dtype) -> None:
    inputs = make_inputs(target.op, SEVERAL_CHUNKS, dtype)
    grad_y = make_grad(target.op, inputs)
    results = []
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        results.append(run(target, inputs, grad_y))
    for result in results[1:]:
        assert_same_bits(result, results[0])


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


# torch.library, meta and fake tensors, torch.compile, torch.export


@ALL_OPS
def test_registration_passes_opcheck(op: Op) -> None:
    inputs = make_inputs(op, SMALL, torch.float32)
    torch.library.opcheck(getattr(torch.ops.dfformer, op.name).default, (*op.schema_order(inputs), None))


@ALL_OPS
def test_registration_of_the_backward_passes_opcheck(op: Op) -> None:
    inputs = make_inputs(op, SMALL, torch.float32, requires_grad=False)
    needs = [name in inputs for name in op.names]
    arguments = (make_grad(op, inputs), *op.schema_order(inputs), needs, None)
    torch.library.opcheck(getattr(torch.ops.dfformer, f"{op.name}_backward").default, arguments)


def signature(tensors: Sequence[Tensor]) -> list[tuple[Any, ...]]:
    return [(t.shape, t.dtype, t.stride()) for t in tensors]


@pytest.mark.parametrize("kind", ["meta", "fake"])
@pytest.mark.parametrize("layout", ["channels_first", "sliced", "expanded_batch"])
@ALL_OPS
def test_tensors_without_data_get_the_shapes_and_strides_of_real_ones(op: Op, layout: str, kind: str) -> None:
    inputs = make_inputs(op, SMALL, torch.bfloat16, requires_grad=False)
    for name in ("x", *op.parameters):
        inputs[name] = LAYOUTS[layout](inputs[name])
    real = [op.public(inputs), *op.backward(inputs["x"], inputs)]
    with FakeTensorMode() if kind == "fake" else nullcontext() as mode:
        without = {name: mode.from_tensor(t) if mode else t.to("meta") for name, t in inputs.items()}
        hollow = [op.public(without), *op.backward(without["x"], without)]
    assert signature(hollow) == signature(real)
    assert {t.device.type for t in hollow} == {"meta" if kind == "meta" else "cpu"}


@pytest.mark.parametrize("requires_grad", [False, True])
@ALL_OPS
def test_modes_see_the_operator(op: Op, requires_grad: bool) -> None:
    inputs = make_inputs(op, SMALL, torch.float32, requires_grad=requires_grad)
    with Operators() as seen:
        y = op.public(inputs)
    assert seen.names.count(f"dfformer::{op.name}") == 1
    assert torch.equal(y, op.public(inputs))


@ALL_OPS
def test_lazily_negated_input_is_negated(op: Op) -> None:
    inputs = make_inputs(op, SMALL, torch.float32, requires_grad=False)
    x = inputs["x"]
    lazy = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert lazy.is_neg()
    assert torch.equal(op.public(inputs | {"x": lazy}), op.public(inputs))


def surrounded(op: Op) -> Callable[[Inputs], Tensor]:
    """The operator between others, so that a compiler has something to do; all of it exact in floating point."""
    return lambda inputs: 2 * op.public(inputs | {"x": -inputs["x"]})


def result_and_gradients(function: Callable[[Inputs], Tensor], inputs: Inputs) -> tuple[Tensor, Inputs]:
    y = function(inputs)
    return y.detach(), gradients(y, inputs, LAYOUTS["expanded_all"](y))


@pytest.mark.parametrize(
    ("name", "compiler"),
    [*((name, "aot_eager") for name in OPS), ("dynamic_filter+star_relu", "inductor")],
)
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_results_equal_eager_ones_from_the_first_call_on(name: str, compiler: str) -> None:
    """The first compiled call runs the kernels under torch's tracing modes, which must not change what they compute."""
    if compiler == "inductor":
        require_compiler()
    op = OPS[name]
    inputs = make_inputs(op, SMALL, torch.float32)
    compiled = torch.compile(surrounded(op), fullgraph=True, backend=compiler)
    first = result_and_gradients(compiled, inputs)
    second = result_and_gradients(compiled, inputs)
    eager = result_and_gradients(surrounded(op), inputs)
    assert_same_bits(first, eager)
    assert_same_bits(second, eager)


@ALL_OPS
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_kernels_are_right_on_their_first_call(op: Op) -> None:
    """Where no gradient is wanted, torch (2.14) runs a graph's first call in a mode that drops lazy conjugations."""
    inputs = make_inputs(op, SMALL, torch.float32, requires_grad=False)

    def kernels(inputs: Inputs) -> list[Tensor]:
        return [op.public(inputs), *op.backward(inputs["x"], inputs)]

    eager = kernels(inputs)
    first = torch.compile(kernels, fullgraph=True, backend="aot_eager")(inputs)
    assert [torch.equal(actual, wanted) for actual, wanted in zip(first, eager, strict=True)] == [True] * len(eager)


@pytest.mark.usefixtures("fresh_compiler")
def test_one_dynamic_graph_serves_all_shapes() -> None:
    op = OPS["dynamic_filter+star_relu"]
    compiled = torch.compile(surrounded(op), fullgraph=True, dynamic=True, backend="aot_eager")
    # No two sizes of the first problem are equal: torch takes those for one and the same.
    first, second = (make_inputs(op, case, torch.float32) for case in (Case(5, 7, 18, 3), Case(3, 4, 6, 8, F=5)))
    assert_same_bits(result_and_gradients(compiled, first), result_and_gradients(surrounded(op), first))
    with torch.compiler.set_stance("fail_on_recompile"):
        result = result_and_gradients(compiled, second)
    assert_same_bits(result, result_and_gradients(surrounded(op), second))


class Step(nn.Module):
    def forward(self, x: Tensor, logits: Tensor, basis: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return dynamic_filter(star_relu(x, scale, bias), logits, basis, (scale, bias))


def test_export_with_a_dynamic_batch() -> None:
    op = OPS["dynamic_filter+star_relu"]
    batch = torch.export.Dim("batch")
    dynamic_shapes = {"x": {0: batch}, "logits": {0: batch}, "basis": None, "scale": None, "bias": None}
    example = tuple(make_inputs(op, SMALL, torch.float32, requires_grad=False).values())
    program = torch.export.export(Step(), example, dynamic_shapes=dynamic_shapes)
    inputs = tuple(make_inputs(op, Case(5, 4, 6, 3), torch.float32, requires_grad=False).values())
    assert torch.equal(program.module()(*inputs), Step()(*inputs))


# Errors

Change = Callable[[Tensor], Tensor]


class Bad(NamedTuple):
    """A bad input: which argument of which operator, how it is spoilt, what is raised and what its message names."""

    op_name: str
    argument: str
    change: Change
    exception: type[Exception]
    accepted: str
    given: str


NUMBERS = "dtype float32, float64, bfloat16, float16"
X = "shape (B,H,W,C) with H, W >= 1"
LOGITS = "shape (B,F,C) = (2, F >= 1, 3) for x of shape (2, 4, 6, 3)"
BASIS = "shape (H,K,F,2), K = W//2 + 1, = (4, 4, 4, 2) for x of shape (2, 4, 6, 3)"
WEIGHT = "shape (H,K,C,2), K = W//2 + 1, = (4, 4, 3, 2) for x of shape (2, 4, 6, 3)"
COMPANION = "dtype float32, bfloat16, float16 beside float32 x"
SPECTRAL = "dtype float32 beside float32 x"


def to_meta(t: Tensor) -> Tensor:
    return t.to("meta")


BAD_INPUTS = {
    "x-integer": Bad("star_relu", "x", Tensor.long, TypeError, NUMBERS, "int64"),
    "x-bool": Bad("global_filter", "x", Tensor.bool, TypeError, NUMBERS, "bool"),
    "x-complex": Bad("dynamic_filter", "x", lambda t: t.to(torch.complex64), TypeError, NUMBERS, "complex64"),
    "x-rank-3": Bad("dynamic_filter", "x", lambda t: t[0], ValueError, X, "(4, 6, 3)"),
    "x-rank-5": Bad("global_filter", "x", lambda t: t[None], ValueError, X, "(1, 2, 4, 6, 3)"),
    "x-no-rows": Bad("dynamic_filter", "x", lambda t: t[:, :0], ValueError, X, "(2, 0, 6, 3)"),
    "x-no-columns": Bad("global_filter", "x", lambda t: t[:, :, :0], ValueError, X, "(2, 4, 0, 3)"),
    "logits-rank": Bad("dynamic_filter", "logits", lambda t: t[0], ValueError, LOGITS, "(4, 3)"),
    "logits-batch": Bad("dynamic_filter", "logits", lambda t: t[:1], ValueError, LOGITS, "(1, 4, 3)"),
    "logits-channels": Bad("dynamic_filter", "logits", lambda t: t[..., :2], ValueError, LOGITS, "(2, 4, 2)"),
    "logits-no-filters": Bad("dynamic_filter", "logits", lambda t: t[:, :0], ValueError, LOGITS, "(2, 0, 3)"),
    "logits-float64": Bad("dynamic_filter", "logits", Tensor.double, TypeError, COMPANION, "float64"),
    "logits-integer": Bad("dynamic_filter", "logits", Tensor.long, TypeError, COMPANION, "int64"),
    "logits-device": Bad("dynamic_filter", "logits", to_meta, ValueError, "on cpu, where x is", "it on meta"),
    "basis-rank": Bad("dynamic_filter", "basis", lambda t: t[0], ValueError, BASIS, "(4, 4, 2)"),
    "basis-rows": Bad("dynamic_filter", "basis", lambda t: t[:3], ValueError, BASIS, "(3, 4, 4, 2)"),
    "basis-columns": Bad("dynamic_filter", "basis", lambda t: t[:, :3], ValueError, BASIS, "(4, 3, 4, 2)"),
    "basis-filters": Bad("dynamic_filter", "basis", lambda t: t[:, :, :3], ValueError, BASIS, "(4, 4, 3, 2)"),
    "basis-real": Bad("dynamic_filter", "basis", lambda t: t[..., :1], ValueError, BASIS, "(4, 4, 4, 1)"),
    "basis-16-bit": Bad("dynamic_filter", "basis", Tensor.bfloat16, TypeError, SPECTRAL, "bfloat16"),
    "basis-float64": Bad("dynamic_filter", "basis", Tensor.double, TypeError, SPECTRAL, "float64"),
    "basis-device": Bad("dynamic_filter", "basis", to_meta, ValueError, "on cpu, where x is", "it on meta"),
    "weight-columns": Bad("global_filter", "weight", lambda t: t[:, :3], ValueError, WEIGHT, "(4, 3, 3, 2)"),
    "weight-channels": Bad("global_filter", "weight", lambda t: t[:, :, :1], ValueError, WEIGHT, "(4, 4, 1, 2)"),
    "weight-16-bit": Bad("global_filter", "weight", Tensor.half, TypeError, SPECTRAL, "float16"),
    "weight-device": Bad("global_filter", "weight", to_meta, ValueError, "on cpu, where x is", "it on meta"),
    "scale-two": Bad("star_relu", "scale", lambda t: t.expand(2), ValueError, "one element", "shape (2,)"),
    # a leaf, whose gradient a backend that reads one element would get wrong
    "scale-per-channel": Bad(
        "dynamic_filter+star_relu",
        "scale",
        lambda t: torch.ones(3, requires_grad=True),
        ValueError,
        "one element",
        "shape (3,)",
    ),
    "bias-none": Bad(
        "global_filter+star_relu", "bias", lambda t: t.new_zeros(0), ValueError, "one element", "shape (0,)"
    ),
    "bias-integer": Bad("global_filter+star_relu", "bias", Tensor.int, TypeError, COMPANION, "int32"),
    "bias-float64": Bad("star_relu", "bias", Tensor.double, TypeError, COMPANION, "float64"),
    "scale-device": Bad("star_relu", "scale", to_meta, ValueError, "on cpu, where x is", "it on meta"),
}
ALL_BAD_INPUTS = pytest.mark.parametrize("bad", BAD_INPUTS.values(), ids=BAD_INPUTS)

ENTRIES: dict[str, Callable[..., Any]] = {"public": Op.public, "function": Op.apply, "custom_op": Op.custom_op}
ALL_ENTRIES = pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)


def assert_message(info: pytest.ExceptionInfo[Exception], *fragments: str) -> None:
    message = str(info.value)
    assert [fragment for fragment in fragments if fragment not in message] == [], message


@ALL_ENTRIES
@ALL_BAD_INPUTS
def test_bad_input_raises_naming_argument_given_and_accepted(bad: Bad, entry: Callable[..., Tensor]) -> None:
    op = OPS[bad.op_name]
    inputs = make_inputs(op, SMALL, torch.float32)
    with pytest.raises(bad.exception) as info:
        entry(op, inputs | {bad.argument: bad.change(inputs[bad.argument].detach())})
    assert_message(info, f"{op.name}: {bad.argument} must be {bad.accepted}", f"got {bad.given}")


@ALL_BAD_INPUTS
def test_bad_input_of_the_backward_operator_raises_alike(bad: Bad) -> None:
    op = OPS[bad.op_name]
    inputs = make_inputs(op, SMALL, torch.float32, requires_grad=False)
    with pytest.raises(bad.exception) as info:
        op.backward(make_grad(op, inputs), inputs | {bad.argument: bad.change(inputs[bad.argument])})
    assert_message(info, f"{bad.argument} must be {bad.accepted}", f"got {bad.given}")


BAD_GRADIENTS: dict[str, tuple[Change, type[Exception], str, str]] = {
    "shape": (lambda t: t[:1], ValueError, "shape (2, 4, 6, 3), that of x", "(1, 4, 6, 3)"),
    "rank": (lambda t: t[0, 0], ValueError, "shape (2, 4, 6, 3), that of x", "(6, 3)"),
    "integer": (Tensor.long, TypeError, COMPANION, "int64"),
    "float64": (Tensor.double, TypeError, COMPANION, "float64"),
    "device": (to_meta, ValueError, "on cpu, where x is", "it on meta"),
}


@pytest.mark.parametrize("bad", BAD_GRADIENTS.values(), ids=BAD_GRADIENTS)
@ALL_OPS
def test_bad_grad_y_raises_naming_it(op: Op, bad: tuple[Change, type[Exception], str, str]) -> None:
    change, exception, accepted, given_ = bad
    inputs = make_inputs(op, SMALL, torch.float32, requires_grad=False)
    with pytest.raises(exception) as info:
        op.backward(change(make_grad(op, inputs)), inputs)
    assert_message(info, f"{op.name}_backward: grad_y must be {accepted}", f"got {given_}")


@ALL_ENTRIES
@pytest.mark.parametrize("missing", ["scale", "bias"])
@pytest.mark.parametrize("name", ["dynamic_filter+star_relu", "global_filter+star_relu"])
def test_scale_without_bias_raises(name: str, missing: str, entry: Callable[..., Any]) -> None:
    inputs = make_inputs(OPS[name], SMALL, torch.float32)
    del inputs[missing]
    with pytest.raises(ValueError, match="star_relu must be both scale and bias, or neither, got one of them"):
        entry(OPS[name], inputs)


@ALL_ENTRIES
@ALL_OPS
def test_unknown_backend_raises_naming_the_known_ones(op: Op, entry: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"backend: got 'nonesuch', accepted are 'cpu', .*'torch'"):
        entry(op, make_inputs(op, SMALL, torch.float32), "nonesuch")


@pytest.mark.parametrize("pair", ["scale", (1.0,), torch.ones(2), 0.9], ids=repr)
@pytest.mark.parametrize("name", FILTERS)
def test_star_relu_that_is_no_pair_raises(name: str, pair: Any) -> None:
    inputs = make_inputs(OPS[name], SMALL, torch.float32)
    with pytest.raises(TypeError, match=rf"{name}: star_relu must be None or a pair \(scale, bias\) of tensors, got "):
        FILTERS[name](*inputs.values(), star_relu=pair)


NOT_A_TENSOR = [
    (name, argument, value)
    for name, op in OPS.items()
    for argument in ("x", *op.parameters, *op.scalars)
    for value in (0.5, None)
    if value is not None or argument not in op.scalars or not op.optional_scalars
]


@pytest.mark.parametrize(("name", "argument", "value"), NOT_A_TENSOR)
def test_an_argument_that_is_no_tensor_raises_naming_it(name: str, argument: str, value: Any) -> None:
    with pytest.raises(TypeError) as info:
        OPS[name].public(make_inputs(OPS[name], SMALL, torch.float32) | {argument: value})
    assert_message(info, f"{OPS[name].name}: {argument} must be a tensor", f"got {type(value).__name__}")


@ALL_OPS
def test_an_infinite_input_stays_in_its_sample(op: Op) -> None:
    inputs = make_inputs(op, SMALL, torch.float32, requires_grad=False)
    wanted = op.public(inputs)
    inputs["x"][0, 0, 0, 0] = math.inf
    y = op.public(inputs)
    assert not y[0].isfinite().all()
    assert torch.equal(y[1], wanted[1])
