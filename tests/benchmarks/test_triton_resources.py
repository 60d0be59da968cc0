"""Every Triton kernel compiled for every kind of GPU: nothing spilled, shared memory within the limit."""

from itertools import product

import gpu_resources
import pytest
import torch
from extent import FULL

pytest.importorskip("triton")
resources = pytest.importorskip("triton_resources")

ALL = list(product(resources.SHAPES, resources.DTYPES))
PROBLEMS = ALL if FULL else [((56, 56, 64), torch.bfloat16), ((9, 15, 5), torch.float32)]


@pytest.mark.parametrize("target", resources.TARGETS)
def test_kernels_fit_every_gpu(target: str) -> None:
    rows = [row for shape, dtype in PROBLEMS for row in resources.rows([target], [shape], [dtype])]
    kernels = {"activate", "activate_backward", "mix", "mix_backward", "global_mix", "global_mix_backward"}
    assert {row["kernel"] for row in rows} == kernels | {"softmax_backward"}
    *_, most_shared = resources.TARGETS[target]
    for row in rows:
        assert row["spill_bytes"] == 0, row
        assert 0 <= row["smem_bytes"] <= most_shared, row
        assert row["ctas_per_sm"] >= 1, row


def test_the_committed_table_is_complete_and_clean() -> None:
    rows = [row for row in gpu_resources.read() if row["backend"] == "cufft"]
    dtypes = [str(dtype).removeprefix("torch.") for dtype in resources.DTYPES]
    problems = {(row["target"], int(row["H"]), int(row["W"]), row["dtype"]) for row in rows}
    assert problems == {(t, H, W, d) for t, (H, W, _), d in product(resources.TARGETS, resources.SHAPES, dtypes)}
    assert all((row["spill_bytes"], row["dispatched"]) == ("0", "True") for row in rows)
