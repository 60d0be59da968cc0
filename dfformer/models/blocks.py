"""The parts of a MetaFormer: strided convolutions, blocks and stages, with channels-last tensors between them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import timm.layers
import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dfformer.models.exact import fusible
from dfformer.models.layers import Activation, Mlp, Scale, call_convolution
from dfformer_kernels.ops import is_under_functorch

TokenMixer = Callable[..., nn.Module]  # called as mixer(dim=, size=)
NormLayer = Callable[[int], nn.Module]  # called with the number of channels; maps (..., channels) to the same shape


def norm(dim: int, bias: bool = False) -> nn.LayerNorm:
    """The norm of this model family, over the channels."""
    return nn.LayerNorm(dim, eps=1e-6, bias=bias)


biased_norm = partial(norm, bias=True)


class Downsampling(nn.Module):
    """A strided convolution with a norm.

    In the stem, the input is an image and the norm comes last. Between stages, the input is (B,H,W,C) and the norm
    comes first.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int,
        padding: int,
        stem: bool,
        norm_layer: NormLayer | None = norm,
    ) -> None:
        super().__init__()
        norm_layer = norm_layer or nn.Identity
        self.is_stem = stem
        self.pre_norm = nn.Identity() if stem else norm_layer(in_channels)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding)
        self.post_norm = norm_layer(out_channels) if stem else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = _channels_last(x) if self.is_stem else self.pre_norm(x).permute(0, 3, 1, 2)
        x = self.conv(x) if torch.jit.is_scripting() else call_convolution(self.conv, x)
        return self.post_norm(x.permute(0, 2, 3, 1))


def _channels_last(x: Tensor) -> Tensor:
    """``x`` in channels-last memory, so that the convolution's result has it too and needs no copy."""
    if not torch.jit.is_scripting():  # noqa: SIM102 (torch.jit.script compiles both sides of an `and`)
        if is_under_functorch((x,)):  # torch.func.vmap does not support memory formats
            return x
    return x.contiguous(memory_format=torch.channels_last)


@fusible
class MetaFormerBlock(nn.Module):
    """``x = r1(x) + l1(mixer(norm1(x)))``, then ``x = r2(x) + l2(mlp(norm2(x)))``, on (B,H,W,dim).

    Args:
        dim: channels.
        size: the plane (H, W), for the token mixer.
        token_mixer: called as ``token_mixer(dim=dim, size=size)``.
        mlp_act: activation of the MLP.
        drop_path: probability, in training, that a sample skips a branch.
        res_scale_init_value: initial value of the learned scale ``r`` of each channel; None for no scale.
        layer_scale_init_value: initial value of the learned scale ``l`` of each channel; None for no scale.
        norm_layer: called with ``dim``.
        mlp_bias: whether the MLP's two layers have biases.
        proj_drop: dropout after each of the MLP's two layers.
    """

    def __init__(
        self,
        dim: int,
        size: tuple[int, int],
        token_mixer: TokenMixer,
        mlp_act: Activation,
        drop_path: float,
        res_scale_init_value: float | None,
        layer_scale_init_value: float | None = None,
        norm_layer: NormLayer = norm,
        mlp_bias: bool = False,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()

        def scale(init_value: float | None) -> nn.Module:
            return nn.Identity() if init_value is None else Scale(dim, init_value)

        def stochastic_depth() -> nn.Module:
            return DropPath(drop_path) if drop_path > 0 else nn.Identity()

        self.norm1 = norm_layer(dim)
        self.token_mixer = token_mixer(dim=dim, size=size)
        self.drop_path1 = stochastic_depth()
        self.layer_scale1 = scale(layer_scale_init_value)
        self.res_scale1 = scale(res_scale_init_value)
        self.norm2 = norm_layer(dim)
        self.mlp: Any
        if mlp_bias or proj_drop > 0:
            self.mlp = timm.layers.Mlp(dim, 4 * dim, act_layer=mlp_act, bias=mlp_bias, drop=proj_drop)
        else:
            self.mlp = Mlp(dim, 4 * dim, act_layer=mlp_act)
        self.drop_path2 = stochastic_depth()
        self.layer_scale2 = scale(layer_scale_init_value)
        self.res_scale2 = scale(res_scale_init_value)

    def forward(self, x: Tensor) -> Tensor:
        x = self.res_scale1(x) + self.layer_scale1(self.drop_path1(self.token_mixer(self.norm1(x))))
        return self.res_scale2(x) + self.layer_scale2(self.drop_path2(self.mlp(self.norm2(x))))


class MetaFormerStage(nn.Sequential):
    """The blocks of a stage; with ``grad_checkpointing`` each is recomputed in backward."""

    def __init__(self, *blocks: Any) -> None:
        super().__init__(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, use_reentrant=False) if torch.is_grad_enabled() else block(x)
            else:
                x = block(x)
        return x
