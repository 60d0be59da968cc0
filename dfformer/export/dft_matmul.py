"""Transforms as matrix products with constant matrices, all real: for runtimes that have no FFT, or a slow one.

On planes of a vision model the products are cheap: 3 H W (H + W) multiply-adds a channel for both directions, on
(2H,2H) and (W+2,W) matrices. A half spectrum is held as (B,2,H,K,C), real parts then imaginary parts.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

from dfformer.models.layers import AFNO2D
from dfformer.utils.eager_baseline import plain_torch
from dfformer_kernels import reference


@contextmanager
def dft_as_matmul() -> Iterator[None]:
    """Models run inside compute what they do inside `plain_torch`, with matrix products for transforms. Process-wide.

    The matrices of a plane are made when it is first seen and kept until the end: after one call of the model, a trace
    of it has each of them once, as a constant.
    """
    transforms = _Transforms()

    def dynamic_filter(x: Tensor, logits: Tensor, basis: Tensor, star_relu: tuple[Tensor, Tensor] | None) -> Tensor:
        (H, K, filters, _), C = basis.shape, x.shape[3]
        parts = basis.permute(3, 0, 1, 2).reshape(2 * H * K, filters)  # (B,F,C) to real then imaginary parts
        M = (parts @ logits.softmax(dim=1)).reshape(-1, 2, H, K, C)
        return transforms.filtered(_activate(x, star_relu), M)

    def global_filter(x: Tensor, weight: Tensor, star_relu: tuple[Tensor, Tensor] | None) -> Tensor:
        return transforms.filtered(_activate(x, star_relu), weight.permute(3, 0, 1, 2))

    def afno_filter(layer: AFNO2D, x: Tensor) -> Tensor:
        W = x.shape[2]
        K = W // 2 + 1
        kept = int(K * layer.hard_thresholding_fraction)
        X = transforms.forward(x)[:, :, :, :kept].unflatten(-1, (layer.num_blocks, -1))
        real, imag = layer._complex_linear(X[:, 0], X[:, 1], layer.w1, layer.b1)
        real, imag = layer._complex_linear(F.relu(real), F.relu(imag), layer.w2, layer.b2)
        Z = F.softshrink(torch.stack([real, imag], dim=1), layer.sparsity_threshold).flatten(-2)
        return transforms.inverse(F.pad(Z, (0, 0, 0, K - kept)), W)

    spectral = patch.multiple("dfformer.models.layers", dynamic_filter=dynamic_filter, global_filter=global_filter)
    with plain_torch(), spectral, patch.object(AFNO2D, "_filter", afno_filter):
        yield


def _activate(x: Tensor, star_relu: tuple[Tensor, Tensor] | None) -> Tensor:
    return x if star_relu is None else reference.star_relu(x, *star_relu)


class _Matrices(NamedTuple):
    """The orthonormal transforms of (H,W) planes. Along H, real and imaginary parts go in and out together."""

    forward_columns: Tensor  # (2K, W): real parts of the kept columns, then imaginary parts
    forward_rows: Tensor  # (2H, 2H): from (row, part) to (part, row)
    inverse_rows: Tensor  # (2H, 2H): from (part, row) to (row, part)
    inverse_columns: Tensor  # (W, 2K)


class _Transforms:
    def __init__(self) -> None:
        self._matrices: dict[tuple[object, ...], _Matrices] = {}

    def forward(self, u: Tensor) -> Tensor:
        """rfft2: (B,H,W,C) to (B,2,H,K,C)."""
        _, H, W, C = u.shape
        matrices = self._for(H, W, u)
        columns = (matrices.forward_columns @ u).reshape(-1, 2 * H, (W // 2 + 1) * C)
        return (matrices.forward_rows @ columns).reshape(-1, 2, H, W // 2 + 1, C)

    def inverse(self, Z: Tensor, W: int) -> Tensor:
        """irfft2: (B,2,H,K,C) to (B,H,W,C). Ignores imaginary parts where the convention says so."""
        _, _, H, K, C = Z.shape
        matrices = self._for(H, W, Z)
        rows = (matrices.inverse_rows @ Z.reshape(-1, 2 * H, K * C)).reshape(-1, H, 2 * K, C)
        return matrices.inverse_columns @ rows

    def filtered(self, u: Tensor, M: Tensor) -> Tensor:
        """``irfft2(rfft2(u) * M)``, ``M`` (B,2,H,K,C) or (2,H,K,C)."""
        X = self.forward(u)
        (X_real, X_imag), (M_real, M_imag) = X.unbind(-4), M.unbind(-4)
        Z = torch.stack([X_real * M_real - X_imag * M_imag, X_real * M_imag + X_imag * M_real], dim=1)
        return self.inverse(Z, u.shape[2])

    def _for(self, H: int, W: int, like: Tensor) -> _Matrices:
        key = (H, W, like.dtype, like.device)
        if key not in self._matrices:
            matrices = _matrices(H, W)
            self._matrices[key] = _Matrices(*(m.to(like.device, like.dtype).contiguous() for m in matrices))
        return self._matrices[key]


def _matrices(H: int, W: int) -> _Matrices:
    """In float64."""
    cos, sin = _cos_sin(W // 2 + 1, W)
    weight = torch.full((W // 2 + 1,), 2.0, dtype=torch.float64)  # how many columns of the whole spectrum it stands for
    weight[0] = 1
    if W % 2 == 0:
        weight[-1] = 1
    row_cos, row_sin = _cos_sin(H, H)
    rows = torch.stack([torch.stack([row_cos, row_sin], -1), torch.stack([-row_sin, row_cos], -1)])  # part,row,row,part
    forward_rows = rows.reshape(2 * H, 2 * H)
    return _Matrices(
        forward_columns=torch.cat([cos, -sin]),
        forward_rows=forward_rows,
        inverse_rows=forward_rows.T,  # the transform is unitary
        inverse_columns=torch.cat([weight[:, None] * cos, -weight[:, None] * sin]).T,
    )


def _cos_sin(frequencies: int, N: int) -> tuple[Tensor, Tensor]:
    """cos and sin of ``2 pi k n / N``, (frequencies, N), orthonormal; sin is exactly 0 where ``2 k n`` divides by N."""
    turns = torch.outer(torch.arange(frequencies), torch.arange(N)) % N
    angle = turns.double() * (2 * math.pi / N)
    sin = angle.sin().masked_fill(2 * turns % N == 0, 0.0)
    return angle.cos() / math.sqrt(N), sin / math.sqrt(N)
