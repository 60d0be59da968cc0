"""What of bench_gpu runs without a GPU: it says so, its rows are complete, what fails is in a row."""

import bench_gpu
import pytest
import torch

from dfformer_kernels.backends.cuda.layout import CHIPS, Step, variant_of


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
    step = Step(H, H, dict(bench_gpu.STAGES)[H], 4, torch.float32, star_relu=True, backward=direction == "backward")
    for lanes, threads, planes in bench_gpu.VARIANTS[key]:
        assert variant_of(step, CHIPS["sm_90"], lanes, planes, threads) is not None
