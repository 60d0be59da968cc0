"""The operators with transforms as products with constant matrices, for runtimes that have no FFT, or a slow one.

All arithmetic is real. On the planes of a vision model the products are cheap: 3 H W (H + W) multiply-adds per channel
for both directions, with (2H,2H) and (W+2,W) matrices. A half spectrum is (B,2,H,K,C), real parts before imaginary
parts. Dtypes are as in `dfformer_kernels.reference`. A trace contains a plane's matrices as constants.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dfformer_kernels import reference
from dfformer_kernels.kept import kept


def dynamic_filter(
    x: Tensor,
    logits: Tensor,
    basis: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    softmax: bool = True,
) -> Tensor:
    """See `dfformer_kernels.reference.dynamic_filter`."""
    (H, K, filters, _), C = basis.shape, x.shape[3]
    u = reference.activate(x, scale, bias)
    r = reference.routing(logits, u.dtype, softmax)
    parts = basis.to(u.dtype).permute(3, 0, 1, 2).reshape(2 * H * K, filters)  # (B,F,C) to real then imaginary parts
    return _filtered(u, (parts @ r).reshape(-1, 2, H, K, C)).to(x.dtype)


def global_filter(x: Tensor, weight: Tensor, scale: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """See `dfformer_kernels.reference.global_filter`."""
    u = reference.activate(x, scale, bias)
    parts = weight.dim() - 4  # not -4, which the older exporter would write into the file
    return _filtered(u, weight.to(u.dtype).movedim(parts + 3, parts)).to(x.dtype)


KERNELS: dict[str, Callable[..., Tensor]] = {
    "star_relu": reference.star_relu,
    "dynamic_filter": dynamic_filter,
    "global_filter": global_filter,
}


def in_onnx_export() -> bool:
    """Whether torch.onnx.export is tracing this call. The DFT operators of ONNX runtimes are slow."""
    tracing = torch.jit.is_tracing() or torch.compiler.is_exporting()  # checked first, because it takes no time
    return tracing and torch.onnx.is_in_onnx_export()


def as_pairs(filters: Tensor) -> Tensor:
    """Complex filters (...) as real and imaginary parts (...,2); real ones as they are.

    The older exporter of torch.onnx has no complex numbers. In its trace the parts of a parameter are a constant.

    Raises:
        NotImplementedError: in such a trace, complex filters that are not a parameter, but computed.
    """
    if not filters.is_complex():
        return filters
    pairs = torch.view_as_real(filters.resolve_conj())
    if not (torch.jit.is_tracing() and torch.onnx.is_in_onnx_export()):
        return pairs
    if not isinstance(filters, nn.Parameter):
        raise NotImplementedError(
            "torch.onnx.export(dynamo=False) cannot export complex filters that are computed or a buffer: use an "
            "nn.Parameter, real filters with a last axis of 2, or dynamo=True"
        )
    return torch.from_numpy(pairs.detach().numpy(force=True)).to(filters.device)


def rfft2(u: Tensor) -> Tensor:
    """The orthonormal transform of real (B,H,W,C): (B,2,H,K,C)."""
    _, H, W, C = u.shape
    matrices = _matrices_on(int(H), int(W), u.dtype, u.device)
    columns = (matrices.forward_columns @ u).reshape(-1, 2 * H, (W // 2 + 1) * C)
    return (matrices.forward_rows @ columns).reshape(-1, 2, H, W // 2 + 1, C)


def irfft2(Z: Tensor, W: int) -> Tensor:
    """The inverse of `rfft2`: (B,2,H,K,C) to (B,H,W,C). Ignores the imaginary parts that the convention ignores."""
    _, _, H, K, C = Z.shape
    matrices = _matrices_on(int(H), int(W), Z.dtype, Z.device)
    rows = (matrices.inverse_rows @ Z.reshape(-1, 2 * H, K * C)).reshape(-1, H, 2 * K, C)
    return matrices.inverse_columns @ rows


def _filtered(u: Tensor, M: Tensor) -> Tensor:
    """``irfft2(rfft2(u) * M)``, ``M`` (B,2,H,K,C) or (2,H,K,C)."""
    X = rfft2(u)
    (X_real, X_imag), (M_real, M_imag) = X.unbind(-4), M.unbind(-4)
    Z = torch.stack([X_real * M_real - X_imag * M_imag, X_real * M_imag + X_imag * M_real], dim=1)
    return irfft2(Z, u.shape[2])


class Matrices(NamedTuple):
    """The orthonormal transforms of (H,W) planes. The matrices along H map real and imaginary parts together."""

    forward_columns: Tensor  # (2K, W): real parts of the half spectrum's columns, then imaginary parts
    forward_rows: Tensor  # (2H, 2H): from (row, part) to (part, row)
    inverse_rows: Tensor  # (2H, 2H): from (part, row) to (row, part)
    inverse_columns: Tensor  # (W, 2K)


def mark_matrices_constant() -> None:
    """From now on torch.compile takes the matrices as constants. Not on import, which would import all of Dynamo."""
    torch.compiler.assume_constant_result(_matrices_on)


# Kept so that a trace uses the same constants for all layers of a stage.
@kept(64)
def _matrices_on(H: int, W: int, dtype: torch.dtype, device: torch.device) -> Matrices:
    made = matrices(H, W, dtype)
    return made if device.type == "cpu" else Matrices(*(m.to(device) for m in made))


def matrices(H: int, W: int, dtype: torch.dtype = torch.float64) -> Matrices:
    """The matrices of (H,W) planes on the CPU, float32 or float64. numpy computes them, which no tracer records."""
    K = W // 2 + 1
    columns = np.fft.rfft(np.eye(W), norm="ortho").T
    rows = np.fft.fft(np.eye(H), norm="ortho")
    parts = np.stack([np.stack([rows.real, -rows.imag], -1), np.stack([rows.imag, rows.real], -1)])
    forward_rows = parts.reshape(2 * H, 2 * H)
    made = (
        np.concatenate([columns.real, columns.imag]),
        forward_rows,
        forward_rows.T,  # the transform is unitary
        np.fft.irfft(np.concatenate([np.eye(K), 1j * np.eye(K)]), W, norm="ortho").T,
    )
    numbers = np.float32 if dtype == torch.float32 else np.float64
    # Of fake tensors, which it traces with, only torch.tensor makes constants.
    if torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export():
        return Matrices(*(torch.tensor(np.ascontiguousarray(m, numbers)) for m in made))
    return Matrices(*(torch.from_numpy(np.ascontiguousarray(m, numbers)) for m in made))
