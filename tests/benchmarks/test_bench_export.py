"""The benchmark of exported models: what it writes, in parts, and that it refuses a wrong file."""

import csv
from pathlib import Path
from typing import Any

import bench_export
import pytest
import timm

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _brief(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model
    shape: dict[str, Any] = {"depths": (1,), "dims": (8,), "strides": (4,), "res_scale_init_values": (None,)}
    monkeypatch.setattr(timm, "create_model", lambda name, **kwargs: create(name, **shape, **kwargs))
    for name, value in {
        "IMG_SIZE": 32,
        "ROUNDS": 1,
        "SECONDS": 0,
        "PLANES": [(4, 6, 3), (5, 3, 2)],
        "DETECTOR_PLANES": [(32, 32, 16)],
    }.items():
        monkeypatch.setattr(bench_export, name, value)


def read(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for only in ("pt2", "pt2 --fused", "transforms"):
        bench_export.main(["--only", only, "--threads", "1", "--output", str(tmp_path)])
    model, *files = read(tmp_path / "export.csv")
    assert (model["run_as"], model["error"]) == ("model", "")
    assert [row["run_as"] for row in files] == ["pt2", "pt2 --fused"]
    assert all(float(row["error"]) < 1e-6 and float(row["export_seconds"]) > 0 for row in files)
    assert all(float(row[f"ms_{B}"]) > 0 for row in (model, *files) for B in (1, 8))
    for row in read(tmp_path / "export_transforms.csv"):
        assert max(float(row["dft_error"]), float(row["products_error"])) < 1e-6
    monkeypatch.setattr(bench_export, "provenance", lambda *args: {"machine": "another"})
    with pytest.raises(SystemExit, match="this is another"):
        bench_export.main(["--output", str(tmp_path)])


def test_products_are_faster_than_dft_in_a_detector(tmp_path: Path) -> None:
    bench_export.main(["--only", "detector", "--threads", "1", "--output", str(tmp_path)])
    (row,) = read(tmp_path / "export_detector.csv")
    assert float(row["products_ms"]) < float(row["dft_ms"])


def test_a_wrong_file_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = bench_export.FORMATS["pt2"]
    wrong = chosen._replace(load=lambda path: lambda x: 1.001 * chosen.load(path)(x))
    export = bench_export.export

    def exported(*args: Any, **kwargs: Any) -> float:
        error = export(*args, **kwargs)
        monkeypatch.setitem(bench_export.FORMATS, "pt2", wrong)
        return error

    monkeypatch.setattr(bench_export, "export", exported)
    with pytest.raises(ValueError, match="a file is wrong for 1 images"):
        bench_export.main(["--only", "pt2", "--output", str(tmp_path)])
    assert not (tmp_path / "export.csv").exists()
