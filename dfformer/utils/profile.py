"""Counts a model's parameters, multiply-adds (including transforms and mixing), and what training saves."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dfformer.models.spectral import AFNO2D
from dfformer_kernels.ops.flops import filter_flops


def _transform(x: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any) -> int:
    """FLOPs of a transform in torch.fft, for which torch has no formula; the real plane is the larger one."""
    return filter_flops(max(x, out_shape, key=math.prod), transforms=1)


_TRANSFORMS = {torch.ops.aten._fft_r2c: _transform, torch.ops.aten._fft_c2r: _transform}
_OPERATORS = (torch.ops.dfformer.dynamic_filter, torch.ops.dfformer.global_filter)
_SPECTRAL = {*_TRANSFORMS, *_OPERATORS}


@dataclass(frozen=True)
class Profile:
    """Counts for one image."""

    parameters: int
    macs: int  # half the FLOPs of linear layers, convolutions and spectral parts
    spectral_macs: int  # the part of macs in transforms, filter mixing and products
    saved_bytes: int  # that one training forward saves for backward, without the parameters
    planes: tuple[tuple[int, int, int], ...]  # H, W, C of every stage


def profile(make_model: Callable[[], nn.Module], img_size: tuple[int, int], in_chans: int = 3) -> Profile:
    """Profiles the model that ``make_model`` builds, on (H, W) images, on the meta device, without computing anything.

    See `dfformer_kernels.ops.flops` for what counts. Resizing filters counts too: a model that was created for another
    ``img_size`` does it in every forward.
    """
    with torch.device("meta"):
        model = make_model().train()
        image = torch.empty(1, in_chans, *img_size)
        saved = saved_for_backward(model, image)
        with torch.no_grad():
            features = model.forward_intermediates(image, intermediates_only=True)  # type: ignore[operator]
            with FlopCounterMode(display=False, custom_mapping=_TRANSFORMS) as counter:
                model(image)
    flops = counter.get_flop_counts()["Global"]
    spectral = _SPECTRAL
    if any(isinstance(module, AFNO2D) for module in model.modules()):
        spectral = spectral | {torch.ops.aten.bmm}  # nothing else in such a model has batched products
    return Profile(
        parameters=sum(p.numel() for p in model.parameters()),
        macs=sum(flops.values()) // 2,
        spectral_macs=sum(flops[op] for op in spectral & flops.keys()) // 2,
        saved_bytes=saved,
        planes=tuple((f.shape[2], f.shape[3], f.shape[1]) for f in features),
    )


def saved_for_backward(model: nn.Module, *inputs: Tensor) -> int:
    """Bytes of distinct storages that ``model(*inputs)`` saves for backward, parameters excluded."""
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
