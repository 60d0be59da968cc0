"""Feature maps for dense prediction: a DFFormer under torchvision's feature pyramid.

python examples/dense_features.py
"""

import timm
import torch
from torchvision.ops import FeaturePyramidNetwork

import dfformer  # noqa: F401 (registers the models with timm)


def main() -> None:
    torch.manual_seed(0)
    backbone = timm.create_model("cdfformer_s18", features_only=True)
    pyramid = FeaturePyramidNetwork(backbone.feature_info.channels(), out_channels=128)
    images = torch.randn(1, 3, 200, 296)  # any size and aspect ratio
    maps = backbone(images)
    fused = pyramid({f"stride {r}": m for r, m in zip(backbone.feature_info.reduction(), maps, strict=True)})
    for m, (name, level) in zip(maps, fused.items(), strict=True):
        print(f"{name}: backbone {tuple(m.shape)}, pyramid {tuple(level.shape)}")


if __name__ == "__main__":
    main()
