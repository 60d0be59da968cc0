"""Launches the Triton kernels on torch tensors: chooses tiles and grids, allocates slots, and compiles."""

import subprocess
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfformer_kernels.backend.cufft import triton_kernels as kernels
from dfformer_kernels.device import Prepared, with_memory_released
from dfformer_kernels.problem import KernelBuildError
from dfformer_kernels.reference import compute_dtype

_PLANE_TILE = 2048  # elements of a program
_SPECTRUM_TILE = {4: 1024, 8: 256}  # by bytes of an element: the most without spilled registers
_WIDTH = 128  # channels of a tile, if there are as many
_HEIGHT = 64  # most rows of a spectrum's tile: long sums in float32 would lose digits
_WARPS = 8  # of a program: a thread needs half as many registers as with Triton's default of 4, so none spill
_PROGRAMS = 1024  # enough to occupy any GPU

_prepared = Prepared()
# The errors of compiling and loading: of Triton's own code, of LLVM and ptxas, and of a missing C compiler.
_UNBUILDABLE = (
    *(triton.TritonError, subprocess.SubprocessError),
    *(RuntimeError, ValueError, AssertionError, OSError, ImportError),
)


def _launch(kernel: Any, grid: tuple[int, ...], *args: Any, warps: int = _WARPS) -> None:
    """``kernel[grid](*args)`` on the current stream of args' device, which is the current device.

    Raises:
        KernelBuildError: the kernel cannot be compiled or loaded.
        torch.OutOfMemoryError: the driver has too little memory to load it.
        RuntimeError: it would have to be compiled or loaded during capture.
    """
    # Everything that Triton may specialise a kernel on, and more: the key holds every integer's value.
    key = (kernel.__name__, *(_kind(a) if isinstance(a, Tensor) else a for a in args))
    if new := _prepared.is_new(key, f"a variant of the Triton kernel {kernel.__name__}"):
        _build(kernel, grid, args, warps)
    kernel[grid](*args, num_warps=warps)
    if new:
        _prepared.add(key)


def _kind(t: Tensor) -> tuple[Any, ...]:
    return t.device, t.dtype, t.data_ptr() % 16, t.untyped_storage().nbytes() < 2**31


def _build(kernel: Any, grid: tuple[int, ...], args: Sequence[Any], warps: int) -> None:
    try:
        compiled = kernel.warmup(*args, grid=grid, num_warps=warps)
        if compiled is not None:  # it is None in Triton's interpreter
            with_memory_released(lambda: _load(compiled))
    except _UNBUILDABLE as error:
        if isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError) or _of_driver(error):
            raise
        raise KernelBuildError(f"Triton's {kernel.__name__}: {type(error).__name__}: {error}") from error


def _load(compiled: Any) -> None:
    try:
        compiled[1, 1, 1]  # loads it, without a launch
    except RuntimeError as error:
        if _of_driver(error) and "out of memory" in str(error):
            raise torch.OutOfMemoryError(str(error)) from error
        raise


def _of_driver(error: BaseException) -> bool:
    """Whether Triton's error reports an error of the driver."""
    return str(error).startswith("Triton Error [")


def activate(x: Tensor, y: Tensor, scale: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """``y = scale * relu(x)^2 + bias``, or ``y = x`` where scale and bias are None; returns y.

    ``x`` and ``y`` are (B,R,C) with any strides, each of any of the four dtypes; ``scale``, ``bias`` one element.
    """
    B, rows, C = x.shape
    tile, grid = _tiles(rows, B * C, _PLANE_TILE, _PLANE_TILE)
    _launch(
        kernels.activate_kernel, grid, x, y, scale, bias, rows, B * C, C, *x.stride(), *y.stride(), _compute(x), *tile
    )
    return y


def activate_backward(
    grad_y: Tensor, x: Tensor, scale: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``grad_x = 2 scale relu(x) grad_y``, ``grad_scale = sum(relu(x)^2 grad_y)``, ``grad_bias = sum(grad_y)``.

    ``grad_y`` and ``x`` are (B,R,C) with any strides. ``needs`` is for (x, scale, bias). grad_x is None if it is
    not needed, and so are both sums, which are float64, if neither is.
    """
    B, rows, C = x.shape
    need_x, *need_scalars = needs
    tile, grid = _tiles(rows, B * C, _PLANE_TILE, _PLANE_TILE)
    grad_x = torch.empty_like(x) if need_x else None
    slots = torch.empty((grid[0], 2), dtype=torch.float64, device=x.device) if any(need_scalars) else None
    strides = (*grad_y.stride(), *x.stride(), *(grad_x if grad_x is not None else x).stride())
    arguments = (grad_y, x, scale, grad_x, slots, rows, B * C, C, *strides, _compute(x), *tile)
    _launch(kernels.activate_backward_kernel, grid, *arguments)
    grad_scale, grad_bias = (None, None) if slots is None else slots.sum(0).unbind()
    return grad_x, grad_scale, grad_bias


def mix(X: Tensor, W: int, logits: Tensor | None, filters: Tensor, softmax: bool = True) -> None:
    """``X *= M / (HW)`` in place; M is ``softmax(logits) @ filters``, ``logits @ filters``, or filters without logits.

    ``X`` is (S,H,K,width,2) with S width = B*C, ``logits`` (B,F,C) with any strides and dtype, ``filters`` the
    contiguous basis (H,K,F,2), weight (H,K,C,2) or weights (B,H,K,C,2).
    """
    S, H, K, width, _ = X.shape
    N = S * width
    tile, grid = _spectrum_tiles(X, N)
    sizes = (H, W, H * K, N)
    if logits is None:
        of_weight = (filters.shape[-2], width, _sample_stride(filters))
        _launch(kernels.global_mix_kernel, grid, X, filters, *sizes, *of_weight, _compute(X), *tile)
        return
    _, F, C = logits.shape
    routing = (C, width, *logits.stride(), F, softmax)
    _launch(kernels.mix_kernel, grid, X, logits, filters, *sizes, *routing, _compute(X), *tile)


def _sample_stride(weight: Tensor) -> int:
    """The stride from one sample's weight to the next, in complex numbers; 0 if all samples share a weight."""
    return weight[0].numel() // 2 if weight.dim() == 5 else 0


def mix_backward(
    G: Tensor, X: Tensor | None, W: int, logits: Tensor, basis: Tensor, needs: Sequence[bool], softmax: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """``G *= conj(M) / (HW)`` in place, and the gradients of logits and basis from the original G and X.

    ``G`` and ``X`` are (S,H,K,width,2) with S width = B*C. ``needs`` is for (G, logits, basis). X may be None if only G
    is needed. A gradient that is not needed is None.
    """
    S, H, K, width, _ = G.shape
    N = S * width
    _, F, C = logits.shape
    need_G, need_logits, need_basis = needs
    tile, grid = _spectrum_tiles(G, N)
    r_slots = _empty(G, triton.cdiv(H * K, tile[0]), F, N) if need_logits else None
    basis_slots = _empty(G, triton.cdiv(N, tile[1]), H, K, F, 2) if need_basis else None
    arguments = (H, W, H * K, N, C, width, *logits.stride(), F, softmax, need_G, _compute(G), *tile)
    _launch(kernels.mix_backward_kernel, grid, G, X, logits, basis, r_slots, basis_slots, *arguments)
    grad_logits = None
    if r_slots is not None:
        grad_r = r_slots.sum(0, dtype=torch.float64)  # float64: softmax's gradient takes differences
        by_sample = grad_r.unflatten(1, (-1, C)).transpose(0, 1)  # (B,F,C)
        grad_logits = _softmax_backward(grad_r, logits) if softmax else by_sample
    return grad_logits, None if basis_slots is None else basis_slots.sum(0)


def _softmax_backward(grad_r: Tensor, logits: Tensor) -> Tensor:
    F, N = grad_r.shape
    grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    strides = (*logits.stride(), *grad_logits.stride())
    arguments = (grad_r, logits, grad_logits, N, logits.shape[2], *strides, F, tl.float64, _WIDTH)
    _launch(kernels.softmax_backward_kernel, (triton.cdiv(N, _WIDTH),), *arguments, warps=4)
    return grad_logits


def global_mix_backward(G: Tensor, X: Tensor | None, W: int, weight: Tensor, needs: Sequence[bool]) -> Tensor | None:
    """``G *= conj(weight) / (HW)`` in place, and weight's gradient from the original G and X.

    ``G`` and ``X`` are (S,H,K,width,2) with S width = B*C. ``needs`` is for (G, weight). X may be None if only G is
    needed. The gradient is None if it is not needed.
    """
    S, H, K, width, _ = G.shape
    C = weight.shape[-2]
    # Samples with weights of their own count as the channels of a single sample.
    B, channels = (1, S * width) if weight.dim() == 5 else (S * width // C, C)
    need_G, need_weight = needs
    tile, (tiles,) = _spectrum_tiles(G, channels)
    samples = triton.cdiv(B, min(B, triton.cdiv(_PROGRAMS, tiles), 65535))
    slices = triton.cdiv(B, samples)
    slots = _empty(G, slices, *weight.shape) if need_weight else None
    sizes = (H, W, H * K, B, channels, C, width, _sample_stride(weight), samples)
    arguments = (G, X, weight, slots, *sizes, need_G, _compute(G), *tile)
    _launch(kernels.global_mix_backward_kernel, (tiles, slices), *arguments)
    return None if slots is None else slots.sum(0)


def _spectrum_tiles(spectrum: Tensor, channels: int) -> tuple[tuple[int, int], tuple[int]]:
    _, H, K, _, _ = spectrum.shape
    return _tiles(H * K, channels, _SPECTRUM_TILE[spectrum.element_size()], _HEIGHT)


def _tiles(rows: int, N: int, elements: int, most_rows: int) -> tuple[tuple[int, int], tuple[int]]:
    """(rows, channels) of a tile, and the grid. They, and so the order of sums, depend only on the problem."""
    channels = min(triton.next_power_of_2(N), _WIDTH)
    height = min(triton.next_power_of_2(rows), elements // channels, most_rows)
    return (height, channels), (triton.cdiv(rows, height) * triton.cdiv(N, channels),)


def _empty(like: Tensor, *shape: int) -> Tensor:
    """An empty tensor for sums, with the dtype of arithmetic on ``like``."""
    return torch.empty(shape, dtype=compute_dtype(like.dtype), device=like.device)


def _compute(t: Tensor) -> tl.dtype:
    return tl.float64 if t.dtype == torch.float64 else tl.float32
