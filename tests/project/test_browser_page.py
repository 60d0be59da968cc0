"""The page that reads a drawn digit: what it computes, in a browser, with the runtime that npm brings."""

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import browser
import numpy as np
import onnxruntime
import pytest
import timm
import torch
from conftest import require
from paths import ROOT

from dfformer.analysis.figures import full_spectrum
from dfformer.analysis.metrics import applied_filters, capture, spectral_layers, stored_filters
from dfformer.models.checkpoint import load_model, save_checkpoint

MEAN, STD = 0.305, 0.376  # of the recipe digits
ARGS: dict[str, Any] = {
    "depths": (1, 1, 2, 1), "dims": (8, 8, 16, 16), "strides": (2, 1, 1, 2), "img_size": 32, "in_chans": 1,
    "num_classes": 10,
}  # fmt: skip

READ = """
const read = await document.querySelector("#example").onclick();
const rows = [...document.querySelectorAll("#classes div")];
const bold = rows.findIndex(row => row.style.fontWeight === "bold");
const captions = [...document.querySelectorAll("figcaption")].map(e => e.textContent);
await document.querySelector("#clear").onclick();
return { ...read, rows: rows.length, bold, captions, left: document.querySelectorAll("#classes div, figure").length };
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require("npm", shutil.which("npm") is not None, "no npm")
    browser.chromium()
    folder = tmp_path_factory.mktemp("page")
    torch.manual_seed(0)
    model = timm.create_model("cdfformer_s18", **ARGS)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    data = {"input_size": (1, 32, 32), "mean": (MEAN,), "std": (STD,)}
    save_checkpoint(model, folder / "model.safetensors", "cdfformer_s18", ARGS, [str(n) for n in range(10)], data)
    spec = importlib.util.spec_from_file_location("build_page", ROOT / "examples" / "browser" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    build.main(str(folder / "model.safetensors"), str(folder))
    return folder / "index.html"


@pytest.mark.slow  # fetches a runtime of 33 MB
@pytest.mark.parametrize("width", [390, 1400])
def test_a_drawn_digit(page: Path, width: int) -> None:
    found = browser.inspect(page, width, READ, wait_ms=30000)
    image = np.array(found["image"], np.float32).reshape(1, 1, 32, 32)
    assert image.min() == pytest.approx(-MEAN / STD, abs=1e-5)
    assert image.max() == pytest.approx((1 - MEAN) / STD, abs=0.2)
    assert image[0, 0, :8].mean() > image[0, 0, -8:].mean(), "the bar of a 7 is above"
    logits, *_ = onnxruntime.InferenceSession(page.with_name("model.onnx")).run(None, {"images": image})
    np.testing.assert_allclose(found["logits"], logits[0], rtol=1e-3, atol=1e-4)
    assert (found["rows"], found["bold"], found["left"]) == (10, logits[0].argmax(), 0)
    model, _ = load_model(page.with_name("model.safetensors"))
    layers = spectral_layers(model)
    inputs = capture(model, layers, torch.from_numpy(image), inputs=True)
    for caption, (name, layer) in zip(found["captions"], layers.items(), strict=True):
        channel = int(caption.split("channel ")[1].split(":")[0])
        mixed = applied_filters(layer, inputs[name])[0]
        even = stored_filters(layer, layer.size).mean(-1)
        own, base = (np.abs(full_spectrum(f, layer.size[1])) for f in (mixed[..., channel], even))
        gains = np.sort(np.abs(20 * np.log10(own / base)).ravel())
        limit = max(1, gains[int(0.99 * gains.size)])
        assert caption == f"{name}, channel {channel}: ±{limit:.1f} dB"
