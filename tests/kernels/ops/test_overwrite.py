"""``overwrite_x``: the result takes the memory of x, if nothing can notice; otherwise x keeps its values."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CASES, DTYPES, EMPTY_CASES, OPS, SMALL, Case, Inputs, Op, Operators, Target, make_inputs
from conftest import targets
from torch import Tensor
from torch.overrides import BaseTorchFunctionMode

from dfformer_kernels import MatmulTransforms, dynamic_filter, global_filter, star_relu
from dfformer_kernels.ops import filter as ops

ON_CPU = pytest.mark.parametrize("target", targets(lambda t: t.device == "cpu"), indirect=True)
GUARD = 64  # elements before and after x
SPATIAL = [op for op in OPS.values() if op.name != "star_relu"]


def run(op: Op, inputs: Inputs, backend: str | None = None, overwrite_x: bool = True) -> Tensor:
    return op.public(inputs, backend, overwrite_x=overwrite_x)


def guarded(x: Tensor, channels_first: bool) -> tuple[Tensor, Tensor]:
    """A copy of x inside of a larger buffer of ones, and the buffer."""
    buffer = torch.ones(x.numel() + 2 * GUARD, dtype=x.dtype)
    inside = buffer[GUARD : GUARD + x.numel()]
    B, H, W, C = x.shape
    copied = inside.view(B, C, H, W).permute(0, 2, 3, 1) if channels_first else inside.view(x.shape)
    return copied.copy_(x), buffer


# Each case with two dtypes and both layouts.
ROTATED = [
    (case, DTYPES[(i + 2 * second) % 4], (i // 4 + second) % 2 == 1)
    for i, case in enumerate([*CASES, *EMPTY_CASES])
    for second in (0, 1)
]


@ON_CPU
@pytest.mark.parametrize(("case", "dtype", "channels_first"), ROTATED, ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_the_result_is_bitwise_that_of_a_new_tensor(
    target: Target, case: Case, dtype: torch.dtype, channels_first: bool, threads: int, one_thread: None
) -> None:
    torch.set_num_threads(threads)
    inputs = make_inputs(target.op, case, dtype, requires_grad=False)
    x, buffer = guarded(inputs["x"], channels_first)
    expected = run(target.op, inputs | {"x": x.clone()}, target.backend, overwrite_x=False)
    y = run(target.op, inputs | {"x": x}, target.backend)
    assert y.data_ptr() == x.data_ptr()
    assert torch.equal(y, expected)
    assert (buffer[:GUARD] == 1).all()
    assert (buffer[len(buffer) - GUARD :] == 1).all()


@pytest.mark.parametrize("case", [Case(1, 251, 251, 20), Case(1, 512, 512, 3), Case(3, 96, 40, 130)], ids=str)
@pytest.mark.parametrize("op", SPATIAL, ids=str)
def test_planes_that_threads_share(op: Op, case: Case) -> None:
    inputs = make_inputs(op, case, torch.float32, requires_grad=False)
    expected = run(op, inputs, overwrite_x=False)
    assert torch.equal(run(op, inputs), expected)


def test_channels_first_maps_are_overwritten() -> None:
    inputs = make_inputs(OPS["dynamic_filter"], SMALL, torch.float32, requires_grad=False)
    x = inputs["x"].permute(0, 3, 1, 2).contiguous()
    arguments = x, inputs["logits"], inputs["basis"]
    expected = dynamic_filter(*arguments, data_format="channels_first")
    y = dynamic_filter(*arguments, data_format="channels_first", overwrite_x=True)
    assert y.data_ptr() == x.data_ptr()
    assert torch.equal(y, expected)


KEEPING: dict[str, Callable[[Inputs], Inputs]] = {
    "a gradient of x": lambda inputs: inputs | {"x": inputs["x"].requires_grad_()},
    "a gradient of a parameter": lambda inputs: {
        name: t.requires_grad_(name not in ("x", "scale", "bias")) for name, t in inputs.items()
    },
    "strides": lambda inputs: inputs | {"x": inputs["x"].transpose(1, 2).contiguous().transpose(1, 2)},
    "an expanded x": lambda inputs: inputs | {"x": inputs["x"][:1].expand(2, -1, -1, -1)},
}


@pytest.mark.parametrize("change", KEEPING.values(), ids=KEEPING)
@pytest.mark.parametrize("op", SPATIAL, ids=str)
def test_x_keeps_its_values(op: Op, change: Callable[[Inputs], Inputs]) -> None:
    inputs = change(make_inputs(op, SMALL, torch.float32, requires_grad=False))
    before = inputs["x"].detach().clone()
    expected = run(op, inputs, overwrite_x=False)
    y = run(op, inputs)
    assert torch.equal(inputs["x"], before)
    assert torch.equal(y, expected)
    assert y.requires_grad == any(t.requires_grad for t in inputs.values())


@pytest.mark.parametrize("op", OPS.values(), ids=str)
def test_without_gradients_parameters_do_not_matter(op: Op) -> None:
    inputs = make_inputs(op, SMALL, torch.float32)
    inputs["x"] = inputs["x"].detach()
    with torch.no_grad():
        expected = run(op, inputs, overwrite_x=False).clone()
        assert run(op, inputs).data_ptr() == inputs["x"].data_ptr()
    assert torch.equal(inputs["x"], expected)


@pytest.mark.parametrize("op", OPS.values(), ids=str)
def test_transforms_and_compiled_code_have_the_same_result(op: Op) -> None:
    inputs = make_inputs(op, SMALL, torch.float64, requires_grad=False)
    expected = run(op, inputs, overwrite_x=False)

    def step(x: Tensor) -> Tensor:
        return run(op, inputs | {"x": x})

    torch.testing.assert_close(torch.func.functionalize(step)(inputs["x"].clone()), expected)
    torch.testing.assert_close(torch.compile(step, backend="aot_eager")(inputs["x"].clone()), expected)
    torch.testing.assert_close(torch.jit.trace(step, inputs["x"].clone(), check_trace=False)(inputs["x"]), expected)


@pytest.mark.parametrize("op", OPS.values(), ids=str)
def test_matrix_products_overwrite_nothing(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(op, SMALL, torch.float64, requires_grad=False)
    before, expected = inputs["x"].clone(), run(op, inputs, overwrite_x=False)
    monkeypatch.setattr(ops, "kernel_for", None)
    monkeypatch.setattr(ops, "overwriting_kernel", None)
    with MatmulTransforms():
        y = run(op, inputs)
    torch.testing.assert_close(y, expected)
    assert torch.equal(inputs["x"], before)


@pytest.mark.parametrize("mode", [BaseTorchFunctionMode, Operators])
@pytest.mark.parametrize("op", OPS.values(), ids=str)
def test_a_mode_may_keep_x(op: Op, mode: Callable[[], Any]) -> None:
    inputs = make_inputs(op, SMALL, torch.float32, requires_grad=False)
    before = inputs["x"].clone()
    with mode():
        run(op, inputs)
    assert torch.equal(inputs["x"], before)


@pytest.mark.parametrize("op", OPS.values(), ids=str)
def test_a_backward_that_needs_x_raises(op: Op) -> None:
    inputs = make_inputs(op, SMALL, torch.float32, requires_grad=False)
    leaf = inputs["x"].clone().requires_grad_()
    y = leaf.exp()
    with torch.no_grad():
        run(op, inputs | {"x": y.detach()})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_an_inference_tensor_is_not_overwritten_outside() -> None:
    with torch.inference_mode():
        x = torch.randn(4)
    before = x.tolist()
    with torch.no_grad():
        star_relu(x, torch.ones(1), torch.zeros(1), overwrite_x=True)
    assert x.tolist() == before


def test_an_x_that_requires_grad_is_kept_without_gradients_too() -> None:
    x = torch.nn.Parameter(torch.randn(4))
    before = x.detach().clone()
    with torch.no_grad():
        y = star_relu(x, torch.ones(1), torch.zeros(1), overwrite_x=True)
    assert not y.requires_grad
    assert torch.equal(x, before)


def test_memory_that_another_argument_shares_is_kept() -> None:
    x = torch.randn(2, 8, 8, 4)
    weight = x.flatten()[: 8 * 5 * 4 * 2].view(8, 5, 4, 2)
    expected = global_filter(x, weight)
    assert torch.equal(global_filter(x, weight, overwrite_x=True), expected)


def test_a_negated_view_is_kept() -> None:
    x = torch._neg_view(torch.randn(2, 4, 4, 3))
    expected = star_relu(x, torch.ones(1), torch.ones(1))
    assert torch.equal(star_relu(x, torch.ones(1), torch.ones(1), overwrite_x=True), expected)


def test_a_refusal_names_the_operator_that_was_called() -> None:
    inputs = make_inputs(OPS["dynamic_filter"], SMALL, torch.float32, requires_grad=False)
    with pytest.raises(RuntimeError) as info:
        run(OPS["dynamic_filter"], inputs, "cuda")
    assert "dynamic_filter_" not in str(info.value)


@pytest.mark.parametrize("op", OPS.values(), ids=str)
def test_the_operator_itself_writes_into_any_strides(op: Op) -> None:
    inputs = make_inputs(op, SMALL, torch.float32, requires_grad=False)
    expected = run(op, inputs, overwrite_x=False)
    x = inputs["x"].transpose(1, 2).contiguous().transpose(1, 2)
    getattr(torch.ops.dfformer, f"{op.name}_")(x, *op.schema_order(inputs)[1:][: len(op.parameters) + 2], None)
    assert torch.equal(x, expected)
    torch.library.opcheck(
        getattr(torch.ops.dfformer, f"{op.name}_").default,
        (x, *op.schema_order(inputs)[1:][: len(op.parameters) + 2], None),
        test_utils=("test_schema", "test_faketensor"),
    )
