"""cuFFT's 2-D real transforms through the compiled core: unscaled in both directions, of any size.

N planes lie side by side, with N fastest. Real planes are (H,W,N), and their spectra (H,K,N,2) with K = W//2 + 1 and
real and imaginary parts last. One sample of a channels-last tensor is such an array (N = C). If there are several
arrays, each is a separate transform.
"""

import math
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from dfformer_kernels.backends import cpu
from dfformer_kernels.device import with_memory_released
from dfformer_kernels.problem import KernelBuildError

T = TypeVar("T")

_DTYPE_CODES = {torch.float32: 0, torch.float64: 1}  # as in csrc/dynamic_filter.h
_SONAMES = {"12": "libcufft.so.11", "13": "libcufft.so.12"}  # by torch's major version of CUDA


# cuFFT's results that mean a lack of device memory, and those of planning that are the fault of the library or plan.
# A call may also report others that it did not cause, such as an illegal access of an earlier kernel.
_NO_MEMORY = ("CUFFT_ALLOC_FAILED", "CUFFT_INTERNAL_ERROR")
_NO_PLAN = (
    *("CUFFT_INVALID_SIZE", "CUFFT_SETUP_FAILED", "CUFFT_NOT_IMPLEMENTED", "CUFFT_LICENSE_ERROR"),
    *("CUFFT_NOT_SUPPORTED", "CUFFT_MISSING_DEPENDENCY", "CUFFT_NVRTC_FAILURE", "CUFFT_NVJITLINK_FAILURE"),
)


class Cuda:
    """The device that transforms run on; tests replace it by host memory."""

    device_type = "cuda"

    def index(self, device: torch.device) -> int:
        return device.index

    def guard(self, device: torch.device) -> AbstractContextManager[object]:
        return torch.cuda.device(device)

    def stream(self, device: torch.device) -> int:
        return torch.cuda.current_stream(device).cuda_stream

    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()


_cuda = Cuda()


def unavailable_reasons() -> list[str]:
    """Why transforms cannot run here; empty if libcufft could be opened. Does not check for a device."""
    return list(_open())


def rfft2(u: Tensor) -> Tensor:
    """``Z[h,k,n] = sum_pq u[p,q,n] exp(-2 pi i (h p / H + k q / W))`` on the device's current stream.

    Args:
        u: (...,H,W,N) float32 or float64, contiguous, on a CUDA device. It is copied if it is not aligned to two
            elements. H*W*N must be even if there are several arrays.

    Returns:
        (...,H,K,N,2), K = W//2 + 1, of u's dtype.

    Raises:
        ValueError: for any other u.
        torch.OutOfMemoryError: if memory is short even after torch's unused memory was released.
        KernelBuildError: if the transform cannot be planned.
        RuntimeError: if libcufft is missing or returns another error, which is named, or if the transform would have
            to be planned while a CUDA graph is captured.
    """
    _check("u", u, "(...,H,W,N)", u.dim() >= 3)
    *several, H, W, N = u.shape
    return _transform(u, u.new_empty((*several, H, W // 2 + 1, N, 2)), (H, W, N), inverse=False)


def irfft2(Z: Tensor, W: int) -> Tensor:
    """``u[p,q,n] = sum_hk Z[h,k,n] exp(2 pi i (h p / H + k q / W))`` over all W frequencies k, on the current stream.

    Frequencies beyond K are the conjugates of ``Z[-h,-k,n]``. If columns k = 0 and k = W/2 are not self-conjugate, the
    result depends on the library.

    Args:
        Z: (...,H,K,N,2), K = W//2 + 1, as `rfft2` returns it. **Overwritten.**
        W: width of the planes.

    Returns:
        (...,H,W,N) of Z's dtype: H*W times the planes that `rfft2` made Z from.

    Raises:
        As `rfft2`.
    """
    fits = W > 0 and Z.dim() >= 4 and Z.shape[-3] == W // 2 + 1 and Z.shape[-1] == 2
    _check("Z", Z, f"(...,H,K,N,2), K = {W}//2 + 1,", fits)
    *several, H, _, N, _ = Z.shape
    return _transform(Z, Z.new_empty((*several, H, W, N)), (H, W, N), inverse=True)


def _check(name: str, t: Tensor, shape: str, fits: bool) -> None:
    """The last check before the core trusts a pointer."""
    dense = t.numel() > 0 and t.is_contiguous() and not t.is_neg()
    if not (fits and dense and t.dtype in _DTYPE_CODES and t.device.type == _cuda.device_type):
        raise ValueError(
            f"libcufft: {name} must be contiguous {shape} float32 or float64 on a {_cuda.device_type} device, got "
            f"{t.dtype} {tuple(t.shape)} with strides {t.stride()} on {t.device}"
        )


def _transform(source: Tensor, result: Tensor, shape: tuple[int, int, int], inverse: bool) -> Tensor:
    if reasons := unavailable_reasons():
        raise RuntimeError("; ".join(reasons))
    core, device = cpu.core(), source.device
    count = (result if inverse else source).numel() // math.prod(shape)
    if count > 1 and math.prod(shape) % 2:
        raise ValueError(f"libcufft: of {count} real arrays {shape} every second one begins at an odd element")
    if source.data_ptr() % (2 * source.itemsize):  # cuFFT requires the alignment of complex numbers for real arrays
        source = source.clone()
    with _cuda.guard(device):
        transform = (_cuda.index(device), shape, _DTYPE_CODES[source.dtype], inverse, _cuda.capturing())
        plan = partial(_called, core.cufft_plan, *transform, no_plan=_NO_PLAN)
        workspace = source.new_empty(with_memory_released(plan), dtype=torch.uint8)
        for i in range(count):
            buffers = (
                source.data_ptr() + i * source.nbytes // count,
                result.data_ptr() + i * result.nbytes // count,
                workspace.data_ptr(),
                workspace.numel(),
                _cuda.stream(device),
            )
            run = partial(_called, core.cufft_run, *transform, *buffers)
            # A failed inverse is not repeated, because it may have overwritten its input.
            run() if inverse else with_memory_released(run)
    return result


def _called(call: Callable[..., T], *args: object, no_plan: tuple[str, ...] = ()) -> T:
    """``call(*args)`` of the core. Its error names cuFFT's result; results in ``no_plan`` raise KernelBuildError."""
    try:
        return call(*args)
    except RuntimeError as error:
        found = re.search(r" returned (CUFFT_\w+) for ", str(error))
        code = found[1] if found else ""
        if code in _NO_MEMORY:
            raise torch.OutOfMemoryError(str(error)) from error
        if code in no_plan:
            raise KernelBuildError(str(error)) from error
        raise


@cache
def _open() -> tuple[str, ...]:
    """Opens libcufft; returns the reasons if that fails."""
    if reasons := cpu.unavailable_reasons():
        return tuple(reasons)
    if torch.version.cuda is None:
        return ("this torch is not built for CUDA, which libcufft comes with",)
    major = torch.version.cuda.split(".")[0]
    if major not in _SONAMES:
        return (f"which libcufft belongs to CUDA {major} is not known, only to CUDA {' and '.join(_SONAMES)}",)
    errors = []
    for path in _candidates(_SONAMES[major]):
        try:
            cpu.core().cufft_open(path)
        except RuntimeError as error:
            errors.append(str(error))
        else:
            return ()
    return (f"libcufft cannot be opened: {', '.join(errors)}",)


def _candidates(soname: str) -> list[str]:
    """The libraries to try, in order: by name, torch's loaded copy or the system's; then the one of a wheel."""
    spec = find_spec("nvidia")
    folders = (spec.submodule_search_locations or []) if spec else []
    return [soname, *(str(path) for folder in folders for path in sorted(Path(folder).glob(f"*/lib/{soname}")))]
