"""What of bench_gpu runs without a GPU: it says so, its rows are complete, what fails is in a row."""

import csv
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import bench_gpu
import pytest
import torch
from torch import Tensor

from dfformer_kernels.backend.cuda.layout import CHIPS, KernelSpec


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["bench_gpu.py"])
    with pytest.raises(SystemExit, match="no CUDA device"):
        bench_gpu.main()


def test_a_failure_is_a_row() -> None:
    def run(grad_y: object, arguments: object) -> list[torch.Tensor]:
        raise ValueError("some reason\nand details")

    row = bench_gpu.measure(bench_gpu.Provider("broken", run, has_error=False), 7, 8, torch.float32, "forward", 1)
    assert row.failure
    assert "\n" not in row.failure
    assert row.gpu_us is None
    assert "broken" in bench_gpu.line(row)


@pytest.mark.parametrize("direction", bench_gpu.DIRECTIONS)
def test_the_reference_has_no_error(direction: str) -> None:
    provider = bench_gpu.Provider("torch.fft", bench_gpu.of_reference)
    assert bench_gpu.largest_error(provider, 7, 8, torch.float32, direction, "cpu") < 1e-6


@pytest.mark.parametrize("key", bench_gpu.VARIANTS, ids=str)
def test_variants_fit_an_h100(key: tuple[int, str]) -> None:
    H, direction = key
    step = KernelSpec(H, H, dict(bench_gpu.STAGES)[H], 4, torch.float32, True, backward=direction == "backward")
    found = {name: variant(step, CHIPS["sm_90"]) for name, variant in bench_gpu.other_variants(H, direction)}
    assert len(found) == len(bench_gpu.VARIANTS[key]) + ("unrolled columns" in found)
    assert all(variant is not None for variant in found.values())
    assert ("unrolled columns" in found) == (H > 14 or (H, direction) == (14, "backward"))


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the clocks runs, on one small plane of CPU tensors; nothing is compiled."""
    inputs: Any = bench_gpu.inputs
    largest_error: Any = bench_gpu.largest_error
    monkeypatch.setattr(bench_gpu, "STAGES", ((7, 8),))
    monkeypatch.setattr(bench_gpu, "inputs", lambda *given: inputs(*given[:-1], "cpu"))
    monkeypatch.setattr(bench_gpu, "largest_error", lambda *given: largest_error(*given[:-1], "cpu"))
    for clock, microseconds in (("graph_us", 4.0), ("host_us", 2.0)):
        monkeypatch.setattr(bench_gpu, clock, lambda run, measured=microseconds: [run(), measured][1])
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")


def rows_against(output: Path) -> dict[tuple[str, str], Any]:
    rows = bench_gpu.run(["float32"], 2, against=True, variants=False, output=output)
    with (output / "bench_gpu.csv").open() as file:
        assert [row["failure"] for row in csv.DictReader(file)] == [row.failure for row in rows]
    return {(row.provider, row.direction): row for row in rows}


@pytest.mark.usefixtures("on_cpu")
def test_every_competitor_has_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "subquadratic_ops_torch.fused_fft_conv2d", None)
    rows = rows_against(tmp_path)
    providers = ("cuda", "cufft", "torch.fft", "torch.compile", "subquadratic-ops (another operation)")
    assert list(rows) == [(provider, direction) for direction in bench_gpu.DIRECTIONS for provider in providers]
    for (provider, direction), row in rows.items():
        if provider.startswith("torch"):
            assert row.error < 1e-5
            assert (row.gpu_us, row.host_us, row.failure) == (4.0, 2.0, "")
            assert row.share_of_copy == bench_gpu.TENSORS[direction] / 2
        else:
            reason = "no backend can run" if provider.startswith("cu") else "subquadratic_ops_torch"
            assert reason in row.failure
            assert row.gpu_us is None


@pytest.mark.usefixtures("on_cpu")
def test_the_other_operation_is_timed_without_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def fused_fft_conv2d(x: Tensor, filters: Tensor) -> Tensor:
        seen.append((x.shape, filters.shape, x.is_contiguous()))
        return x * filters

    for name in ("subquadratic_ops_torch", "subquadratic_ops_torch.fused_fft_conv2d"):
        monkeypatch.setitem(sys.modules, name, module := ModuleType(name))
    module.__dict__["fused_fft_conv2d"] = fused_fft_conv2d
    rows = rows_against(tmp_path)
    for direction in bench_gpu.DIRECTIONS:
        row = rows[bench_gpu.OTHER_OPERATION, direction]
        assert (row.error, row.gpu_us, row.failure) == (None, 4.0, "")
    assert set(seen) == {((2, 8, 7, 7), (8, 7, 7), True), ((1, 32, 7, 7), (32, 7, 7), True)}


@pytest.mark.parametrize("arguments", [["--dtype", "float64"], ["--batch", "many"], ["--agains", "x"]])
def test_arguments_that_are_refused(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["bench_gpu.py", *arguments])
    with pytest.raises(SystemExit, match="2"):
        bench_gpu.main()
