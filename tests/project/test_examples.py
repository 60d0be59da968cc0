"""Every example runs as its first lines say, and prints what it is there to show: all of it, line by line."""

import re
import runpy
import sys

import pytest
from paths import ROOT

EXAMPLES = ROOT / "examples"
MS = r"\d+\.\d\d ms"
# Patterns of the lines it prints.
PRINTED = {
    "drop_in.py": [
        r"224x224: logits \(1, 10\)",
        r"192x192: logits \(1, 10\)",
        r"gradient of the filter basis: \(14, 8, 4, 2\)",
    ],
    "dense_features.py": [
        rf"stride {stride}: backbone \(1, {C}, {H}, {W}\), pyramid \(1, 128, {H}, {W}\)"
        for stride, C, H, W in ((4, 64, 50, 74), (8, 128, 25, 37), (16, 320, 13, 19), (32, 512, 7, 10))
    ],
    "measure_step.py": [
        r"relative error [1-9]\.\de-0[7-9]",
        *(rf"{name}: forward {MS}, with backward {MS}" for name in ("torch\\.fft", "dynamic_filter")),
    ],
}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", PRINTED)
def test_example(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [name])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(PRINTED[name]), lines
    for line, pattern in zip(lines, PRINTED[name], strict=True):
        assert re.fullmatch(pattern, line)


def test_every_example_is_run() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == PRINTED.keys()
