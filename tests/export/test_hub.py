"""The folder for Hugging Face's hub: read by timm and transformers as from the hub, without a network."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from paths import ROOT
from safetensors.torch import load_file, save_file
from torch import nn

from dfformer.cli.main import main
from dfformer.export.export import export
from dfformer.models.checkpoint import save_checkpoint

ARGS: dict[str, Any] = {
    "depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16), "img_size": 32, "in_chans": 1, "num_classes": 3,
}  # fmt: skip
CLASSES = ["ant", "bee", "cat"]

# With the huggingface_hub's own cache in place of the network.
AS_FROM_THE_HUB = """
import sys
import timm, torch
import dfformer
from safetensors.torch import load_file, save_file
x = load_file(sys.argv[1])["x"]
with torch.no_grad():
    if sys.argv[2] == "timm":
        y = timm.create_model("hf-hub:owner/name", pretrained=True).eval()(x)
    else:
        from transformers import AutoModelForImageClassification
        model = AutoModelForImageClassification.from_pretrained("owner/name").eval()
        assert model.config.id2label == {0: "ant", 1: "bee", 2: "cat"}
        model.save_pretrained(sys.argv[1] + ".saved")
        y = model(x).logits
save_file({"y": y}, sys.argv[1])
"""


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("dfformer_s18", pretrained_cfg_overlay={"mean": (0.4,), "std": (0.2,)}, **ARGS).eval()


def save(model: nn.Module, folder: Path) -> Path:
    assert export(model, folder, 32, "hub", architecture="dfformer_s18", model_args=ARGS, classes=CLASSES) == 0
    return folder


def test_what_is_in_it(model: nn.Module, tmp_path: Path) -> None:
    folder = save(model, tmp_path / "hub")
    assert {path.name for path in folder.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    config = json.loads((folder / "config.json").read_text())
    assert (config["architecture"], config["num_classes"], config["label_names"]) == ("dfformer_s18", 3, CLASSES)
    assert config["pretrained_cfg"]["mean"] == [0.4]
    assert not {"license", "origin_url", "tag"} & config["pretrained_cfg"].keys(), "they are the authors' weights'"
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: timm\n")
    assert "3 classes,\nimages of 1x32x32" in card
    figures = re.search(r"^\| (\S+) \| \S+ \| \S+ \| \S+ \|$", card, re.MULTILINE)
    assert figures
    assert float(figures[1]) == pytest.approx(sum(p.numel() for p in model.parameters()) / 1e6, rel=0.01)


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_as_from_the_hub(model: nn.Module, library: str, tmp_path: Path) -> None:
    if find_spec(library) is None:
        pytest.skip(f"no {library}: pip install {library}")
    repository = tmp_path / "hub" / "models--owner--name"
    save(model, repository / "snapshots" / "0123")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    x = torch.randn(2, 1, 32, 32)
    file = tmp_path / "tensors"
    save_file({"x": x}, file)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    command = [sys.executable, "-c", AS_FROM_THE_HUB, str(file), library]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(load_file(file)["y"], expected)
        if library == "transformers":
            again = timm.create_model(f"local-dir:{file}.saved", pretrained=True).eval()
            assert torch.equal(again(x), expected)


def test_the_command(model: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, folder = tmp_path / "model.safetensors", tmp_path / "hub"
    save_checkpoint(model, checkpoint, "dfformer_s18", ARGS, CLASSES)
    command = ["export", "--checkpoint", str(checkpoint), str(folder), "--format", "hub"]
    assert main(command) == 0
    assert "differs from the model by 0 " in capsys.readouterr().out
    assert main(command) == 2
    assert "path: expected a new folder, got the existing folder" in capsys.readouterr().err
    shutil.rmtree(folder)
    assert main([*command[:4]]) == 2, "a folder's name is of no format"
