"""Linear layers by the library that is fast on this processor.

PyTorch's x86 builds send float32 products to MKL, which runs at about half its rate on processors that Intel did not
make. oneDNN does not, and a 1x1 convolution of a channels-last view is PyTorch's public way to it. So on such a
processor an ordinary float32 product is that convolution; everything else is ``F.linear``.
"""

import platform
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn import grad as gradients_of

_TENSORS = (Tensor, nn.Parameter)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear(x, weight, bias)``, on the fastest library for this processor.

    Args:
        x: (..., K), any floating dtype.
        weight: (N, K), of x's dtype; under autocast, of any.
        bias: (N,), likewise, or None.

    Returns:
        (..., N). Saves ``x`` and ``weight`` for backward.

    Raises:
        RuntimeError: what ``F.linear`` raises for shapes, dtypes or devices that do not go together.
    """
    if not prefers_convolution(x, weight):
        return F.linear(x, weight, bias)
    y = F.conv2d(_as_image(x), weight[:, :, None, None], bias)  # (1,N,M,1)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], weight.shape[0])


def linear_backward(grad_y: Tensor, x: Tensor, weight: Tensor, needs: Sequence[bool]) -> list[Tensor]:
    """The gradients of ``linear`` without bias that ``needs`` asks for, of (x, weight).

    ``grad_y`` (M,N), ``x`` (M,K), ``weight`` (N,K).
    """
    need_x, need_weight = needs
    if not prefers_convolution(x, weight):
        return ([grad_y @ weight] if need_x else []) + ([grad_y.t() @ x] if need_weight else [])
    image, grad, kernel = _as_image(x), _as_image(grad_y), weight[:, :, None, None]
    gradients = []
    if need_x:
        gradients.append(gradients_of.conv2d_input(image.shape, kernel, grad).permute(0, 2, 3, 1).reshape(x.shape))
    if need_weight:
        gradients.append(gradients_of.conv2d_weight(image, kernel.shape, grad).reshape(weight.shape))
    return gradients


def prefers_convolution(x: Tensor, weight: Tensor) -> bool:
    """Whether ``linear`` of these tensors is a convolution by oneDNN here."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not mkl_is_slow():
        return False
    return (
        type(x) in _TENSORS
        and type(weight) in _TENSORS
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.layout == weight.layout == torch.strided
        and weight.dim() == 2
        and x.dim() > 0
        and x.shape[-1] == weight.shape[1]
        and x.numel() > 0
        and weight.numel() > 0
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled("cpu")
    )


@cache
def mkl_is_slow() -> bool:
    """Whether this is an x86 processor of another maker than Intel, with oneDNN in this build of torch."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return x86 and torch.backends.mkldnn.is_available() and "GenuineIntel" not in _processor()


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")  # Linux
    return cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.is_file() else platform.processor()


def _as_image(rows: Tensor) -> Tensor:
    """(...,K) as the channels-last view (1,K,M,1)."""
    K = rows.shape[-1]
    return rows.reshape(1, -1, 1, K).permute(0, 3, 1, 2)
