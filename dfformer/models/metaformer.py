"""MetaFormer with spectral token mixers and timm's complete model API: channels-last inside, official names outside."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from timm.layers import DropPath, SelectAdaptivePool2d, to_2tuple, trunc_normal_
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dfformer.models.filter_resize import check_rule
from dfformer.models.layers import (
    Activation,
    DynamicFilter,
    Mlp,
    MlpHead,
    Scale,
    SpectralFilter,
    StarReLU,
)
from dfformer_kernels.ops.conv2d import output_plane

TokenMixer = Callable[..., nn.Module]

# (kernel size, padding) of the stem and of the three downsampling convolutions.
STEM, DOWNSAMPLE = (7, 2), (3, 1)
NORM_EPS = 1e-6


def _norm(dim: int, bias: bool = False) -> nn.LayerNorm:
    return nn.LayerNorm(dim, eps=NORM_EPS, bias=bias)


class Downsampling(nn.Module):
    """A strided convolution with a norm: after it in the stem (image in), before it between stages (B,H,W,C in)."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int, padding: int, stem: bool):
        super().__init__()
        self.is_stem = stem
        self.pre_norm = nn.Identity() if stem else _norm(in_channels)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding)
        self.post_norm = _norm(out_channels) if stem else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        # A channels-last image makes the convolution return what the rest of the network wants without a copy.
        x = x.contiguous(memory_format=torch.channels_last) if self.is_stem else self.pre_norm(x).permute(0, 3, 1, 2)
        return self.post_norm(self.conv(x).permute(0, 2, 3, 1))


class MetaFormerBlock(nn.Module):
    """``x = s1 x + mixer(norm(x))``, ``x = s2 x + mlp(norm(x))`` on (B,H,W,dim), ``s`` a learned scale or 1."""

    def __init__(
        self,
        dim: int,
        size: tuple[int, int],
        token_mixer: TokenMixer,
        mlp_act: Activation,
        drop_path: float,
        res_scale_init_value: float | None,
    ) -> None:
        super().__init__()

        def scale() -> nn.Module:
            return nn.Identity() if res_scale_init_value is None else Scale(dim, res_scale_init_value)

        self.norm1 = _norm(dim)
        self.token_mixer = token_mixer(dim=dim, size=size)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.res_scale1 = scale()
        self.norm2 = _norm(dim)
        self.mlp = Mlp(dim, 4 * dim, act_layer=mlp_act)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.res_scale2 = scale()

    def forward(self, x: Tensor) -> Tensor:
        x = self.res_scale1(x) + self.drop_path1(self.token_mixer(self.norm1(x)))
        return self.res_scale2(x) + self.drop_path2(self.mlp(self.norm2(x)))


class MetaFormer(nn.Module):
    """Four stages of MetaFormer blocks ("FFT-based Dynamic Token Mixer for Vision", section 3.3).

    Args:
        img_size: (H, W) of the images, or one number; sets the planes the spectral filters are stored for. Images of
            any other size and aspect ratio work too: the filters are resized on the fly.
        in_chans: image channels.
        num_classes: 0 for no classifier.
        global_pool: "avg", "max", "avgmax", or "" to classify every position of the last feature map.
        depths, dims: blocks and channels of each stage.
        token_mixers: one for all stages or one a stage; called as ``mixer(dim=, size=plane)``.
        mlp_act: activation of the MLPs.
        drop_rate: dropout before the last linear layer of the head.
        drop_path_rate: stochastic depth of the last block; the others' grows linearly from 0.
        res_scale_init_values: one a stage; None for no scale on the residual branch.
        strides: of the stem and the three downsampling convolutions.
        resize: the rule for resizing filters, see `dfformer.models.filter_resize.resize_filter`.
        fork_feat: the authors' form for dense prediction: no head, ``forward`` returns the four stages' feature maps
            (NCHW), each normalised by its own ``norm0`` .. ``norm3``; so do timm's ``features_only=True`` with it.

    ``forward`` maps (B,in_chans,H,W) images to (B,num_classes) logits. ``forward_features`` returns (B,H',W',C).
    """

    output_fmt = "NHWC"

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (3, 3, 9, 3),
        dims: Sequence[int] = (64, 128, 320, 512),
        token_mixers: TokenMixer | Sequence[TokenMixer] = DynamicFilter,
        mlp_act: Activation = StarReLU,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        res_scale_init_values: Sequence[float | None] = (None, None, 1.0, 1.0),
        strides: Sequence[int] = (4, 2, 2, 2),
        resize: str = "bicubic",
        fork_feat: bool = False,
    ) -> None:
        super().__init__()
        check_rule(resize)
        stages = len(depths)
        mixers = [token_mixers] * stages if callable(token_mixers) else list(token_mixers)
        per_stage = {
            "dims": dims,
            "token_mixers": mixers,
            "res_scale_init_values": res_scale_init_values,
            "strides": strides,
        }
        for name, values in per_stage.items():
            if len(values) != stages:
                raise ValueError(f"{name}: got {len(values)} values for the {stages} stages of depths={tuple(depths)}")
        self.in_chans = in_chans
        self.num_classes = 0 if fork_feat else num_classes
        self.drop_rate = drop_rate
        self.fork_feat = fork_feat
        self.grad_checkpointing = False
        self.feature_info: list[dict[str, Any]] = []

        last_block = max(sum(depths) - 1, 1)
        drop_path_rates = (drop_path_rate * block / last_block for block in range(sum(depths)))
        plane, channels, reduction = to_2tuple(img_size), in_chans, 1
        self.downsample_layers, self.stages = nn.ModuleList(), nn.ModuleList()
        for i in range(stages):
            kernel_size, padding = STEM if i == 0 else DOWNSAMPLE
            plane = output_plane(plane, *map(to_2tuple, (kernel_size, strides[i], padding)))
            if min(plane) < 1:
                raise ValueError(f"img_size: got {img_size}, which leaves nothing at stage {i}")
            self.downsample_layers.append(
                Downsampling(channels, dims[i], kernel_size, strides[i], padding, stem=i == 0)
            )
            blocks = [
                MetaFormerBlock(dims[i], plane, mixers[i], mlp_act, next(drop_path_rates), res_scale_init_values[i])
                for _ in range(depths[i])
            ]
            self.stages.append(nn.Sequential(*blocks))
            channels, reduction = dims[i], reduction * strides[i]
            self.feature_info.append({"num_chs": channels, "reduction": reduction, "module": f"stages.{i}"})
            if fork_feat:
                self.add_module(f"norm{i}", _norm(channels, bias=True))

        self.num_features = self.head_hidden_size = channels
        self.global_pool = self._make_pool(global_pool)
        self.norm = nn.Identity() if fork_feat else _norm(channels, bias=True)
        self.head = self._make_head()
        self.apply(_init_weights)
        for module in self.modules():
            if isinstance(module, SpectralFilter):
                module.weight_resize, module.resize = True, resize

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        if self.fork_feat:
            return self.forward_intermediates(x, norm=True, intermediates_only=True)
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """(B,in_chans,H,W) to the last stage's (B,H',W',C), neither pooled nor normalised."""
        for i in range(len(self.stages)):
            x = self._stage(i, x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B,H',W',C) to logits; with ``pre_logits`` to what the head is given, pooled and normalised (B,C)."""
        x = self.norm(self.global_pool(x))
        return x if pre_logits else self.head(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NHWC"] = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The stages' feature maps, timm's way.

        Args:
            x: (B,in_chans,H,W).
            indices: the last n stages if a number, those stages if a list, all if None.
            norm: normalise the maps that have a norm: the last one, or all with ``fork_feat``.
            stop_early: do not run stages after the last index.
            output_fmt: layout of the intermediates.
            intermediates_only: return just the list, not ``(last feature map (B,H',W',C), list)``.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt: got {output_fmt!r}, accepted are 'NCHW', 'NHWC'")
        taken, last = self._taken(indices)
        intermediates = []
        for i in range(last + 1 if stop_early else len(self.stages)):
            x = self._stage(i, x)
            if i in taken:
                feature = self._stage_norm(i)(x) if norm else x
                intermediates.append(feature.permute(0, 3, 1, 2) if output_fmt == "NCHW" else feature)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes the stages after the last index, and on request the norm and the head; returns the indices.

        Of ``fork_feat``'s norms those of stages that are left but not taken stop learning: nothing would teach them.
        """
        taken, last = self._taken(indices)
        stages = len(self.stages)
        pruned = last < stages - 1
        self.downsample_layers, self.stages = self.downsample_layers[: last + 1], self.stages[: last + 1]
        if self.fork_feat:
            for i in range(last + 1, stages):
                delattr(self, f"norm{i}")
            for i in range(last + 1):
                self.get_submodule(f"norm{i}").requires_grad_(i in taken)
        if pruned:  # the norm and the head were for features that are gone
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_norm or pruned:
            self.norm = nn.Identity()
        if prune_head or pruned:
            self.reset_classifier(0, "")
        return taken

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the head by a new one for ``num_classes``, or by nothing for 0."""
        if self.fork_feat and num_classes:
            raise ValueError(f"num_classes: got {num_classes}, a model with fork_feat=True has no head")
        if global_pool is not None:
            self.global_pool = self._make_pool(global_pool)
        self.num_classes = num_classes
        like = next(self.parameters())
        self.head = self._make_head().to(device=like.device, dtype=like.dtype).train(self.training)
        self.head.apply(_init_weights)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every block in backward instead of saving its activations."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups for layer-wise learning rates: a stage (coarse) or a block each, a stage's convolution with
        its first block."""
        stage = r"^(?:downsample_layers|stages)\.(\d+)"
        blocks = [(r"^downsample_layers\.(\d+)", (0,)), (r"^stages\.(\d+)\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^downsample_layers\.0", "blocks": stage if coarse else blocks}

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay should leave alone: norms, residual scales, StarReLU's scalars, biases."""
        return {name for name, parameter in self.named_parameters() if parameter.ndim <= 1}

    def _stage(self, i: int, x: Tensor) -> Tensor:
        x = self.downsample_layers[i](x)
        if self.grad_checkpointing and torch.is_grad_enabled():
            for block in self.stages[i].children():
                x = checkpoint(block, x, use_reentrant=False)
            return x
        return self.stages[i](x)

    def _taken(self, indices: int | list[int] | None) -> tuple[list[int], int]:
        """Stage numbers that timm's ``indices`` stand for, and the last of them."""
        stages = len(self.stages)
        if isinstance(indices, int) and 0 < indices <= stages:
            indices = list(range(stages - indices, stages))
        elif indices is None:
            indices = list(range(stages))
        if isinstance(indices, int) or not indices or not all(-stages <= i < stages for i in indices):
            raise ValueError(f"indices: got {indices}, accepted are 1 to {stages}, or a list of stages of {stages}")
        taken = [i % stages for i in indices]
        return taken, max(taken)

    def _stage_norm(self, i: int) -> nn.Module:
        if self.fork_feat:
            return self.get_submodule(f"norm{i}")
        return self.norm if i == len(self.feature_info) - 1 else nn.Identity()

    def _make_pool(self, pool_type: str) -> nn.Module:
        accepted = ("avg", "max", "avgmax", "")
        if pool_type not in accepted:
            raise ValueError(f"global_pool: got {pool_type!r}, accepted are {', '.join(map(repr, accepted))}")
        return SelectAdaptivePool2d(pool_type=pool_type, flatten=bool(pool_type), input_fmt="NHWC")

    def _make_head(self) -> nn.Module:
        if self.num_classes == 0:
            return nn.Identity()
        return MlpHead(self.num_features, self.num_classes, drop_rate=self.drop_rate)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
