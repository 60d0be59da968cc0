"""Every example runs as its first lines say."""

import runpy
import sys

import pytest
from paths import ROOT

EXAMPLES = ROOT / "examples"
PRINTED = {
    "drop_in.py": "gradient of the filter basis: (14, 8, 4, 2)",
    "dense_features.py": "stride 32: backbone (1, 512, 7, 10), pyramid (1, 128, 7, 10)",
    "measure_step.py": "dynamic_filter: forward",
}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", PRINTED)
def test_example(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [name])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert PRINTED[name] in capsys.readouterr().out


def test_every_example_is_run() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == PRINTED.keys()
