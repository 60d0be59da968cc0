"""`DFFormer`, the MetaFormer with spectral token mixers: channels-last inside, official parameter names, timm's API."""

import inspect
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Final

import torch
from timm.layers import SelectAdaptivePool2d, to_2tuple, trunc_normal_
from timm.models.metaformer import MlpHead
from torch import Tensor, nn

from dfformer.models.blocks import (
    Downsampling,
    MetaFormerBlock,
    MetaFormerStage,
    NormLayer,
    TokenMixer,
    biased_norm,
    norm,
)
from dfformer.models.filter_resize import RULE
from dfformer.models.layers import Activation, StarReLU
from dfformer.models.spectral import DynamicFilter, SpectralFilter
from dfformer.utils.accepted import COUNT, COUNT_OR_0, MODULE, PLANE, RATE, SCALE, check_arguments, choice
from dfformer.utils.suggest import did_you_mean

# (kernel size, padding) of the stem and of the downsampling convolutions.
STEM, DOWNSAMPLE = (7, 2), (3, 1)
POOL, OUTPUT_FORMAT = choice("avg", "max", "avgmax", ""), choice("NCHW", "NHWC")
# Arguments of a token mixer that the model sets itself.
_SET_BY_MODEL = {"dim", "size", "weight_resize", "resize", "device", "dtype"}


class DFFormer(nn.Module):
    """A MetaFormer of four stages ("FFT-based Dynamic Token Mixer for Vision", section 3.3): all models of the family.

    Args:
        img_size: (H, W) of the images, or one number; the filters are stored for the planes of this size. Images of
            any other size and aspect ratio work too: the filters are resized on the fly.
        in_chans: image channels.
        num_classes: 0 for no classifier.
        global_pool: "avg", "max", "avgmax", or "" to classify every position of the last feature map.
        depths, dims: blocks and channels of each stage.
        token_mixers: one for all stages or one for each; called as ``mixer(dim=, size=plane)``.
        mlp_act: activation of the MLPs.
        drop_rate: dropout before the last linear layer of the head.
        drop_path_rate: stochastic depth of the last block; the others' grows linearly from 0.
        res_scale_init_values: initial values of the scales on the residual connections, one for all stages or one for
            each; None for no scale.
        strides: strides of the stem and of the downsampling convolutions.
        resize: the rule for resizing filters, see `dfformer.models.filter_resize.resize_filter`.
        fork_feat: for dense prediction, as in the authors' checkpoints: no head, and a norm for each stage's feature
            map (``norm0`` .. ``norm3``). ``timm.create_model(..., features_only=True, fork_feat=True)`` returns the
            normalised maps.
        mlp_bias: whether the MLPs' layers have biases.
        proj_drop_rate: dropout after both layers of the MLPs.
        layer_scale_init_values: like ``res_scale_init_values``, for the scales on both branches of a block.
        downsample_norm: norm of the stem and of the downsampling convolutions; None for none.
        norm_layers: norms of the blocks, one for all stages or one for each.
        output_norm: norm before the classifier, and of the maps with ``fork_feat``.
        use_mlp_head: classify by an MLP, as the official models do; False for a linear layer.
        device, dtype: of the parameters; None for torch's defaults.
        mixer_args: other arguments, such as ``num_filters`` of `DynamicFilter`; they go to the mixers that take them.

    Norms are called with the number of channels and normalise (..., channels), as ``torch.nn.LayerNorm`` does.
    ``timm.create_model`` drops arguments that are None: pass it ``[None] * 4`` or ``torch.nn.Identity`` instead.

    ``forward`` maps (B,in_chans,H,W) images to (B,num_classes) logits, or to (B,C) without a classifier.

    Raises:
        ValueError: a value out of range, by name. TypeError: an argument that neither the model nor a mixer takes.
    """

    output_fmt = "NHWC"
    fork_feat: Final[bool]

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (3, 3, 9, 3),
        dims: int | Sequence[int] = (64, 128, 320, 512),
        token_mixers: TokenMixer | Sequence[TokenMixer] = DynamicFilter,
        mlp_act: Activation = StarReLU,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        res_scale_init_values: float | Sequence[float | None] | None = (None, None, 1.0, 1.0),
        strides: Sequence[int] = (4, 2, 2, 2),
        resize: str = "bicubic",
        fork_feat: bool = False,
        *,
        mlp_bias: bool = False,
        proj_drop_rate: float = 0.0,
        layer_scale_init_values: float | Sequence[float | None] | None = None,
        downsample_norm: NormLayer | None = norm,
        norm_layers: NormLayer | Sequence[NormLayer] = norm,
        output_norm: NormLayer = biased_norm,
        use_mlp_head: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **mixer_args: Any,
    ) -> None:
        super().__init__()
        check_arguments(RULE, resize=resize)
        counts, makers = {"dims": dims, "strides": strides}, {"token_mixers": token_mixers, "norm_layers": norm_layers}
        scales = {"res_scale_init_values": res_scale_init_values, "layer_scale_init_values": layer_scale_init_values}
        check_arguments(COUNT, in_chans=in_chans)
        check_arguments(COUNT, lists=True, depths=depths, **counts)
        check_arguments(PLANE, img_size=img_size)
        check_arguments(COUNT_OR_0, num_classes=num_classes)
        check_arguments(RATE, drop_rate=drop_rate, drop_path_rate=drop_path_rate, proj_drop_rate=proj_drop_rate)
        check_arguments(SCALE, lists=True, **scales)
        check_arguments(MODULE, lists=True, **makers)
        check_arguments(MODULE, mlp_act=mlp_act, output_norm=output_norm, downsample_norm=downsample_norm or norm)
        self.in_chans, self.drop_rate, self.use_mlp_head = in_chans, drop_rate, use_mlp_head
        self.num_classes = 0 if fork_feat else num_classes
        self.fork_feat, self.grad_checkpointing = fork_feat, False
        per_stage = _per_stage(depths, **counts, **makers, **scales)
        per_stage["token_mixers"] = _with_arguments(per_stage["token_mixers"], mixer_args)
        block = partial(MetaFormerBlock, mlp_act=mlp_act, mlp_bias=mlp_bias, proj_drop=proj_drop_rate)
        with nullcontext() if device is None else torch.device(device):
            self._add_stages(img_size, depths, drop_path_rate, downsample_norm, per_stage, block)
            self._add_norms(output_norm)
            self.global_pool, self.head = _pool(global_pool), self._make_head()
            self.apply(_init_weights)
        for module in self.modules():
            if isinstance(module, SpectralFilter):
                module.weight_resize, module.resize = True, resize
        if dtype is not None:
            self.to(dtype)

    def _add_stages(
        self,
        img_size: int | tuple[int, int],
        depths: Sequence[int],
        drop_path_rate: float,
        downsample_norm: NormLayer | None,
        per_stage: dict[str, list[Any]],
        block: Callable[..., nn.Module],
    ) -> None:
        self.feature_info: list[dict[str, Any]] = []
        self.downsample_layers, self.stages = nn.ModuleList(), nn.ModuleList()
        last_block = max(sum(depths) - 1, 1)
        drop_path = (drop_path_rate * number / last_block for number in range(sum(depths)))
        plane, channels, reduction = to_2tuple(img_size), self.in_chans, 1
        for i, depth in enumerate(depths):
            own = {name.removesuffix("s"): values[i] for name, values in per_stage.items()}  # as the block calls them
            dim, stride = own["dim"], own.pop("stride")
            kernel_size, padding = STEM if i == 0 else DOWNSAMPLE
            plane = tuple((side + 2 * padding - kernel_size) // stride + 1 for side in plane)
            if min(plane) < 1:
                raise ValueError(f"img_size: expected one that leaves pixels at stage {i}, got {img_size}")
            self.downsample_layers.append(
                Downsampling(channels, dim, kernel_size, stride, padding, stem=i == 0, norm_layer=downsample_norm)
            )
            blocks = [block(**own, size=plane, drop_path=next(drop_path)) for _ in range(depth)]
            self.stages.append(MetaFormerStage(*blocks))
            channels, reduction = dim, reduction * stride
            self.feature_info.append({"num_chs": channels, "reduction": reduction, "module": f"stages.{i}"})

    def _add_norms(self, output_norm: NormLayer) -> None:
        dims = [info["num_chs"] for info in self.feature_info]
        for i, dim in enumerate(dims if self.fork_feat else []):
            self.add_module(f"norm{i}", output_norm(dim))
        self.num_features = self.head_hidden_size = dims[-1]
        self.norm = nn.Identity() if self.fork_feat else output_norm(dims[-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Maps (B,in_chans,H,W) to the last stage's (B,H',W',C), neither pooled nor normalised."""
        for downsample, stage in zip(self.downsample_layers, self.stages):  # noqa: B905 (jit.script takes no strict)
            x = stage(downsample(x))
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Maps (B,H',W',C) to logits; with ``pre_logits`` to the head's input, pooled and normalised (B,C)."""
        x = self.global_pool(x)
        x = self._last_norm(x) if self.fork_feat else self.norm(x)
        return x if pre_logits else self.head(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The stages' feature maps, as timm's models return them.

        Args:
            x: (B,in_chans,H,W).
            indices: the last n stages if a number, those stages if a list, all if None.
            norm: normalise the maps that have a norm: the last one, or all with ``fork_feat``.
            stop_early: do not run stages after the last index.
            output_fmt: layout of the intermediates, "NCHW" or "NHWC".
            intermediates_only: return just the list, not ``(last feature map (B,H',W',C), list)``.
        """
        check_arguments(OUTPUT_FORMAT, output_fmt=output_fmt)
        taken, last = self._taken(indices)
        intermediates = []
        for i in range(last + 1 if stop_early else len(self.stages)):
            x = self.stages[i](self.downsample_layers[i](x))
            if i in taken:
                feature = self._stage_norm(i)(x) if norm else x
                intermediates.append(feature.permute(0, 3, 1, 2) if output_fmt == "NCHW" else feature)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes the stages after the last index, and on request the norm and the head; returns the indices.

        With ``fork_feat``, norms of stages that remain but are not selected no longer train, because nothing uses them.
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
        if pruned:  # the norm and the head were for the removed features
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or pruned:
            self.reset_classifier(0, "")
        if prune_norm or pruned:
            self.norm = nn.Identity()
        return taken

    def get_classifier(self) -> nn.Module:
        """The head; ``Identity`` without one."""
        return self.head

    def reset_classifier(
        self,
        num_classes: int,
        global_pool: str | None = None,
        reset_other: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Replaces the head by a new one for ``num_classes``, or by nothing for 0.

        Args:
            num_classes: number of classes of the new head.
            global_pool: the new pooling, see `DFFormer`; None to keep it.
            reset_other: remove the norm before the head too.
            device, dtype: of the new head; None for those of the model.
        """
        if self.fork_feat and num_classes:
            raise ValueError(f"num_classes: with fork_feat=True, without a head, expected 0, got {num_classes}")
        check_arguments(COUNT_OR_0, num_classes=num_classes)
        if global_pool is not None:
            self.global_pool = _pool(global_pool)
        if reset_other:
            self.norm = nn.Identity()
        self.num_classes = num_classes
        like = next(self.parameters())
        with torch.device(device or like.device):
            self.head = self._make_head()
        if (dtype := dtype or like.dtype) != torch.get_default_dtype():  # fake tensors cannot be cast in place
            self.head.to(dtype)
        self.head.apply(_init_weights).train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Makes every block recompute its activations in backward instead of saving them."""
        self.grad_checkpointing = enable
        for module in self.modules():
            if isinstance(module, MetaFormerStage):
                module.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups for layer-wise learning rates: one for each stage (coarse) or block.

        A stage's convolution is in the group of its first block.
        """
        stage = r"^(?:downsample_layers|stages)\.(\d+)"
        blocks = [(r"^downsample_layers\.(\d+)", (0,)), (r"^stages\.(\d+)\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^downsample_layers\.0", "blocks": stage if coarse else blocks}

    def no_weight_decay(self) -> set[str]:
        """Parameters that should have no weight decay: norms, residual scales, StarReLU's scalars, biases."""
        return {name for name, parameter in self.named_parameters() if parameter.ndim <= 1}

    def _taken(self, indices: int | Sequence[int] | None) -> tuple[list[int], int]:
        """Stage numbers that timm's ``indices`` stand for, and the last of them."""
        stages = len(self.stages)
        indices = stages if indices is None else indices
        if isinstance(indices, int) and 0 < indices <= stages:
            indices = list(range(stages - indices, stages))
        if isinstance(indices, int) or not indices or not all(-stages <= i < stages for i in indices):
            raise ValueError(f"indices: expected 1 to {stages}, or a list of stages of {stages}, got {indices}")
        taken = [i % stages for i in indices]
        return taken, max(taken)

    def _stage_norm(self, i: int) -> nn.Module:
        if self.fork_feat:
            return self.get_submodule(f"norm{i}")
        return self.norm if i == len(self.feature_info) - 1 else nn.Identity()

    @torch.jit.ignore
    def _last_norm(self, x: Tensor) -> Tensor:
        """Applies the last stage's norm of ``fork_feat``; its name depends on the number of stages."""
        y: Tensor = self._stage_norm(len(self.stages) - 1)(x)
        return y

    def _make_head(self) -> nn.Module:
        if self.num_classes == 0:
            return nn.Identity()
        if self.use_mlp_head:
            return MlpHead(self.num_features, self.num_classes, norm_layer=nn.LayerNorm, drop_rate=self.drop_rate)
        # The last layer has the name that timm expects of the classifier.
        layers = [("drop", nn.Dropout(self.drop_rate)), ("fc2", nn.Linear(self.num_features, self.num_classes))]
        return nn.Sequential(OrderedDict(layers))


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _pool(pool_type: str) -> nn.Module:
    check_arguments(POOL, global_pool=pool_type)
    return SelectAdaptivePool2d(pool_type=pool_type, flatten=bool(pool_type), input_fmt="NHWC")


def _per_stage(depths: Sequence[int], **arguments: Any) -> dict[str, list[Any]]:
    """For each argument a list with one value per stage; an argument that is no list or tuple holds for all stages."""
    if not isinstance(depths, list | tuple):
        raise ValueError(f"depths: expected a list of whole numbers, one for each stage, got {depths!r}")
    stages = len(depths)
    lists = {name: list(v) if isinstance(v, list | tuple) else [v] * stages for name, v in arguments.items()}
    for name, values in lists.items():
        if len(values) != stages:
            raise ValueError(
                f"{name}: expected {stages} values, for the stages of depths={tuple(depths)}, got {len(values)}"
            )
    return lists


def _with_arguments(mixers: list[TokenMixer], arguments: dict[str, Any]) -> list[TokenMixer]:
    """Each mixer with those of ``arguments`` that it takes; TypeError for an argument that no mixer takes."""
    if not arguments:
        return mixers
    accepted = [inspect.signature(mixer).parameters.keys() - _SET_BY_MODEL for mixer in mixers]
    if unknown := arguments.keys() - set().union(*accepted):
        hint = did_you_mean(min(unknown), {*inspect.signature(DFFormer).parameters}.union(*accepted))
        raise TypeError(f"DFFormer.__init__() got an unexpected keyword argument {min(unknown)!r}{hint}")
    taken = [{n: value for n, value in arguments.items() if n in names} for names in accepted]
    return [partial(mixer, **own) for mixer, own in zip(mixers, taken, strict=True)]
