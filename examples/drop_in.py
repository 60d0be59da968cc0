"""Dynamic filters in another model: timm's ConvFormer with the token mixers of its last two stages replaced.

python examples/drop_in.py
"""

import timm
import torch
from torch import Tensor, nn

from dfformer import DynamicFilter


class ChannelsFirst(nn.Module):
    """Adapts a mixer of (B,H,W,C) to a model with maps (B,C,H,W)."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x: Tensor) -> Tensor:
        return self.mixer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def main() -> None:
    torch.manual_seed(0)
    model = timm.create_model("convformer_s18", num_classes=10)
    for stage, plane in ((2, 14), (3, 7)):  # the planes of 224x224 images
        for block in model.stages[stage].blocks:
            dim = block.norm1.weight.shape[0]
            block.token_mixer = ChannelsFirst(DynamicFilter(dim, size=plane, weight_resize=True))
    for size in (224, 192):  # weight_resize: the filters follow the image's size
        logits = model(torch.randn(1, 3, size, size))
        print(f"{size}x{size}: logits {tuple(logits.shape)}")
    logits.sum().backward()
    mixer = model.stages[2].blocks[0].token_mixer.mixer
    print(f"gradient of the filter basis: {tuple(mixer.complex_weights.grad.shape)}")


if __name__ == "__main__":
    main()
