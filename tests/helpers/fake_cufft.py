"""A libcufft that transforms host memory by the definition, and host memory in a GPU's place.

The library (tests/native/fake_cufft.cpp) knows cuFFT's rules and remembers the first that was broken.
"""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfformer_kernels.backend.cufft import libcufft
from dfformer_kernels.backend.cufft.plans import Plans

DTYPES = [torch.float32, torch.float64]


EXECUTE = {
    (torch.float32, False): "cufftExecR2C",
    (torch.float32, True): "cufftExecC2R",
    (torch.float64, False): "cufftExecD2Z",
    (torch.float64, True): "cufftExecZ2D",
}


class Fake:
    """The fake library's controls, and host memory in a GPU's place."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.library: Any = ctypes.CDLL(str(path))
        for name in ("last_work_area", "last_stream"):
            getattr(self.library, f"fake_cufft_{name}").restype = ctypes.c_void_p
        self.library.fake_cufft_violation.restype = ctypes.c_char_p

    def fail(self, function: str, code: int) -> None:
        self.library.fake_cufft_fail(function.encode(), code)

    def calls(self, function: str) -> int:
        return self.library.fake_cufft_calls(function.encode())

    @property
    def live_plans(self) -> int:
        return self.library.fake_cufft_live_plans()

    def assert_no_violation(self) -> None:
        assert self.library.fake_cufft_violation() == b""


class HostMemory(libcufft.Cuda):
    """Each thread's CPU tensors are on the device and stream it says."""

    device_type = "cpu"

    def __init__(self, fake: Fake) -> None:
        self.fake = fake
        self.here = threading.local()

    def index(self, device: torch.device) -> int:
        return getattr(self.here, "device", 0)

    @contextmanager
    def guard(self, device: torch.device) -> Iterator[None]:
        previous = self.fake.library.fake_cufft_set_device(self.index(device))
        try:
            yield
        finally:
            self.fake.library.fake_cufft_set_device(previous)

    def stream(self, device: torch.device) -> int:
        return getattr(self.here, "stream", 0)


def host_memory() -> HostMemory:
    assert isinstance(libcufft._cuda, HostMemory)
    return libcufft._cuda


def library_plans() -> Plans:
    plans = libcufft._open()
    assert isinstance(plans, Plans)
    return plans


def kept_plans(device: int) -> int:
    return len(library_plans()._recent[device])


def clear_plans(device: torch.device | str = "cpu") -> None:
    """Frees the memory that cuFFT keeps on the device for later transforms, except what captured CUDA graphs use."""
    device = torch.device(device)
    with libcufft._cuda.guard(device):
        library_plans()._recent[libcufft._cuda.index(device)].clear()


def planes(shape: tuple[int, int, int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def spectra(u: Tensor) -> Tensor:
    return torch.view_as_real(torch.fft.rfft2(u.double(), dim=(0, 1))).to(u.dtype).contiguous()


def run_one(dtype: torch.dtype, inverse: bool) -> Tensor:
    u = planes((6, 10, 4), dtype)
    return libcufft.irfft2(spectra(u), 10) if inverse else libcufft.rfft2(u)
