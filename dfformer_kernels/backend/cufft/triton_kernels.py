"""Triton kernels around a 2-D transform: they prepare its input, filter the spectrum and convert the result.

Planes are (B,R,C) with R = H*W rows and any strides. Spectra are those of N = B*C planes, ``width`` of them side by
side: (N/width,H,K,width,2), contiguous, with K = W//2 + 1. Transforms are unscaled in both directions, and filtering
multiplies by 1/(HW). A program works on a tile of pixels x channels or frequencies x channels: rows, and n, which is
channel n % C of sample n // C. Both are counted in 32 bits, offsets in 64. Partial sums go to slots, one for each tile,
which are then added in a fixed order, without atomics. Arithmetic is float64 for float64 planes or spectra and float32
otherwise.

An integer argument of value 1 is a Python constant in a kernel, so it has no methods.

Columns k = 0 and k = W/2 of a real plane's spectrum are Hermitian. Those of a filtered spectrum need not be, and
libraries differ in what their inverse then returns. The convention (invert along H, drop the imaginary part) is
equivalent to filtering these two columns by (M[h] + conj(M[-h])) / 2, which keeps them Hermitian. These kernels do so.
"""

import triton
import triton.language as tl

# Helpers of the kernels


@triton.jit
def _tile(rows, N, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """A program's rows and channels, and which elements exist. Neighbouring programs have neighbouring channels."""
    across = tl.cdiv(N, CHANNELS)
    row = (tl.program_id(0) // across) * ROWS + tl.arange(0, ROWS)
    n = (tl.program_id(0) % across) * CHANNELS + tl.arange(0, CHANNELS)
    return row, n, (row < rows)[:, None] & (n < N)[None, :]


@triton.jit
def _one_over(count, COMPUTE: tl.constexpr):
    return tl.full((), 1, COMPUTE) / tl.cast(count, COMPUTE)


@triton.jit
def _offsets(row, n, C, stride_b, stride_row, stride_c):
    channels = (n // C).to(tl.int64) * stride_b + (n % C).to(tl.int64) * stride_c
    return row.to(tl.int64)[:, None] * stride_row + channels[None, :]


@triton.jit
def _points(row, n, rows, width):
    """The offsets of points of spectra, in complex numbers."""
    channels = (n // width).to(tl.int64) * rows * width + n % width
    return row.to(tl.int64)[:, None] * width + channels[None, :]


@triton.jit
def _load_complex(address, offset, exists):
    pair = tl.arange(0, 2)[None, None, :]
    return tl.split(tl.load(address + (2 * offset[:, :, None] + pair), exists[:, :, None], 0))


@triton.jit
def _store_complex(address, offset, real, imaginary, exists):
    pair = tl.arange(0, 2)[None, None, :]
    tl.store(address + (2 * offset[:, :, None] + pair), tl.join(real, imaginary), exists[:, :, None])


@triton.jit
def _mirror_row(row, H, W):
    """Row (-h, k) of each row (h, k), and whether its column k is a self-conjugate one."""
    K = W // 2 + 1
    h, k = row // K, row % K
    return ((H - h) % H) * K + k, (k == 0) | (2 * k == W)


@triton.jit
def _basis(basis, row, rows, f, H, W, F: tl.constexpr):
    """Function f of the basis on these rows, symmetric in the self-conjugate columns."""
    mirror_row, special = _mirror_row(row, H, W)
    address = basis + 2 * (row.to(tl.int64) * F + f)
    mirror = basis + 2 * (mirror_row.to(tl.int64) * F + f)
    exists, mirrored = row < rows, (row < rows) & special
    real, imaginary = tl.load(address, exists, 0), tl.load(address + 1, exists, 0)
    real = tl.where(special, (real + tl.load(mirror, mirrored, 0)) * 0.5, real)
    return real, tl.where(special, (imaginary - tl.load(mirror + 1, mirrored, 0)) * 0.5, imaginary)


@triton.jit
def _weight(weight, row, n, C, w_stride_b, exists, H, W):
    """A global filter on these rows and channels, symmetric in the self-conjugate columns of its spectrum."""
    mirror_row, special = _mirror_row(row, H, W)
    mirrored = exists & special[:, None]
    real, imaginary = _load_complex(weight, _offsets(row, n, C, w_stride_b, C, 1), exists)
    mirror_real, mirror_imaginary = _load_complex(weight, _offsets(mirror_row, n, C, w_stride_b, C, 1), mirrored)
    real = tl.where(special[:, None], (real + mirror_real) * 0.5, real)
    return real, tl.where(special[:, None], (imaginary - mirror_imaginary) * 0.5, imaginary)


@triton.jit
def _logits(logits, n, N, C, f, stride_b, stride_f, stride_c, COMPUTE: tl.constexpr):
    offset = (n // C).to(tl.int64) * stride_b + (n % C).to(tl.int64) * stride_c + f * stride_f
    return tl.load(logits + offset, n < N, 0).to(COMPUTE)


@triton.jit
def _softmax_scale(logits, n, N, C, stride_b, stride_f, stride_c, F: tl.constexpr, COMPUTE: tl.constexpr):
    """The largest logit and the sum of exponentials, for ``r[f] = exp(logits[f] - peak) / total``."""
    peak = _logits(logits, n, N, C, 0, stride_b, stride_f, stride_c, COMPUTE)
    for f in range(1, F):
        peak = tl.maximum(peak, _logits(logits, n, N, C, f, stride_b, stride_f, stride_c, COMPUTE))
    total = tl.zeros_like(peak)
    for f in range(F):
        total += tl.exp(_logits(logits, n, N, C, f, stride_b, stride_f, stride_c, COMPUTE) - peak)
    return peak, total


@triton.jit
def _routing(
    logits, n, N, C, f, stride_b, stride_f, stride_c, peak, total, SOFTMAX: tl.constexpr, COMPUTE: tl.constexpr
):
    value = _logits(logits, n, N, C, f, stride_b, stride_f, stride_c, COMPUTE)
    if SOFTMAX:
        value = tl.exp(value - peak) / total
    return value


@triton.jit
def _store_product(X, offset, exists, real, imaginary, M_real, M_imaginary, norm):
    """``X = (real + i imaginary) M norm``."""
    _store_complex(
        X,
        offset,
        (real * M_real - imaginary * M_imaginary) * norm,
        (real * M_imaginary + imaginary * M_real) * norm,
        exists,
    )


@triton.jit
def _multiply(X, offset, exists, M_real, M_imaginary, norm):
    real, imaginary = _load_complex(X, offset, exists)
    _store_product(X, offset, exists, real, imaginary, M_real, M_imaginary, norm)


# Kernels


@triton.jit
def activate_kernel(
    x, y, scale, bias, rows, N, C,
    x_stride_b, x_stride_row, x_stride_c, y_stride_b, y_stride_row, y_stride_c,
    COMPUTE: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """``y = scale * relu(x)^2 + bias``, or ``y = x`` without scale and bias; any dtypes, any strides."""
    row, n, exists = _tile(rows, N, ROWS, CHANNELS)
    value = tl.load(x + _offsets(row, n, C, x_stride_b, x_stride_row, x_stride_c), exists, 0).to(COMPUTE)
    if scale is not None:
        # Not maximum(x, 0), which would turn NaN into 0.
        r = tl.where(value < 0, 0.0, value)
        value = tl.load(scale).to(COMPUTE) * r * r + tl.load(bias).to(COMPUTE)
    tl.store(y + _offsets(row, n, C, y_stride_b, y_stride_row, y_stride_c), value.to(y.dtype.element_ty), exists)


@triton.jit
def activate_backward_kernel(
    grad_y, x, scale, grad_x, slots, rows, N, C,
    g_stride_b, g_stride_row, g_stride_c, x_stride_b, x_stride_row, x_stride_c, o_stride_b, o_stride_row, o_stride_c,
    COMPUTE: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """``grad_x = 2 scale relu(x) grad_y``; slots (tiles,2) get ``sum(relu(x)^2 grad_y)`` and ``sum(grad_y)``."""
    row, n, exists = _tile(rows, N, ROWS, CHANNELS)
    g = tl.load(grad_y + _offsets(row, n, C, g_stride_b, g_stride_row, g_stride_c), exists, 0).to(COMPUTE)
    r = tl.load(x + _offsets(row, n, C, x_stride_b, x_stride_row, x_stride_c), exists, 0).to(COMPUTE)
    r = tl.where(r < 0, 0.0, r)
    if grad_x is not None:
        # Selected, because with an infinite grad_y a product would be 0 * inf where x <= 0.
        value = tl.where(r == 0, 0.0, 2 * tl.load(scale).to(COMPUTE) * r * g)
        offset = _offsets(row, n, C, o_stride_b, o_stride_row, o_stride_c)
        tl.store(grad_x + offset, value.to(grad_x.dtype.element_ty), exists)
    if slots is not None:
        slot = slots + 2 * tl.program_id(0).to(tl.int64)
        # Sums over a row are float32; longer sums are float64, because terms cancel.
        tl.store(slot, tl.sum(tl.sum(r * r * g, 1).to(tl.float64), 0))
        tl.store(slot + 1, tl.sum(tl.sum(g, 1).to(tl.float64), 0))


@triton.jit
def mix_kernel(
    X, logits, basis, H, W, rows, N, C, width, l_stride_b, l_stride_f, l_stride_c,
    F: tl.constexpr, SOFTMAX: tl.constexpr, COMPUTE: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """``X *= M / (HW)``, ``M[h,k,n] = sum_f r[f,n] basis[h,k,f]``, in place; r is softmax(logits), or the logits."""
    row, n, exists = _tile(rows, N, ROWS, CHANNELS)
    peak, total = _softmax_scale(logits, n, N, C, l_stride_b, l_stride_f, l_stride_c, F, COMPUTE)
    M_real, M_imaginary = tl.zeros((ROWS, CHANNELS), COMPUTE), tl.zeros((ROWS, CHANNELS), COMPUTE)
    for f in range(F):
        r = _routing(logits, n, N, C, f, l_stride_b, l_stride_f, l_stride_c, peak, total, SOFTMAX, COMPUTE)
        basis_real, basis_imaginary = _basis(basis, row, rows, f, H, W, F)
        M_real += basis_real[:, None] * r[None, :]
        M_imaginary += basis_imaginary[:, None] * r[None, :]
    _multiply(X, _points(row, n, rows, width), exists, M_real, M_imaginary, _one_over(H * W, COMPUTE))


@triton.jit
def global_mix_kernel(
    X, weight, H, W, rows, N, C, width, w_stride_b,
    COMPUTE: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """``X *= weight / (HW)``, in place."""
    row, n, exists = _tile(rows, N, ROWS, CHANNELS)
    M_real, M_imaginary = _weight(weight, row, n, C, w_stride_b, exists, H, W)
    _multiply(X, _points(row, n, rows, width), exists, M_real, M_imaginary, _one_over(H * W, COMPUTE))


@triton.jit
def mix_backward_kernel(
    G, X, logits, basis, r_slots, basis_slots, H, W, rows, N, C, width, l_stride_b, l_stride_f, l_stride_c,
    F: tl.constexpr, SOFTMAX: tl.constexpr, STORE_G: tl.constexpr, COMPUTE: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """``G *= conj(M) / (HW)`` in place, and partial sums for the gradients of logits and basis.

    With ``P = D G conj(X) / (HW)`` of the original G, r_slots (row tiles,F,N) get ``sum_hk Re(P conj(basis[h,k,f]))``,
    and basis_slots (channel tiles,rows,F,2) get ``sum_n r[f,n] P``.
    """
    row, n, exists = _tile(rows, N, ROWS, CHANNELS)
    norm = _one_over(H * W, COMPUTE)
    offset = _points(row, n, rows, width)
    peak, total = _softmax_scale(logits, n, N, C, l_stride_b, l_stride_f, l_stride_c, F, COMPUTE)
    G_real, G_imaginary = _load_complex(G, offset, exists)
    if X is not None:
        X_real, X_imaginary = _load_complex(X, offset, exists)
        _, special = _mirror_row(row, H, W)
        D = tl.where(special, norm, 2 * norm)[:, None]
        P_real = D * (G_real * X_real + G_imaginary * X_imaginary)
        P_imaginary = D * (G_imaginary * X_real - G_real * X_imaginary)
    if STORE_G:
        M_real, M_imaginary = tl.zeros((ROWS, CHANNELS), COMPUTE), tl.zeros((ROWS, CHANNELS), COMPUTE)
    for f in range(F):
        r = _routing(logits, n, N, C, f, l_stride_b, l_stride_f, l_stride_c, peak, total, SOFTMAX, COMPUTE)
        if STORE_G:
            real, imaginary = _basis(basis, row, rows, f, H, W, F)
            M_real += real[:, None] * r[None, :]
            M_imaginary += imaginary[:, None] * r[None, :]
        if r_slots is not None:
            address = basis + 2 * (row.to(tl.int64) * F + f)
            real, imaginary = tl.load(address, row < rows, 0), tl.load(address + 1, row < rows, 0)
            part = tl.sum(P_real * real[:, None] + P_imaginary * imaginary[:, None], 0)
            slot = (tl.program_id(0) // tl.cdiv(N, CHANNELS)).to(tl.int64) * F + f
            tl.store(r_slots + slot * N + n, part, n < N)
        if basis_slots is not None:
            slot = (tl.program_id(0) % tl.cdiv(N, CHANNELS)).to(tl.int64) * rows + row
            address = basis_slots + 2 * (slot * F + f)
            tl.store(address, tl.sum(P_real * r[None, :], 1), row < rows)
            tl.store(address + 1, tl.sum(P_imaginary * r[None, :], 1), row < rows)
    if STORE_G:
        _store_product(G, offset, exists, G_real, G_imaginary, M_real, -M_imaginary, norm)


@triton.jit
def global_mix_backward_kernel(
    G, X, weight, slots, H, W, rows, B, channels, C, width, w_stride_b, samples,
    STORE_G: tl.constexpr, COMPUTE: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """``G *= conj(weight) / (HW)`` in place; slots (slices,rows,C,2) get ``sum_b D G conj(X) / (HW)`` of the old G.

    A program has a tile of channels, and goes through a slice of ``samples`` samples, one after the other. If each
    sample has a weight of its own, all N = ``channels`` count as one sample, and slots are (1,N/C,rows,C,2).
    """
    row, n, exists = _tile(rows, channels, ROWS, CHANNELS)
    norm = _one_over(H * W, COMPUTE)
    _, special = _mirror_row(row, H, W)
    D = tl.where(special, norm, 2 * norm)[:, None]
    if STORE_G:
        M_real, M_imaginary = _weight(weight, row, n, C, w_stride_b, exists, H, W)
    sum_real, sum_imaginary = tl.zeros((ROWS, CHANNELS), COMPUTE), tl.zeros((ROWS, CHANNELS), COMPUTE)
    first = tl.program_id(1) * samples
    for b in range(first, tl.minimum(first + samples, B)):
        offset = _points(row, b * channels + n, rows, width)
        G_real, G_imaginary = _load_complex(G, offset, exists)
        if X is not None:
            X_real, X_imaginary = _load_complex(X, offset, exists)
            sum_real += G_real * X_real + G_imaginary * X_imaginary
            sum_imaginary += G_imaginary * X_real - G_real * X_imaginary
        if STORE_G:
            _store_product(G, offset, exists, G_real, G_imaginary, M_real, -M_imaginary, norm)
    if slots is not None:
        slot = tl.program_id(1).to(tl.int64) * rows * C
        _store_complex(slots, slot + _offsets(row, n, C, w_stride_b, C, 1), D * sum_real, D * sum_imaginary, exists)


@triton.jit
def softmax_backward_kernel(
    grad_r, logits, grad_logits, N, C, l_stride_b, l_stride_f, l_stride_c, o_stride_b, o_stride_f, o_stride_c,
    F: tl.constexpr, COMPUTE: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """``grad_logits[f] = r[f] (grad_r[f] - sum_g r[g] grad_r[g])``, ``r = softmax(logits)``; grad_r is (F,N)."""
    n = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    peak, total = _softmax_scale(logits, n, N, C, l_stride_b, l_stride_f, l_stride_c, F, COMPUTE)
    mean = tl.zeros_like(peak)
    for f in range(F):
        r = tl.exp(_logits(logits, n, N, C, f, l_stride_b, l_stride_f, l_stride_c, COMPUTE) - peak) / total
        mean += r * tl.load(grad_r + f * tl.cast(N, tl.int64) + n, n < N, 0)
    for f in range(F):
        r = tl.exp(_logits(logits, n, N, C, f, l_stride_b, l_stride_f, l_stride_c, COMPUTE) - peak) / total
        value = r * (tl.load(grad_r + f * tl.cast(N, tl.int64) + n, n < N, 0) - mean)
        offset = (n // C).to(tl.int64) * o_stride_b + (n % C).to(tl.int64) * o_stride_c + f * o_stride_f
        tl.store(grad_logits + offset, value.to(grad_logits.dtype.element_ty), n < N)
