"""Transforms as matrix products with constant matrices, all real: for runtimes that have no FFT, or a slow one.

On planes of a vision model the products are cheap: 3 H W (H + W) multiply-adds a channel for both directions, on
(2H,2H) and (W+2,W) matrices. A half spectrum is held as (B,2,H,K,C), real parts then imaginary parts.
"""

import math
from functools import lru_cache
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfformer.models.spectral import AFNO2D, DynamicFilter, GlobalFilter, Scalars, afno_mlp
from dfformer.utils.eager_baseline import EAGER, with_classes
from dfformer_kernels import reference

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def with_dft_matmul(model: ModuleT) -> ModuleT:
    """A copy of ``model`` that computes its spectral mixers with matrix products instead of transforms.

    Works for any module with this package's mixers in it, by operations that every runtime has. A plane's matrices are
    constants of a trace.
    """
    return with_classes(model, {**EAGER, **_MATMUL})


def _activate(x: Tensor, star_relu: Scalars) -> Tensor:
    return x if star_relu is None else reference.star_relu(x, *star_relu)


class _DynamicFilter(DynamicFilter):
    def filter(self, x: Tensor, logits: Tensor, basis: Tensor, star_relu: Scalars) -> Tensor:
        (H, K, filters, _), C = basis.shape, x.shape[3]
        parts = basis.permute(3, 0, 1, 2).reshape(2 * H * K, filters)  # (B,F,C) to real then imaginary parts
        M = (parts @ logits.softmax(dim=1)).reshape(-1, 2, H, K, C)
        return _filtered(_activate(x, star_relu), M)


class _GlobalFilter(GlobalFilter):
    def filter(self, x: Tensor, weight: Tensor, star_relu: Scalars) -> Tensor:
        return _filtered(_activate(x, star_relu), weight.permute(3, 0, 1, 2))


class _AFNO2D(AFNO2D):
    def filter(self, x: Tensor) -> Tensor:
        W = x.shape[2]
        K = W // 2 + 1
        kept = int(K * self.hard_thresholding_fraction)
        X = rfft2(x)[:, :, :, :kept]
        Z = torch.stack(afno_mlp(X[:, 0], X[:, 1], self.w1, self.b1, self.w2, self.b2), dim=1)
        return irfft2(F.pad(F.softshrink(Z, self.sparsity_threshold), (0, 0, 0, K - kept)), W)


_MATMUL: dict[type[nn.Module], type[nn.Module]] = {
    DynamicFilter: _DynamicFilter,
    GlobalFilter: _GlobalFilter,
    AFNO2D: _AFNO2D,
}


def rfft2(u: Tensor) -> Tensor:
    """The orthonormal transform of real (B,H,W,C): (B,2,H,K,C)."""
    _, H, W, C = u.shape
    matrices = _matrices_for(H, W, u)
    columns = (matrices.forward_columns @ u).reshape(-1, 2 * H, (W // 2 + 1) * C)
    return (matrices.forward_rows @ columns).reshape(-1, 2, H, W // 2 + 1, C)


def irfft2(Z: Tensor, W: int) -> Tensor:
    """Its inverse: (B,2,H,K,C) to (B,H,W,C). Ignores imaginary parts where the convention says so."""
    _, _, H, K, C = Z.shape
    matrices = _matrices_for(H, W, Z)
    rows = (matrices.inverse_rows @ Z.reshape(-1, 2 * H, K * C)).reshape(-1, H, 2 * K, C)
    return matrices.inverse_columns @ rows


def _filtered(u: Tensor, M: Tensor) -> Tensor:
    """``irfft2(rfft2(u) * M)``, ``M`` (B,2,H,K,C) or (2,H,K,C)."""
    X = rfft2(u)
    (X_real, X_imag), (M_real, M_imag) = X.unbind(-4), M.unbind(-4)
    Z = torch.stack([X_real * M_real - X_imag * M_imag, X_real * M_imag + X_imag * M_real], dim=1)
    return irfft2(Z, u.shape[2])


class _Matrices(NamedTuple):
    """The orthonormal transforms of (H,W) planes. Along H, real and imaginary parts go in and out together."""

    forward_columns: Tensor  # (2K, W): real parts of the kept columns, then imaginary parts
    forward_rows: Tensor  # (2H, 2H): from (row, part) to (part, row)
    inverse_rows: Tensor  # (2H, 2H): from (part, row) to (row, part)
    inverse_columns: Tensor  # (W, 2K)


def _matrices_for(H: int, W: int, like: Tensor) -> _Matrices:
    return _matrices_on(int(H), int(W), like.dtype, like.device)


@lru_cache(maxsize=64)  # a trace takes the same constants for all layers of a stage
def _matrices_on(H: int, W: int, dtype: torch.dtype, device: torch.device) -> _Matrices:
    return _Matrices(*(m.to(device, dtype).contiguous() for m in _matrices(H, W)))


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
