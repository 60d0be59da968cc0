"""cuFFT's 2-D real transforms: unscaled in both directions, of any size.

N planes lie side by side, with N fastest. Real planes are (H,W,N), and their spectra (H,K,N,2) with K = W//2 + 1 and
real and imaginary parts last. One sample of a channels-last tensor is such an array (N = C). If there are several
arrays, each is a separate transform.
"""

import math
from contextlib import AbstractContextManager
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from dfformer_kernels.backend.cufft.plans import DTYPES, Plans, PlanSpec
from dfformer_kernels.device import with_memory_released

_SONAMES = {"12": "libcufft.so.11", "13": "libcufft.so.12"}  # by torch's major version of CUDA


class Cuda:
    """The device that transforms run on; tests replace it by host memory."""

    device_type = "cuda"

    def index(self, device: torch.device) -> int:
        return device.index

    def guard(self, device: torch.device) -> AbstractContextManager[object]:
        return torch.cuda.device(device)

    def stream(self, device: torch.device) -> int:
        return torch.cuda.current_stream(device).cuda_stream


_cuda = Cuda()


def unavailable_reasons() -> list[str]:
    """Why transforms cannot run here; empty if libcufft could be opened. Does not check for a device."""
    plans = _open()
    return [plans] if isinstance(plans, str) else []


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
    """The last check before the library trusts a pointer."""
    readable = t.numel() > 0 and t.is_contiguous() and not t.is_neg()
    if not (fits and readable and t.dtype in DTYPES and t.device.type == _cuda.device_type):
        raise ValueError(
            f"libcufft: {name}: expected contiguous {shape} float32 or float64 on a {_cuda.device_type} device, got "
            f"{t.dtype} {tuple(t.shape)} with strides {t.stride()} on {t.device}"
        )


def _transform(source: Tensor, result: Tensor, shape: tuple[int, int, int], inverse: bool) -> Tensor:
    plans = _open()
    if isinstance(plans, str):
        raise RuntimeError(plans)
    device = source.device
    count = (result if inverse else source).numel() // math.prod(shape)
    if count > 1 and math.prod(shape) % 2:
        raise ValueError(f"libcufft: of {count} real arrays {shape} every second one begins at an odd element")
    if source.data_ptr() % (2 * source.itemsize):  # cuFFT requires the alignment of complex numbers for real arrays
        source = source.clone()
    with _cuda.guard(device):
        _run(plans, PlanSpec(_cuda.index(device), shape, source.dtype, inverse), source, result, count)
    return result


def _run(plans: Plans, spec: PlanSpec, source: Tensor, result: Tensor, count: int) -> None:
    """Transforms ``count`` arrays. A plan that is no longer kept is destroyed on return: its device is current."""
    plan = with_memory_released(partial(plans.get, spec))
    workspace = source.new_empty(plan.workspace_bytes, dtype=torch.uint8)
    buffers = {"workspace": workspace.data_ptr(), "stream": _cuda.stream(source.device)}
    for i in range(count):
        arrays = (t.data_ptr() + i * t.nbytes // count for t in (source, result))
        run = partial(plan.run, *arrays, **buffers)
        # A failed inverse is not repeated, because it may have overwritten its input.
        run() if spec.inverse else with_memory_released(run)


@cache
def _open() -> Plans | str:
    """The plans of the libcufft that torch uses; the reason if it cannot be opened."""
    if torch.version.cuda is None:
        return "this torch is not built for CUDA, which libcufft comes with"
    major = torch.version.cuda.split(".")[0]
    if major not in _SONAMES:
        return f"which libcufft belongs to CUDA {major} is not known, only to CUDA {' and '.join(_SONAMES)}"
    errors = []
    for path in _candidates(_SONAMES[major]):
        try:
            return Plans(path)
        except (OSError, AttributeError) as error:
            errors.append(str(error))
    return f"libcufft cannot be opened: {', '.join(errors)}"


def _candidates(soname: str) -> list[str]:
    """The libraries to try, in order: by name, torch's loaded copy or the system's; then the one of a wheel."""
    spec = find_spec("nvidia")
    folders = (spec.submodule_search_locations or []) if spec else []
    return [soname, *(str(path) for folder in folders for path in sorted(Path(folder).glob(f"*/lib/{soname}")))]
