"""The operators in torch.library: opcheck, meta and fake tensors, modes, torch.compile, torch.export."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from cases import (
    LAYOUTS,
    OPS,
    SMALL,
    Case,
    Inputs,
    Op,
    Operators,
    assert_same_bits,
    gradients,
    make_grad,
    make_inputs,
)
from conftest import require_compiled_graphs, require_compiler
from extent import pairwise
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dfformer_kernels import dynamic_filter, star_relu, use_backend
from dfformer_kernels.tolerance import BOUND, gradient_errors, relative_error

pytestmark = pytest.mark.usefixtures("one_thread")
ALL_OPS = pytest.mark.parametrize("op", OPS.values(), ids=OPS)


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


@pytest.mark.parametrize(
    **pairwise(op=list(OPS), layout=["channels_first", "sliced", "expanded_batch"], kind=["meta", "fake"])
)
def test_tensors_without_data_get_the_shapes_and_strides_of_real_ones(op: str, layout: str, kind: str) -> None:
    step = OPS[op]
    inputs = make_inputs(step, SMALL, torch.bfloat16, requires_grad=False)
    for name in ("x", *step.parameters):
        inputs[name] = LAYOUTS[layout](inputs[name])
    real = [step.public(inputs), *step.backward(inputs["x"], inputs)]
    with FakeTensorMode() if kind == "fake" else nullcontext() as mode:
        without = {name: mode.from_tensor(t) if mode else t.to("meta") for name, t in inputs.items()}
        hollow = [step.public(without), *step.backward(without["x"], without)]
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


# StarReLU is an expression in compiled graphs, and has tests of its own below.
OPAQUE = [name for name in OPS if name != "star_relu"]


@pytest.mark.parametrize(
    ("name", "compiler"),
    [*((name, "aot_eager") for name in OPAQUE), ("dynamic_filter+star_relu", "inductor")],
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


@pytest.mark.parametrize("name", OPAQUE)
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_kernels_are_right_on_their_first_call(name: str) -> None:
    """Where no gradient is wanted, torch (2.14) runs a graph's first call in a mode that drops lazy conjugations."""
    op = OPS[name]
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


@pytest.mark.parametrize("by", [None, "argument", "use_backend", "environment"])
@pytest.mark.usefixtures("fresh_compiler")
def test_star_relu_is_an_operator_in_compiled_graphs_only_if_a_backend_is_named(
    by: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_compiled_graphs()
    if by == "environment":
        monkeypatch.setenv("DFFORMER_BACKEND", "torch")
    backend = "torch" if by == "argument" else None
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    x, one = torch.randn(6), torch.ones(1)
    with use_backend("torch") if by == "use_backend" else nullcontext():
        torch.compile(lambda x: star_relu(x, one, one, backend=backend), fullgraph=True, backend=keep)(x)
    targets = {str(node.target) for graph in graphs for node in graph.graph.nodes}
    assert ("dfformer.star_relu" in targets) == (by is not None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_star_relu_is_within_the_bound_in_either_memory_format(dtype: torch.dtype) -> None:
    require_compiler()
    op = OPS["star_relu"]
    compiled = torch.compile(surrounded(op), fullgraph=True)
    for layout in ("channels_first", "sliced"):
        inputs = make_inputs(op, SMALL, dtype)
        inputs["x"] = LAYOUTS[layout](inputs["x"].detach()).requires_grad_()
        y, grads = result_and_gradients(compiled, inputs)
        exact = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
        wanted_y, wanted = result_and_gradients(surrounded(op), exact)
        assert signature([y]) == signature([surrounded(op)(inputs)])
        assert relative_error(y, wanted_y) <= BOUND[dtype]
        assert all(error <= BOUND[dtype] for error in gradient_errors([*grads.values()], [*wanted.values()]))


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
