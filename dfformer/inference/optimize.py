"""A model made ready to serve: everything that is fixed once training is over is computed once."""

from copy import deepcopy
from typing import Any

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from dfformer.models.layers import (
    AFNO2D,
    DynamicFilter,
    GlobalFilter,
    Linear,
    Mlp,
    PackedLinear,
    PackedMlp,
    SepConv,
    SpectralFilter,
    StarReLU,
    is_plain,
)
from dfformer.models.metaformer import MetaFormerBlock

DTYPES = (None, torch.float32, torch.bfloat16)

# The projections that read a token mixer's input, and so can take over the scale of the norm before it.
_INPUT_PROJECTIONS: dict[type[nn.Module], tuple[str, ...]] = {
    DynamicFilter: ("pwconv1", "reweight.fc1"),
    GlobalFilter: ("pwconv1",),
    SepConv: ("pwconv1",),
    AFNO2D: ("pwconv1",),
}


def optimize_for_inference(
    model: nn.Module, dtype: torch.dtype | None = None, img_size: int | tuple[int, int] | None = None
) -> "InferenceModel":
    """A copy of ``model`` that serves faster and cannot be trained; ``model`` stays as it is.

    The scales of norms and of StarReLU go into the projections after them, whose weights are kept in the layout the
    processor's matrix product wants (which takes their size in memory once more).

    Args:
        model: any module with blocks of this family in it, e.g. a classifier or a segmentation model around one.
        dtype: torch.bfloat16 for weights and activations of that dtype (filters and spectra stay float32); None for
            the model's own. Images are cast to it, results back to the dtype of the images.
        img_size: (H, W) of the images to come, or one number: filters are resized for it now, and other sizes that
            would need other filters are refused. None to resize them as images come.

    Returns:
        A module that is called like ``model``; the optimised copy itself, with its other methods, is its ``model``.
        It can be compiled, exported, pickled and deep-copied.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype}, accepted are {', '.join(map(str, DTYPES))}")
    # Tensors made in inference mode would not tell that they changed.
    with torch.inference_mode(False), torch.no_grad():
        served = deepcopy(model).eval().requires_grad_(False)
        if img_size is not None:
            _fix_filters(served, to_2tuple(img_size))
        for module in served.modules():
            if type(module) is MetaFormerBlock:
                _fold_norms(module)
        _replace_layers(served)
        if dtype is not None:
            _convert(served, dtype)
    return InferenceModel(served, dtype)


class InferenceModel(nn.Module):
    """What `optimize_for_inference` returns."""

    def __init__(self, model: nn.Module, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.dtype = dtype
        self.model = model
        self.pretrained_cfg = getattr(model, "pretrained_cfg", {})  # says how images are prepared
        super().train(False)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Any:
        results = self.model(x if self.dtype is None else x.to(self.dtype))
        return results if self.dtype is None else tree_map_only(Tensor, lambda t: t.to(x.dtype), results)

    def train(self, mode: bool = True) -> "InferenceModel":
        if mode:
            raise RuntimeError("a model optimised for inference cannot be trained; train the one it was made from")
        return super().train(False)


def _fix_filters(model: nn.Module, img_size: tuple[int, int]) -> None:
    planes: dict[SpectralFilter, tuple[int, int]] = {}

    def note_plane(module: SpectralFilter, inputs: tuple[Tensor, ...]) -> None:
        planes[module] = (inputs[0].shape[1], inputs[0].shape[2])

    spectral = [m for m in model.modules() if isinstance(m, SpectralFilter)]
    handles = [m.register_forward_pre_hook(note_plane) for m in spectral]
    like = next(model.parameters())
    in_chans = next(m for m in model.modules() if isinstance(m, nn.Conv2d)).in_channels
    try:
        model(torch.zeros(1, in_chans, *img_size, dtype=like.dtype, device=like.device))
    finally:
        for handle in handles:
            handle.remove()
    for module, plane in planes.items():
        module.complex_weights = nn.Parameter(module.filters_for(plane).clone(), requires_grad=False)
        module.size, module.weight_resize = plane, False


def _convert(model: nn.Module, dtype: torch.dtype) -> None:
    filters = {id(m.complex_weights) for m in model.modules() if isinstance(m, SpectralFilter)}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in filters and tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


def _fold_norms(block: MetaFormerBlock) -> None:
    """``W (g * n) = (W * g) n``: the norms' scales into the projections that read them."""
    mixer = block.token_mixer
    readers: list[Any] = [mixer.get_submodule(name) for name in _INPUT_PROJECTIONS.get(type(mixer), ())]
    for name, projections in (("norm1", readers), ("norm2", [block.mlp.fc1])):
        norm = getattr(block, name)
        if is_plain(norm, nn.LayerNorm) and getattr(norm, "bias", None) is None and projections:
            for projection in projections:
                projection.weight.mul_(norm.weight)
            setattr(block, name, nn.LayerNorm(norm.normalized_shape, eps=norm.eps, elementwise_affine=False))


def _replace_layers(module: nn.Module) -> None:
    for name, child in module.named_children():
        if type(child) is Mlp and is_plain(child.act, StarReLU):
            setattr(module, name, _packed_mlp(child, child.act))
        elif is_plain(child, Linear) or is_plain(child, nn.Linear):
            setattr(module, name, PackedLinear(child.weight, child.bias))
        else:
            _replace_layers(child)


def _packed_mlp(module: Mlp, act: StarReLU) -> PackedMlp:
    """``W (s r + b) = (s W) r + b (W 1)``."""
    weight = module.fc2.weight
    return PackedMlp(PackedLinear(module.fc1.weight), PackedLinear(act.scale * weight, act.bias * weight.sum(1)))
