"""Counts a model's parameters, multiply-adds (including transforms and mixing), and activations."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dfformer.models.layers import channels_last
from dfformer.models.spectral import AFNO2D, DynamicFilter, GlobalFilter


@dataclass(frozen=True)
class Profile:
    """Counts for one image."""

    parameters: int
    macs: int  # linear, convolution, spectral (one multiply and one add each)
    spectral_macs: int  # the part of macs in transforms, filter mixing and products
    activations: int  # output elements of linear, convolution and filter layers
    saved_bytes: int  # that one training forward keeps for backward, without the parameters
    planes: tuple[tuple[int, int, int], ...]  # H, W, C of every stage


def profile(make_model: Callable[[], nn.Module], img_size: tuple[int, int], in_chans: int = 3) -> Profile:
    """Profiles the model that ``make_model`` builds, on (H, W) images, on the meta device, without computing anything.

    A real 2-D transform of N points counts 2.5 N log2 N flops, the usual figure, that is 1.25 N log2 N multiply-adds a
    channel; mixing F filters 2F and the complex product 4 for each kept frequency and channel.
    """
    counter = _Counter()
    with torch.device("meta"):
        model = make_model().train()
        image = torch.empty(1, in_chans, *img_size)
        saved = saved_for_backward(model, image)  # before the hooks, which prevent fusing
        with torch.no_grad():
            features = model.forward_intermediates(image, intermediates_only=True)  # type: ignore[operator]
            for module in model.modules():
                if type(module) in _MACS:
                    module.register_forward_hook(counter.count)
            model(image)
    return Profile(
        parameters=sum(p.numel() for p in model.parameters()),
        macs=counter.macs,
        spectral_macs=counter.spectral_macs,
        activations=counter.activations,
        saved_bytes=saved,
        planes=tuple((f.shape[2], f.shape[3], f.shape[1]) for f in features),
    )


def saved_for_backward(model: nn.Module, *inputs: Tensor) -> int:
    """Bytes of distinct storages that ``model(*inputs)`` keeps for backward, parameters excluded."""
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}  # holding the storage keeps its identity from being reused

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in own:
            storages[storage._cdata] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(*inputs)
    return sum(storage.nbytes() for storage in storages.values())


def _linear_macs(module: Any, x: Tensor, y: Tensor) -> int:
    return y.numel() * module.in_features


def _conv_macs(module: Any, x: Tensor, y: Tensor) -> int:
    return y.numel() * module.weight[0].numel()


def _spectral_macs(module: Any, x: Tensor, y: Tensor) -> int:
    B, H, W, _ = channels_last(x, module.data_format).shape
    C, K, N = module.pwconv1.out_features, W // 2 + 1, H * W
    transforms = 2 * round(1.25 * N * math.log2(N)) if N > 1 else 0
    if isinstance(module, AFNO2D):
        per_channel = 4 * (module.w1.shape[2] + module.w2.shape[2])
    else:
        per_channel = 4 + (2 * module.num_filters if isinstance(module, DynamicFilter) else 0)
    return B * C * (transforms + H * K * per_channel)


_MACS: dict[type[nn.Module], Callable[[Any, Tensor, Tensor], int]] = {
    nn.Linear: _linear_macs,
    nn.Conv2d: _conv_macs,
    DynamicFilter: _spectral_macs,
    GlobalFilter: _spectral_macs,
    AFNO2D: _spectral_macs,
}


class _Counter:
    def __init__(self) -> None:
        self.macs = self.spectral_macs = self.activations = 0

    def count(self, module: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        macs = _MACS[type(module)](module, inputs[0], y)
        self.macs += macs
        self.activations += y.numel()
        if _MACS[type(module)] is _spectral_macs:
            self.spectral_macs += macs
