"""The ``cuda`` backend: the filter steps and their gradients as one hand-written kernel each.

A kernel reads x once and writes y once: a block of threads keeps the half spectra of a few channels of one sample in
shared memory (csrc/cuda/dynamic_filter.inl). It is specialised on the plane, C, F, dtype and chip, compiled at the
first call and kept on disk (`nvrtc`). `choose_variant` decides from the chip's limits how threads and shared memory
are laid out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dfformer_kernels.backends.cuda import nvrtc
from dfformer_kernels.backends.cuda.sources import cuda_sources
from dfformer_kernels.backends.filter_kernels import filter_kernels

if TYPE_CHECKING:
    from dfformer_kernels.dispatch import Problem

_STORAGE = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}  # the macro STORAGE
_MOST_FILTERS = 16
_LARGEST_PRIME = 13
_OLDEST = (8, 0)  # compute capability
_SECTOR = 32  # bytes that device memory moves at least
_WARP = 32
_MOST_REGISTERS = 255  # a thread can have
_MOST_WARPS = 16  # of a block: enough to fill a multiprocessor with two

_ROW_PAIRS, _HALF_ROWS = 0, 1
_COLUMNS_IN_REGISTERS, _COLUMNS_ROLLED = 0, 2


@dataclass(frozen=True)
class Chip:
    """What limits a kernel on a GPU. Shared memory in bytes."""

    arch: str
    multiprocessors: int
    shared_per_block: int
    shared_per_multiprocessor: int
    threads_per_multiprocessor: int
    blocks_per_multiprocessor: int
    registers_per_multiprocessor: int = 65536

    def resident_blocks(self, threads: int, registers: int, shared_bytes: int) -> int:
        """How many blocks of ``threads`` threads with ``registers`` registers each fit one multiprocessor at once."""
        warps = -(-threads // _WARP)
        per_warp = -(-registers * _WARP // 256) * 256  # handed out by the 256, from one of four files
        most_warps = self.registers_per_multiprocessor // 4 // per_warp * 4
        return min(
            self.blocks_per_multiprocessor,
            self.threads_per_multiprocessor // (warps * _WARP),
            most_warps // warps,
            self.shared_per_multiprocessor // (shared_bytes + 1024),  # 1 KiB of each block is the system's
        )


# One chip of each kind, for compiling and checking without one. From NVIDIA's tables of compute capabilities.
CHIPS = {
    chip.arch: chip
    for chip in (
        Chip("sm_80", 108, 163 << 10, 164 << 10, 2048, 32),  # A100
        Chip("sm_86", 82, 99 << 10, 100 << 10, 1536, 16),  # RTX 3090
        Chip("sm_89", 128, 99 << 10, 100 << 10, 1536, 24),  # RTX 4090
        Chip("sm_90", 132, 227 << 10, 228 << 10, 2048, 32),  # H100
        Chip("sm_100", 148, 227 << 10, 228 << 10, 2048, 32),  # B200
        Chip("sm_120", 170, 99 << 10, 100 << 10, 1536, 24),  # RTX 5090
    )
}


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
        "MAX_REGISTERS_PER_MULTIPROCESSOR",
    )
    return Chip(f"sm_{major}{minor}", *(nvrtc.device_attribute(device, limit) for limit in limits))


@dataclass(frozen=True)
class Step:
    """What a kernel computes: a step or its backward on (B,H,W,C) of ``dtype``; F = 0 is the global filter."""

    H: int
    W: int
    C: int
    F: int
    dtype: torch.dtype
    star_relu: bool
    backward: bool

    @property
    def K(self) -> int:  # noqa: N802
        return self.W // 2 + 1


@dataclass(frozen=True)
class Variant:
    """How a kernel does it; see `choose_variant`."""

    rows: int
    columns: int
    lanes: int
    threads: int
    planes: int  # half spectra of each lane in shared memory
    min_blocks: int
    shared_bytes: int


def choose_variant(step: Step, chip: Chip) -> Variant | None:
    """How ``step`` is laid out on ``chip``; None if it does not fit.

    ``lanes`` channels of a sample are a block's work: enough to fill sectors of device memory and, on small planes,
    four warps. Half as many, and again, until two blocks fit a multiprocessor, so that one computes while the other
    waits for memory. Where that never happens, the most lanes of which one block fits. Backward has two half spectra
    in shared memory or, where those of two lanes do not fit, takes them in turn.
    """
    wanted = max(_SECTOR // step.dtype.itemsize, 4 * _WARP // _workers(step))
    most = max(min(_power_of_two(wanted), _power_of_two(step.C), _WARP), 2)
    for planes in (2, 1) if step.backward else (1,):
        variants = [_variant(step, chip, lanes, planes) for lanes in (32, 16, 8, 4, 2) if lanes <= most]
        fitting = [variant for variant in variants if variant is not None]
        if fitting:
            return next((variant for variant in fitting if variant.min_blocks >= 2), fitting[0])
    return None


def _variant(step: Step, chip: Chip, lanes: int, planes: int) -> Variant | None:
    rows, columns = _rows(step), _columns(step)
    registers = _registers(step, rows, columns)
    threads = _threads(step, lanes, registers)
    shared_bytes = _shared_bytes(step, rows, lanes, threads, planes)
    if registers > _MOST_REGISTERS or shared_bytes > chip.shared_per_block:
        return None
    min_blocks = chip.resident_blocks(threads, registers, shared_bytes)
    return Variant(rows, columns, lanes, threads, planes, min_blocks, shared_bytes) if min_blocks else None


def _threads(step: Step, lanes: int, registers: int) -> int:
    """Whole warps, and of every lane as many, since lanes divide a warp; no more than have registers."""
    most_warps = _MOST_WARPS if registers <= 128 else _MOST_WARPS // 2
    return min(-(-_workers(step) * lanes // _WARP), most_warps) * _WARP


def _rows(step: Step) -> int:
    """An even row as a complex row of half the length; two odd rows as one complex row."""
    return _HALF_ROWS if step.W % 2 == 0 else _ROW_PAIRS


def _workers(step: Step) -> int:
    """Threads of a lane: one a column, or one for every two items of the rows' phases."""
    row_items = step.H if _rows(step) == _HALF_ROWS else -(-step.H // 2)
    return max(step.K, -(-row_items // 2))


def _columns(step: Step) -> int:
    """Short columns and those without two factors in registers, others in loops over the factors: fewest registers."""
    return _COLUMNS_ROLLED if step.H > 8 and _second_factor(step.H) > 1 else _COLUMNS_IN_REGISTERS


def _registers(step: Step, rows: int, columns: int) -> int:
    """What a thread needs so that nothing spills: fitted to what the compiler reports.

    It makes do with what there is in backward rows of up to 80 points.
    """
    N2 = step.H if columns == _COLUMNS_IN_REGISTERS else _second_factor(step.H)
    row = step.W // 2 if rows == _HALF_ROWS else step.W
    if step.backward:
        for_row = min(3 * row + 70, _MOST_REGISTERS) if row <= 80 else 3 * row + 70
        return max(for_row, 7 * N2 + 6 * step.F + 16, 4 * (step.H // N2) + 40)
    addresses = row + 16 if step.C % 2 else 0  # of pixels, which an even number of channels lets it add to one base
    return max(2 * row + 40 + addresses, 5 * N2 + 4 * step.F + 20, 4 * (step.H // N2) + 30)


def _shared_bytes(step: Step, rows: int, lanes: int, threads: int, planes: int) -> int:
    """As `Layout` in dynamic_filter.inl computes it, where it is explained."""
    K = step.K
    narrow_padding = lanes * (1 - K % 2) if rows == _HALF_ROWS else lanes // 2
    row_stride = K * lanes + (narrow_padding if lanes < 16 else 0)
    if not step.backward:
        return 8 * step.H * row_stride
    sums = max(step.F, 2 if step.star_relu else 0)
    return planes * 8 * step.H * row_stride + 4 * (step.F * lanes + sums * threads)


def _second_factor(H: int) -> int:
    """As in dynamic_filter.inl."""
    pairs = [(H // n, n) for n in range(2, H + 1) if H % n == 0 and n * n <= H]
    coprime = [n for m, n in pairs if math.gcd(m, n) == 1 and m <= 16]
    return max(coprime or [n for _, n in pairs], default=1)


def _power_of_two(n: int) -> int:
    """The smallest that is at least n."""
    return 1 << (n - 1).bit_length()


def compile_options(step: Step, variant: Variant) -> list[str]:
    """What specialises csrc/cuda/dynamic_filter.cu."""
    macros = {
        "DIRECTION": int(step.backward),
        "PLANE_H": step.H,
        "PLANE_W": step.W,
        "CHANNELS": step.C,
        "FILTERS": step.F,
        "STORAGE": _STORAGE[step.dtype],
        "STAR_RELU": int(step.star_relu),
        "ROWS": variant.rows,
        "COLUMNS": variant.columns,
        "LANES": variant.lanes,
        "THREADS": variant.threads,
        "PLANES": variant.planes,
        "MIN_BLOCKS": variant.min_blocks,
        "SHARED_BYTES": variant.shared_bytes,
    }
    return ["-default-device", "-std=c++17", *(f"-D{name}={value}" for name, value in macros.items())]


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


def refusals(problem: "Problem") -> list[str]:
    """Why it cannot run ``problem``, whose x is on a GPU; empty if it can."""
    capability = torch.cuda.get_device_capability(problem.device_index)
    if capability < _OLDEST:
        return [_too_old(capability)]
    return step_refusals(_step(problem), chip_of(problem.device_index))


def prepared(problem: "Problem") -> bool:
    """Whether the kernel for ``problem`` is loaded."""
    return (_step(problem), problem.device_index) in _kernels


def _step(problem: "Problem") -> Step:
    _, H, W, C = problem.shape
    return Step(H, W, C, problem.filters, problem.dtype, problem.star_relu, problem.op.endswith("_backward"))


def step_refusals(step: Step, chip: Chip) -> list[str]:
    reasons = []
    if step.dtype not in _STORAGE:
        reasons.append(f"it computes in float32, x is {str(step.dtype).removeprefix('torch.')}")
    if step.F > _MOST_FILTERS:
        reasons.append(f"it mixes at most {_MOST_FILTERS} filters, there are {step.F}")
    for side, length in (("H", step.H), ("W", step.W)):
        if _largest_prime_factor(length) > _LARGEST_PRIME:
            reasons.append(f"{side} = {length} has a prime factor above {_LARGEST_PRIME}")
    if step.H * step.W * step.C >= 2**31:
        reasons.append("a sample has 2^31 elements or more")
    return reasons or _misfits(step, chip)


def _misfits(step: Step, chip: Chip) -> list[str]:
    """What of a chip has no room for ``step``; empty where `choose_variant` finds a layout."""
    reasons, rows = [], _rows(step)
    registers = _registers(step, rows, _columns(step))
    if registers > _MOST_REGISTERS:
        reasons.append(f"rows of W = {step.W} do not fit the {_MOST_REGISTERS} registers of a thread")
    if _shared_bytes(step, rows, 2, _threads(step, 2, registers), 1) > chip.shared_per_block:
        reasons.append(
            f"half spectra of two channels of {step.H}x{step.W} planes do not fit the "
            f"{chip.shared_per_block >> 10} KiB of shared memory that a block has on {chip.arch}"
        )
    return reasons


def _too_old(capability: tuple[int, int]) -> str:
    return f"compute capability is {'.'.join(map(str, capability))}, it needs {'.'.join(map(str, _OLDEST))}"


def _largest_prime_factor(n: int) -> int:
    factor = 2
    while factor * factor <= n:
        if n % factor:
            factor += 1
        else:
            n //= factor
    return n


@dataclass(frozen=True)
class _Prepared:
    """A kernel in a device's memory."""

    kernel: nvrtc.Kernel
    channel_blocks: int  # blocks' worth of work in a sample
    resident: int  # blocks the chip runs at once
    spectrum: int  # complex numbers of device memory that a block needs


_kernels: dict[tuple[Step, int], _Prepared] = {}


def _prepare(step: Step, device: int) -> _Prepared:
    if (step, device) not in _kernels:
        _kernels[step, device] = _load(step, device)
    return _kernels[step, device]


def _load(step: Step, device: int) -> _Prepared:
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a kernel must be compiled or loaded first: call the operator once before capturing a graph")
    chip = chip_of(device)
    variant = choose_variant(step, chip)
    if variant is None:
        raise RuntimeError("; ".join(step_refusals(step, chip)))
    cubin = nvrtc.cached_cubin(cuda_sources(), compile_options(step, variant), chip.arch)
    name = "filter_backward" if step.backward else "filter_forward"
    kernel = nvrtc.Kernel(cubin, name, device, variant.threads, variant.shared_bytes)
    spectrum = step.H * step.K * variant.lanes if step.backward and variant.planes == 1 else 0
    return _Prepared(kernel, -(-step.C // variant.lanes), chip.multiprocessors * variant.min_blocks, spectrum)


def _filter(x: Tensor, logits: Tensor | None, filters: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    with torch.cuda.device(x.device):
        inputs = _Inputs(x, logits, filters, scale, bias)
        prepared = inputs.prepare(backward=False)
        y = torch.empty_like(inputs.x)
        B = x.shape[0]
        prepared.kernel.launch(
            B * prepared.channel_blocks, *_addresses(x.device, x.dtype, inputs.x, y), *inputs.parameters, B
        )
        return y


def _filter_backward(
    grad_y: Tensor,
    x: Tensor,
    logits: Tensor | None,
    filters: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Sums over samples and channels are one slot a block, or a group of blocks, and torch's sum over slots: in the
    same order every time, since the number of blocks is the chip's.
    """
    need_x, need_logits, need_filters, need_scale, need_bias = needs
    with torch.cuda.device(x.device):
        inputs = _Inputs(x, logits, filters, scale, bias)
        prepared = inputs.prepare(backward=True)
        grad_y = grad_y.to(x.dtype).contiguous()
        blocks, slots = _launch_size(prepared, x.shape[0], per_channel=logits is None)

        def output(wanted: bool, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
            return torch.empty(shape, dtype=dtype, device=x.device) if wanted else None

        grad_x = output(need_x, *x.shape, dtype=x.dtype)
        grad_logits = output(logits is not None and need_logits, *(() if logits is None else logits.shape))
        filter_slots = output(need_filters, slots, *filters.shape)
        scalar_slots = output(need_scale or need_bias, blocks, 2)
        spectra = output(prepared.spectrum > 0, blocks, prepared.spectrum, 2)
        prepared.kernel.launch(
            blocks,
            *_addresses(x.device, x.dtype, grad_y, inputs.x),
            *inputs.parameters,
            *_addresses(x.device, x.dtype, grad_x),
            *_addresses(x.device, torch.float32, grad_logits, filter_slots, scalar_slots, spectra),
            x.shape[0],
        )
        gradients = [] if grad_x is None else [grad_x]
        if logits is not None and grad_logits is not None:
            gradients.append(grad_logits.to(logits.dtype))
        if filter_slots is not None:
            gradients.append(filter_slots.sum(0))
        if scalar_slots is not None:
            sums = scalar_slots.sum(0)
            for parameter, need, i in ((scale, need_scale, 0), (bias, need_bias, 1)):
                if parameter is not None and need:
                    gradients.append(sums[i].to(parameter.dtype).reshape(parameter.shape))
        return gradients


def _launch_size(prepared: _Prepared, B: int, per_channel: bool) -> tuple[int, int]:
    """Blocks, and slots of the filters' gradient: a block each, or all blocks of one sample together if every channel
    has its own weight.
    """
    if per_channel:
        slots = max(1, min(B, prepared.resident // prepared.channel_blocks))
        return slots * prepared.channel_blocks, slots
    blocks = min(B * prepared.channel_blocks, prepared.resident)
    return blocks, blocks


class _Inputs:
    """A filter step's inputs as the kernels take them: dense, parameters in float32 on the device."""

    def __init__(
        self, x: Tensor, logits: Tensor | None, filters: Tensor, scale: Tensor | None, bias: Tensor | None
    ) -> None:
        self.x = x.contiguous()
        self._logits = None if logits is None else logits.float().contiguous()
        filters = filters.contiguous()
        self._filters = filters.clone() if filters.data_ptr() % 16 else filters  # read four floats at once
        pair = None if scale is None or bias is None else (scale.reshape(1).float(), bias.reshape(1).float())
        self._star_relu = None if pair is None else torch.cat(pair)

    @property
    def parameters(self) -> list[int]:
        return _addresses(self.x.device, torch.float32, self._logits, self._filters, self._star_relu)

    def prepare(self, backward: bool) -> _Prepared:
        """The kernel for these inputs; compiled at its first use."""
        _, H, W, C = self.x.shape
        F = 0 if self._logits is None else self._logits.shape[1]
        step = Step(H, W, C, F, self.x.dtype, self._star_relu is not None, backward)
        return _prepare(step, self.x.device.index)


def _addresses(device: torch.device, dtype: torch.dtype, *tensors: Tensor | None) -> list[int]:
    """Addresses of dense tensors of ``dtype``, 0 for None; the last check before a kernel trusts a pointer."""
    for t in tensors:
        if t is not None and not (t.device == device and t.is_contiguous() and t.dtype == dtype):
            raise RuntimeError(
                f"the kernel takes contiguous {dtype} tensors on {device}, got {t.dtype} {tuple(t.shape)} with "
                f"strides {t.stride()} on {t.device}"
            )
    return [0 if t is None else t.data_ptr() for t in tensors]


KERNELS = filter_kernels(_filter, _filter_backward)
