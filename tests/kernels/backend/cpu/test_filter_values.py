"""The filter step of the compiled core: instruction sets, dtypes, shapes, lengths, and what it reads and writes."""

from collections.abc import Sequence
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
    assert_all_within_bound,
    assert_same_bits,
    assert_within_bound,
    expected,
    make_grad,
    make_inputs,
    saved_for_backward,
)
from extent import FULL, pairwise
from hypothesis import given, settings
from hypothesis import strategies as st
from native_core import (
    DYNAMIC,
    FILTERS,
    ISAS,
    assert_joint_scalars_within_bound,
    assert_run_within_bound,
    run,
    run_guarded,
)
from torch import Tensor

from dfformer_kernels import reference
from dfformer_kernels.backend import cpu

pytestmark = pytest.mark.usefixtures("one_thread", "core")

WIDE_DTYPES = [torch.float32, torch.float64]
# Full tiles and a partial one with every instruction set; an odd number of them.
TILES = Case(3, 12, 10, 37)


@pytest.mark.parametrize(**pairwise(isa=ISAS, op=list(FILTERS), dtype=DTYPES, case=CASES))
@pytest.mark.usefixtures("isa")
def test_every_instruction_set_is_within_the_bound(op: str, dtype: torch.dtype, case: Case) -> None:
    assert_run_within_bound(FILTERS[op], make_inputs(FILTERS[op], case, dtype))


GUARDED = [TILES, Case(2, 7, 9, 3, F=3), Case(1, 5, 1, 16), Case(1, 128, 130, 2)]


@pytest.mark.parametrize(**pairwise(isa=ISAS, op=list(FILTERS), dtype=DTYPES, case=GUARDED))
@pytest.mark.usefixtures("isa")
def test_memory_outside_the_tensors_is_neither_used_nor_changed(
    core: ModuleType, op: str, dtype: torch.dtype, case: Case
) -> None:
    inputs = make_inputs(FILTERS[op], case, dtype)
    grad_y = make_grad(FILTERS[op], inputs)
    assert_same_bits(run_guarded(core, FILTERS[op], inputs, grad_y), run(FILTERS[op], inputs, grad_y))


PLANES = [
    # primes by definition (103), by Rader (61, 97, 101, 127, 251) and by Bluestein (131, 509), alone and with other
    # factors, along H and along W
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


@pytest.mark.parametrize(**pairwise(op=["dynamic_filter+star_relu", "global_filter"], dtype=WIDE_DTYPES, plane=PLANES))
def test_planes_of_every_kind_of_length_are_within_the_bound(
    op: str, dtype: torch.dtype, plane: tuple[int, int]
) -> None:
    assert_run_within_bound(OPS[op], make_inputs(OPS[op], Case(1, *plane, 3), dtype))


def test_every_length_up_to_600_is_within_the_bound() -> None:
    """Each length along H or along W, in float32 or float64, in turn; all four of each with DFFORMER_TEST_FULL=1."""
    kinds = [(upright, dtype) for upright in (False, True) for dtype in WIDE_DTYPES]
    failures = []
    for n in range(1, 601):
        for upright, dtype in kinds if FULL else [kinds[(n + n // 4) % 4]]:
            H, W = (n, 1) if upright else (1, n)
            try:
                assert_run_within_bound(DYNAMIC, make_inputs(DYNAMIC, Case(1, H, W, 5), dtype))
            except AssertionError as error:
                failures.append(f"{H}x{W} {dtype}: {error}")
    assert failures == []


@settings(max_examples=200 if FULL else 40, deadline=None, derandomize=True)
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
    op: Any, case: Case, dtype: torch.dtype, x_layout: str, grad_layout: str
) -> None:
    inputs = make_inputs(op, case, dtype)
    inputs["x"] = LAYOUTS[x_layout](inputs["x"]).requires_grad_()
    grad_y = make_grad(op, inputs)
    grad_y /= max(1, grad_y.numel() / 4096)  # keeps the scalars' gradients, sums over all elements, in float16's range
    assert_joint_scalars_within_bound(op, inputs, LAYOUTS[grad_layout](grad_y))


@pytest.mark.parametrize(
    **pairwise(
        op=list(FILTERS),
        plane=[(6, 8), (7, 8), (6, 7), (5, 2), (1, 2), (1, 8), (1, 1), (6, 1), (1, 7)],
        column=[0, -1],
    )
)
def test_a_filter_that_no_real_signal_has_gives_what_irfft2_gives(op: str, plane: tuple[int, int], column: int) -> None:
    """All of the filter is in one column whose imaginary part irfft2 drops, and nothing in it is Hermitian."""
    (H, W), step = plane, FILTERS[op]
    inputs = make_inputs(step, Case(2, H, W, 3), torch.float32)
    filters = list(step.parameters)[-1]
    kept = torch.zeros_like(inputs[filters])
    kept[:, column] = inputs[filters][:, column].detach()
    inputs[filters] = kept.requires_grad_()
    with torch.no_grad():
        x, *others = (t.double() for name, t in inputs.items() if name not in step.scalars)
        u = reference.star_relu(x, *(inputs[name].double() for name in step.scalars)) if step.scalars else x
        M = torch.view_as_complex(others[-1])
        if len(others) == 2:
            M = torch.einsum("bfc,hkf->bhkc", others[0].softmax(1).to(M.dtype), M)
        wanted = torch.fft.irfft2(torch.fft.rfft2(u, dim=(1, 2)) * M, s=(H, W), dim=(1, 2))
    assert_within_bound("y", step.public(inputs, "cpu"), wanted)
    assert_joint_scalars_within_bound(step, inputs, make_grad(step, inputs))


PAIRS = [(x, logits) for x in DTYPES for logits in DTYPES if x == torch.float64 or logits != torch.float64]


@pytest.mark.parametrize(("dtype", "logits_dtype"), PAIRS, ids=str)
def test_logits_of_every_dtype_beside_every_x(dtype: torch.dtype, logits_dtype: torch.dtype) -> None:
    inputs = make_inputs(DYNAMIC, TILES, dtype, parameter_dtype=logits_dtype)
    grad_y = make_grad(DYNAMIC, inputs)
    y, grads = run(DYNAMIC, inputs, grad_y)
    assert_all_within_bound(y, grads, expected(DYNAMIC, inputs, grad_y))
    assert grads["logits"].dtype == logits_dtype


@pytest.mark.parametrize(**pairwise(op=list(FILTERS), parameter_dtype=[torch.float32, torch.bfloat16]))
def test_no_copy_made_for_the_core_is_saved_for_backward(op: str, parameter_dtype: torch.dtype) -> None:
    """x is not contiguous and logits are not of the arithmetic dtype, so that the core works on copies."""
    inputs = make_inputs(FILTERS[op], TILES, torch.float32, parameter_dtype=parameter_dtype)
    inputs["x"] = LAYOUTS["transposed_plane"](inputs["x"]).requires_grad_()

    def signatures(tensors: Sequence[Tensor]) -> list[tuple[Any, ...]]:
        return [(t.data_ptr(), t.dtype, t.shape, t.stride()) for t in tensors]

    with saved_for_backward() as saved:
        FILTERS[op].public(inputs, "cpu")
    assert signatures(saved) == signatures(list(inputs.values()))


def test_a_side_too_long_for_the_core_is_left_to_the_next_backend() -> None:
    inputs = make_inputs(DYNAMIC, Case(1, 1, 32769, 1), torch.float32, requires_grad=False)
    assert torch.equal(DYNAMIC.public(inputs), DYNAMIC.public(inputs, "torch"))


SHAPES: list[tuple[str, Inputs]] = [
    ("basis", {"basis": torch.ones(4, 3, 2, 2)}),
    ("basis of another F", {"basis": torch.ones(4, 4, 3, 2)}),
    ("logits", {"logits": torch.ones(2, 2, 4)}),
    ("no logits", {"logits": torch.ones(0)}),
]


@pytest.mark.parametrize(("what", "wrong"), SHAPES, ids=[what for what, _ in SHAPES])
def test_parameters_of_another_shape_never_reach_the_core(what: str, wrong: Inputs) -> None:
    """The last check before addresses, whatever is checked before."""
    x, logits = torch.ones(2, 4, 6, 3), wrong.get("logits", torch.ones(2, 2, 3))
    with pytest.raises(RuntimeError, match="filters, logits: expected"):
        cpu.KERNELS["dynamic_filter"](x, logits if logits.numel() else None, wrong.get("basis", torch.ones(4, 4, 2, 2)),
                                      None, None)  # fmt: skip
