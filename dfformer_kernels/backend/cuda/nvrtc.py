"""CUDA source to running kernels: compiled by NVRTC, kept on disk as cubins, loaded and launched by the driver.

NVRTC and the driver are reached through cuda-bindings, imported at first use. Compiling needs neither a GPU nor a
driver.
"""

import ctypes
import hashlib
import logging
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from typing import Any

import torch

from dfformer_kernels import disk_cache as disk
from dfformer_kernels.device import with_memory_released
from dfformer_kernels.problem import KernelBuildError

_LONGEST_LOG = 4000  # characters of an error: the first mistake explains the others
# What the driver's loading of a kernel returns because of the kernel or the driver. Other errors, such as an illegal
# access of an earlier kernel, only happen to be reported by the call.
_LOADING = ("cuModuleLoadData", "cuModuleGetFunction", "cuFuncSetAttribute")
_NOT_LOADABLE = {
    f"CUDA_ERROR_{name}"
    for name in (
        "INVALID_VALUE",
        "INVALID_IMAGE",
        "NO_BINARY_FOR_GPU",
        "INVALID_PTX",
        "JIT_COMPILER_NOT_FOUND",
        "UNSUPPORTED_PTX_VERSION",
        "JIT_COMPILATION_DISABLED",
        "INVALID_SOURCE",
        "SHARED_OBJECT_SYMBOL_NOT_FOUND",
        "SHARED_OBJECT_INIT_FAILED",
        "NOT_FOUND",
        "NOT_SUPPORTED",
    )
}

_logger = logging.getLogger(__name__)


@cache
def unavailable_reasons() -> tuple[str, ...]:
    """Why nothing can be compiled here; empty if NVRTC answers."""
    try:
        version()
    except (ImportError, OSError, RuntimeError) as error:
        first_line = str(error).strip().partition("\n")[0]
        return (f"NVRTC cannot be reached through cuda-bindings ({first_line}); pip install cuda-bindings",)
    return ()


def version() -> tuple[int, int]:
    return _checked("nvrtcVersion", _nvrtc().nvrtcVersion())


def compile_cubin(sources: Mapping[str, str], options: Sequence[str], arch: str) -> tuple[bytes, str]:
    """The cubin of a program and the compiler's log.

    Args:
        sources: text by file name; the first is the program, the others are what it includes.
        options: further NVRTC options.
        arch: such as ``"sm_90"``.

    Raises:
        KernelBuildError: with the compiler's log.
    """
    nvrtc = _nvrtc()
    (name, text), *headers = ((name.encode(), text.encode()) for name, text in sources.items())
    program = _checked(
        "nvrtcCreateProgram",
        nvrtc.nvrtcCreateProgram(text, name, len(headers), [h for _, h in headers], [n for n, _ in headers]),
    )
    try:
        arguments = [option.encode() for option in (f"--gpu-architecture={arch}", *options)]
        (error,) = nvrtc.nvrtcCompileProgram(program, len(arguments), arguments)
        log = _text_of(program)
        if error.name == "NVRTC_ERROR_OUT_OF_MEMORY":
            raise MemoryError(f"NVRTC ran out of host memory for {name.decode()} on {arch}")
        if error != 0:
            raise KernelBuildError(f"NVRTC returned {error.name} for {name.decode()} on {arch}:\n{log[:_LONGEST_LOG]}")
        cubin = bytearray(_checked("nvrtcGetCUBINSize", nvrtc.nvrtcGetCUBINSize(program)))
        _checked("nvrtcGetCUBIN", nvrtc.nvrtcGetCUBIN(program, cubin))
        return bytes(cubin), log
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def cached_cubin(sources: Mapping[str, str], options: Sequence[str], arch: str) -> bytes:
    """`compile_cubin`, once for all processes: kept on disk under a hash of everything it depends on."""
    parts = [*(part for item in sources.items() for part in item), *options, arch, repr(version())]
    lengths = ",".join(str(len(part)) for part in parts)
    name = hashlib.sha256("\0".join([lengths, *parts]).encode()).hexdigest() + ".cubin"
    kept = disk.read(name)
    if kept is not None and kept[:_DIGEST_SIZE] == _digest(kept[_DIGEST_SIZE:]):
        return kept[_DIGEST_SIZE:]
    _announce()
    cubin, _ = compile_cubin(sources, options, arch)
    disk.write(name, _digest(cubin) + cubin)
    return cubin


def load(cubin: bytes, name: str, device: int, threads: int, shared_bytes: int) -> "Kernel":
    """The kernel, with torch's unused memory released if the driver needs it.

    Raises KernelBuildError where it cannot be loaded, torch.OutOfMemoryError where memory is lacking all the same.
    """
    return with_memory_released(lambda: Kernel(cubin, name, device, threads, shared_bytes))


class Kernel:
    """A kernel of a cubin on one device, ready to be launched, in CUDA graph capture too.

    ``shared_bytes`` of dynamic shared memory may be all that the device has for one CTA.
    """

    def __init__(self, cubin: bytes, name: str, device: int, threads: int, shared_bytes: int) -> None:
        self._driver = driver = _driver()
        self._device, self._threads, self._shared_bytes = device, threads, shared_bytes
        handle = _checked("cuDeviceGet", driver.cuDeviceGet(device))
        # The context that torch works in. It is never released: torch's lives as long.
        self._context = _checked("cuDevicePrimaryCtxRetain", driver.cuDevicePrimaryCtxRetain(handle))
        self._enter()
        self._module = _checked("cuModuleLoadData", driver.cuModuleLoadData(cubin))
        self._function = _checked("cuModuleGetFunction", driver.cuModuleGetFunction(self._module, name.encode()))
        # This also ends lazy loading, which could not happen during capture.
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked("cuFuncSetAttribute", driver.cuFuncSetAttribute(self._function, attribute, shared_bytes))

    def launch(self, ctas: int, *arguments: int) -> None:
        """On torch's current stream of the device, which must be torch's current device.

        The kernel's parameters must all be pointers or 64-bit integers. Raises torch.OutOfMemoryError where the driver
        lacks memory for it, even after torch's unused memory has been released.
        """
        self._enter()
        values = (ctypes.c_int64 * len(arguments))(*arguments)
        begin = ctypes.addressof(values)
        pointers = (ctypes.c_void_p * len(arguments))(*range(begin, begin + ctypes.sizeof(values), 8))
        with_memory_released(lambda: self._launch(ctas, ctypes.addressof(pointers)))

    def _launch(self, ctas: int, pointers: int) -> None:
        stream = torch.cuda.current_stream(self._device).cuda_stream
        result = self._driver.cuLaunchKernel(
            self._function, ctas, 1, 1, self._threads, 1, 1, self._shared_bytes, stream, pointers, 0
        )
        _checked("cuLaunchKernel", result)

    def _enter(self) -> None:
        # torch makes its context current on a thread at that thread's first call of the runtime, which may be later.
        _checked("cuCtxSetCurrent", self._driver.cuCtxSetCurrent(self._context))


def device_attribute(device: int, name: str) -> int:
    """The driver's ``CU_DEVICE_ATTRIBUTE_<name>`` of the device torch calls ``cuda:<device>``."""
    driver = _driver()
    attribute = getattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
    handle = _checked("cuDeviceGet", driver.cuDeviceGet(device))
    return _checked("cuDeviceGetAttribute", driver.cuDeviceGetAttribute(attribute, handle))


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


_DIGEST_SIZE = len(_digest(b""))


def _nvrtc() -> Any:
    return import_module("cuda.bindings.nvrtc")


@cache
def _driver() -> Any:
    driver = import_module("cuda.bindings.driver")
    _checked("cuInit", driver.cuInit(0))
    return driver


def _checked(call: str, result: tuple[Any, ...]) -> Any:
    """What a call of cuda-bindings returned beside its error code: one value, several as a tuple, or None."""
    error, *values = result
    if error != 0:
        raise _error(call, error.name)
    return values[0] if len(values) == 1 else tuple(values) or None


def _error(call: str, code: str) -> RuntimeError:
    message = f"{call} returned {code}"
    if code == "CUDA_ERROR_OUT_OF_MEMORY":
        return torch.OutOfMemoryError(message)
    return (KernelBuildError if call in _LOADING and code in _NOT_LOADABLE else RuntimeError)(message)


def _text_of(program: Any) -> str:
    nvrtc = _nvrtc()
    # Not bytes, as one sees it done: an empty log would overwrite Python's only bytes object of that one byte.
    log = bytearray(_checked("nvrtcGetProgramLogSize", nvrtc.nvrtcGetProgramLogSize(program)))
    _checked("nvrtcGetProgramLog", nvrtc.nvrtcGetProgramLog(program, log))
    return log.rstrip(b"\0\n").decode(errors="replace")


@cache
def _announce() -> None:
    _logger.warning(
        "dfformer_kernels compiles CUDA kernels, some seconds each, once for this machine: kept in %s", disk.directory()
    )
