"""The plans of one libcufft, called through ctypes: made once for each kind of transform and kept.

Nothing of CUDA is needed to load this module. ctypes releases the GIL during a call.
"""

import ctypes
import threading
import weakref
from collections import OrderedDict, defaultdict
from functools import partial
from typing import NamedTuple

import torch

from dfformer_kernels import device
from dfformer_kernels.problem import KernelBuildError

PLANS_PER_DEVICE = 64  # those used last

_SIZE, _POINTER, _PLAN = ctypes.c_longlong, ctypes.c_void_p, ctypes.c_int
_SIZES = ctypes.POINTER(_SIZE)
_EXECUTE = {  # by dtype and inverse, with the cufftType
    (torch.float32, False): ("cufftExecR2C", 0x2A),
    (torch.float32, True): ("cufftExecC2R", 0x2C),
    (torch.float64, False): ("cufftExecD2Z", 0x6A),
    (torch.float64, True): ("cufftExecZ2D", 0x6C),
}
DTYPES = tuple(dict.fromkeys(dtype for dtype, _ in _EXECUTE))
_PLANNING = ("cufftCreate", "cufftSetAutoAllocation", "cufftMakePlanMany64")
_LAYOUT = (_SIZES, _SIZE, _SIZE)  # sizes, stride and distance of what a plan reads or writes
_FUNCTIONS = {
    "cufftCreate": (ctypes.POINTER(_PLAN),),
    "cufftDestroy": (_PLAN,),
    "cufftSetAutoAllocation": (_PLAN, ctypes.c_int),
    "cufftMakePlanMany64": (
        *(_PLAN, ctypes.c_int, _SIZES, *_LAYOUT, *_LAYOUT),
        *(ctypes.c_int, _SIZE, ctypes.POINTER(ctypes.c_size_t)),
    ),
    "cufftSetWorkArea": (_PLAN, _POINTER),
    "cufftSetStream": (_PLAN, _POINTER),
    **{name: (_PLAN, _POINTER, _POINTER) for name, _ in _EXECUTE.values()},
}

# cufftResult. Codes 10, 12 and 15 are those of cuFFT before version 12.
_RESULTS = (
    *("SUCCESS", "INVALID_PLAN", "ALLOC_FAILED", "INVALID_TYPE", "INVALID_VALUE", "INTERNAL_ERROR", "EXEC_FAILED"),
    *("SETUP_FAILED", "INVALID_SIZE", "UNALIGNED_DATA", "INCOMPLETE_PARAMETER_LIST", "INVALID_DEVICE", "PARSE_ERROR"),
    *("NO_WORKSPACE", "NOT_IMPLEMENTED", "LICENSE_ERROR", "NOT_SUPPORTED", "MISSING_DEPENDENCY", "NVRTC_FAILURE"),
    *("NVJITLINK_FAILURE", "NVSHMEM_FAILURE"),
)
# Results of planning that are the fault of the library or plan. A call may also report others that it did not cause,
# such as an illegal access of an earlier kernel.
_NO_PLAN = (
    *("SETUP_FAILED", "INVALID_SIZE", "NOT_IMPLEMENTED", "LICENSE_ERROR", "NOT_SUPPORTED", "MISSING_DEPENDENCY"),
    *("NVRTC_FAILURE", "NVJITLINK_FAILURE"),
)


class PlanSpec(NamedTuple):
    """What a plan computes: rfft2 of (H,W,N) planes of ``dtype`` to (H,K,N) complex, or the inverse, on one device."""

    device: int
    shape: tuple[int, int, int]  # (H,W,N)
    dtype: torch.dtype
    inverse: bool

    def __str__(self) -> str:
        H, W, N = self.shape
        kind, dtype = "irfft2" if self.inverse else "rfft2", str(self.dtype).removeprefix("torch.")
        return f"{kind} of {dtype} {H}x{W} planes, N={N}, on device {self.device}"


def _load(path: str) -> ctypes.CDLL:
    """libcufft. Raises OSError if the library cannot be loaded, AttributeError if it is another one."""
    library = ctypes.CDLL(path)
    for name, types in _FUNCTIONS.items():
        if not hasattr(library, name):
            raise AttributeError(f"{path} has no function {name}")
        getattr(library, name).argtypes = types
    return library


def _call(library: ctypes.CDLL, spec: PlanSpec, name: str, *args: object) -> None:
    """Raises RuntimeError if the function returns an error, which the class tells from others."""
    if (code := getattr(library, name)(*args)) == 0:
        return
    result = _RESULTS[code] if 0 < code < len(_RESULTS) else ""
    message = f"{name} returned {f'CUFFT_{result}' if result else f'code {code}'} for {spec}"
    planning = name in _PLANNING  # which reports a lack of memory as either
    if result == "ALLOC_FAILED" or (planning and result == "INTERNAL_ERROR"):
        raise torch.OutOfMemoryError(message)
    raise (KernelBuildError if planning and result in _NO_PLAN else RuntimeError)(message)


class CufftPlan:
    """A plan of libcufft. It is destroyed when nothing refers to it any more, but not at exit: the driver may be gone.

    Attributes:
        workspace_bytes: what `run` needs.
    """

    def __init__(self, library: ctypes.CDLL, spec: PlanSpec) -> None:
        self._call = partial(_call, library, spec)
        self._execute, self._kind = _EXECUTE[spec.dtype, spec.inverse]
        self._spec, self._id, self._lock = spec, _PLAN(-1), threading.Lock()
        self._call("cufftCreate", ctypes.byref(self._id))
        # What destroying returns is of no use: after a fault on the device every call fails.
        self.destroy = weakref.finalize(self, library.cufftDestroy, self._id)
        self.destroy.atexit = False
        try:
            self.workspace_bytes = self._make()
        except BaseException:
            self.destroy()
            raise

    def _make(self) -> int:
        H, W, N = self._spec.shape
        planes, spectra = ((_SIZE * 2)(H, width) for width in (W, W // 2 + 1))
        source, result = (spectra, planes) if self._spec.inverse else (planes, spectra)
        layouts = (source, N, 1, result, N, 1)
        workspace = ctypes.c_size_t()
        self._call("cufftSetAutoAllocation", self._id, 0)  # the workspace comes from torch's allocator
        self._call("cufftMakePlanMany64", self._id, 2, planes, *layouts, self._kind, N, ctypes.byref(workspace))
        return workspace.value

    def run(self, source: int, result: int, workspace: int, stream: int) -> None:
        """Queues the transform on the stream. All arguments are addresses; an inverse overwrites its source."""
        with self._lock:  # from setting the workspace and stream to the launch that uses them
            self._call("cufftSetWorkArea", self._id, workspace)
            self._call("cufftSetStream", self._id, stream)
            self._call(self._execute, self._id, source, result)


class Plans:
    """The plans of a library, safe to use from threads. The caller makes their device current.

    A forked child never asks for one of its parent's: torch refuses to make a device current there.
    """

    def __init__(self, path: str) -> None:
        self._library = _load(path)
        self._lock = threading.Lock()
        self._recent: defaultdict[int, OrderedDict[PlanSpec, CufftPlan]] = defaultdict(OrderedDict)  # by device
        self._captured: set[CufftPlan] = set()  # graphs refer to their memory, and may be replayed for ever

    def get(self, spec: PlanSpec) -> CufftPlan:
        """The plan, made if there is none; RuntimeError if it would have to be made while a graph is captured."""
        with self._lock:
            plans = self._recent[spec.device]
            plan = plans.get(spec)
            if plan is None:
                device.refuse_capture(str(spec))
                plan = plans[spec] = CufftPlan(self._library, spec)
                if len(plans) > PLANS_PER_DEVICE:
                    plans.popitem(last=False)
            plans.move_to_end(spec)
            if device.capturing():
                self._captured.add(plan)
            return plan
