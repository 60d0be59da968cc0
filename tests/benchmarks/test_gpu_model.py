"""The model of what bounds the CUDA kernels: it counts loops as they run, and no kernel needs more than it did."""

import csv

import gpu_model
import pytest
import torch
from conftest import require

from dfformer_kernels.backend.cuda import nvrtc
from dfformer_kernels.backend.cuda.layout import CHIPS, KernelSpec, choose_variant

# Thread-instructions an element of x on sm_90 in float32: a few per cent above what there are.
MOST = {(28, False): 62, (28, True): 120, (7, False): 53, (7, True): 112}


@pytest.mark.parametrize(
    ("tasks", "threads", "per_task", "expected"),
    [(56, 256, 8, 14), (29, 256, 8, 8), (4, 128, 32, 4), (5, 128, 32, 5), (112, 128, 1, 4), (0, 128, 8, 0)],
)
def test_a_warp_runs_a_loop_as_often_as_its_first_thread(
    tasks: int, threads: int, per_task: int, expected: int
) -> None:
    assert gpu_model.warp_iterations(tasks, threads, per_task) == expected


def test_loops_are_branches_back() -> None:
    code = ["MOV R1, 1", "FADD R1, R1, R1", "BRA `(.L_x_1)", "BRA `(.L_x_2)", "EXIT"]
    assert gpu_model.loops_of(code, {".L_x_1": 1, ".L_x_2": 4}) == [(1, 2)]


@pytest.mark.parametrize(("H", "backward"), MOST)
def test_instructions_of_a_stage(H: int, backward: bool) -> None:
    pytest.importorskip("triton", reason="its package has the disassembler")
    require("cuda", not nvrtc.unavailable_reasons(), "nothing can be compiled here")
    step = KernelSpec(H, H, dict(gpu_model.STAGES)[H], 4, torch.float32, star_relu=True, backward=backward)
    row = gpu_model.row("H100", step)
    assert row.instructions <= MOST[H, backward]
    assert row.instructions == pytest.approx(row.rows + row.grad_rows + row.columns + row.inverse_rows, abs=0.1)
    assert row.instructions == pytest.approx(row.float32 + row.shared + row.device + row.other, abs=0.1)
    # every element is loaded and stored, by warps of 32 whole lanes: x and y, or grad_y, x twice and grad_x
    variant = choose_variant(step, CHIPS["sm_90"])
    assert variant is not None
    assert row.device >= (4 if backward else 2) / variant.width
    assert row.floor_us == max(row.issue_us, row.float32_us, row.shared_us, row.l2_us, row.device_us)


def test_layouts_differ_and_arithmetic_does_not() -> None:
    """In the committed table, whose kernels differ between chips in channels per CTA, threads and spectra."""
    of_step: dict[tuple[str, ...], list[float]] = {}
    with gpu_model.RESULTS.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            step = tuple(row[name] for name in ("H", "C", "dtype", "direction"))
            of_step.setdefault(step, []).append(float(row["float32"]))
    assert {step: counts for step, counts in of_step.items() if max(counts) > 1.05 * min(counts)} == {}
