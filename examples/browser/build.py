"""Builds a page on which you draw a digit; a model reads it, and the page shows the filters that the digit gets.

    python examples/browser/build.py demo/digits.safetensors FOLDER
    python -m http.server --directory FOLDER

It needs the `export` extra, and npm to install onnxruntime-web. The model runs in the page, which sends nothing.
"""

import base64
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import onnx
import torch
from timm.data import resolve_model_data_config

from dfformer import load_model
from dfformer.analysis.metrics import spectral_layers, stored_filters
from dfformer.export.export import export
from dfformer.export.formats import DESCRIPTION

RUNTIME = "onnxruntime-web@1.30.0"
RUNTIME_FILES = ("ort.wasm.min.js", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")


def write_model(checkpoint: Path, folder: Path) -> None:
    """Writes model.onnx, which also outputs the routing weights of each layer, and model.json with their bases."""
    model, classes = load_model(checkpoint)
    path = folder / "model.onnx"
    _, H, W = resolve_model_data_config(model)["input_size"]
    export(model, path, (H, W), classes=classes)
    program = onnx.load(path)
    layers: dict[str, Any] = spectral_layers(model)
    shares = [node.output[0] for node in program.graph.node if node.op_type == "Softmax"]
    assert len(shares) == len(layers), "one softmax is a layer's"
    for name in shares:
        program.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    onnx.save(program, path)
    description = json.loads({entry.key: entry.value for entry in program.metadata_props}[DESCRIPTION])
    described = []
    for (name, layer), output in zip(layers.items(), shares, strict=True):
        basis = torch.view_as_real(stored_filters(layer, layer.size)).contiguous()  # (H,K,F,2)
        values = base64.b64encode(basis.numpy().astype("<f4").tobytes()).decode()
        H, W = layer.size
        described.append({"name": name, "shares": output, "H": H, "W": W, "F": layer.num_filters, "basis": values})
    content = {"data": description["data"], "classes": classes, "layers": described}
    (folder / "model.json").write_text(json.dumps(content), encoding="utf-8")


def write_runtime(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as packed:
        subprocess.run(["npm", "pack", "--silent", RUNTIME, "--pack-destination", packed], check=True)
        (archive,) = Path(packed).iterdir()
        with tarfile.open(archive) as files:
            for name in RUNTIME_FILES:
                source = files.extractfile(f"package/dist/{name}")
                assert source is not None
                with (folder / name).open("wb") as target:
                    shutil.copyfileobj(source, target)


def main(checkpoint: str, folder: str) -> None:
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    write_model(Path(checkpoint), target)
    write_runtime(target)
    shutil.copy(Path(__file__).with_name("index.html"), target)
    print(f"wrote {target}: python -m http.server --directory {target}")


if __name__ == "__main__":
    main(*sys.argv[1:])
