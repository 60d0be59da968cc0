"""Every example runs as its first lines say, and prints what it is there to show: all of it, line by line."""

import os
import re
import runpy
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from paths import ROOT

import dfformer_kernels

EXAMPLES = ROOT / "examples"
VERSION = dfformer_kernels.__version__
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
    "kernels_repository.py": [
        rf"wrote version {VERSION} to kernels_repository/build for torch-cpu, torch-cuda, torch-rocm"
    ],
    "yolo_style.py": [
        r"strides \[8, 16, 32\], widths \[24, 32, 48\]",
        r"loss [1-9]\.\d\d, after 30 steps 0\.\d\d",
        r"found (\d), score 0\.[5-9]\d; there is \1, IoU 0\.[6-9]\d",
    ],
    "detr_style.py": [r"strides \[16\], widths \[32\]", r"loss [6-9]\.\d\d, after 30 steps [1-3]\.\d\d"],
    "smp_decoders.py": [
        rf"{decoder}: logits \(2, 11, 96, 128\), 68 of 68 encoder parameters learn"
        for decoder in ("fpn", "linknet", "manet", "segformer", "unet", "upernet")
    ],
    "measure_step.py": [
        r"relative error [1-9]\.\de-0[7-9]",
        *(rf"{name}: forward {MS}, with backward {MS}" for name in ("torch\\.fft", "dynamic_filter")),
    ],
}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", PRINTED)
def test_example(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(PRINTED[name]), lines
    for line, pattern in zip(lines, PRINTED[name], strict=True):
        assert re.fullmatch(pattern, line)


def test_every_example_is_run() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == PRINTED.keys()


USE = """
import sys
from pathlib import Path
import torch
from kernels import get_local_kernel
kernel = get_local_kernel(Path(sys.argv[1]))
assert kernel.__file__.startswith(sys.argv[1]), kernel.__file__
x, logits, basis = torch.randn(2, 6, 5, 3), torch.randn(2, 4, 3), torch.randn(6, 3, 4, 2)
x.requires_grad_()
y = kernel.dynamic_filter(x, logits, basis, backend="torch")
y.sum().backward()
mixed = torch.einsum("bfc,hkf->bhkc", logits.softmax(1).cfloat(), torch.view_as_complex(basis))
expected = torch.fft.irfft2(torch.fft.rfft2(x, dim=(1, 2)) * mixed, s=(6, 5), dim=(1, 2))
torch.testing.assert_close(y, expected)
reasons = kernel.backends()
assert "the compiled core" in reasons["cpu"][0], reasons
sources = __import__(f"{kernel.__name__}.backend.cuda.sources", fromlist=["cuda_sources"])
assert "dynamic_filter.cu" in sources.cuda_sources()
assert "dfformer_kernels" not in sys.modules
import dfformer_kernels  # beside it, with operators of its own
torch.testing.assert_close(dfformer_kernels.dynamic_filter(x, logits, basis), expected)
"""


def test_kernels_loads_the_repository(tmp_path: Path) -> None:
    try:
        version("kernels")  # tests/kernels would be found as a module of that name
    except PackageNotFoundError:
        pytest.skip("no kernels: pip install kernels")
    for command in ([str(EXAMPLES / "kernels_repository.py"), str(tmp_path)], ["-c", USE, str(tmp_path)]):
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
        done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
