"""The executable specification of every operator, in torch.fft, for any device, floating dtype and plane.

It is the ``torch`` backend, and every other backend is compared with it. Second derivatives come from it as well,
because each gradient is itself a differentiable expression. Here clarity is more important than speed.

Notation: ``B,H,W,C`` are batch, height, width and channels; ``F`` is the number of filters; ``K = W//2 + 1``.
Arithmetic is float64 for float64 ``x`` and float32 otherwise. A gradient has the dtype of its tensor, ``y`` that of
``x``.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of arithmetic on tensors stored as ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def star_relu(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """``y = scale * relu(x)^2 + bias``."""
    return _star_relu(x, scale, bias).to(x.dtype)


def star_relu_backward(grad_y: Tensor, x: Tensor, scale: Tensor, bias: Tensor, needs: Sequence[bool]) -> list[Tensor]:
    """``grad_x = 2 scale relu(x) grad_y``, ``grad_scale = sum(relu(x)^2 grad_y)``, ``grad_bias = sum(grad_y)``.

    Returns the gradients of (x, scale, bias) that are needed, in that order.
    """
    grad_y = grad_y.to(compute_dtype(x.dtype))
    r = x.to(grad_y.dtype).relu()
    gradients = (
        # Selected, because with an infinite grad_y a product would be 0 * inf where x <= 0.
        lambda: torch.where(r == 0, 0, 2 * scale.to(r.dtype).reshape(()) * r * grad_y).to(x.dtype),
        lambda: (r.square() * grad_y).sum().to(scale.dtype).reshape(scale.shape),
        lambda: grad_y.sum().to(bias.dtype).reshape(bias.shape),
    )
    return [gradient() for gradient, need in zip(gradients, needs, strict=True) if need]


def dynamic_filter(
    x: Tensor,
    logits: Tensor,
    basis: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    softmax: bool = True,
) -> Tensor:
    """The dynamic filter step (paper, section 3.2)::

        u = star_relu(x)                              if scale and bias are given, else x
        X = rfft2(u)                                  (B,H,K,C), ortho
        r = softmax(logits, dim=1)                    (B,F,C), or the logits themselves
        M[b,h,k,c] = sum_f r[b,f,c] basis[h,k,f]      (B,H,K,C)
        y = irfft2(X * M)                             (B,H,W,C), ortho

    ``x`` (B,H,W,C), ``logits`` (B,F,C), ``basis`` (H,K,F,2).
    """
    u = activate(x, scale, bias)
    M = _mixed_filter(routing(logits, u.dtype, softmax), _complex(basis))
    return _irfft2(_rfft2(u) * M, x.shape[2]).to(x.dtype)


def dynamic_filter_backward(
    grad_y: Tensor,
    x: Tensor,
    logits: Tensor,
    basis: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    needs: Sequence[bool],
    softmax: bool = True,
) -> list[Tensor]:
    """With ``G = rfft2(grad_y)``, ``D[k] = 1`` for k=0 and k=W/2 (W even) else 2, ``P = D G conj(X)``::

        grad_u             = irfft2(conj(M) * G)                   then StarReLU's gradients
        grad_r[b,f,c]      = sum_hk Re(P conj(basis[h,k,f]))       then softmax's gradient if there is one
        grad_basis[h,k,f]  = sum_bc r[b,f,c] P

    Returns the gradients of (x, logits, basis, scale, bias) that are needed, in that order.
    """
    need_x, need_logits, need_basis, need_scale, need_bias = needs
    u = activate(x, scale, bias)
    r, filters = routing(logits, u.dtype, softmax), _complex(basis)
    G = _rfft2(grad_y.to(u.dtype))
    of_parameters: list[Tensor] = []
    of_input: list[Tensor] = []
    if need_x or need_scale or need_bias:
        of_input = _input_backward(_mixed_filter(r, filters), G, x, scale, bias, (need_x, need_scale, need_bias))
    if need_logits or need_basis:
        P = _half_spectrum_weight(x.shape[2], u) * G * _conj(_rfft2(u))
        if need_logits:
            # Rows first, then their sum: one long chain of float32 additions would lose digits on large planes.
            by_row = _conj(filters).mT @ P
            grad_r = torch.view_as_real(by_row)[..., 0].sum(1)
            if softmax:
                grad_r = r * (grad_r - (r * grad_r).sum(1, keepdim=True))
            of_parameters.append(grad_r.to(logits.dtype))
        if need_basis:
            grad_filters = (P @ r.to(P.dtype).mT[:, None]).sum(0)
            of_parameters.append(torch.view_as_real(grad_filters).to(basis.dtype))
    return of_input[:need_x] + of_parameters + of_input[need_x:]


def global_filter(x: Tensor, weight: Tensor, scale: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """``y = irfft2(rfft2(u) * weight)``, ``u = star_relu(x)`` if scale and bias are given, else ``x``.

    ``x`` (B,H,W,C); ``weight`` (H,K,C,2), or (B,H,K,C,2) with one weight for each sample. This is GFNet's global filter
    (Rao et al., NeurIPS 2021), as GFFormer uses it.
    """
    u = activate(x, scale, bias)
    return _irfft2(_rfft2(u) * _complex(weight), x.shape[2]).to(x.dtype)


def global_filter_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, needs: Sequence[bool]
) -> list[Tensor]:
    """``grad_u = irfft2(conj(weight) G)``, ``grad_weight = sum_b D G conj(X)``.

    ``G`` and ``D`` are as for the dynamic filter. There is no sum over b if each sample has a weight of its own.

    Returns the gradients of (x, weight, scale, bias) that are needed, in that order.
    """
    need_x, need_weight, need_scale, need_bias = needs
    u = activate(x, scale, bias)
    G = _rfft2(grad_y.to(u.dtype))
    of_parameters: list[Tensor] = []
    of_input: list[Tensor] = []
    if need_x or need_scale or need_bias:
        of_input = _input_backward(_complex(weight), G, x, scale, bias, (need_x, need_scale, need_bias))
    if need_weight:
        P = _half_spectrum_weight(x.shape[2], u) * G * _conj(_rfft2(u))
        of_parameters.append(torch.view_as_real(P if weight.dim() == 5 else P.sum(0)).to(weight.dtype))
    return of_input[:need_x] + of_parameters + of_input[need_x:]


KERNELS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        star_relu,
        star_relu_backward,
        dynamic_filter,
        dynamic_filter_backward,
        global_filter,
        global_filter_backward,
    )
}


def _star_relu(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    u = x.to(compute_dtype(x.dtype))
    return scale.to(u.dtype).reshape(()) * u.relu().square() + bias.to(u.dtype).reshape(())


def activate(x: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """``u`` of `dynamic_filter`: x after StarReLU if there is one, in the dtype of arithmetic."""
    if scale is None or bias is None:
        return x.to(compute_dtype(x.dtype))
    return _star_relu(x, scale, bias)


def _input_backward(
    M: Tensor, G: Tensor, x: Tensor, scale: Tensor | None, bias: Tensor | None, needs: Sequence[bool]
) -> list[Tensor]:
    """The needed gradients of (x, scale, bias), from ``grad_u = irfft2(conj(M) * G)``."""
    grad_u = _irfft2(_conj(M) * G, x.shape[2])
    if scale is None or bias is None:
        return [grad_u.to(x.dtype)]
    return star_relu_backward(grad_u, x, scale, bias, needs)


def _complex(pairs: Tensor) -> Tensor:
    """Real and imaginary parts (...,2) as complex numbers (...): a view if torch allows one, else a view of a copy."""
    *outer, inner = pairs.stride()
    # Parameters that are slices of one flat buffer may begin at an odd element. Dynamo cannot ask where they begin.
    odd_offset = torch.compiler.is_compiling() or pairs.storage_offset() % 2
    if inner != 1 or odd_offset or any(stride % 2 for stride in outer):
        pairs = pairs.clone(memory_format=torch.contiguous_format)
    return torch.view_as_complex(pairs)


def routing(logits: Tensor, dtype: torch.dtype, softmax: bool) -> Tensor:
    """``r`` of `dynamic_filter`: softmax of the logits or the logits themselves, as ``dtype``."""
    return logits.to(dtype).softmax(dim=1) if softmax else logits.to(dtype)


def _mixed_filter(r: Tensor, filters: Tensor) -> Tensor:
    return filters @ r.to(filters.dtype)[:, None]


def _rfft2(u: Tensor) -> Tensor:
    if u.requires_grad and torch.is_grad_enabled():
        # The gradient of rfft2 is a two-dimensional complex transform. On strided float64 planes of some sizes (2x64,
        # 5x509), MKL's version writes outside its result (torch 2.14.1). One-dimensional transforms do not.
        return torch.fft.fft(torch.fft.rfft(u, dim=2, norm="ortho"), dim=1, norm="ortho")
    return torch.fft.rfft2(u, dim=(1, 2), norm="ortho")


def _irfft2(Z: Tensor, W: int) -> Tensor:
    # A filtered spectrum is not Hermitian in the columns k=0 and k=W/2, and libraries differ in what a 2-D c2r returns
    # for it. The convention is to invert along H, then run c2r along W, which ignores those columns' imaginary part.
    return torch.fft.irfft(torch.fft.ifft(Z, dim=1, norm="ortho"), n=W, dim=2, norm="ortho")


def _conj(Z: Tensor) -> Tensor:
    # Not Tensor.conj(): torch.compile runs a custom operator's first call in a mode that ignores this lazy flag
    # (torch 2.14), and products would silently lack the conjugation.
    return torch.conj_physical(Z)


def _half_spectrum_weight(W: int, like: Tensor) -> Tensor:
    """``D`` (1,1,K,1): how many columns of the full spectrum each column of the half spectrum stands for."""
    D = torch.full((W // 2 + 1,), 2.0, dtype=like.dtype, device=like.device)
    D[0] = 1
    if W % 2 == 0:
        D[-1] = 1
    return D.view(1, 1, -1, 1)
