"""A model of the memory traffic of the ``cufft`` backend."""

from collections.abc import Sequence

import torch

from dfformer_kernels.backend.cufft.passes import by_sample
from dfformer_kernels.reference import compute_dtype


def traffic(
    op: str, shape: Sequence[int], dtype: torch.dtype, star_relu: bool = False, backward: bool = False
) -> list[tuple[str, int]]:
    """A model of the passes of a filter step on x (B,H,W,C), or of its whole backward, and of the bytes each moves.

    A transform counts its input and its output once, and nothing that the library does in between. A global filter's
    weight counts, because it is as large as a sample's spectrum, and so does its gradient (once, though small planes
    have slots of it). A dynamic filter's parameters and slots are small and do not count. Each pass is one launch,
    except that a transform of several samples is one launch for each if `by_sample` chooses so.
    """
    B, H, W, C = shape
    stored, wide = dtype.itemsize, compute_dtype(dtype).itemsize
    elements = B * H * W * C
    plane, spectrum = elements * wide, 2 * B * H * (W // 2 + 1) * C * wide
    weight = spectrum // B if op == "global_filter" else 0
    moves = stored != wide or not by_sample(shape, dtype, star_relu, backward)
    inside = ("inside", elements * stored + plane)
    outside = ("outside", plane + elements * stored)
    transform = ("rfft2", plane + spectrum)
    inverse = ("irfft2", spectrum + plane)
    x_in = [inside] * (moves or star_relu) + [transform]
    if not backward:
        return [*x_in, ("mix", 2 * spectrum + weight), inverse, *[outside] * moves]
    last = [("star_relu_backward", plane + 2 * elements * stored)] if star_relu else [outside] * moves
    return [*[inside] * moves, transform, *x_in, ("mix_backward", 3 * spectrum + 2 * weight), inverse, *last]
