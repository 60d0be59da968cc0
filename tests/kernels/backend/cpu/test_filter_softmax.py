"""The softmax inside the compiled core's filter step: accuracy, extreme logits, and logits without a softmax."""

import math

import pytest
import torch
from cases import DTYPES, Case, assert_within_bound, expected, make_grad, make_inputs
from extent import pairwise
from native_core import DYNAMIC, ISAS, run
from torch import Tensor

from dfformer_kernels import dynamic_filter, reference
from dfformer_kernels.tolerance import BOUND

pytestmark = pytest.mark.usefixtures("one_thread", "core")

WIDE_DTYPES = [torch.float32, torch.float64]
EVERY_ISA_IN_WIDE_DTYPES = pytest.mark.parametrize(**pairwise(isa=ISAS, dtype=WIDE_DTYPES))


def only_filter(case: Case, f: int, dtype: torch.dtype) -> Tensor:
    """The basis whose result is x times the weight of filter f."""
    basis = torch.zeros(case.H, case.W // 2 + 1, case.F, 2, dtype=reference.compute_dtype(dtype))
    basis[:, :, f, 0] = 1
    return basis


@EVERY_ISA_IN_WIDE_DTYPES
@pytest.mark.usefixtures("isa")
def test_each_weight_is_accurate_however_small(dtype: torch.dtype) -> None:
    C, furthest = 1001, {torch.float32: 86, torch.float64: 700}[dtype]
    below = torch.linspace(0, furthest, C, dtype=dtype)
    logits = torch.stack([torch.zeros_like(below), -below])[None]
    basis = only_filter(Case(1, 1, 1, C, F=2), 1, dtype)
    y = dynamic_filter(torch.ones(1, 1, 1, C, dtype=dtype), logits, basis, backend="cpu")
    wanted = logits.double().softmax(1)[0, 1]
    # exp, a sum, a quotient and two products, each rounded; the float64 reference rounds its own
    allowed = 8 * torch.finfo(dtype).eps
    assert ((y.flatten().double() - wanted).abs() / wanted).max() <= allowed


LOGITS = {
    "far_apart": [1e4, -1e4, 0.0, 9999.0],
    "largest_last": [-1e4, 0.0, 1e4, 1e4],
    "all_low": [-1e4, -1e4, -1e4, -1e4],
    "all_high": [1e4, 1e4, 1e4, 1e4],
    "equal": [0.3, 0.3, 0.3, 0.3],
    "impossible_first": [-math.inf, 0.5, -0.5, 1.0],
    "impossible_last": [0.5, -0.5, 1.0, -math.inf],
    "one_possible": [-math.inf, -math.inf, 2.0, -math.inf],
}


@pytest.mark.parametrize(**pairwise(isa=ISAS, dtype=DTYPES, name=list(LOGITS)))
@pytest.mark.usefixtures("isa")
def test_extreme_logits_are_within_the_bound(dtype: torch.dtype, name: str) -> None:
    inputs = make_inputs(DYNAMIC, Case(2, 6, 5, 9), dtype)
    inputs["logits"] = torch.tensor(LOGITS[name], dtype=dtype).view(1, 4, 1).repeat(2, 1, 9).requires_grad_()
    grad_y = make_grad(DYNAMIC, inputs)
    y, grads = run(DYNAMIC, inputs, grad_y)
    wanted_y, wanted = expected(DYNAMIC, inputs, grad_y)
    assert_within_bound("y", y, wanted_y)
    for parameter in ("x", "basis"):
        assert_within_bound(f"grad_{parameter}", grads[parameter], wanted[parameter])
    # Where one weight is 1 the gradient is a difference of equal numbers: the error is relative to those numbers.
    weights = inputs["logits"].detach().double().softmax(1)
    parts = torch.linalg.vector_norm(grad_y.double()) * torch.linalg.vector_norm(wanted_y)
    assert torch.linalg.vector_norm(grads["logits"].double() - wanted["logits"]) <= BOUND[dtype] * parts
    assert torch.equal(grads["logits"][weights == 0], torch.zeros_like(grads["logits"][weights == 0]))


@EVERY_ISA_IN_WIDE_DTYPES
@pytest.mark.usefixtures("isa")
def test_a_filter_of_logit_minus_infinity_has_weight_zero(dtype: torch.dtype) -> None:
    case = Case(2, 6, 5, 9)
    for f in range(case.F):
        inputs = make_inputs(DYNAMIC, case, dtype, requires_grad=False)
        inputs["logits"][:, f] = -math.inf
        y = dynamic_filter(inputs["x"], inputs["logits"], 1e30 * only_filter(case, f, dtype), backend="cpu")
        assert torch.equal(y, torch.zeros_like(y)), f


@EVERY_ISA_IN_WIDE_DTYPES
@pytest.mark.usefixtures("isa")
def test_the_gradient_of_a_single_filters_logits_is_exactly_zero(dtype: torch.dtype) -> None:
    """Softmax over one is constant 1, whatever the size that transforms are normalised by."""
    for H in range(1, 65):
        inputs = make_inputs(DYNAMIC, Case(1, H, 3, 5, F=1), dtype)
        _, grads = run(DYNAMIC, inputs, make_grad(DYNAMIC, inputs))
        assert not grads["logits"].any(), H


@pytest.mark.parametrize(**pairwise(isa=ISAS, f=[0, 3], value=[math.inf, math.nan]))
@pytest.mark.usefixtures("isa")
def test_a_logit_without_a_softmax_spoils_its_channel_only(f: int, value: float) -> None:
    inputs = make_inputs(DYNAMIC, Case(3, 12, 10, 37), torch.float32, requires_grad=False)
    wanted = DYNAMIC.public(inputs, "cpu")
    inputs["logits"][1, f, 20] = value
    y = DYNAMIC.public(inputs, "cpu")
    spoilt = torch.zeros_like(y, dtype=torch.bool)
    spoilt[1, :, :, 20] = True
    assert torch.equal(y.isnan(), spoilt)
    assert torch.equal(y[~spoilt], wanted[~spoilt])
