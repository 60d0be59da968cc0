"""The ``cuda`` backend: the filter steps and their gradients as one hand-written kernel each.

A kernel reads x once and writes y once: a CTA (thread block) keeps the half spectra of a few channels of one sample in
shared memory (csrc/cuda/dynamic_filter.inl). It is specialised on the plane, C, F, dtype and chip, compiled at the
first call and kept on disk (`nvrtc`). `layout` decides from the chip's limits how threads and shared memory are used.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor

from dfformer_kernels.backend.cuda import layout, nvrtc
from dfformer_kernels.backend.cuda.layout import Chip, KernelSpec, choose_variant, compile_options
from dfformer_kernels.backend.cuda.sources import cuda_sources
from dfformer_kernels.backend.filter_kernels import FilterStep, Gradients, contiguous, filter_kernels
from dfformer_kernels.device import refuse_capture
from dfformer_kernels.problem import Problem

_OLDEST = (8, 0)  # compute capability


@cache
def chip_of(device: int) -> Chip:
    """The chip torch calls ``cuda:<device>``."""
    major, minor = torch.cuda.get_device_capability(device)
    limits = (
        "MULTIPROCESSOR_COUNT",
        "MAX_SHARED_MEMORY_PER_BLOCK_OPTIN",
        "MAX_SHARED_MEMORY_PER_MULTIPROCESSOR",
        "MAX_THREADS_PER_MULTIPROCESSOR",
        "MAX_BLOCKS_PER_MULTIPROCESSOR",
        "L2_CACHE_SIZE",
        "MAX_REGISTERS_PER_MULTIPROCESSOR",
    )
    return Chip(f"sm_{major}{minor}", *(nvrtc.device_attribute(device, limit) for limit in limits))


def unavailable_reasons() -> list[str]:
    """Why nothing can run on this backend here; empty if there is a GPU it runs on."""
    if torch.version.hip is not None:
        return ["its kernels are CUDA, torch is built for ROCm"]
    if torch.version.cuda is None:
        return ["torch is built without CUDA"]
    if not torch.cuda.is_available():
        return ["no CUDA device"]
    capabilities = [torch.cuda.get_device_capability(device) for device in range(torch.cuda.device_count())]
    if max(capabilities) < _OLDEST:
        return [_too_old(max(capabilities))]
    return list(nvrtc.unavailable_reasons())


def unsupported_reasons(problem: Problem) -> list[str]:
    """Why it cannot run ``problem``, whose x is on a GPU; empty if it can."""
    capability = torch.cuda.get_device_capability(problem.device_index)
    if capability < _OLDEST:
        return [_too_old(capability)]
    reasons = [] if problem.softmax else ["its routing is a softmax of the logits"]
    if problem.weight_per_sample:
        reasons.append("it has one weight for all samples")
    return reasons + layout.unsupported_reasons(KernelSpec.of(problem), chip_of(problem.device_index))


def _too_old(capability: tuple[int, int]) -> str:
    return f"compute capability is {'.'.join(map(str, capability))}, it needs {'.'.join(map(str, _OLDEST))}"


# Kernels in a device's memory


@dataclass(frozen=True)
class LoadedKernel:
    """A kernel in a device's memory."""

    kernel: nvrtc.Kernel
    items_per_sample: int  # CTAs' work items in a sample
    resident_ctas: int  # that the chip runs at once
    kept: int  # complex numbers of device memory that a CTA needs
    slots: int  # parts of the basis' gradient that a CTA writes

    def launch_size(self, B: int, per_channel: bool) -> tuple[int, int]:
        """The backward's CTAs, and slots of the filters' gradient: each CTA's own, or one for all CTAs of one
        sample together if every channel has its own weight.
        """
        if per_channel:
            slots = max(1, min(B, self.resident_ctas // self.items_per_sample))
            return slots * self.items_per_sample, slots
        ctas = min(B * self.items_per_sample, self.resident_ctas)
        return ctas, ctas * self.slots


_loaded: dict[tuple[KernelSpec, int], LoadedKernel] = {}


@lru_cache(maxsize=4096)
def prepare(problem: Problem) -> LoadedKernel:
    """The kernel that computes ``problem``, for any batch size; compiled and loaded at its first use.

    Raises KernelBuildError where it cannot be, RuntimeError while a CUDA graph is captured.
    """
    key = KernelSpec.of(problem), problem.device_index
    if key not in _loaded:
        refuse_capture(f"the kernel of {problem.op} on {problem.shape}")
        _loaded[key] = _load(*key)
    return _loaded[key]


def _load(spec: KernelSpec, device: int) -> LoadedKernel:
    chip = chip_of(device)
    variant = choose_variant(spec, chip)
    if variant is None:
        raise RuntimeError("; ".join(layout.unsupported_reasons(spec, chip)))
    cubin = nvrtc.cached_cubin(cuda_sources(), compile_options(spec, variant), chip.arch)
    name = "filter_backward" if spec.backward else "filter_forward"
    kernel = nvrtc.load(cubin, name, device, variant.threads, variant.shared_bytes)
    kept = spec.H * spec.K * variant.channels_per_cta if spec.backward and variant.spectra_in_shared == 1 else 0
    resident_ctas = chip.multiprocessors * variant.min_ctas
    slots = layout.slots_per_cta(spec.H * spec.K, variant.channels_per_cta, variant.threads)
    return LoadedKernel(kernel, -(-spec.C // variant.channels_per_cta), resident_ctas, kept, slots)


# The kernels as functions of tensors


def _filter(step: FilterStep) -> Tensor:
    inputs = _Inputs("filter", step)
    y, B = torch.empty_like(inputs.x), len(step.x)
    with _current(y.device):
        loaded = prepare(inputs.problem)
        ctas, ahead = B * loaded.items_per_sample, loaded.resident_ctas
        loaded.kernel.launch(ctas, inputs.x.data_ptr(), y.data_ptr(), *inputs.parameters, ahead)
    return y


def _filter_backward(grad_y: Tensor, step: FilterStep, needs: Sequence[bool]) -> Gradients:
    """Sums over samples and channels are one slot per CTA, or per group of CTAs, and torch's sum over slots: in the
    same order every time, since the number of CTAs is the chip's.
    """
    need_x, need_logits, need_filters, need_scale, need_bias = needs
    x, logits, filters, *_ = step
    inputs, B = _Inputs("filter_backward", step), len(x)
    grad_y = _paired(contiguous(grad_y, x.dtype))
    with _current(x.device):
        loaded = prepare(inputs.problem)
        ctas, slots = loaded.launch_size(B, per_channel=logits is None)
        new = inputs.filters.new_empty
        grad_x = torch.empty_like(inputs.x) if need_x else None
        grad_logits = new(logits.shape) if logits is not None and need_logits else None
        filter_slots = new((slots, *filters.shape)) if need_filters else None
        scalar_slots = new((ctas, 2)) if need_scale or need_bias else None
        kept = new((ctas, loaded.kept, 2)) if loaded.kept else None
        outputs = (grad_x, grad_logits, filter_slots, scalar_slots, kept)
        loaded.kernel.launch(
            ctas,
            *_addresses(x.device, x.dtype, grad_y, inputs.x),
            *inputs.parameters,
            *(0 if t is None else t.data_ptr() for t in outputs),
            B,
        )
    grad_scale, grad_bias = (None, None) if scalar_slots is None else scalar_slots.sum(0).unbind()
    return grad_x, grad_logits, None if filter_slots is None else filter_slots.sum(0), grad_scale, grad_bias


class _Inputs:
    """A filter step's inputs as the kernels take them: contiguous, parameters in float32 on x's device."""

    def __init__(self, op: str, step: FilterStep) -> None:
        x, logits, filters, scale, bias, _ = step
        if logits is None:
            self.problem = Problem.of(f"global_{op}", (x, filters, scale, bias))
        else:
            self.problem = Problem.of(f"dynamic_{op}", (x, logits, filters, scale, bias))
        self.x = _paired(x.contiguous())
        filters = filters.contiguous()
        self.filters = filters.clone() if filters.data_ptr() % 16 else filters  # read four floats at once
        # Some are copies, which must live until the kernel has been launched.
        logits = None if logits is None else _paired(contiguous(logits, torch.float32))
        self._others = [logits, *(None if t is None else contiguous(t, torch.float32) for t in (scale, bias))]
        logits, scale, bias = self._others
        self.parameters = _addresses(x.device, torch.float32, logits, self.filters, scale, bias)


def _paired(t: Tensor) -> Tensor:
    """Contiguous ``t`` where two channels can be read at once, which kernels do where C is even."""
    return t.clone() if t.shape[-1] % 2 == 0 and t.data_ptr() % (2 * t.element_size()) else t


def _addresses(device: torch.device, dtype: torch.dtype, *tensors: Tensor | None) -> list[int]:
    """Addresses of contiguous tensors of ``dtype``, 0 for None; the last check before a kernel trusts a pointer."""
    for t in tensors:
        if t is not None and not (t.device == device and t.is_contiguous() and t.dtype == dtype):
            raise RuntimeError(
                f"the kernel: expected contiguous {dtype} tensors on {device}, got {t.dtype} {tuple(t.shape)} with "
                f"strides {t.stride()} on {t.device}"
            )
    return [0 if t is None else t.data_ptr() for t in tensors]


_HERE: AbstractContextManager[object] = nullcontext()


def _current(device: torch.device) -> AbstractContextManager[object]:
    """torch's guard for ``device`` where another one is current; entering it when it is would cost microseconds."""
    return _HERE if torch.cuda.current_device() == device.index else torch.cuda.device(device)


KERNELS = filter_kernels(_filter, _filter_backward)
