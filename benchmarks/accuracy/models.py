"""Models of equal depth and width: this package's, timm's, and DFFormer with changed initial values."""

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
from timm.models.metaformer import Attention, LayerNorm2dNoBias, LayerNormNoBias, MetaFormer, SepConv
from torch import nn

import dfformer  # noqa: F401 (registers the models)
from accuracy.images import SIZE
from dfformer.models.spectral import DynamicFilter

# The widths are multiples of 32, the channels of an attention head. Images of 24 pixels have planes of 11, 6, 6 and 3.
SHAPE: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 64)}
STRIDES = (2, 2, 1, 2)
OURS = ("dfformer", "cdfformer", "gfformer")

Build = Callable[[int, int], nn.Module]  # a function of in_chans and classes


def _ours(name: str, in_chans: int, classes: int, **arguments: Any) -> nn.Module:
    return timm.create_model(
        f"{name}_s18", img_size=SIZE, in_chans=in_chans, num_classes=classes, strides=STRIDES, **SHAPE, **arguments
    )


def _timm(token_mixers: Any, norm_layers: Any, in_chans: int, classes: int) -> nn.Module:
    model = MetaFormer(in_chans, classes, **SHAPE, token_mixers=token_mixers, norm_layers=norm_layers)
    convolutions = [model.stem.conv, *(stage.downsample.conv for stage in list(model.stages)[1:])]
    for conv, stride in zip(convolutions, STRIDES, strict=True):  # for which MetaFormer has no argument
        conv.stride = (stride, stride)
    return model


MODELS: dict[str, Build] = {
    **{name: partial(_ours, name) for name in OURS},
    "convformer": partial(_timm, SepConv, LayerNorm2dNoBias),
    "caformer": partial(
        _timm, [SepConv, SepConv, Attention, Attention], [LayerNorm2dNoBias] * 2 + [LayerNormNoBias] * 2
    ),
}


@torch.no_grad()
def _started(change: Callable[[DynamicFilter], object], *shape: int) -> nn.Module:
    model = MODELS["dfformer"](*shape)
    for mixer in (m for m in model.modules() if isinstance(m, DynamicFilter)):
        change(mixer)
    return model


# dfformer with one change each: F filters instead of 4; the routing's last layer 20 times as large; filters around 1
# instead of 0.
CHANGES: dict[str, Build] = {
    **{f"dfformer_f{F}": partial(_ours, "dfformer", num_filters=F) for F in (1, 2, 8)},
    "dfformer_routing20": partial(_started, lambda m: m.get_parameter("reweight.fc2.weight").mul_(20)),
    "dfformer_filters1": partial(_started, lambda m: m.complex_weights[..., 0].add_(1)),
}
