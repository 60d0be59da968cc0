"""Writes a folder in the form of a timm model on Hugging Face's hub: weights, config.json and a model card."""

import json
from functools import partial
from pathlib import Path
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
    channels, H, W = images
    spectral, kept = counts.spectral_macs / 1e9, counts.saved_bytes / 2**20
    return f"""---
library_name: timm
pipeline_tag: image-classification
tags: [image-classification, timm, dfformer]
---
# {architecture}

A model of the DFFormer family
([FFT-based Dynamic Token Mixer for Vision](https://arxiv.org/abs/2303.03932), AAAI 2024): {classes} classes,
images of {channels}x{H}x{W}.

| parameters (M) | GMACs | of it spectral | a training forward keeps (MiB) |
|---|---|---|---|
| {counts.parameters / 1e6:.3g} | {counts.macs / 1e9:.2g} | {spectral:.2g} | {kept:.3g} |

Counted for one image, including transforms and filter mixing.

```python
import timm
import dfformer  # registers the architecture

model = timm.create_model("hf-hub:OWNER/NAME", pretrained=True).eval()  # or "local-dir:FOLDER"
```

```bibtex
@inproceedings{{tatsunami2024fft,
  title={{FFT-based Dynamic Token Mixer for Vision}},
  author={{Tatsunami, Yuki and Taki, Masato}},
  booktitle={{Proceedings of the AAAI Conference on Artificial Intelligence}},
  year={{2024}}
}}
```
"""
