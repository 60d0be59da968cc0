"""The restoration model: a U of MetaFormer blocks that adds a correction to its input, tile by tile."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import timm
import torch
from timm.layers import to_2tuple
from torch import Tensor, nn
from torch.nn import functional as F

from dfformer.models.metadata import is_ours

# Border of the image, in pixels, that the stem's convolution needs to return 1 / stride of the pixels; strides 1, 2, 4.
_BORDER = 1
_OVERLAP = 1 / 4  # of neighbouring tiles, as a share of a tile's side


class Restorer(nn.Module):
    """Maps images (B,3,H,W) of 0 to 1, of any size, to restored images (B,3,scale*H,scale*W), which are not clipped.

    The encoder is a model of this package without norms between its stages, so that contrast is not lost. The decoder
    has the same stages, from the last but one to the first. The input of each is the output of the stage below,
    enlarged by a transposed convolution, plus the encoder's map of the same size. The output is the bicubically
    enlarged input plus a correction, which is initially zero.

    Args:
        encoder: its name for ``timm.create_model``, one of this package's models.
        encoder_args: other arguments of the encoder. ``img_size`` is the size of the output; ``strides`` are 1, 2 or 4
            in the stem, and 2 afterwards.
        scale: factor between the sides of output and input.
        mean, std: of the pixels.

    Raises:
        ValueError: the encoder or its strides are not supported.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, encoder: str, encoder_args: dict[str, Any], scale: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        if not is_ours(encoder):
            raise ValueError(f"model.name: got {encoder}, accepted to restore are this package's models")
        bordered = [side + 2 * _BORDER for side in to_2tuple(encoder_args["img_size"])]
        arguments = {**encoder_args, "img_size": bordered, "downsample_norm": None}
        self.scale = scale
        self.encoder = timm.create_model(encoder, features_only=True, **arguments)
        dims, strides = self.encoder.feature_info.channels(), self.encoder.feature_info.reduction()
        if strides[0] not in (1, 2, 4) or strides != [strides[0] * 2**stage for stage in range(len(dims))]:
            raise ValueError(
                f"model.args.strides: got maps of strides {strides}, accepted are 1, 2 or 4, then twice the one before"
            )
        self.stride = strides[-1]
        self.stages = timm.create_model(encoder, **{**arguments, "num_classes": 0}).stages[:-1]
        self.enlarge = nn.ModuleList(nn.ConvTranspose2d(below, dim, 2, 2) for dim, below in pairwise(dims))
        self.correction = nn.Conv2d(dims[0], 3 * strides[0] ** 2, 3, padding=1)
        for parameter in self.correction.parameters():
            nn.init.zeros_(parameter)
        self.shuffle = nn.PixelShuffle(strides[0])
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        images = enlarged(images, self.scale)
        H, W = images.shape[-2:]
        border = (_BORDER, -W % self.stride + _BORDER, _BORDER, -H % self.stride + _BORDER)
        *skipped, x = self.encoder(F.pad((images - self.mean) / self.std, border, "replicate"))
        for stage, enlarge, skip in reversed(list(zip(self.stages, self.enlarge, skipped, strict=True))):
            x = stage((enlarge(x) + skip).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return images + self.shuffle(self.correction(x).float())[..., :H, :W]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in [*self.encoder.model.stages, *self.stages]:
            stage.grad_checkpointing = enable


class SelfEnsemble(nn.Module):
    """Averages a restorer's results for an image turned and mirrored in all eight ways; takes eight times as long.

    Source: Timofte, Rothe and Van Gool, "Seven ways to improve example-based single image super resolution", CVPR 2016.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        def restored(turns: int) -> Tensor:
            turned = images.rot90(turns, (2, 3))
            result: Tensor = self.model(turned) + self.model(turned.mT).mT
            return result.rot90(-turns, (2, 3))

        return torch.stack([restored(turns) for turns in range(4)]).sum(0) / 8


def enlarged(images: Tensor, scale: int) -> Tensor:
    """Enlarges (B,3,H,W) to float32 (B,3,scale*H,scale*W), bicubically as in Pillow."""
    images = images.float()
    return images if scale == 1 else F.interpolate(images, scale_factor=scale, mode="bicubic", antialias=True)


def tiled(model: nn.Module, image: Tensor, scale: int, tile: tuple[int, int], at_once: int = 16) -> Tensor:
    """Runs ``model`` on an image (3,H,W) of any size, tile by tile; returns (3,scale*H,scale*W).

    Neighbouring tiles overlap by at least a quarter of a tile. The outer quarter of an overlap is not used; between,
    the result is blended linearly from one tile to the next. If the model's receptive field reaches no further than a
    sixteenth of a tile, the result equals that of the whole image. A dynamic filter sees its whole tile and nothing
    else, so its result depends on the tiles, and is continuous across them.

    Args:
        scale: the model's scale.
        tile: (H,W) of the model's output at a time; a smaller image is one tile.
        at_once: the most tiles in a batch.
    """
    sides = [min(side, max(1, most // scale)) for side, most in zip(image.shape[1:], tile, strict=True)]
    starts = [_starts(total, side) for total, side in zip(image.shape[1:], sides, strict=True)]
    places = [(top, left) for top in starts[0] for left in starts[1]]
    weights = [
        {start: _weights(start, side, total, scale).to(image.device) for start in along}
        for along, side, total in zip(starts, sides, image.shape[1:], strict=True)
    ]
    result = image.new_zeros(3, *(scale * side for side in image.shape[1:]))
    total = result.new_zeros(1, *result.shape[1:])
    for first in range(0, len(places), at_once):
        some = places[first : first + at_once]
        outputs = model(torch.stack([image[:, top : top + sides[0], left : left + sides[1]] for top, left in some]))
        for (top, left), output in zip(some, outputs, strict=True):
            weight = weights[0][top][:, None] * weights[1][left]
            here = (
                slice(None),
                *(slice(scale * at, scale * at + n) for at, n in zip((top, left), weight.shape, strict=True)),
            )
            result[here] += weight * output
            total[here] += weight
    return result / total


def _starts(total: int, side: int) -> list[int]:
    """The starts of tiles of ``side`` that cover ``total`` evenly."""
    if total == side:
        return [0]
    step = max(1, side - math.ceil(_OVERLAP * side))
    count = 1 + math.ceil((total - side) / step)
    return [round(n * (total - side) / (count - 1)) for n in range(count)]


def _weights(start: int, side: int, total: int, scale: int) -> Tensor:
    """The weights of the rows or columns of a tile's output; at the border of the image they are 1."""
    inside = torch.arange(scale * side) + 0.5
    overlap = scale * max(1, math.ceil(_OVERLAP * side))
    weights = torch.ones(scale * side)
    if side == 1:  # such tiles do not overlap
        return weights
    for at_border, distance in ((start == 0, inside), (start + side == total, scale * side - inside)):
        if not at_border:
            weights = weights * (2 * distance / overlap - 0.5).clamp(0, 1)
    return weights
