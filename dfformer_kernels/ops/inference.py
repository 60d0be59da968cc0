"""Products without gradients: the norm before them and the residual after them done on the way, weights packed once.

On the compiled core's backend a norm is applied to the rows that a product is about to read and a residual is added
where its result is written, which saves passes over memory (docs/model_speed.md). Everywhere else the same operators
are compositions of torch's.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dfformer_kernels.backends import cpu
from dfformer_kernels.backends.cpu import Norm, Residual
from dfformer_kernels.dispatch import requested_backend, without_autocast
from dfformer_kernels.ops import checks
from dfformer_kernels.ops.filter import register
from dfformer_kernels.ops.mlp import X86, autocast_dtype, by_core, chunks, for_core, rows_of, star_relu_
from dfformer_kernels.ops.packing import is_kept, packed

# Rows that oneDNN lays a weight out for: any number runs.
PACKED_FOR_ROWS = 784


def fuses(x: Tensor) -> bool:
    """Whether norms and residuals are better left to the products next to them."""
    return for_core(x) and not torch.is_grad_enabled()


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm: Norm | None = None,
    residual: Residual | None = None,
) -> Tensor:
    """``F.linear(norm(x), weight, bias) + residual.x * residual.scale`` without gradients.

    Args:
        x: (..., K), any floating dtype. weight: (N, K), bias: (N,), of x's dtype.
        norm: over K. residual: (..., N), its scale (N,).
    """
    norm_weight, eps = norm or (None, None)
    y, scale = residual or (None, None)
    return torch.ops.dfformer.norm_linear(x, norm_weight, eps, weight, bias, y, scale, requested_backend(None))


def mlp(
    x: Tensor,
    weight1: Tensor,
    star_relu: tuple[Tensor, Tensor],
    weight2: Tensor,
    bias2: Tensor | None,
    norm: Norm,
    residual_scale: Tensor | None,
) -> Tensor:
    """``mlp(norm(x)) + bias2 + x * residual_scale`` without gradients; see `dfformer_kernels.mlp`; K = N."""
    args = (*norm, weight1, *star_relu, weight2, bias2, residual_scale)
    return torch.ops.dfformer.norm_mlp(x, *args, requested_backend(None))


def norm_mean(x: Tensor, norm: Norm) -> Tensor:
    """The mean (B,K) of ``norm(x)`` over a plane; x (B,H,W,K), any floating dtype."""
    return torch.ops.dfformer.norm_mean(x, *norm, requested_backend(None))


# bfloat16 and weights that do not change: oneDNN's products, by a weight in its layout


def by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether that is faster, and x is not only traced: graphs leave such products to their compiler."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(x) is not Tensor or not is_kept(weight):
        return False
    if not x.is_cpu or not x.dtype == weight.dtype == torch.bfloat16 or x.numel() == 0 or autocast_dtype(x):
        return False
    return X86 and torch._C._get_mkldnn_enabled() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`dfformer_kernels.linear` without gradients."""
    return torch.ops.mkldnn._linear_pointwise(x, packed(weight, _reorder), bias, "none", [], "")


def onednn_mlp(
    x: Tensor, weight1: Tensor, star_relu: tuple[Tensor, Tensor], weight2: Tensor, bias2: Tensor | None
) -> Tensor:
    """`dfformer_kernels.mlp` without gradients, plus ``bias2`` (N,)."""
    rows = rows_of(x)
    y = cpu.empty((len(rows), len(weight2)), x)
    for part in chunks(rows, len(weight1)):
        y[part] = onednn_linear(star_relu_(onednn_linear(rows[part], weight1), *star_relu), weight2, bias2)
    return y.view(*x.shape[:-1], len(weight2))


def _reorder(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACKED_FOR_ROWS)


# The operators


def _norm(x: Tensor, norm_weight: Tensor | None, eps: float | None) -> Tensor:
    return x if eps is None else F.layer_norm(x, x.shape[-1:], norm_weight, eps=eps)


def _add(y: Tensor, residual: Tensor | None, scale: Tensor | None) -> Tensor:
    if residual is None:
        return y
    return residual + y if scale is None else torch.addcmul(y, residual, scale)


def _norm_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    eps: float | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    backend: str | None,
) -> Tensor:
    checks.check_norm_linear(x, norm_weight, eps, weight, bias, residual, residual_scale)
    with without_autocast(x.device):
        if not by_core(x, backend):
            return _add(F.linear(_norm(x, norm_weight, eps), weight, bias), residual, residual_scale)
        norm = None if eps is None else Norm(_dense(norm_weight), eps)
        added = None if residual is None else Residual(rows_of(residual).contiguous(), _dense(residual_scale))
        return cpu.product(rows_of(x), weight, bias, norm, added).view(*x.shape[:-1], len(weight))


def _norm_linear_fake(x: Tensor, norm_weight: Tensor | None, eps: float | None, weight: Tensor, *others: Any) -> Tensor:
    checks.check_norm_linear(x, norm_weight, eps, weight, *others[:-1])
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _norm_mlp(
    x: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    weight1: Tensor,
    scale: Tensor,
    bias: Tensor,
    weight2: Tensor,
    bias2: Tensor | None,
    residual_scale: Tensor | None,
    backend: str | None,
) -> Tensor:
    checks.check_norm_mlp(x, norm_weight, weight1, scale, bias, weight2, bias2, residual_scale)
    with without_autocast(x.device):
        rows = rows_of(x).contiguous()
        if not by_core(x, backend):
            h = star_relu_(F.linear(_norm(rows, norm_weight, eps), weight1), scale, bias, backend)
            return _add(F.linear(h, weight2, bias2), rows, residual_scale).view(x.shape)
        norm, residual = Norm(_dense(norm_weight), eps), Residual(rows, _dense(residual_scale))
        return cpu.mlp(rows, weight1, scale, bias, weight2, bias2, False, norm, residual)[0].view(x.shape)


def _norm_mlp_fake(x: Tensor, norm_weight: Tensor | None, eps: float, *others: Any) -> Tensor:
    checks.check_norm_mlp(x, norm_weight, *others[:-1])
    return x.new_empty(x.shape)


def _norm_mean(x: Tensor, norm_weight: Tensor | None, eps: float, backend: str | None) -> Tensor:
    checks.check_norm_mean(x, norm_weight)
    with without_autocast(x.device):
        if x.numel() and by_core(x, backend):
            return cpu.norm_mean(x.flatten(1, 2), Norm(_dense(norm_weight), eps))
        return _norm(x, norm_weight, eps).mean(dim=(1, 2))


def _norm_mean_fake(x: Tensor, norm_weight: Tensor | None, eps: float, backend: str | None) -> Tensor:
    checks.check_norm_mean(x, norm_weight)
    return x.new_empty((x.shape[0], x.shape[3]))


def _dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


_NORM = "Tensor x, Tensor? norm_weight"
register(
    f"norm_linear({_NORM}, float? eps, Tensor weight, Tensor? bias, Tensor? residual, Tensor? residual_scale, "
    "str? backend) -> Tensor",
    _norm_linear,
    _norm_linear_fake,
)
register(
    f"norm_mlp({_NORM}, float eps, Tensor weight1, Tensor scale, Tensor bias, Tensor weight2, Tensor? bias2, "
    "Tensor? residual_scale, str? backend) -> Tensor",
    _norm_mlp,
    _norm_mlp_fake,
)
register(f"norm_mean({_NORM}, float eps, str? backend) -> Tensor", _norm_mean, _norm_mean_fake)
