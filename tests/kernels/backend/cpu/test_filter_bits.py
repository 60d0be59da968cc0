"""The compiled core's filter step: bits that depend on nothing but the problem, and special values."""

import math
from itertools import combinations

import pytest
import torch
from cases import (
    DTYPES,
    OPS,
    Case,
    assert_all_within_bound,
    assert_same_bits,
    assert_within_bound,
    expected,
    make_grad,
    make_inputs,
)
from extent import pairwise
from native_core import DYNAMIC, FILTERS, ISAS, run
from torch import Tensor

from dfformer_kernels import dynamic_filter, reference

pytestmark = pytest.mark.usefixtures("one_thread", "core")

# Full tiles and a partial one with every instruction set; an odd number of them.
TILES = Case(3, 12, 10, 37)
THREAD_CASES = [
    Case(8, 14, 14, 80),  # many small tiles
    Case(1, 56, 56, 16),  # fewer than threads
    TILES,
    # tiles large enough to be shared by all threads: one alone, several, and one left over
    Case(1, 128, 128, 16),
    Case(2, 128, 128, 20),
    Case(1, 96, 100, 80),
    Case(3, 101, 90, 33),
]


@pytest.mark.parametrize(**pairwise(isa=ISAS, op=list(OPS), dtype=DTYPES, case=THREAD_CASES))
@pytest.mark.usefixtures("isa")
def test_bits_depend_neither_on_threads_nor_on_the_run(op: str, dtype: torch.dtype, case: Case) -> None:
    inputs = make_inputs(OPS[op], case, dtype)
    grad_y = make_grad(OPS[op], inputs)
    first = run(OPS[op], inputs, grad_y)
    for threads in (2, 7, 7):
        torch.set_num_threads(threads)
        assert_same_bits(run(OPS[op], inputs, grad_y), first)


@pytest.mark.parametrize(
    **pairwise(op=list(FILTERS), dtype=DTYPES, case=[TILES, Case(5, 7, 7, 70), Case(2, 128, 128, 20)])
)
def test_a_sample_does_not_depend_on_its_batch(op: str, dtype: torch.dtype, case: Case) -> None:
    inputs = make_inputs(FILTERS[op], case, dtype)
    grad_y = make_grad(FILTERS[op], inputs)
    y, grads = run(FILTERS[op], inputs, grad_y)
    one = {name: t[1:2].detach().requires_grad_() if name in ("x", "logits") else t for name, t in inputs.items()}
    y_of_one, grads_of_one = run(FILTERS[op], one, grad_y[1:2])
    assert torch.equal(y_of_one, y[1:2])
    for name in {"x", "logits"} & inputs.keys():
        assert torch.equal(grads_of_one[name], grads[name][1:2]), name


@pytest.mark.parametrize(
    **pairwise(op=list(FILTERS), threads=[1, 2], case=[TILES, Case(2, 13, 1, 5, F=3), Case(1, 128, 128, 20)])
)
def test_gradients_have_the_same_bits_alone_in_pairs_and_all_together(op: str, threads: int, case: Case) -> None:
    torch.set_num_threads(threads)
    step = FILTERS[op]
    inputs = make_inputs(step, case, torch.float32, requires_grad=False)
    grad_y = make_grad(step, inputs)
    everything = dict(zip(inputs, step.backward(grad_y, inputs, backend="cpu"), strict=True))
    for names in (*((name,) for name in inputs), *combinations(inputs, 2)):
        some = step.backward(grad_y, inputs, [name in names for name in step.names], "cpu")
        for name, gradient in zip(names, some, strict=True):
            assert torch.equal(gradient, everything[name]), (name, names)


# Special values

SPECIAL = [math.nan, math.inf, -math.inf]
SPECIAL_CASES = [TILES, Case(3, 11, 7, 37), Case(3, 1, 6, 37), Case(3, 2, 2, 37, F=3)]


@pytest.mark.parametrize(**pairwise(isa=ISAS, op=list(FILTERS), case=SPECIAL_CASES, value=SPECIAL))
@pytest.mark.usefixtures("isa")
def test_a_value_that_is_not_finite_stays_in_its_plane(op: str, case: Case, value: float) -> None:
    step = FILTERS[op]
    inputs = make_inputs(step, case, torch.float32, requires_grad=False)
    before = step.public(inputs, "cpu")
    inputs["x"][1, -1, -1, 20] = value
    y, wanted = step.public(inputs, "cpu"), step.reference(inputs)
    plane = torch.zeros_like(y, dtype=torch.bool)
    plane[1, :, :, 20] = True
    assert torch.equal(y[~plane], before[~plane])
    assert y[wanted.isnan()].isnan().all()
    if not (step.scalars and value < 0):  # which relu makes zero
        assert not y[plane].isfinite().any()
    else:
        assert_within_bound("y", y, wanted)


@pytest.mark.parametrize(**pairwise(isa=ISAS, op=list(FILTERS), value=SPECIAL))
@pytest.mark.usefixtures("isa")
def test_a_gradient_that_is_not_finite_stays_in_its_plane(op: str, value: float) -> None:
    step = FILTERS[op]
    inputs = make_inputs(step, TILES, torch.float32, requires_grad=False)
    grad_y = make_grad(step, inputs)
    needs = [name in ("x", "logits") and name in inputs for name in step.names]
    before = step.backward(grad_y, inputs, needs, "cpu")
    grad_y[1, 3, 4, 20] = value
    after = step.backward(grad_y, inputs, needs, "cpu")
    for gradient, wanted in zip(after, before, strict=True):
        plane = torch.zeros_like(gradient, dtype=torch.bool)
        plane[1, ..., 20] = True
        assert torch.equal(gradient[~plane], wanted[~plane])
        # where relu is flat nothing comes through
        flat = plane.new_zeros(()) if not step.scalars or gradient.dim() != 4 else inputs["x"] <= 0
        assert not gradient[plane & ~flat].isfinite().any()


def identity_filter(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits and basis of a dynamic filter that changes nothing."""
    basis = torch.zeros(case.H, case.W // 2 + 1, case.F, 2, dtype=reference.compute_dtype(dtype))
    basis[..., 0] = 1
    return torch.zeros(case.B, case.F, case.C, dtype=dtype), basis


@pytest.mark.parametrize(
    **pairwise(
        isa=ISAS,
        dtype=[torch.float32, torch.float64, torch.bfloat16],
        case=[Case(2, 4, 6, 37), Case(2, 5, 3, 3), Case(1, 1, 1, 16)],
    )
)
@pytest.mark.usefixtures("isa")
def test_subnormal_inputs_are_not_flushed(case: Case, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    quantum = info.smallest_normal * info.eps
    x = make_inputs(DYNAMIC, case, torch.float64, requires_grad=False)["x"]
    x = (x.clamp(-1.5, 1.5) * info.smallest_normal / 2).to(dtype)
    assert x.abs().max() < info.smallest_normal
    y = dynamic_filter(x, *identity_filter(case, dtype), backend="cpu")
    # Each of a plane's filtered frequencies, and each sum on the way, is rounded to the nearest subnormal.
    allowed = (2 if dtype == torch.bfloat16 else case.H * case.W) * quantum
    assert allowed < 0.02 * info.smallest_normal
    assert (y.double() - x.double()).abs().max() <= allowed


def test_subnormal_float16_inputs_come_back_exactly() -> None:
    """They are normal numbers of float32."""
    case = Case(1, 8, 8, 32)
    x = torch.arange(-1024, 1024).mul(2.0**-24).to(torch.float16).view(1, 8, 8, 32)
    assert torch.equal(dynamic_filter(x, *identity_filter(case, x.dtype), backend="cpu"), x)


@pytest.mark.parametrize(**pairwise(isa=ISAS, op=["dynamic_filter", "global_filter"], magnitude=[1e30, 1e-30]))
@pytest.mark.usefixtures("isa")
def test_very_large_and_very_small_inputs_are_within_the_bound(op: str, magnitude: float) -> None:
    inputs = make_inputs(FILTERS[op], Case(2, 28, 28, 5), torch.float32)
    grad_y = make_grad(FILTERS[op], inputs)
    inputs["x"] = (magnitude * inputs["x"].detach()).requires_grad_()
    assert_all_within_bound(*run(FILTERS[op], inputs, grad_y), expected(FILTERS[op], inputs, grad_y))
