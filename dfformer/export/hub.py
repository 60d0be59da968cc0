"""Writes a folder in the form of a timm model on Hugging Face's hub: weights, config.json and a model card."""

import json
from functools import partial
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import timm
from timm.models import save_for_hf
from torch import nn

from dfformer.utils.io import write_json
from dfformer.utils.profile import Profile, profile


def save_hub(model: Any, folder: Path, description: dict[str, Any]) -> None:
    """Writes ``model`` with the ``description`` of `dfformer.export.export`; changes its ``pretrained_cfg``."""
    architecture, model_args, data = (description[key] for key in ("architecture", "model_args", "data"))
    channels, H, W = data["input_size"]
    # The source and licence of the architecture's official weights are left out, because these may be other weights.
    kept = {key: model.pretrained_cfg[key] for key in ("classifier", "first_conv") if key in model.pretrained_cfg}
    model.pretrained_cfg = kept | {"architecture": architecture, "num_classes": model.num_classes} | data
    labels = {"label_names": description["classes"]} if description["classes"] else {}
    save_for_hf(model, str(folder), model_config=labels, model_args=model_args, safe_serialization=True)
    config = folder / "config.json"
    content = json.loads(config.read_text(encoding="utf-8"))
    content["model_args"].pop("num_classes", None)  # transformers passes it from outside model_args
    write_json(config, content)
    counts = profile(partial(timm.create_model, architecture, **model_args), (H, W), channels)
    card = _card(architecture, model.num_classes, (channels, H, W), counts)
    (folder / "README.md").write_text(card, encoding="utf-8")


def load_hub(folder: Path) -> nn.Module:
    """The model that ``hf-hub:`` will load once the folder is on the hub."""
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def _card(architecture: str, classes: int, images: tuple[int, int, int], counts: Profile) -> str:
    template = files("dfformer.export").joinpath("model_card.md").read_text(encoding="utf-8")
    return Template(template).substitute(
        architecture=architecture,
        classes=classes,
        images="x".join(map(str, images)),
        parameters=f"{counts.parameters / 1e6:.3g}",
        macs=f"{counts.macs / 1e9:.2g}",
        spectral=f"{counts.spectral_macs / 1e9:.2g}",
        saved=f"{counts.saved_bytes / 2**20:.3g}",
    )
