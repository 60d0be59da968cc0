"""The adaptive Fourier neural operator (arXiv:2111.13587) in torch's own operators; there is no fused one.

The arguments are those of `dfformer.models.spectral.afno_filter`.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from dfformer_kernels import dft_matmul
from dfformer_kernels.reference import compute_dtype


def filter(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, kept_fraction: float, threshold: float) -> Tensor:
    _, H, W, _ = x.shape
    K = W // 2 + 1
    kept = int(K * kept_fraction)
    X = torch.fft.rfft2(x.to(compute_dtype(x.dtype)), dim=(1, 2), norm="ortho")[:, :, :kept]
    real, imag = mlp(X.real, X.imag, w1, b1, w2, b2)
    Z = torch.view_as_complex(F.softshrink(torch.stack([real, imag], dim=-1), threshold))
    return torch.fft.irfft2(F.pad(Z, (0, 0, 0, K - kept)), s=(H, W), dim=(1, 2), norm="ortho").to(x.dtype)


def filter_matmul(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, kept_fraction: float, threshold: float
) -> Tensor:
    """`filter`, with transforms as matrix products."""
    W = x.shape[2]
    K = W // 2 + 1
    kept = int(K * kept_fraction)
    X = dft_matmul.rfft2(x.to(compute_dtype(x.dtype)))[:, :, :, :kept]
    Z = torch.stack(mlp(X[:, 0], X[:, 1], w1, b1, w2, b2), dim=1)
    return dft_matmul.irfft2(F.pad(F.softshrink(Z, threshold), (0, 0, 0, K - kept)), W).to(x.dtype)


def mlp(real: Tensor, imag: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> tuple[Tensor, Tensor]:
    """The complex two-layer MLP with ReLU on (...,C) real and imaginary parts, block-diagonal in C.

    ``w1`` (2,blocks,width,hidden), ``b1`` (2,blocks,hidden), ``w2`` (2,blocks,hidden,width), ``b2`` (2,blocks,width).
    """
    shape, blocks, width = real.shape, w1.shape[1], w1.shape[2]
    # Batch dimensions are flattened: Core ML supports at most five dimensions, and no ellipsis in einsum.
    real, imag = real.reshape(-1, blocks, width), imag.reshape(-1, blocks, width)
    real, imag = _complex_linear(real, imag, w1, b1)
    real, imag = _complex_linear(F.relu(real), F.relu(imag), w2, b2)
    return real.reshape(shape), imag.reshape(shape)


def _complex_linear(real: Tensor, imag: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    w, b = w.to(real.dtype), b.to(real.dtype)
    apply = "nbi,bio->nbo"
    return (
        torch.einsum(apply, real, w[0]) - torch.einsum(apply, imag, w[1]) + b[0],
        torch.einsum(apply, imag, w[0]) + torch.einsum(apply, real, w[1]) + b[1],
    )
