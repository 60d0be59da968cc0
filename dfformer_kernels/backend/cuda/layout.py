"""How a kernel is laid out on a chip: threads, registers and shared memory, from its spec and the chip's limits.

Pure arithmetic: nothing here needs a GPU, a driver or a compiler.
"""

import math
from dataclasses import dataclass

import torch

from dfformer_kernels.problem import Problem

STORAGE = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}  # the macro STORAGE
_MOST_FILTERS = 16
_LARGEST_PRIME = 13
_SECTOR = 32  # bytes that device memory moves at least
_RUN = 2 * _SECTOR  # of a pixel's channels: what a warp's request costs the L1 cache is its number of lines
_WARP = 32
_MOST_REGISTERS = 255  # a thread can have
_MOST_WARPS = 16  # of a CTA: enough to fill a multiprocessor with two

_ROW_PAIRS, _HALF_ROWS = 0, 1
_COLUMNS_IN_REGISTERS, COLUMNS_UNROLLED, _COLUMNS_ROLLED = 0, 1, 2


@dataclass(frozen=True)
class Chip:
    """What limits a kernel on a GPU. Memory in bytes."""

    arch: str
    multiprocessors: int
    shared_per_cta: int
    shared_per_multiprocessor: int
    threads_per_multiprocessor: int
    ctas_per_multiprocessor: int
    l2_cache: int
    registers_per_multiprocessor: int = 65536

    def resident_ctas(self, threads: int, registers: int, shared_bytes: int) -> int:
        """How many CTAs of ``threads`` threads with ``registers`` registers each fit one multiprocessor at once."""
        warps = -(-threads // _WARP)
        per_warp = -(-registers * _WARP // 256) * 256  # handed out by the 256, from one of four files
        most_warps = self.registers_per_multiprocessor // 4 // per_warp * 4
        return min(
            self.ctas_per_multiprocessor,
            self.threads_per_multiprocessor // (warps * _WARP),
            most_warps // warps,
            self.shared_per_multiprocessor // (shared_bytes + 1024),  # 1 KiB of each CTA is the system's
        )


# One chip of each kind, for compiling and checking without one. From NVIDIA's tables of compute capabilities.
CHIPS = {
    chip.arch: chip
    for chip in (
        Chip("sm_80", 108, 163 << 10, 164 << 10, 2048, 32, 40 << 20),  # A100
        Chip("sm_86", 82, 99 << 10, 100 << 10, 1536, 16, 6 << 20),  # RTX 3090
        Chip("sm_89", 128, 99 << 10, 100 << 10, 1536, 24, 72 << 20),  # RTX 4090
        Chip("sm_90", 132, 227 << 10, 228 << 10, 2048, 32, 50 << 20),  # H100
        Chip("sm_100", 148, 227 << 10, 228 << 10, 2048, 32, 126 << 20),  # B200
        Chip("sm_120", 170, 99 << 10, 100 << 10, 1536, 24, 96 << 20),  # RTX 5090
    )
}


@dataclass(frozen=True)
class KernelSpec:
    """What a kernel computes: a spec or its backward on (B,H,W,C) of ``dtype``; F = 0 is the global filter."""

    H: int
    W: int
    C: int
    F: int
    dtype: torch.dtype
    star_relu: bool
    backward: bool

    @staticmethod
    def of(problem: Problem) -> "KernelSpec":
        _, H, W, C = problem.shape
        backward = problem.op.endswith("_backward")
        return KernelSpec(H, W, C, problem.filters, problem.dtype, problem.star_relu, backward)

    @property
    def K(self) -> int:  # noqa: N802
        return self.W // 2 + 1


@dataclass(frozen=True)
class Variant:
    """How a kernel does it; see `choose_variant`."""

    rows: int
    columns: int
    channels_per_cta: int
    width: int  # channels of a thread
    threads: int
    spectra_in_shared: int  # half spectra of each channel in shared memory
    min_ctas: int
    shared_bytes: int


def choose_variant(spec: KernelSpec, chip: Chip) -> Variant | None:
    """How ``spec`` is laid out on ``chip``; None if it does not fit.

    Backward has two half spectra in shared memory. Where those of two channels do not fit, it takes one after the
    other; also where those of fewer channels fit than make a sector of float32, if it then has more channels and the
    resident CTAs' spectra fill at most half of the L2 cache.
    """
    if not spec.backward:
        return _most_channels(spec, chip, 1)
    variant = _most_channels(spec, chip, 2)
    if variant is not None and 4 * variant.channels_per_cta >= _SECTOR:
        return variant
    one = _most_channels(spec, chip, 1)
    if variant is None or one is None:
        return variant or one
    spectra = 8 * spec.H * spec.K * one.channels_per_cta * one.min_ctas * chip.multiprocessors
    return one if one.channels_per_cta > variant.channels_per_cta and 2 * spectra <= chip.l2_cache else variant


def _most_channels(spec: KernelSpec, chip: Chip, spectra: int) -> Variant | None:
    """A CTA has enough channels to fill two sectors of device memory and, on small planes, four warps. Half as many,
    and again, until two CTAs fit a multiprocessor, so that one computes while the other waits for memory. But whole
    sectors are not given up for a second CTA: parts of them double what the L2 cache moves. Where two never fit, the
    most channels of which one CTA does.
    """
    wanted = max(_RUN // spec.dtype.itemsize, 4 * _WARP // _workers(spec))
    most = max(min(_power_of_two(wanted), _power_of_two(spec.C), _WARP), 2)
    variants = [variant_of(spec, chip, channels, spectra) for channels in (32, 16, 8, 4, 2) if channels <= most]
    fitting = [variant for variant in variants if variant is not None]
    whole_sectors = (v for v in fitting if v.channels_per_cta * spec.dtype.itemsize >= _SECTOR)
    return next((v for v in whole_sectors if v.min_ctas >= 2), fitting[0] if fitting else None)


def variant_of(
    spec: KernelSpec, chip: Chip, channels_per_cta: int, spectra_in_shared: int, threads: int | None = None
) -> Variant | None:
    """``spec`` with so many channels per CTA, and spectra in shared memory; None if ``chip`` has no room for it."""
    rows, columns = _rows(spec), _columns(spec)
    registers, width = _registers(spec), 1
    # Short columns leave a thread registers for two channels, and a multiprocessor warps enough. With fewer than 16
    # channels some planes would spill.
    if (
        columns == _COLUMNS_IN_REGISTERS
        and spec.C % 2 == 0
        and channels_per_cta >= 16
        and 1.6 * registers <= _MOST_REGISTERS
    ):
        registers, width = int(1.6 * registers), 2
    chosen = threads or _threads(spec, channels_per_cta // width, registers)
    shared_bytes = _shared_bytes(spec, channels_per_cta, chosen * width, spectra_in_shared)
    if registers > _MOST_REGISTERS or shared_bytes > chip.shared_per_cta:
        return None
    # More threads than have those registers make do with fewer, as far as one CTA goes.
    available = chip.registers_per_multiprocessor // chosen // 8 * 8
    min_ctas = chip.resident_ctas(chosen, min(registers, available), shared_bytes)
    if min_ctas == 0:
        return None
    # A few warps alone on a multiprocessor wait for each instruction: twice as many share the work.
    if threads is None and min_ctas == 1 and chosen <= 4 * _WARP and 2 * chosen * registers <= 65536:
        more = variant_of(spec, chip, channels_per_cta, spectra_in_shared, 2 * chosen)
        if more is not None:
            return more
    return Variant(rows, columns, channels_per_cta, width, chosen, spectra_in_shared, min_ctas, shared_bytes)


def _threads(spec: KernelSpec, channels: int, registers: int) -> int:
    """Whole warps, and for every channel as many, since channels divide a warp; no more than have registers."""
    most_warps = _MOST_WARPS if registers <= 128 else _MOST_WARPS // 2
    return min(-(-_workers(spec) * channels // _WARP), most_warps) * _WARP


def _rows(spec: KernelSpec) -> int:
    """An even row as a complex row of half the length; two odd rows as one complex row."""
    return _HALF_ROWS if spec.W % 2 == 0 else _ROW_PAIRS


def _workers(spec: KernelSpec) -> int:
    """Threads of a channel: one per column, or one for every two items of the rows' phases."""
    row_items = spec.H if _rows(spec) == _HALF_ROWS else -(-spec.H // 2)
    return max(spec.K, -(-row_items // 2))


def _columns(spec: KernelSpec) -> int:
    """Short columns and those without two factors in registers, others in loops over the factors: fewest registers.
    Backward has two columns at a time.
    """
    longest = longest_in_registers(spec.backward)
    return _COLUMNS_ROLLED if longest < spec.H and second_factor(spec.H) > 1 else _COLUMNS_IN_REGISTERS


def longest_in_registers(backward: bool) -> int:
    """The longest column of two factors that a thread keeps in registers."""
    return 8 if backward else 16


def _registers(spec: KernelSpec) -> int:
    """What a thread needs so that nothing spills: fitted to what the compiler reports.

    It makes do with what there is in backward rows of up to 80 points.
    """
    N2 = second_factor(spec.H, _columns(spec))
    row = spec.W // 2 if _rows(spec) == _HALF_ROWS else spec.W
    odd = spec.C % 2  # which costs registers for addresses: an even number of channels lets it add them to one base
    filters = spec.F + 2 * max(spec.F - 4, 0)  # beyond four, each takes three times as much
    if spec.backward:
        for_row = min(3 * row + 74, _MOST_REGISTERS) if row <= 80 else 3 * row + 74
        for_column = min(7 * N2 + 2 * spec.F + 4 * filters + 16 + 8 * odd, _MOST_REGISTERS)
        return max(for_row, for_column, 4 * (spec.H // N2) + 40)
    for_column = (5 * N2 + 20 if N2 <= 8 else 2 * N2 + 28) + 4 * filters + 8 * odd
    return max(2 * row + 36 + odd * (row + 16), for_column, 4 * (spec.H // N2) + 30)


def _shared_bytes(spec: KernelSpec, channels: int, threads: int, spectra: int) -> int:
    """As `Layout` in csrc/cuda/layout.inl computes it, where it is explained."""
    K = spec.K
    narrow_padding = channels * (1 - K % 2) if _rows(spec) == _HALF_ROWS else channels // 2
    row_stride = K * channels + (narrow_padding if channels < 16 else 0)
    if not spec.backward:
        return 8 * spec.H * row_stride
    sums = max(spec.F, 2 if spec.star_relu else 0)
    return spectra * 8 * spec.H * row_stride + 4 * (spec.F * channels + sums * threads)


def slots_per_cta(frequencies: int, channels: int, threads: int) -> int:
    """Parts of the basis' gradient that a CTA writes.

    It is the largest power of 2 that leaves a thread for each of them at every frequency, and two channels for each
    thread.
    """
    slots = 1
    while 4 * slots <= channels and 2 * slots * frequencies <= threads:
        slots *= 2
    return slots


def second_factor(H: int, columns: int = COLUMNS_UNROLLED) -> int:
    """N2 of H = N1 N2, N1 >= N2: coprime (no twiddles between the two) and of at most 16 if there is such a pair,
    otherwise as equal as possible. H itself for columns in registers.
    """
    if columns == _COLUMNS_IN_REGISTERS:
        return H
    pairs = [(H // n, n) for n in range(2, H + 1) if H % n == 0 and n * n <= H]
    coprime = [n for m, n in pairs if math.gcd(m, n) == 1 and m <= 16]
    return max(coprime or [n for _, n in pairs], default=1)


def _power_of_two(n: int) -> int:
    """The smallest that is at least n."""
    return 1 << (n - 1).bit_length()


def compile_options(spec: KernelSpec, variant: Variant) -> list[str]:
    """What specialises csrc/cuda/dynamic_filter.cu."""
    macros = {
        "DIRECTION": int(spec.backward),
        "PLANE_H": spec.H,
        "PLANE_W": spec.W,
        "CHANNELS": spec.C,
        "FILTERS": spec.F,
        "STORAGE": STORAGE[spec.dtype],
        "STAR_RELU": int(spec.star_relu),
        "ROWS": variant.rows,
        "COLUMNS": variant.columns,
        "CHANNELS_PER_CTA": variant.channels_per_cta,
        "WIDTH": variant.width,
        "THREADS": variant.threads,
        "SECOND_FACTOR": second_factor(spec.H, variant.columns),
        "SLOTS": slots_per_cta(spec.H * spec.K, variant.channels_per_cta, variant.threads) if spec.F else 1,
        "SPECTRA_IN_SHARED": variant.spectra_in_shared,
        "MIN_CTAS": variant.min_ctas,
        "SHARED_BYTES": variant.shared_bytes,
    }
    return ["-default-device", "-std=c++17", *(f"-D{name}={value}" for name, value in macros.items())]


def unsupported_reasons(spec: KernelSpec, chip: Chip) -> list[str]:
    """Why no kernel on ``chip`` computes ``spec``; empty if `choose_variant` finds a layout."""
    reasons = []
    if spec.dtype not in STORAGE:
        reasons.append(f"it computes in float32, x is {str(spec.dtype).removeprefix('torch.')}")
    if spec.F > _MOST_FILTERS:
        reasons.append(f"it mixes at most {_MOST_FILTERS} filters, there are {spec.F}")
    for side, length in (("H", spec.H), ("W", spec.W)):
        if _largest_prime_factor(length) > _LARGEST_PRIME:
            reasons.append(f"{side} = {length} has a prime factor above {_LARGEST_PRIME}")
    if spec.H * spec.W * spec.C >= 2**31:
        reasons.append("a sample has 2^31 elements or more")
    return reasons or _no_room(spec, chip)


def _no_room(spec: KernelSpec, chip: Chip) -> list[str]:
    """What of a chip has no room for ``spec``; empty where `choose_variant` finds a layout."""
    reasons, registers = [], _registers(spec)
    if registers > _MOST_REGISTERS:
        reasons.append(f"rows of W = {spec.W} do not fit the {_MOST_REGISTERS} registers of a thread")
    if _shared_bytes(spec, 2, _threads(spec, 2, registers), 1) > chip.shared_per_cta:
        reasons.append(
            f"half spectra of two channels of {spec.H}x{spec.W} planes do not fit the "
            f"{chip.shared_per_cta >> 10} KiB of shared memory that a CTA has on {chip.arch}"
        )
    return reasons


def _largest_prime_factor(n: int) -> int:
    factor = 2
    while factor * factor <= n:
        if n % factor:
            factor += 1
        else:
            n //= factor
    return n
