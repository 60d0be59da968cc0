"""Small models for the tests of exports: with every token mixer, with one, and somebody's detector."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from filter_copies import ChannelsFirst
from torch import Tensor, nn

from dfformer import AFNO2D, DFFormer, DynamicFilter, GlobalFilter, SepConv
from dfformer_kernels.tolerance import BOUND

MIXERS: dict[str, Callable[..., nn.Module]] = {
    "dynamic": DynamicFilter,
    "dynamic_gelu": partial(DynamicFilter, act1_layer=nn.GELU, num_filters=2),
    "global": GlobalFilter,
    "afno": AFNO2D,
    "afno_low_pass": partial(AFNO2D, hard_thresholding_fraction=0.5),
}
# float32 models round some tens of times in a row, in an order that programs change
ERROR = 20 * BOUND[torch.float32]
SIZE = (24, 20)


def spread(model: Any) -> Any:
    """With filters large enough to matter."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def images(batch: int, *shape: int) -> Tensor:
    return torch.randn(batch, *(shape or (1, *SIZE)))


def _stages(*token_mixers: Any, img_size: tuple[int, int] = SIZE) -> Any:
    torch.manual_seed(0)
    count = len(token_mixers)
    shape: dict[str, Any] = {"depths": (1,) * count, "dims": (8,) * count, "strides": (2, 2, 1, 1)[:count]}
    scales = (None,) * (count - 1) + (1.0,)
    return spread(
        DFFormer(
            **shape, in_chans=1, img_size=img_size, num_classes=5, token_mixers=token_mixers,
            res_scale_init_values=scales,
        )
    )  # fmt: skip


def tiny(img_size: tuple[int, int] = SIZE) -> Any:
    """A stage of one dynamic filter."""
    return _stages(DynamicFilter, img_size=img_size)


def mixed() -> Any:
    """A stage of each kind of mixer, on odd and even planes."""
    return _stages(SepConv, DynamicFilter, GlobalFilter, AFNO2D)


class Detector(nn.Module):
    """Boxes and scores of every cell, from channels-first maps that a copy of the dynamic filter mixes."""

    def __init__(self, size: int = 8, dim: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, dim, 4, stride=4)
        self.mixer = ChannelsFirst(dim, size)
        self.neck = nn.Sequential(nn.BatchNorm2d(dim), nn.SiLU())
        self.boxes, self.scores = nn.Conv2d(dim, 4, 1), nn.Conv2d(dim, 2, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = self.stem(images)
        x = self.neck(x + self.mixer(x))
        return {"boxes": self.boxes(x).flatten(2), "scores": self.scores(x).flatten(2).sigmoid()}


def detector(**shape: int) -> Detector:
    torch.manual_seed(0)
    return spread(Detector(**shape))
