"""The filter step of the compiled core: instruction sets, lengths, bits, special values, memory, threads and forks."""

import math
import mmap
import os
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from cases import (
    CASES,
    DTYPES,
    LAYOUTS,
    OPS,
    Case,
    Inputs,
    Op,
    assert_all_within_bound,
    assert_within_bound,
    expected,
    gradients,
    make_grad,
    make_inputs,
)
from conftest import require
from hypothesis import given, settings
from hypothesis import strategies as st
from native_core import CODES, Guarded, assert_releases_the_gil, run_script
from torch import Tensor

from dfformer_kernels import dynamic_filter, reference
from dfformer_kernels.backends import cpu
from dfformer_kernels.tolerance import BOUND

pytestmark = pytest.mark.usefixtures("one_thread", "core")

FILTERS = {name: op for name, op in OPS.items() if op.parameters}
ALL_FILTERS = pytest.mark.parametrize("op", FILTERS.values(), ids=FILTERS)
ALL_DTYPES = pytest.mark.parametrize("dtype", DTYPES, ids=str)
WIDE_DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
EVERY_ISA = pytest.mark.usefixtures("isa")
DYNAMIC = OPS["dynamic_filter"]
# Blocks of channels that are full and one that is not, in any instruction set; an odd number of them.
BLOCKS = Case(3, 12, 10, 37)


def run(op: Op, inputs: Inputs, grad_y: Tensor) -> tuple[Tensor, Inputs]:
    y = op.public(inputs, "cpu")
    return y.detach(), gradients(y, inputs, grad_y)


def assert_run_within_bound(op: Op, inputs: Inputs) -> None:
    grad_y = make_grad(op, inputs)
    assert_all_within_bound(*run(op, inputs, grad_y), expected(op, inputs, grad_y))


def assert_fairly_within_bound(op: Op, inputs: Inputs, grad_y: Tensor) -> None:
    """Scalars' gradients are judged together, for problems in which one of them may happen to cancel."""
    y, grads = run(op, inputs, grad_y)
    wanted_y, wanted = expected(op, inputs, grad_y)
    if op.scalars:
        grads["scalars"], wanted["scalars"] = (
            torch.cat([g.pop(n).view(1) for n in op.scalars]) for g in (grads, wanted)
        )
    assert_all_within_bound(y, grads, (wanted_y, wanted))


def assert_same_bits(actual: tuple[Tensor, Inputs], wanted: tuple[Tensor, Inputs]) -> None:
    assert torch.equal(actual[0], wanted[0])
    assert actual[1].keys() == wanted[1].keys()
    for name, gradient in actual[1].items():
        assert torch.equal(gradient, wanted[1][name]), name


def pass_all(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits and basis of a dynamic filter that changes nothing."""
    basis = torch.zeros(case.H, case.W // 2 + 1, case.F, 2, dtype=reference.compute_dtype(dtype))
    basis[..., 0] = 1
    return torch.zeros(case.B, case.F, case.C, dtype=dtype), basis


# Instruction sets


@pytest.mark.parametrize("case", CASES, ids=str)
@ALL_DTYPES
@ALL_FILTERS
@EVERY_ISA
def test_every_instruction_set_is_within_the_bound(op: Op, dtype: torch.dtype, case: Case) -> None:
    assert_run_within_bound(op, make_inputs(op, case, dtype))


def run_guarded(core: ModuleType, op: Op, inputs: Inputs, grad_y: Tensor) -> tuple[Tensor, Inputs]:
    """Result and gradients of the core, of tensors aligned to nothing: NaN around those read, else a sentinel."""
    x, *parameters = (inputs[name].detach() for name in ("x", *op.parameters))
    arithmetic = reference.compute_dtype(x.dtype)
    logits = inputs.get("logits")
    scalars = [inputs[name].detach() for name in op.scalars]
    star_relu = tuple(float(t) for t in scalars) or None
    problem = ((*x.shape, 0 if logits is None else logits.shape[1]), CODES[x.dtype], star_relu)

    given = [Guarded(x, math.nan), *(Guarded(t.to(arithmetic), math.nan) for t in parameters)]
    addresses = [given[0].address, *([0] if logits is None else []), *(t.address for t in given[1:])]
    results = [Guarded(torch.full_like(g.inside, math.nan), 123.0) for g in given]
    y, grad = Guarded(torch.full_like(x, math.nan), 123.0), Guarded(grad_y, math.nan)
    grad_addresses = [results[0].address, *([0] if logits is None else []), *(t.address for t in results[1:])]
    core.filter(*problem, *addresses, y.address, 2)
    sums = core.filter_backward(*problem, grad.address, *addresses, *grad_addresses, star_relu is not None, 2)
    for written in (y, *results):
        written.assert_margins_untouched()
    grads = [r.inside.view(t.shape).to(t.dtype) for r, t in zip(results, (x, *parameters), strict=True)]
    grads += [torch.full_like(t, value) for t, value in zip(scalars, sums, strict=False)]
    return y.inside.view(x.shape), dict(zip(inputs, grads, strict=True))


@pytest.mark.parametrize("case", [BLOCKS, Case(2, 7, 9, 3, F=3), Case(1, 5, 1, 16), Case(1, 128, 130, 2)], ids=str)
@ALL_DTYPES
@ALL_FILTERS
@EVERY_ISA
def test_nothing_outside_the_tensors_is_used_or_changed(
    core: ModuleType, op: Op, dtype: torch.dtype, case: Case
) -> None:
    inputs = make_inputs(op, case, dtype)
    grad_y = make_grad(op, inputs)
    assert_same_bits(run_guarded(core, op, inputs, grad_y), run(op, inputs, grad_y))


# Transform lengths

PLANES = [
    # primes summed by definition (103), convolved as powers of a generator (61, 97, 101, 127, 251) and with a chirp
    # (131, 509), alone and with other factors, in either direction
    *[(n, 6) for n in (61, 101, 103, 127, 131, 202, 251, 262, 303, 509)],
    *[(5, n) for n in (61, 101, 103, 127, 131, 202, 251, 262, 303, 509)],
    *[(97, 89), (101, 103), (61, 131), (11, 94), (187, 26)],
    # no prime factor above 3, none above 7
    *[(48, 72), (81, 108), (96, 162), (49, 35), (105, 84), (42, 245), (210, 70)],
    # squares of dense prediction
    *[(n, n) for n in (96, 112, 128, 192, 256)],
    # lines that are transformed part by part, from their second pass on or from a later one
    *[(512, 6), (4, 1024), (4608, 2), (2, 4608)],
]


@pytest.mark.parametrize(("H", "W"), PLANES)
@WIDE_DTYPES
def test_planes_of_every_kind_of_length_are_within_the_bound(dtype: torch.dtype, H: int, W: int) -> None:
    for name in ("dynamic_filter+star_relu", "global_filter"):
        assert_run_within_bound(OPS[name], make_inputs(OPS[name], Case(1, H, W, 3), dtype))


@pytest.mark.parametrize("upright", [False, True], ids=["1xN", "Nx1"])
@WIDE_DTYPES
def test_every_length_up_to_600_is_within_the_bound(dtype: torch.dtype, upright: bool) -> None:
    failures = []
    for n in range(1, 601):
        H, W = (n, 1) if upright else (1, n)
        inputs = make_inputs(DYNAMIC, Case(1, H, W, 5), dtype)
        try:
            assert_run_within_bound(DYNAMIC, inputs)
        except AssertionError as error:
            failures.append(f"{H}x{W}: {error}")
    assert failures == []


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    op=st.sampled_from(list(FILTERS.values())),
    case=st.builds(
        Case, st.integers(1, 3), st.integers(1, 80), st.integers(1, 80), st.integers(1, 70), st.integers(1, 6)
    ),
    dtype=st.sampled_from(DTYPES),
    x_layout=st.sampled_from(sorted(LAYOUTS)),
    grad_layout=st.sampled_from(sorted(LAYOUTS)),
)
def test_any_problem_is_within_the_bound(
    op: Op, case: Case, dtype: torch.dtype, x_layout: str, grad_layout: str
) -> None:
    inputs = make_inputs(op, case, dtype)
    inputs["x"] = LAYOUTS[x_layout](inputs["x"]).requires_grad_()
    assert_fairly_within_bound(op, inputs, LAYOUTS[grad_layout](make_grad(op, inputs)))


# The columns whose imaginary part irfft2 drops


@pytest.mark.parametrize("column", [0, -1], ids=["first", "last"])
@pytest.mark.parametrize(("H", "W"), [(6, 8), (7, 8), (6, 7), (5, 2), (1, 2), (1, 8), (1, 1), (6, 1), (1, 7)])
@ALL_FILTERS
def test_a_filter_that_no_real_signal_has_gives_what_irfft2_gives(op: Op, H: int, W: int, column: int) -> None:
    """All of the filter is in one column, and nothing in it is Hermitian."""
    inputs = make_inputs(op, Case(2, H, W, 3), torch.float32)
    filters = list(op.parameters)[-1]
    kept = torch.zeros_like(inputs[filters])
    kept[:, column] = inputs[filters][:, column].detach()
    inputs[filters] = kept.requires_grad_()
    with torch.no_grad():
        x, *others = (t.double() for name, t in inputs.items() if name not in op.scalars)
        u = reference.star_relu(x, *(inputs[name].double() for name in op.scalars)) if op.scalars else x
        M = torch.view_as_complex(others[-1])
        if len(others) == 2:
            M = torch.einsum("bfc,hkf->bhkc", others[0].softmax(1).to(M.dtype), M)
        wanted = torch.fft.irfft2(torch.fft.rfft2(u, dim=(1, 2)) * M, s=(H, W), dim=(1, 2))
    assert_within_bound("y", op.public(inputs, "cpu"), wanted)
    assert_fairly_within_bound(op, inputs, make_grad(op, inputs))


# Softmax


def only_filter(case: Case, f: int, dtype: torch.dtype) -> Tensor:
    """The basis whose result is x times the weight of filter f."""
    _, basis = pass_all(case, dtype)
    basis[:, :, torch.arange(case.F) != f] = 0
    return basis


@EVERY_ISA
@WIDE_DTYPES
def test_weights_are_accurate_each_by_itself_however_small(dtype: torch.dtype) -> None:
    C, furthest = 1001, {torch.float32: 86, torch.float64: 700}[dtype]
    case = Case(1, 1, 1, C, F=2)
    below = torch.linspace(0, furthest, C, dtype=dtype)
    logits = torch.stack([torch.zeros_like(below), -below])[None]
    y = dynamic_filter(torch.ones(1, 1, 1, C, dtype=dtype), logits, only_filter(case, 1, dtype), backend="cpu")
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


@pytest.mark.parametrize("values", LOGITS.values(), ids=LOGITS)
@ALL_DTYPES
@EVERY_ISA
def test_extreme_logits_are_within_the_bound(dtype: torch.dtype, values: list[float]) -> None:
    inputs = make_inputs(DYNAMIC, Case(2, 6, 5, 9), dtype)
    inputs["logits"] = torch.tensor(values, dtype=dtype).view(1, 4, 1).repeat(2, 1, 9).requires_grad_()
    grad_y = make_grad(DYNAMIC, inputs)
    y, grads = run(DYNAMIC, inputs, grad_y)
    wanted_y, wanted = expected(DYNAMIC, inputs, grad_y)
    assert_within_bound("y", y, wanted_y)
    for name in ("x", "basis"):
        assert_within_bound(f"grad_{name}", grads[name], wanted[name])
    # Where one weight is 1 the gradient is a difference of equal numbers: judged beside what it is the difference of.
    weights = inputs["logits"].detach().double().softmax(1)
    parts = torch.linalg.vector_norm(grad_y.double()) * torch.linalg.vector_norm(wanted_y)
    assert torch.linalg.vector_norm(grads["logits"].double() - wanted["logits"]) <= BOUND[dtype] * parts
    assert torch.equal(grads["logits"][weights == 0], torch.zeros_like(grads["logits"][weights == 0]))


@pytest.mark.parametrize("f", range(4))
@WIDE_DTYPES
@EVERY_ISA
def test_a_filter_of_logit_minus_infinity_has_no_weight_at_all(dtype: torch.dtype, f: int) -> None:
    case = Case(2, 6, 5, 9)
    inputs = make_inputs(DYNAMIC, case, dtype, requires_grad=False)
    inputs["logits"][:, f] = -math.inf
    y = dynamic_filter(inputs["x"], inputs["logits"], 1e30 * only_filter(case, f, dtype), backend="cpu")
    assert torch.equal(y, torch.zeros_like(y))


@WIDE_DTYPES
@EVERY_ISA
def test_logits_of_a_single_filter_have_no_gradient_at_all(dtype: torch.dtype) -> None:
    """Softmax over one is constant 1, whatever the size that transforms are normalised by."""
    for H in range(1, 65):
        inputs = make_inputs(DYNAMIC, Case(1, H, 3, 5, F=1), dtype)
        _, grads = run(DYNAMIC, inputs, make_grad(DYNAMIC, inputs))
        assert not grads["logits"].any(), H


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("f", [0, 3])
@EVERY_ISA
def test_a_logit_that_has_no_softmax_spoils_its_channel_only(f: int, value: float) -> None:
    inputs = make_inputs(DYNAMIC, BLOCKS, torch.float32, requires_grad=False)
    wanted = DYNAMIC.public(inputs, "cpu")
    inputs["logits"][1, f, 20] = value
    y = DYNAMIC.public(inputs, "cpu")
    spoilt = torch.zeros_like(y, dtype=torch.bool)
    spoilt[1, :, :, 20] = True
    assert torch.equal(y.isnan(), spoilt)
    assert torch.equal(y[~spoilt], wanted[~spoilt])


@pytest.mark.parametrize(
    ("dtype", "logits_dtype"),
    [pair for pair in product(DTYPES, DTYPES) if pair[0] == torch.float64 or pair[1] != torch.float64],
    ids=str,
)
def test_logits_of_every_dtype_beside_every_x(dtype: torch.dtype, logits_dtype: torch.dtype) -> None:
    inputs = make_inputs(DYNAMIC, BLOCKS, dtype, parameter_dtype=logits_dtype)
    grad_y = make_grad(DYNAMIC, inputs)
    y, grads = run(DYNAMIC, inputs, grad_y)
    assert_all_within_bound(y, grads, expected(DYNAMIC, inputs, grad_y))
    assert grads["logits"].dtype == logits_dtype


# Bits: threads, runs, batches, which gradients are wanted

THREAD_CASES = [
    Case(8, 14, 14, 80),  # many small planes
    Case(1, 56, 56, 16),  # few: fewer than threads
    BLOCKS,
    # planes large enough to be shared by all threads: one alone, two, and one left over
    Case(1, 128, 128, 16),
    Case(1, 192, 160, 20),
    Case(2, 256, 256, 16),
    Case(1, 96, 100, 80),
    Case(3, 101, 90, 33),
]


def results_of_threads(op: Op, inputs: Inputs, counts: Sequence[int]) -> list[tuple[Tensor, Inputs]]:
    grad_y = make_grad(op, inputs)
    results = []
    for threads in counts:
        torch.set_num_threads(threads)
        results.append(run(op, inputs, grad_y))
    return results


@pytest.mark.parametrize("case", THREAD_CASES, ids=str)
@pytest.mark.parametrize("name", ["dynamic_filter+star_relu", "global_filter+star_relu"])
@EVERY_ISA
def test_bits_depend_neither_on_threads_nor_on_the_run(name: str, case: Case) -> None:
    op = OPS[name]
    first, *others = results_of_threads(op, make_inputs(op, case, torch.float32), (1, 2, 7, 7))
    for other in others:
        assert_same_bits(other, first)


@ALL_DTYPES
@ALL_FILTERS
def test_bits_of_no_dtype_depend_on_threads(op: Op, dtype: torch.dtype) -> None:
    first, *others = results_of_threads(op, make_inputs(op, Case(1, 128, 128, 20), dtype), (1, 2, 7))
    for other in others:
        assert_same_bits(other, first)


@pytest.mark.parametrize("case", [BLOCKS, Case(5, 7, 7, 70), Case(2, 128, 128, 20)], ids=str)
@ALL_DTYPES
@ALL_FILTERS
def test_a_sample_does_not_depend_on_its_batch(op: Op, dtype: torch.dtype, case: Case) -> None:
    inputs = make_inputs(op, case, dtype)
    grad_y = make_grad(op, inputs)
    y, grads = run(op, inputs, grad_y)
    one = {name: t[1:2].detach().requires_grad_() if name in ("x", "logits") else t for name, t in inputs.items()}
    y_of_one, grads_of_one = run(op, one, grad_y[1:2])
    assert torch.equal(y_of_one, y[1:2])
    for name in {"x", "logits"} & inputs.keys():
        assert torch.equal(grads_of_one[name], grads[name][1:2]), name


@pytest.mark.parametrize("case", [BLOCKS, Case(2, 13, 1, 5, F=3), Case(1, 128, 128, 20)], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
@ALL_FILTERS
def test_gradients_have_the_same_bits_alone_in_pairs_and_all_together(op: Op, threads: int, case: Case) -> None:
    torch.set_num_threads(threads)
    inputs = make_inputs(op, case, torch.float32, requires_grad=False)
    grad_y = make_grad(op, inputs)
    everything = dict(zip(inputs, op.backward(grad_y, inputs, backend="cpu"), strict=True))
    for names in (*((name,) for name in inputs), *combinations(inputs, 2)):
        some = op.backward(grad_y, inputs, [name in names for name in op.names], "cpu")
        for name, gradient in zip(names, some, strict=True):
            assert torch.equal(gradient, everything[name]), (name, names)


# Special values


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("case", [BLOCKS, Case(3, 11, 7, 37), Case(3, 1, 6, 37), Case(3, 2, 2, 37, F=3)], ids=str)
@ALL_FILTERS
@EVERY_ISA
def test_a_value_that_is_not_finite_stays_in_its_plane(op: Op, case: Case, value: float) -> None:
    inputs = make_inputs(op, case, torch.float32, requires_grad=False)
    before = op.public(inputs, "cpu")
    inputs["x"][1, -1, -1, 20] = value
    y, wanted = op.public(inputs, "cpu"), op.reference(inputs)
    plane = torch.zeros_like(y, dtype=torch.bool)
    plane[1, :, :, 20] = True
    assert torch.equal(y[~plane], before[~plane])
    assert y[wanted.isnan()].isnan().all()
    if not (op.scalars and value < 0):  # which relu makes zero
        assert not y[plane].isfinite().any()
    else:
        assert_within_bound("y", y, wanted)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@ALL_FILTERS
@EVERY_ISA
def test_a_gradient_that_is_not_finite_stays_in_its_plane(op: Op, value: float) -> None:
    inputs = make_inputs(op, BLOCKS, torch.float32, requires_grad=False)
    grad_y = make_grad(op, inputs)
    needs = [name in ("x", "logits") and name in inputs for name in op.names]
    before = op.backward(grad_y, inputs, needs, "cpu")
    grad_y[1, 3, 4, 20] = value
    after = op.backward(grad_y, inputs, needs, "cpu")
    for gradient, wanted in zip(after, before, strict=True):
        plane = torch.zeros_like(gradient, dtype=torch.bool)
        plane[1, ..., 20] = True
        assert torch.equal(gradient[~plane], wanted[~plane])
        # where relu is flat nothing comes through
        flat = plane.new_zeros(()) if not op.scalars or gradient.dim() != 4 else inputs["x"] <= 0
        assert not gradient[plane & ~flat].isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [Case(2, 4, 6, 37), Case(2, 5, 3, 3), Case(1, 1, 1, 16)], ids=str)
@EVERY_ISA
def test_subnormal_inputs_are_not_flushed(case: Case, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    quantum = info.smallest_normal * info.eps
    x = make_inputs(DYNAMIC, case, torch.float64, requires_grad=False)["x"]
    x = (x.clamp(-1.5, 1.5) * info.smallest_normal / 2).to(dtype)
    assert x.abs().max() < info.smallest_normal
    y = dynamic_filter(x, *pass_all(case, dtype), backend="cpu")
    # Each of a plane's filtered frequencies, and each sum on the way, is rounded to the nearest subnormal.
    allowed = (2 if dtype == torch.bfloat16 else case.H * case.W) * quantum
    assert allowed < 0.02 * info.smallest_normal
    assert (y.double() - x.double()).abs().max() <= allowed


def test_subnormal_float16_inputs_come_back_exactly() -> None:
    """Float32 has them all among its normal numbers."""
    case = Case(1, 8, 8, 32)
    x = torch.arange(-1024, 1024).mul(2.0**-24).to(torch.float16).view(1, 8, 8, 32)
    assert torch.equal(dynamic_filter(x, *pass_all(case, x.dtype), backend="cpu"), x)


@pytest.mark.parametrize("magnitude", [1e30, 1e-30])
@pytest.mark.parametrize("name", ["dynamic_filter", "global_filter"])
@EVERY_ISA
def test_very_large_and_very_small_inputs_are_within_the_bound(name: str, magnitude: float) -> None:
    inputs = make_inputs(OPS[name], Case(2, 28, 28, 5), torch.float32)
    grad_y = make_grad(OPS[name], inputs)
    inputs["x"] = (magnitude * inputs["x"].detach()).requires_grad_()
    assert_all_within_bound(*run(OPS[name], inputs, grad_y), expected(OPS[name], inputs, grad_y))


# Memory

STAGES = [(56, 64), (28, 128), (14, 320), (7, 512)]
MEBI = 2**20
# Spectra and partial sums are each rounded up to large pages of 2 MiB, where they take more than one.
ROUNDING = 2 * 2 * MEBI


@pytest.mark.parametrize(("side", "C"), STAGES)
@ALL_DTYPES
@EVERY_ISA
def test_a_forward_step_works_in_4_mebibytes_per_thread(side: int, C: int, dtype: torch.dtype) -> None:
    for threads in (1, 2):
        torch.set_num_threads(threads)
        workspace = cpu.filter_workspace_bytes((8, side, side, C), 4, dtype)
        assert 0 < workspace <= 4 * MEBI * threads
        assert cpu.filter_workspace_bytes((64, side, side, C), 4, dtype) == workspace  # whatever the batch


VECTOR_BYTES = {"avx512": 64, "avx2": 32, "generic": 16, "neon": 16}
SHARED_SHAPES = [(1, 128, 128, 16), (1, 192, 160, 20), (2, 256, 256, 16), (2, 1024, 1024, 64)]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@ALL_DTYPES
@EVERY_ISA
def test_workspace_grows_no_faster_than_threads(dtype: torch.dtype, backward: bool) -> None:
    for shape in [(8, side, side, C) for side, C in STAGES] + SHARED_SHAPES:
        for F in (0, 4):
            alone = cpu.filter_workspace_bytes(shape, F, dtype, backward)
            for threads in range(2, 9):
                torch.set_num_threads(threads)
                # a plane, or a group of them, for each thread, and one that they share
                together = cpu.filter_workspace_bytes(shape, F, dtype, backward)
                assert alone / 4 < together <= (threads + 1) * alone + ROUNDING, (shape, F, threads)
            torch.set_num_threads(1)


@pytest.mark.parametrize("threads", [1, 2, 7])
@ALL_DTYPES
def test_workspace_of_a_large_plane_is_that_of_its_spectra(isa: str, dtype: torch.dtype, threads: int) -> None:
    side = 1024
    torch.set_num_threads(threads)
    plane = side * side * VECTOR_BYTES[isa]
    planes = threads + 1 if threads > 1 else 1
    for F in (0, 4):
        forward, backward = (cpu.filter_workspace_bytes((2, side, side, 64), F, dtype, b) for b in (False, True))
        basis = side * (side // 2 + 1) * F * 2 * reference.compute_dtype(dtype).itemsize
        assert plane + basis <= forward <= 1.05 * plane * planes + basis + ROUNDING
        assert 2 * plane + basis <= backward <= 2.1 * plane * planes + basis + max(16 * MEBI, basis) + ROUNDING


def last_caches_bytes() -> int:
    """Of the last caches that this machine's processors have, where Linux tells."""
    folders = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/"))
    if not folders:
        pytest.skip("the system does not tell its caches")
    size = (folders[-1] / "size").read_text().strip()
    sharing = int((folders[-1] / "shared_cpu_map").read_text().replace(",", ""), 16).bit_count()
    return int(size.removesuffix("K")) * 1024 * -(-(os.cpu_count() or 1) // sharing)


def test_threads_share_a_plane_where_those_of_all_would_not_fit_the_last_caches(isa: str) -> None:
    side = 512
    plane = side * (side + 1) * VECTOR_BYTES[isa]
    fitting = max(1, last_caches_bytes() // plane)
    for threads, planes in ((fitting, fitting), (fitting + 1, 1)):
        torch.set_num_threads(threads)
        workspace = cpu.filter_workspace_bytes((threads, side, side, 1), 0, torch.float32)
        assert plane * planes <= workspace <= plane * planes + threads * MEBI / 4 + ROUNDING


# Results written past the caches

LARGE = 16 * MEBI


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("case", [Case(5, 129, 128, 64), Case(3, 257, 354, 16), Case(5, 128, 128, 70)], ids=str)
@WIDE_DTYPES
def test_large_results_are_those_of_their_samples(
    core: ModuleType, dtype: torch.dtype, case: Case, threads: int, offset: int
) -> None:
    inputs = make_inputs(DYNAMIC, replace(case, C=case.C * 4 // dtype.itemsize), dtype, requires_grad=False)
    x, logits, basis = inputs.values()
    grad_y = make_grad(DYNAMIC, inputs).contiguous()
    y, grad_x = (torch.full((x.numel() + offset,), math.nan, dtype=dtype) for _ in range(2))
    assert x.numel() * x.itemsize >= LARGE > x[0].numel() * x.itemsize
    problem = (*x.shape, case.F), CODES[dtype], None
    addresses = [t.data_ptr() for t in inputs.values()]
    core.filter(*problem, *addresses, y[offset:].data_ptr(), threads)
    core.filter_backward(*problem, grad_y.data_ptr(), *addresses, grad_x[offset:].data_ptr(), 0, 0, False, threads)
    for i in range(case.B):
        alone = x[i : i + 1].clone().requires_grad_()
        wanted = DYNAMIC.public({"x": alone, "logits": logits[i : i + 1], "basis": basis}, "cpu")
        (wanted_grad,) = torch.autograd.grad(wanted, alone, grad_y[i : i + 1])
        assert torch.equal(y[offset:].view(x.shape)[i], wanted[0])
        assert torch.equal(grad_x[offset:].view(x.shape)[i], wanted_grad[0])


PEAK = """
import torch
from dfformer_kernels.backends import cpu

def peak():  # getrusage's may be that of the process this one was started by
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM"))

torch.set_num_threads(1)
problem = (1, 1024, 1024, 16, 4), 0, None
x, y, grad_y = torch.ones(3, 1, 1024, 1024, 16).unbind()
logits, grad_logits = torch.ones(2, 1, 4, 16).unbind()
basis, grad_basis = torch.ones(2, 1024, 513, 4, 2).unbind()
inputs = [t.data_ptr() for t in (x, logits, basis)]
results = [t.data_ptr() for t in (y, grad_logits, grad_basis)]
# Had more been in use before than is now, new memory would not raise the peak.
ballast = torch.ones(2**27, dtype=torch.uint8)
before = peak()
cpu.core().filter(*problem, *inputs, y.data_ptr(), 1)
print(peak() - before, cpu.filter_workspace_bytes(x.shape, 4, x.dtype))
cpu.core().filter_backward(*problem, grad_y.data_ptr(), *inputs, *results, False, 1)
print(peak() - before, cpu.filter_workspace_bytes(x.shape, 4, x.dtype, backward=True))
"""
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads and limits memory as Linux does")


@LINUX
def test_a_call_takes_the_memory_its_workspace_says() -> None:
    done = run_script(PEAK)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        taken, said = map(int, line.split())
        assert 0.9 * said <= taken <= said + 2 * MEBI  # plans, and pages of code


NO_MEMORY = """
import resource, sys
import torch
from dfformer_kernels.backends import cpu

core = cpu.core()
x, y, grad_y = torch.ones(3, 1, 2048, 2048, 1).unbind()
weight, grad_weight = torch.tensor([1.0, 0.0]).repeat(2, 2048, 1025, 1, 1).unbind()
problem = (*x.shape, 0), 0, None

def forward():
    core.filter(*problem, x.data_ptr(), 0, weight.data_ptr(), y.data_ptr(), 1)

def backward():
    addresses = grad_y, x, None, weight, y, None, grad_weight
    core.filter_backward(*problem, *(0 if t is None else t.data_ptr() for t in addresses), False, 1)

with open("/proc/self/statm") as file:
    in_use = int(file.read().split()[0]) * resource.getpagesize()
for step in forward, backward:
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (in_use + 4 * 2**20, limits[1]))
    try:
        step()
    except MemoryError:
        pass
    else:
        sys.exit(f"{step} found memory")
    resource.setrlimit(resource.RLIMIT_AS, limits)
    y.zero_()
    step()
    if (y - x).abs().max() > 1e-5:
        sys.exit(f"{step} is wrong afterwards")
"""


@LINUX
def test_a_workspace_that_cannot_be_had_is_a_memory_error() -> None:
    done = run_script(NO_MEMORY)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("parameter_dtype", [torch.float32, torch.bfloat16], ids=str)
@ALL_FILTERS
def test_no_copy_made_for_the_core_is_saved_for_backward(op: Op, parameter_dtype: torch.dtype) -> None:
    """x is not dense and logits have not the dtype of the arithmetic, so that the core works on copies."""
    inputs = make_inputs(op, BLOCKS, torch.float32, parameter_dtype=parameter_dtype)
    inputs["x"] = LAYOUTS["transposed_plane"](inputs["x"]).requires_grad_()
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    def signatures(tensors: Sequence[Tensor]) -> list[tuple[Any, ...]]:
        return [(t.data_ptr(), t.dtype, t.shape, t.stride()) for t in tensors]

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        op.public(inputs, "cpu")
    assert signatures(saved) == signatures(list(inputs.values()))


def zeros_of_unused_memory(*shape: int) -> Tensor:
    """bfloat16 zeros that take memory where they are written to only."""
    return torch.frombuffer(mmap.mmap(-1, 2 * math.prod(shape), mmap.MAP_PRIVATE), dtype=torch.bfloat16).view(shape)


@LINUX
def test_offsets_beyond_2_to_the_31(core: ModuleType) -> None:
    """Only the last sample, whose elements are all beyond, is looked at."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    require("memory", free >= 16 * 2**30, "less than 16 GiB of free memory")
    last = make_inputs(DYNAMIC, Case(1, 32, 32, 1024, F=2), torch.bfloat16, parameter_dtype=torch.float32)
    grad_y = last["x"].detach()
    wanted_y, wanted = run(DYNAMIC, last, grad_y)

    B = 2**11 + 1
    x, result = (zeros_of_unused_memory(B, 32, 32, 1024) for _ in range(2))
    logits, grad_logits = torch.zeros(2, B, 2, 1024).unbind()
    x[-1:], logits[-1:] = grad_y, last["logits"].detach()
    problem = (*x.shape, 2), CODES[x.dtype], None
    addresses = [t.data_ptr() for t in (x, logits, last["basis"])]
    core.filter(*problem, *addresses, result.data_ptr(), 2)
    assert torch.equal(result[-1:], wanted_y)
    results = result.data_ptr(), grad_logits.data_ptr(), 0
    core.filter_backward(*problem, x.data_ptr(), *addresses, *results, False, 2)
    assert torch.equal(result[-1:], wanted["x"])
    assert torch.equal(grad_logits[-1:], wanted["logits"])


# Range checks. The buffer is as large as the good problem needs.

BUFFER = torch.zeros(16, dtype=torch.float64)
FORWARD = ("x", "logits", "filters", "y")
BACKWARD = ("grad_y", "x", "logits", "filters")
GOOD_PROBLEM = {"shape": (1, 1, 1, 1, 1), "dtype": 0, "star_relu": None, "threads": 1}
GOOD: dict[str, dict[str, Any]] = {
    "filter": GOOD_PROBLEM | dict.fromkeys(FORWARD, BUFFER.data_ptr()),
    "filter_backward": GOOD_PROBLEM
    | dict.fromkeys(BACKWARD, BUFFER.data_ptr())
    | dict.fromkeys(("grad_x", "grad_logits", "grad_filters"), 0)
    | {"need_scalars": False},
    "filter_workspace": {"shape": (1, 1, 1, 1, 1), "dtype": 0, "backward": True, "threads": 1},
}
HUGE = 2**63 - 1
BAD_SHAPES = [
    *(tuple(size if i == place else 1 for i in range(5)) for place in range(4) for size in (0, -1, HUGE, -HUGE)),
    (1, 1, 1, 1, -1),
    (1, 1, 1, 1, HUGE),
    (1, 2**15 + 1, 1, 1, 1),
    (1, 1, 2**15 + 1, 1, 1),
    # each size is possible, the product of them is not
    (2**20, 2**15, 2**15, 2**10, 1),
    (2**31, 1, 1, 2**31, 1),
    (2**31, 1, 1, 1, 2**31),
    (1, 2**15, 2**15, 1, 2**31),
]
BAD_PROBLEMS: list[tuple[dict[str, Any], str]] = [
    ({"dtype": 4}, "dtype: got code 4, accepted are 0 to 3"),
    ({"dtype": -1}, "dtype: got code -1"),
    ({"threads": 0}, "threads: got 0, accepted are 1 to 4096"),
    ({"threads": -1}, "threads: got -1"),
    ({"threads": 4097}, "threads: got 4097"),
    *(({"shape": shape}, "shape: ") for shape in BAD_SHAPES),
]


@pytest.mark.parametrize("function", GOOD)
@pytest.mark.parametrize(("bad", "message"), BAD_PROBLEMS, ids=lambda v: str(v).replace(str(HUGE), "huge"))
def test_bad_problems_raise_naming_the_argument(
    core: ModuleType, function: str, bad: dict[str, Any], message: str
) -> None:
    getattr(core, function)(**GOOD[function])
    with pytest.raises(ValueError, match=f"^{message}"):
        getattr(core, function)(**GOOD[function] | bad)


@pytest.mark.parametrize("F", [2**31, 2**32 + 1])
def test_more_filters_than_an_int_counts_raise(core: ModuleType, F: int) -> None:
    """In the function that reads no memory; the others check with it."""
    with pytest.raises(ValueError, match=r"^shape: "):
        core.filter_workspace(**GOOD["filter_workspace"] | {"shape": (1, 1, 1, 1, F)})


@pytest.mark.parametrize(
    ("function", "name"), [("filter", n) for n in FORWARD] + [("filter_backward", n) for n in BACKWARD]
)
def test_null_pointers_raise_naming_the_argument(core: ModuleType, function: str, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: got a null pointer"):
        getattr(core, function)(**GOOD[function] | {name: 0})


@pytest.mark.parametrize("function", ["filter", "filter_backward"])
def test_a_global_filter_needs_no_logits(core: ModuleType, function: str) -> None:
    getattr(core, function)(**GOOD[function] | {"shape": (1, 1, 1, 1, 0), "logits": 0})


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"need_scalars": True}, "need_scalars: got true, but the problem has no StarReLU"),
        ({"shape": (1, 1, 1, 1, 0), "grad_logits": BUFFER.data_ptr()}, r"grad_logits: a global filter \(F = 0\)"),
    ],
    ids=["need_scalars", "grad_logits"],
)
def test_gradients_that_there_are_not_raise(core: ModuleType, bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        core.filter_backward(**GOOD["filter_backward"] | bad)


@pytest.mark.parametrize(
    "bad",
    [{"shape": (1, 1, 1, 1)}, {"shape": (1, 1, 1, 1, 2**63)}, {"shape": 1}, {"dtype": "float32"}, {"star_relu": 1.0}],
    ids=str,
)
def test_arguments_of_the_wrong_type_raise(core: ModuleType, bad: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        core.filter(**GOOD["filter"] | bad)


def test_a_side_too_long_for_the_core_is_left_to_the_next_backend() -> None:
    case = Case(1, 1, 32769, 1)
    inputs = make_inputs(DYNAMIC, case, torch.float32, requires_grad=False)
    assert torch.equal(DYNAMIC.public(inputs), DYNAMIC.public(inputs, "torch"))


# Python threads and forks

# More lengths than plans are kept, so that plans come and go while others use them.
THREAD_SHAPES = [[Case(1, h, h + 8, 5) for h in range(first, 153, 16)] for first in range(1, 9)]


@ALL_FILTERS
def test_eight_threads_at_once_get_their_own_results(op: Op) -> None:
    def compute(inputs: Inputs, grad_y: Tensor) -> list[Tensor]:
        return [op.public(inputs, "cpu"), *op.backward(grad_y, inputs, backend="cpu")]

    problems = [[make_inputs(op, case, torch.float32, requires_grad=False) for case in c] for c in THREAD_SHAPES]
    grads = [[make_grad(op, inputs) for inputs in one] for one in problems]
    wanted = [[compute(*p) for p in zip(*each, strict=True)] for each in zip(problems, grads, strict=True)]
    start = threading.Barrier(len(problems))

    def work(i: int) -> list[list[Tensor]]:
        start.wait()
        return [compute(*p) for _ in range(3) for p in zip(problems[i], grads[i], strict=True)]

    with ThreadPoolExecutor(len(problems)) as pool:
        results = list(pool.map(work, range(len(problems))))
    for result, serial in zip(results, wanted, strict=True):
        for actual, expected_ in zip(result, 3 * serial, strict=True):
            assert all(torch.equal(a, w) for a, w in zip(actual, expected_, strict=True))


def test_eight_threads_at_once_may_each_have_threads_of_their_own() -> None:
    torch.set_num_threads(2)
    op = OPS["dynamic_filter+star_relu"]
    problems = [make_inputs(op, Case(1, 96 + 2 * i, 100, 20), torch.float32, requires_grad=False) for i in range(8)]
    wanted = [op.public(inputs, "cpu") for inputs in problems]

    def work(inputs: Inputs) -> Tensor:
        torch.set_num_threads(2)  # a thread begins with the number the process began with
        return op.public(inputs, "cpu")

    with ThreadPoolExecutor(8) as pool:
        assert all(torch.equal(y, w) for y, w in zip(pool.map(work, 3 * problems), 3 * wanted, strict=True))


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_other_python_threads_run_during_a_call(core: ModuleType, backward: bool) -> None:
    """Were the GIL held, no time would be read in the middle half of a call."""
    core.set_active_isa(core.supported_isas()[-1])
    inputs = make_inputs(DYNAMIC, Case(1, 512, 512, 16), torch.float32, requires_grad=False)
    x = inputs["x"]
    y, grad_y = torch.zeros_like(x), torch.ones_like(x)
    problem = (*x.shape, 4), CODES[x.dtype], None
    addresses = [t.data_ptr() for t in inputs.values()]

    def run() -> None:
        if backward:
            core.filter_backward(*problem, grad_y.data_ptr(), *addresses, y.data_ptr(), 0, 0, False, 1)
        else:
            core.filter(*problem, *addresses, y.data_ptr(), 1)

    assert_releases_the_gil(run)


FORK = """
import multiprocessing, os, sys, threading
import torch
from dfformer_kernels import dynamic_filter

torch.set_num_threads(4)
x = torch.linspace(-1, 1, 2 * 128 * 128 * 20).view(2, 128, 128, 20).requires_grad_()
logits = torch.linspace(-1, 1, 2 * 4 * 20).view(2, 4, 20).requires_grad_()
basis = torch.linspace(-1, 1, 128 * 65 * 4 * 2).view(128, 65, 4, 2).requires_grad_()
star_relu = torch.tensor([0.9], requires_grad=True), torch.tensor([0.3], requires_grad=True)
leaves = (x, logits, basis, *star_relu)
grad_y = torch.ones(x.shape)  # made here: torch's own parallel operators hang in a forked child

def run():  # forward and backward, in several threads where that is allowed
    y = dynamic_filter(x, logits, basis, star_relu, backend="cpu")
    return [t.numpy().tobytes() for t in (y.detach(), *torch.autograd.grad(y, leaves, grad_y))]

def child():
    sys.exit(0 if run() == wanted else 3)

def new_lengths():  # plan after plan, so that a fork finds one being made
    for n in range(1000, 30000):
        if stop.is_set():
            return
        dynamic_filter(torch.ones(1, 1, n, 1), torch.ones(1, 1, 1), torch.ones(1, n // 2 + 1, 1, 2), backend="cpu")

def fork():
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(30)
    if process.exitcode != 0:
        process.kill()
        print("the forked child", "hangs" if process.exitcode is None else "is wrong", file=sys.stderr, flush=True)
        os._exit(1)

wanted = run()
fork()
stop = threading.Event()
planner = threading.Thread(target=new_lengths)
planner.start()
for _ in range(10):
    fork()
stop.set()
planner.join()
sys.exit(run() != wanted)
"""
CAN_FORK = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")


@CAN_FORK
def test_a_forked_child_computes_after_and_during_calls_of_its_parent() -> None:
    done = run_script(FORK)
    assert done.returncode == 0, done.stderr


WORKERS = """
import torch
from torch.utils.data import DataLoader, Dataset
from dfformer_kernels import dynamic_filter

torch.set_num_threads(4)
basis = torch.linspace(-1, 1, 64 * 33 * 4 * 2).view(64, 33, 4, 2)

class Filtered(Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, i):
        x = torch.linspace(-1, 1 + i, 64 * 64 * 20).view(1, 64, 64, 20)
        return dynamic_filter(x, torch.linspace(-1, 1, 80).view(1, 4, 20), basis, backend="cpu")[0]

if __name__ == "__main__":
    wanted = [Filtered()[i] for i in range(6)]
    loader = DataLoader(Filtered(), batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=60)
    for batch, first in zip(loader, range(0, 6, 2), strict=True):
        assert torch.equal(batch, torch.stack(wanted[first : first + 2]))
"""


@CAN_FORK
def test_workers_of_a_data_loader_compute() -> None:
    done = run_script(WORKERS)
    assert done.returncode == 0, done.stderr
