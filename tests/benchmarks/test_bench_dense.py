"""The benchmark of products: what it writes, and that it refuses a wrong result."""

import csv
from pathlib import Path

import bench_dense
import pytest
from conftest import require_backend

from dfformer_kernels.backends import cpu

pytestmark = pytest.mark.usefixtures("one_thread")


def test_quick(tmp_path: Path) -> None:
    require_backend("cpu")
    bench_dense.main(["--quick", "--threads", "1", "--output", str(tmp_path)])
    with (tmp_path / "dense.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["op"] for row in rows] == 2 * ["product", "grad_x", "grad_weight"] + ["mlp"]
    for row in rows:
        M, N, K = (int(row[key]) for key in "MNK")
        flops = 2 * M * N * K * (8 if row["op"] == "mlp" else 1)
        assert float(row["ours_gflops"]) == pytest.approx(1e-6 * flops / float(row["ours_ms"]))
        assert float(row["faster_than_torch"]) == pytest.approx(float(row["torch_ms"]) / float(row["ours_ms"]))


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    require_backend("cpu")
    monkeypatch.setattr(cpu, "product", lambda x, weight: 1.001 * x @ weight.t())
    case = next(bench_dense.products(5, 6, 7))
    with pytest.raises(ValueError, match="ours: product of \\(5, 6, 7\\) is wrong"):
        bench_dense.measure(case, 1, 0)
