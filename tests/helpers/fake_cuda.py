"""Stand-ins for what the ``cuda`` backend talks to: a driver, and kernels that run on the host."""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from dfformer_kernels import reference
from dfformer_kernels.backend.cuda.layout import KernelSpec


class Result(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NO_BINARY_FOR_GPU = 209
    CUDA_ERROR_ILLEGAL_ADDRESS = 700


class FakeDriver:
    """cuda.bindings.driver that records its calls and fails with ``error`` in the one named ``failing``."""

    def __init__(self, failing: str = "", error: Result = Result.CUDA_ERROR_NO_BINARY_FOR_GPU) -> None:
        self.failing, self.error, self.calls = failing, error, list[tuple[Any, ...]]()
        self.CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="shared")

    def __getattr__(self, name: str) -> Callable[..., tuple[Any, ...]]:
        def call(*args: Any) -> tuple[Any, ...]:
            if name == "cuLaunchKernel":
                *args_before, parameters, extra = args
                pointers = (ctypes.c_void_p * 3).from_address(parameters)
                args = (*args_before, [ctypes.c_int64.from_address(p or 0).value for p in pointers], extra)
            self.calls.append((name, *args))
            if name == self.failing:
                return (self.error, None)
            return (Result.CUDA_SUCCESS,) if "Set" in name or "Launch" in name else (Result.CUDA_SUCCESS, f"<{name}>")

        return call


class HostDriver(FakeDriver):
    """Loads libraries where the driver loads cubins; calls their ``launch`` where it launches kernels."""

    def cuModuleLoadData(self, path: bytes) -> tuple[Any, ...]:  # noqa: N802
        return (Result.CUDA_SUCCESS, ctypes.CDLL(path.decode()))

    def cuModuleGetFunction(self, module: ctypes.CDLL, name: bytes) -> tuple[Any, ...]:  # noqa: N802
        getattr(module, name.decode())  # the direction's kernel is there
        return (Result.CUDA_SUCCESS, module)

    def cuLaunchKernel(self, library: ctypes.CDLL, ctas: int, *rest: int) -> tuple[Any, ...]:  # noqa: N802
        *_, shared_bytes, stream, parameters, _ = rest
        assert stream == 7
        library.launch(ctas, shared_bytes, ctypes.c_void_p(parameters))
        return (Result.CUDA_SUCCESS,)


def at(address: int, dtype: torch.dtype, *shape: int) -> Tensor:
    """The tensor at an address of this process."""
    count = torch.Size(shape).numel() * dtype.itemsize
    return torch.frombuffer((ctypes.c_char * count).from_address(address), dtype=dtype).view(shape)


@dataclass
class FakeKernel:
    """Reads and writes what the kernels do, at the addresses it is given."""

    spec: KernelSpec
    items_per_sample: int
    launched: list[tuple[int, ...]]

    def launch(self, ctas: int, *arguments: int) -> None:
        self.launched.append((ctas, *arguments))
        (self._backward if self.spec.backward else self._forward)(ctas, *arguments)

    def _parameters(self, B: int, logits: int, filters: int, scale: int, bias: int) -> list[Tensor | None]:
        spec = self.spec
        assert bool(logits) == bool(spec.F)
        assert bool(scale) == bool(bias) == spec.star_relu
        assert filters % 16 == 0
        scalars = [at(p, torch.float32, 1) if p else None for p in (scale, bias)]
        if not spec.F:
            return [at(filters, torch.float32, spec.H, spec.K, spec.C, 2), *scalars]
        basis = at(filters, torch.float32, spec.H, spec.K, spec.F, 2)
        return [at(logits, torch.float32, B, spec.F, spec.C), basis, *scalars]

    def _run(self, suffix: str) -> Callable[..., Any]:
        return reference.KERNELS[("dynamic_filter" if self.spec.F else "global_filter") + suffix]

    def _forward(self, ctas: int, x: int, y: int, logits: int, filters: int, scale: int, bias: int, ahead: int) -> None:
        B = ctas // self.items_per_sample
        shape = (self.spec.dtype, B, self.spec.H, self.spec.W, self.spec.C)
        assert (ctas % self.items_per_sample, ahead) == (0, 5)
        at(y, *shape).copy_(self._run("")(at(x, *shape), *self._parameters(B, logits, filters, scale, bias)))

    def _backward(
        self,
        ctas: int,
        grad_y: int,
        x: int,
        logits: int,
        filters: int,
        scale: int,
        bias: int,
        grad_x: int,
        grad_logits: int,
        filter_slots: int,
        star_relu_slots: int,
        kept: int,
        B: int,
    ) -> None:
        spec = self.spec
        tensors = [at(p, spec.dtype, B, spec.H, spec.W, spec.C) for p in (grad_y, x)]
        parameters = self._parameters(B, logits, filters, scale, bias)
        names = ["x", "logits", "filters", "scale", "bias"] if spec.F else ["x", "filters", "scale", "bias"]
        given = [True, *(p is not None for p in parameters)]
        gradients = self._run("_backward")(*tensors, *parameters, given)
        found = dict(
            zip([name for name, is_given in zip(names, given, strict=True) if is_given], gradients, strict=True)
        )
        assert ctas <= B * self.items_per_sample
        assert ctas % self.items_per_sample == 0 or spec.F
        if grad_x:
            at(grad_x, spec.dtype, *found["x"].shape).copy_(found["x"])
        if grad_logits:
            at(grad_logits, torch.float32, *found["logits"].shape).copy_(found["logits"])
        if filter_slots:
            slots = 2 * ctas if spec.F else ctas // self.items_per_sample
            at(filter_slots, torch.float32, slots, *found["filters"].shape).copy_(found["filters"] / slots)
        if star_relu_slots:
            pair = torch.cat([found["scale"].reshape(1), found["bias"].reshape(1)])
            at(star_relu_slots, torch.float32, ctas, 2).copy_(pair / ctas)
