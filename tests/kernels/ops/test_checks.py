"""Bad input of every operator raises at once; the message names the argument, what was expected and what was given."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from cases import (
    OPS,
    SMALL,
    Op,
    make_grad,
    make_inputs,
)
from torch import Tensor

from dfformer_kernels import dynamic_filter, global_filter, mlp

pytestmark = pytest.mark.usefixtures("one_thread")
ALL_OPS = pytest.mark.parametrize("op", OPS.values(), ids=OPS)
FILTERS: dict[str, Callable[..., Tensor]] = {"dynamic_filter": dynamic_filter, "global_filter": global_filter}


Change = Callable[[Tensor], Tensor]


class Bad(NamedTuple):
    """A bad input: which argument of which operator, how it is spoilt, what is raised and what its message names."""

    op_name: str
    argument: str
    change: Change
    exception: type[Exception]
    expected: str
    given: str


NUMBERS = "dtype float32, float64, bfloat16, float16"
X = "shape (B,H,W,C) with H, W >= 1"
LOGITS = "shape (B,F,C) = (2, F >= 1, 3) for x of shape (2, 4, 6, 3)"
BASIS = "shape (H,K,F,2), K = W//2 + 1, = (4, 4, 4, 2) for x of shape (2, 4, 6, 3)"
WEIGHT = "shape (H,K,C,2), K = W//2 + 1, = (4, 4, 3, 2) for x of shape (2, 4, 6, 3)"
COMPANION = "dtype float32, bfloat16, float16 beside float32 x"
SPECTRAL = "dtype float32 beside float32 x"
STRIDED = "a strided tensor"


def to_meta(t: Tensor) -> Tensor:
    return t.to("meta")


BAD_INPUTS = {
    "x-integer": Bad("star_relu", "x", Tensor.long, TypeError, NUMBERS, "int64"),
    "x-bool": Bad("global_filter", "x", Tensor.bool, TypeError, NUMBERS, "bool"),
    "x-complex": Bad("dynamic_filter", "x", lambda t: t.to(torch.complex64), TypeError, NUMBERS, "complex64"),
    "x-sparse": Bad("star_relu", "x", Tensor.to_sparse, TypeError, STRIDED, "a torch.sparse_coo one"),
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
    "logits-sparse": Bad("dynamic_filter", "logits", Tensor.to_sparse, TypeError, STRIDED, "a torch.sparse_coo one"),
    "logits-device": Bad("dynamic_filter", "logits", to_meta, ValueError, "a tensor on cpu, where x is", "one on meta"),
    "basis-rank": Bad("dynamic_filter", "basis", lambda t: t[0], ValueError, BASIS, "(4, 4, 2)"),
    "basis-rows": Bad("dynamic_filter", "basis", lambda t: t[:3], ValueError, BASIS, "(3, 4, 4, 2)"),
    "basis-columns": Bad("dynamic_filter", "basis", lambda t: t[:, :3], ValueError, BASIS, "(4, 3, 4, 2)"),
    "basis-filters": Bad("dynamic_filter", "basis", lambda t: t[:, :, :3], ValueError, BASIS, "(4, 4, 3, 2)"),
    "basis-real": Bad("dynamic_filter", "basis", lambda t: t[..., :1], ValueError, BASIS, "(4, 4, 4, 1)"),
    "basis-16-bit": Bad("dynamic_filter", "basis", Tensor.bfloat16, TypeError, SPECTRAL, "bfloat16"),
    "basis-float64": Bad("dynamic_filter", "basis", Tensor.double, TypeError, SPECTRAL, "float64"),
    "basis-device": Bad("dynamic_filter", "basis", to_meta, ValueError, "a tensor on cpu, where x is", "one on meta"),
    "weight-columns": Bad("global_filter", "weight", lambda t: t[:, :3], ValueError, WEIGHT, "(4, 3, 3, 2)"),
    "weight-channels": Bad("global_filter", "weight", lambda t: t[:, :, :1], ValueError, WEIGHT, "(4, 4, 1, 2)"),
    "weight-16-bit": Bad("global_filter", "weight", Tensor.half, TypeError, SPECTRAL, "float16"),
    "weight-sparse": Bad("global_filter", "weight", Tensor.to_sparse, TypeError, STRIDED, "a torch.sparse_coo one"),
    "weight-device": Bad("global_filter", "weight", to_meta, ValueError, "a tensor on cpu, where x is", "one on meta"),
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
    "scale-device": Bad("star_relu", "scale", to_meta, ValueError, "a tensor on cpu, where x is", "one on meta"),
}
ALL_BAD_INPUTS = pytest.mark.parametrize("bad", BAD_INPUTS.values(), ids=BAD_INPUTS)

ENTRIES: dict[str, Callable[..., Any]] = {"public": Op.public, "function": Op.apply, "custom_op": Op.custom_op}
ALL_ENTRIES = pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)


def assert_message(info: pytest.ExceptionInfo[Exception], *fragments: str) -> None:
    message = str(info.value)
    assert [fragment for fragment in fragments if fragment not in message] == [], message


@ALL_ENTRIES
@ALL_BAD_INPUTS
def test_bad_input_raises_naming_argument_expected_and_given(bad: Bad, entry: Callable[..., Tensor]) -> None:
    op = OPS[bad.op_name]
    inputs = make_inputs(op, SMALL, torch.float32)
    with pytest.raises(bad.exception) as info:
        entry(op, inputs | {bad.argument: bad.change(inputs[bad.argument].detach())})
    assert_message(info, f"{op.name}: {bad.argument}: expected {bad.expected}, got {bad.given}")


@ALL_BAD_INPUTS
def test_bad_input_of_the_backward_operator_raises_alike(bad: Bad) -> None:
    op = OPS[bad.op_name]
    inputs = make_inputs(op, SMALL, torch.float32, requires_grad=False)
    with pytest.raises(bad.exception) as info:
        op.backward(make_grad(op, inputs), inputs | {bad.argument: bad.change(inputs[bad.argument])})
    assert_message(info, f"{bad.argument}: expected {bad.expected}, got {bad.given}")


BAD_GRADIENTS: dict[str, tuple[Change, type[Exception], str, str]] = {
    "shape": (lambda t: t[:1], ValueError, "shape (2, 4, 6, 3), that of x", "(1, 4, 6, 3)"),
    "rank": (lambda t: t[0, 0], ValueError, "shape (2, 4, 6, 3), that of x", "(6, 3)"),
    "integer": (Tensor.long, TypeError, COMPANION, "int64"),
    "sparse": (Tensor.to_sparse, TypeError, STRIDED, "a torch.sparse_coo one"),
    "float64": (Tensor.double, TypeError, COMPANION, "float64"),
    "device": (to_meta, ValueError, "a tensor on cpu, where x is", "one on meta"),
}


@pytest.mark.parametrize("bad", BAD_GRADIENTS.values(), ids=BAD_GRADIENTS)
@ALL_OPS
def test_bad_grad_y_raises_naming_it(op: Op, bad: tuple[Change, type[Exception], str, str]) -> None:
    change, exception, expected, given_ = bad
    inputs = make_inputs(op, SMALL, torch.float32, requires_grad=False)
    with pytest.raises(exception) as info:
        op.backward(change(make_grad(op, inputs)), inputs)
    assert_message(info, f"{op.name}_backward: grad_y: expected {expected}, got {given_}")


@ALL_ENTRIES
@pytest.mark.parametrize("missing", ["scale", "bias"])
@pytest.mark.parametrize("name", ["dynamic_filter+star_relu", "global_filter+star_relu"])
def test_scale_without_bias_raises(name: str, missing: str, entry: Callable[..., Any]) -> None:
    inputs = make_inputs(OPS[name], SMALL, torch.float32)
    del inputs[missing]
    with pytest.raises(ValueError, match="star_relu: expected both scale and bias, or neither, got one of them"):
        entry(OPS[name], inputs)


def test_a_backend_that_is_no_name_raises_naming_the_known_ones() -> None:
    number: Any = 3
    with pytest.raises(ValueError, match=r"backend: expected one of 'cpu', .*, got 3"):
        global_filter(torch.randn(1, 4, 4, 2), torch.randn(4, 3, 2, 2), backend=number)


@ALL_ENTRIES
@ALL_OPS
def test_unknown_backend_raises_naming_the_known_ones(op: Op, entry: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"backend: expected one of 'cpu', .*'torch', got 'nonesuch'"):
        entry(op, make_inputs(op, SMALL, torch.float32), "nonesuch")


@pytest.mark.parametrize("pair", ["scale", (1.0,), torch.ones(2), 0.9], ids=repr)
@pytest.mark.parametrize("name", FILTERS)
def test_star_relu_that_is_no_pair_raises(name: str, pair: Any) -> None:
    inputs = make_inputs(OPS[name], SMALL, torch.float32)
    with pytest.raises(TypeError, match=rf"{name}: star_relu: expected None or a pair \(scale, bias\) of tensors"):
        FILTERS[name](*inputs.values(), star_relu=pair)


@pytest.mark.parametrize("pair", [None, torch.ones(2)], ids=repr)
def test_an_mlps_star_relu_that_is_no_pair_raises(pair: Any) -> None:
    with pytest.raises(TypeError, match=r"mlp: star_relu: expected a pair \(scale, bias\) of tensors, got "):
        mlp(torch.ones(6, 4), torch.ones(8, 4), pair, torch.ones(3, 8))


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
    assert_message(info, f"{OPS[name].name}: {argument}: expected a tensor, got {type(value).__name__}")
