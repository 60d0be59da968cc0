"""The ``cufft`` backend: Triton kernels around cuFFT's transforms (torch.fft's without libcufft), for any plane.

Samples lie side by side: planes are (1,H,W,B*C) and spectra (1,H,K,B*C,2), so one transform takes all channels of all
samples. A pass over memory copies ``x`` there, applies StarReLU and converts to float32 on the way; another copies the
result back. Alternatively, if `by_sample` chooses so, each sample is a separate transform. Planes are then (B,H,W,C)
like x and y, and if x has the arithmetic dtype, only StarReLU needs passes.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dfformer_kernels.backend import torch_fft
from dfformer_kernels.backend.cufft import libcufft
from dfformer_kernels.backend.filter_kernels import FilterStep, Gradients, filter_kernels, needed
from dfformer_kernels.problem import KernelBuildError, Problem, empty_like, is_channels_first
from dfformer_kernels.reference import compute_dtype
from dfformer_kernels.warn_once import warn_once

# Assumed bytes that memory moves while another transform is launched: 3 us at the 3.35 TB/s of an H100.
_LAUNCH_BYTES = 10_000_000
_MAX_EXTENT = 2**30  # of H*W and of B*C, which are 32-bit indices in the Triton kernels; offsets are 64-bit


def unavailable_reasons() -> list[str]:
    """Why nothing can run on this backend here; empty if the machine has a GPU and Triton."""
    reasons = [] if torch.cuda.is_available() else ["there is no CUDA or ROCm device"]
    if find_spec("triton") is None:
        reasons.append("the package triton is not installed")
    return reasons


def unsupported_reasons(problem: Problem) -> list[str]:
    """Why it cannot run ``problem``, whose x is on a GPU; empty if it can."""
    shape = problem.shape
    if problem.op.startswith("star_relu"):
        extents = {"elements a channel": math.prod(shape[:-1]), "channels": math.prod(shape[-1:])}
    else:
        extents = {"H*W": shape[1] * shape[2], "B*C": shape[0] * shape[3]}
    return [f"{name} is {n}, above {_MAX_EXTENT}" for name, n in extents.items() if n > _MAX_EXTENT]


def star_relu(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    with torch.cuda.device_of(x):
        _triton().activate(_rows(x), _rows(y), scale, bias)
    return y


def star_relu_backward(grad_y: Tensor, x: Tensor, scale: Tensor, bias: Tensor, needs: Sequence[bool]) -> list[Tensor]:
    with torch.cuda.device_of(x):
        gradients = _triton().activate_backward(_rows(grad_y), _rows(x), scale, needs)
    return needed(gradients, (x, scale, bias), needs)


def by_sample(shape: Sequence[int], dtype: torch.dtype, star_relu: bool, backward: bool) -> bool:
    """Whether each sample of x (B,H,W,C) is a separate transform: it is if that moves fewer bytes, launches included.

    It saves the passes that only copy samples side by side or back: those of x and y, or of grad_y, x and grad_x. With
    StarReLU it saves those of y and grad_y alone, because StarReLU's own passes remain. Each sample beyond the first
    takes two more launches forward, three backward. A single sample is the same either way. Passes that convert 16-bit
    types remain as well.
    """
    B, H, W, C = shape
    if B == 1:
        return True
    if dtype != compute_dtype(dtype) or H * W * C % 2:  # cuFFT requires real arrays to begin at even elements
        return False
    transforms = 3 if backward else 2
    passes = 1 if star_relu else transforms
    return passes * 2 * H * W * C * dtype.itemsize > transforms * _LAUNCH_BYTES


def _filter(step: FilterStep) -> Tensor:
    x, logits, filters, scale, bias, softmax = step
    with torch.cuda.device_of(x):
        X = _spectrum(x, x.dtype, scale, bias, by_sample(x.shape, x.dtype, scale is not None, backward=False))
        _triton().mix(X, x.shape[2], logits, filters.contiguous(), softmax)
        return _samples(_transforms(x.device.type)[1](X, x.shape[2]), x)


def _filter_backward(grad_y: Tensor, step: FilterStep, needs: Sequence[bool]) -> Gradients:
    x, logits, filters, scale, bias, softmax = step
    need_x, need_logits, need_filters, need_scale, need_bias = needs
    need_u, W, filters = need_x or need_scale or need_bias, x.shape[2], filters.contiguous()
    grad_x = grad_logits = grad_filters = grad_scale = grad_bias = None
    with torch.cuda.device_of(x):
        per_sample = by_sample(x.shape, x.dtype, scale is not None, backward=True)
        G = _spectrum(grad_y, x.dtype, None, None, per_sample)
        X = _spectrum(x, x.dtype, scale, bias, per_sample) if need_logits or need_filters else None
        if logits is None:
            grad_filters = _triton().global_mix_backward(G, X, W, filters, (need_u, need_filters))
        else:
            parts = (need_u, need_logits, need_filters)
            grad_logits, grad_filters = _triton().mix_backward(G, X, W, logits, filters, parts, softmax)
        del X
        if need_u:
            grad_u = _transforms(x.device.type)[1](G, W)
            if scale is None or bias is None:
                grad_x = _samples(grad_u, x)
            else:
                planes, of_inputs = _by_channel(grad_u, len(x)), (need_x, need_scale, need_bias)
                gradients = _triton().activate_backward(planes, x.flatten(1, 2), scale, of_inputs)
                grad_x, grad_scale, grad_bias = gradients
    return grad_x, grad_logits, grad_filters, grad_scale, grad_bias


KERNELS: dict[str, Callable[..., Any]] = {
    "star_relu": star_relu,
    "star_relu_backward": star_relu_backward,
    **filter_kernels(_filter, _filter_backward),
}


def _spectrum(x: Tensor, dtype: torch.dtype, scale: Tensor | None, bias: Tensor | None, per_sample: bool) -> Tensor:
    """``rfft2(u)`` with u = x or StarReLU of it, in the dtype of arithmetic on ``dtype``.

    The result is (B,H,K,C,2) if ``per_sample``, else (1,H,K,B*C,2) with samples side by side.
    """
    B, H, W, C = x.shape
    planes = x.flatten(1, 2)  # a view, unless the rows of a plane are not evenly spaced
    if per_sample and scale is None and x.dtype == compute_dtype(dtype) and planes.is_contiguous():
        u = planes.view(x.shape)
    else:
        shape = (B, H, W, C) if per_sample else (1, H, W, B * C)
        u = torch.empty(shape, dtype=compute_dtype(dtype), device=x.device)
        _triton().activate(planes, _by_channel(u, B), scale, bias)
    return _transforms(x.device.type)[0](u)


def _samples(u: Tensor, x: Tensor) -> Tensor:
    """(B,H,W,C) or (1,H,W,B*C) as (B,H,W,C) of x's dtype and memory format."""
    if u.shape == x.shape and u.dtype == x.dtype and not is_channels_first(x):
        return u
    y = empty_like(x)
    _triton().activate(_by_channel(u, x.shape[0]), y.flatten(1, 2))
    return y


def _by_channel(u: Tensor, B: int) -> Tensor:
    """(B,H,W,C) or (1,H,W,B*C) seen as (B,H*W,C)."""
    rows = u.flatten(1, 2)
    return rows if len(u) == B else rows[0].unflatten(1, (B, -1)).transpose(0, 1)


def _rows(x: Tensor) -> Tensor:
    """x of any shape as (1,R,C)."""
    return x.reshape(1, -1, x.shape[-1] if x.dim() else 1)


@cache
def _triton() -> ModuleType:
    try:
        return import_module("dfformer_kernels.backend.cufft.triton_launch")
    except ImportError as error:
        raise KernelBuildError(f"Triton cannot be imported ({error})") from error


@cache
def _transforms(device_type: str) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor, int], Tensor]]:
    """``rfft2`` and ``irfft2``, unscaled: cuFFT's if libcufft can be opened, otherwise torch.fft's, as on ROCm."""
    if device_type == "cuda":
        if not (reasons := libcufft.unavailable_reasons()):
            return libcufft.rfft2, libcufft.irfft2
        if torch.version.hip is None:
            warn_once(f"dfformer_kernels' 'cufft' backend uses torch.fft's transforms: {reasons[0]}")
    return _torch_rfft2, _torch_irfft2


def _rfft2(u: Tensor) -> Tensor:
    return torch.view_as_real(torch.fft.rfft2(u, dim=(1, 2), norm="backward").contiguous())


def _irfft2(Z: Tensor, W: int) -> Tensor:
    # "forward" leaves the scaling to the forward transform: none here.
    z = torch.view_as_complex(Z)
    return torch.fft.irfft2(z, s=(Z.shape[1], W), dim=(1, 2), norm="forward").contiguous()


_torch_rfft2 = partial(torch_fft.run, _rfft2, "rfft2")
_torch_irfft2 = partial(torch_fft.run, _irfft2, "irfft2")
