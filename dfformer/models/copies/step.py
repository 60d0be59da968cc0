"""Our step as a function of the tensors of a copy, in the copy's layout and with its stored filters."""

from typing import NamedTuple

import torch
from torch import Tensor

from dfformer.models.filter_resize import resize_filter
from dfformer_kernels import dynamic_filter, global_filter
from dfformer_kernels.dispatch import without_autocast
from dfformer_kernels.graph.trace import called_whole
from dfformer_kernels.reference import compute_dtype

# The orders of axes that filters are stored in, and the permutation of each to (H,K,F,2).
STORAGE: dict[str, tuple[int, ...]] = {"(H,K,F,2)": (0, 1, 2, 3), "(F,H,K,2)": (1, 2, 0, 3)}


def as_basis(weight: Tensor, storage: str) -> Tensor:
    """Stored filters, real with a last axis of 2 or complex, as (H,K,F,2)."""
    real = torch.view_as_real(weight) if weight.is_complex() else weight
    return real.permute(STORAGE[storage])


class Form(NamedTuple):
    """How a copy lays out the inputs of its transforms.

    With ``channels_first``, maps are (B,C,H,W), else (B,H,W,C). ``size`` is the plane (H, W) of the stored filters, W
    up to its parity. ``storage`` is a key of `STORAGE`. ``filter_axis`` is the axis of the logits that the softmax runs
    over. With ``normalised``, the routing is taken after its softmax.
    """

    channels_first: bool
    size: tuple[int, int]
    storage: str
    resize: str
    filter_axis: int = 1
    normalised: bool = False


@called_whole
def filter_step(
    x: Tensor,
    weight: Tensor,
    logits: Tensor | None,
    *,
    channels_first: bool,
    size: tuple[int, int],
    storage: str,
    resize: str,
    filter_axis: int,
    normalised: bool,
) -> Tensor:
    """The dynamic or global filter step on the tensors of a copy, whose `Form` gives the other arguments.

    Args:
        x: (B,H,W,C) or (B,C,H,W).
        weight: the stored filters.
        logits: the first axis is B, ``filter_axis`` is F, and the others are C or 1; None for one filter per channel.

    Returns:
        x's shape and dtype, contiguous.
    """
    data_format = "channels_first" if channels_first else "channels_last"
    C, H, W = x.shape[1:] if channels_first else (x.shape[3], *x.shape[1:3])
    with without_autocast(x.device):
        basis = as_basis(weight, storage).to(compute_dtype(x.dtype))
        if tuple(basis.shape[:2]) != (H, W // 2 + 1):
            basis = resize_filter(basis.contiguous(), size, (H, W), resize)
    if logits is None:
        return global_filter(x, basis, data_format=data_format).contiguous()
    logits = logits.movedim(filter_axis, 1)
    logits = logits.flatten(2) if logits.dim() > 2 else logits[..., None]
    normalization = None if normalised else "softmax"
    y = dynamic_filter(x, logits.expand(-1, -1, C), basis, normalization=normalization, data_format=data_format)
    return y.contiguous()
