"""Decoders of segmentation_models_pytorch on a CDFFormer: the encoder has its name in timm, with the prefix "tu-".

python examples/smp_decoders.py
"""

from typing import Any

import segmentation_models_pytorch as smp
import torch

import dfformer  # noqa: F401 (registers the models with timm)

DECODERS = ("fpn", "linknet", "manet", "segformer", "unet", "upernet")
SMALL: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 48)}  # leave it out for the model's own


def main() -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 3, 96, 128)  # sides are multiples of 32
    for decoder in DECODERS:
        model = smp.create_model(decoder, "tu-cdfformer_s18", encoder_weights=None, classes=11, **SMALL)
        logits = model(images)
        logits.square().mean().backward()
        taught = [p.grad is not None for p in model.encoder.parameters() if p.requires_grad]
        print(f"{decoder}: logits {tuple(logits.shape)}, {sum(taught)} of {len(taught)} encoder parameters learn")


if __name__ == "__main__":
    main()
