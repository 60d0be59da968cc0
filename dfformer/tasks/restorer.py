"""The restoration model: convolutions around a U of MetaFormer blocks add a correction to its input, tile by tile."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import timm
import torch
from timm.layers import to_2tuple
from torch import Tensor, nn
from torch.nn import functional as F

from dfformer.models.description import is_ours

# Border of the map, in pixels, with which the encoder's first convolution returns 1 / stride of them.
_BORDER = 1
_OVERLAP = 1 / 4  # of neighbouring tiles, as a share of a tile's side


class ResidualBlock(nn.Sequential):
    """``x + conv(relu(conv(x)))`` with 3x3 convolutions and no norm (EDSR, arXiv:1707.02921)."""

    def __init__(self, channels: int) -> None:
        convolutions = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2)]
        super().__init__(convolutions[0], nn.ReLU(), convolutions[1])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)
        return x + y


class Restorer(nn.Module):
    """Maps images (B,3,H,W) of 0 to 1, of any size, to restored images (B,3,scale*H,scale*W), which are not clipped.

    A strided convolution makes a map of the image. Residual blocks of convolutions, a U of MetaFormer blocks and as
    many residual blocks again each add to it. No map is normalised, only the input of a MetaFormer block's branches,
    so that contrast is not lost. The encoder of the U is a model of this package. Its decoder has the same stages, from
    the last but one to the first. The input of each is the output of the stage below, enlarged by a transposed
    convolution, plus the encoder's map of the same size. The output is the bicubically enlarged input plus a
    correction, which is initially zero.

    Args:
        encoder: its name for ``timm.create_model``, one of this package's models.
        encoder_args: other arguments of the encoder. ``img_size`` is the size of the output; ``strides`` are relative
            to the map of the image.
        scale: factor between the sides of output and input.
        mean, std: of the pixels.
        channels, stride: of the map of the image.
        blocks: number of residual blocks before the U, and after it.

    Raises:
        ValueError: the encoder is not supported.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        encoder: str,
        encoder_args: dict[str, Any],
        scale: int,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        channels: int = 64,
        stride: int = 2,
        blocks: int = 3,
    ) -> None:
        super().__init__()
        if not is_ours(encoder):
            raise ValueError(f"model.name: for restoration, expected a model of this package, got {encoder}")
        plane = [-(-side // stride) + 2 * _BORDER for side in to_2tuple(encoder_args["img_size"])]
        # create_model would drop None as a norm.
        arguments = {**encoder_args, "img_size": plane, "in_chans": channels, "downsample_norm": nn.Identity}
        self.scale = scale
        self.encoder = timm.create_model(encoder, features_only=True, **arguments)
        self.stages = timm.create_model(encoder, **{**arguments, "num_classes": 0}).stages[:-1]
        dims, reductions = [channels, *self.encoder.feature_info.channels()], self.encoder.feature_info.reduction()
        strides = [after // before for before, after in pairwise([1, *reductions])]
        self.stride = stride * reductions[-1]
        self.enlarge = nn.ModuleList(
            nn.ConvTranspose2d(below, dim, step, step)
            for (dim, below), step in zip(pairwise(dims), strides, strict=True)
        )
        self.stem = nn.Conv2d(3, channels, 3 * stride, stride, padding=stride)
        self.before, self.after = (nn.Sequential(*(ResidualBlock(channels) for _ in range(blocks))) for _ in range(2))
        self.correction = nn.Conv2d(channels, 3 * stride**2, 3, padding=1)
        for parameter in self.correction.parameters():
            nn.init.zeros_(parameter)
        self.shuffle = nn.PixelShuffle(stride)
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        images = enlarged(images, self.scale)
        H, W = images.shape[-2:]
        padded = F.pad((images - self.mean) / self.std, (0, -W % self.stride, 0, -H % self.stride), "replicate")
        x = self.stem(padded.contiguous(memory_format=torch.channels_last))
        y = self.before(x)
        y = x + self.after(y + self._unet(y))
        return images + self.shuffle(self.correction(y).float())[..., :H, :W]

    def _unet(self, x: Tensor) -> Tensor:
        """Maps (B,C,H,W), with H and W multiples of the encoder's last stride, to the same size."""
        *skipped, y = self.encoder(F.pad(x, (_BORDER,) * 4, "replicate"))
        first, *others = self.enlarge
        for stage, enlarge, skip in reversed(list(zip(self.stages, others, skipped, strict=True))):
            y = stage((enlarge(y) + skip).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        result: Tensor = first(y)
        return result

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in [*self.encoder.model.stages, *self.stages]:
            stage.grad_checkpointing = enable


class SelfEnsemble(nn.Module):
    """Averages a restorer's results over the eight rotations and flips of an image; takes eight times as long.

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
            down, across = (slice(scale * at, scale * at + n) for at, n in zip((top, left), weight.shape, strict=True))
            result[:, down, across] += weight * output
            total[:, down, across] += weight
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
