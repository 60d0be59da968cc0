// Lane types: how elements are stored in memory and computed with in a register. Each instruction set defines
// VECTOR_BYTES, the width of a register.
//
// A lane type L has L::Scalar (storage), L::Vec (arithmetic register), L::count, L::load and L::store.

namespace {

#include "../../fft/butterflies.inl"

using F32 = float __attribute__((vector_size(VECTOR_BYTES)));
using F64 = double __attribute__((vector_size(VECTOR_BYTES)));
using I32 = std::int32_t __attribute__((vector_size(VECTOR_BYTES)));
using I64 = std::int64_t __attribute__((vector_size(VECTOR_BYTES)));
using U32 = std::uint32_t __attribute__((vector_size(VECTOR_BYTES)));
using U16 = std::uint16_t __attribute__((vector_size(VECTOR_BYTES / 2)));
// For sums of float32 in float64: it has as many lanes as F32, and so is twice as wide as a register.
using F64Wide = double __attribute__((vector_size(2 * VECTOR_BYTES)));

template <>
struct ScalarOf<F32> {
    using Type = float;
    static constexpr bool immediate = false;
};
template <>
struct ScalarOf<F64> {
    using Type = double;
    static constexpr bool immediate = false;
};

template <class To, class From>
inline To bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    __builtin_memcpy(&to, &from, sizeof(to));
    return to;
}

template <class Vec, class Scalar>
inline Vec load_unaligned(const Scalar* from) {
    Vec v;
    __builtin_memcpy(&v, from, sizeof(v));
    return v;
}

template <class T, class Register>
struct NativeLane {
    using Scalar = T;
    using Vec = Register;
    static constexpr int count = sizeof(Register) / sizeof(T);
    static Vec load(const Scalar* from) { return load_unaligned<Vec>(from); }
    static void store(Scalar* to, Vec v) { __builtin_memcpy(to, &v, sizeof(v)); }
};
// Non-temporal stores, for registers as wide as a cache line. The address must be aligned to the register. Other
// threads see the store after a `stream_fence`.
#if VECTOR_BYTES == 64
constexpr bool can_stream = true;
template <class Vec>
inline void stream(void* to, Vec v) {
    _mm512_stream_ps(static_cast<float*>(to), bits<__m512>(v));
}
inline void stream_fence() { _mm_sfence(); }
#else
constexpr bool can_stream = false;
template <class Vec>
inline void stream(void*, Vec) {}
inline void stream_fence() {}
#endif

using Float32 = NativeLane<float, F32>;
using Float64 = NativeLane<double, F64>;

struct BFloat16 {
    using Scalar = std::uint16_t;
    using Vec = F32;
    static constexpr int count = VECTOR_BYTES / 4;

    static Vec load(const Scalar* from) {
        return bits<F32>(__builtin_convertvector(load_unaligned<U16>(from), U32) << 16);
    }
    static void store(Scalar* to, Vec v) {
        const U32 b = bits<U32>(v);
        const U32 nearest_even = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
        const U32 quiet_nan = (b >> 16) | 0x40;
        const U16 h = __builtin_convertvector(v != v ? quiet_nan : nearest_even, U16);
        __builtin_memcpy(to, &h, sizeof(h));
    }
};

struct Float16 {
    using Scalar = std::uint16_t;
    using Vec = F32;
    static constexpr int count = VECTOR_BYTES / 4;

#if VECTOR_BYTES == 64
    static Vec load(const Scalar* from) { return bits<F32>(_mm512_cvtph_ps(load_unaligned<__m256i>(from))); }
    static void store(Scalar* to, Vec v) {
        const __m256i h = _mm512_cvtps_ph(bits<__m512>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        __builtin_memcpy(to, &h, sizeof(h));
    }
#elif VECTOR_BYTES == 32
    static Vec load(const Scalar* from) { return bits<F32>(_mm256_cvtph_ps(load_unaligned<__m128i>(from))); }
    static void store(Scalar* to, Vec v) {
        const __m128i h = _mm256_cvtps_ph(bits<__m256>(v), _MM_FROUND_TO_NEAREST_INT);
        __builtin_memcpy(to, &h, sizeof(h));
    }
#else
    static Vec load(const Scalar* from) {
        const U32 h = __builtin_convertvector(load_unaligned<U16>(from), U32);
        const U32 magnitude = (h & 0x7fff) << 13;
        const F32 rebias =
            bits<F32>(U32{} + 0x77800000);  // 2^112: float16's exponent bias to float32's, subnormals too
        const U32 finite = bits<U32>(bits<F32>(magnitude) * rebias);
        const U32 value = magnitude >= 0x0f800000 ? (magnitude | 0x7f800000) : finite;
        return bits<F32>(value | ((h & 0x8000) << 16));
    }
    static void store(Scalar* to, Vec v) {
        const U32 b = bits<U32>(v), magnitude = b & 0x7fffffff;
        const U32 normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
        const F32 half = F32{} + 0.5f;  // adding it moves a subnormal result's bits to the bottom, rounded to even
        const U32 subnormal = bits<U32>(bits<F32>(magnitude) + half) - bits<U32>(half);
        const U32 infinite = magnitude > 0x7f800000 ? U32{} + 0x7e00 : U32{} + 0x7c00;
        const U32 finite = magnitude < 0x38800000 ? subnormal : normal;
        const U32 value = (magnitude >= 0x47800000 ? infinite : finite) | ((b >> 16) & 0x8000);
        const U16 h = __builtin_convertvector(value, U16);
        __builtin_memcpy(to, &h, sizeof(h));
    }
#endif
};

// Loads and stores of the first n < L::count elements; other lanes are zero, other memory is not touched.
#if VECTOR_BYTES == 64
template <class L>
inline typename L::Vec load_first(const typename L::Scalar* from, int n) {
    using Vec = typename L::Vec;
    const unsigned mask = (1u << n) - 1;
    if constexpr (sizeof(*from) == 8) return bits<Vec>(_mm512_maskz_loadu_pd(mask, from));
    if constexpr (sizeof(*from) == 4) return bits<Vec>(_mm512_maskz_loadu_ps(mask, from));
    if constexpr (sizeof(*from) == 2) {
        const __m256i elements = _mm256_maskz_loadu_epi16(mask, from);
        return L::load(reinterpret_cast<const typename L::Scalar*>(&elements));
    }
}
template <class L>
inline void store_first(typename L::Scalar* to, typename L::Vec v, int n) {
    const unsigned mask = (1u << n) - 1;
    if constexpr (sizeof(*to) == 8) _mm512_mask_storeu_pd(to, mask, bits<__m512d>(v));
    if constexpr (sizeof(*to) == 4) _mm512_mask_storeu_ps(to, mask, bits<__m512>(v));
    if constexpr (sizeof(*to) == 2) {
        __m256i elements;
        L::store(reinterpret_cast<typename L::Scalar*>(&elements), v);
        _mm256_mask_storeu_epi16(to, mask, elements);
    }
}
#else
template <class L>
__attribute__((noinline)) typename L::Vec load_first(const typename L::Scalar* from, int n) {
    typename L::Scalar elements[L::count] = {};
    for (int i = 0; i < n; i++) elements[i] = from[i];
    return L::load(elements);
}
template <class L>
__attribute__((noinline)) void store_first(typename L::Scalar* to, typename L::Vec v, int n) {
    typename L::Scalar elements[L::count];
    L::store(elements, v);
    for (int i = 0; i < n; i++) to[i] = elements[i];
}
#endif

// Loads and stores of the first n <= L::count elements.
template <class L>
FFT_INLINE typename L::Vec load(const typename L::Scalar* from, int n) {
    return n == L::count ? L::load(from) : load_first<L>(from, n);
}
template <class L>
FFT_INLINE void store(typename L::Scalar* to, typename L::Vec v, int n) {
    n == L::count ? L::store(to, v) : store_first<L>(to, v, n);
}

// fn(first element, number of elements) for each register of elements [first, last) of `size`. `last` is a multiple of
// the register's or `size`. The number is a constant for full registers.
template <int lanes, class Fn>
FFT_INLINE void for_each_register(std::int64_t first, std::int64_t last, std::int64_t size, const Fn& fn) {
    for (; first + lanes <= size && first < last; first += lanes) fn(first, Index<lanes>{});
    if (first < last) fn(first, int(size - first));
}

// exp(x) for x <= 0, to about 1 ulp; zero where the result would be subnormal. x = n ln 2 + r; exp(r) is its Taylor
// series, 2^n is added to the exponent.
template <class Int, int terms, int mantissa_bits, class Vec, class Scalar>
inline Vec exp_nonpositive(Vec x, Scalar lowest, Scalar ln2_high, Scalar ln2_low) {
    constexpr Scalar rounder = 1.5 * (1ll << mantissa_bits);  // adding it rounds to an integer
    const Vec bounded = x < lowest ? Vec{} + lowest : x;
    const Vec shifted = bounded * Scalar(1.4426950408889634) + rounder;
    const Vec n = shifted - rounder, r = (bounded - n * ln2_high) - n * ln2_low;
    Vec series = Vec{} + Scalar(1);
    for (int i = terms; i > 0; i--) series = series * r * Scalar(1.0 / i) + Scalar(1);
    const Int power = bits<Int>(shifted) - bits<Int>(Vec{} + rounder);
    const Vec result = bits<Vec>(bits<Int>(series) + (power << mantissa_bits));
    return x < lowest ? Vec{} : x != x ? x : result;
}
inline F32 exp_nonpositive(F32 x) { return exp_nonpositive<I32, 7, 23>(x, -87.0f, 0.693359375f, -2.12194440e-4f); }
inline F64 exp_nonpositive(F64 x) {
    return exp_nonpositive<I64, 14, 52>(x, -708.0, 0.6931471803691238, 1.9082149292705877e-10);
}

template <int... I>
struct Indices {};
template <int n, int... I>
struct CountTo : CountTo<n - 1, n - 1, I...> {};
template <int... I>
struct CountTo<0, I...> {
    using Type = Indices<I...>;
};
// In each `width` lanes every second `size` lanes of a, then of b, starting with the first (0) or the second (1).
template <int first, int size, int width, class Vec, int... I>
inline Vec alternate(Vec a, Vec b, Indices<I...>) {
    constexpr int lanes = sizeof...(I), half = width / 2;
    return __builtin_shufflevector(
        a, b,
        (I / width * width + (I % half / size * 2 + first) * size + I % size + (I % width < half ? 0 : lanes))...);
}
template <int first, int size, int width, class Vec>
inline Vec alternate(Vec a, Vec b) {
    return alternate<first, size, width>(a, b, typename CountTo<sizeof(Vec) / sizeof(a[0])>::Type{});
}
// The lower or upper halves of a and b, interleaved.
template <bool upper, class Vec, int... I>
inline Vec interleave(Vec a, Vec b, Indices<I...>) {
    constexpr int lanes = sizeof...(I), first = upper ? lanes / 2 : 0;
    return __builtin_shufflevector(a, b, (first + I / 2 + (I % 2 ? lanes : 0))...);
}
template <bool upper, class Vec>
inline Vec interleave(Vec a, Vec b) {
    return interleave<upper>(a, b, typename CountTo<sizeof(Vec) / sizeof(a[0])>::Type{});
}
// Horizontal sum of float64 lanes.
template <class Vec>
inline double lane_sum(Vec v) {
    double sum = 0;
    for (int i = 0; i < int(sizeof(v) / sizeof(v[0])); i++) sum += v[i];
    return sum;
}
// A float64 sum of registers of either type.
inline F64Wide widened(F32 v) { return __builtin_convertvector(v, F64Wide); }
inline F64 widened(F64 v) { return v; }
template <class Vec>
struct Accumulator {
    decltype(widened(Vec{})) sum{};
    void add(Vec v) { sum += widened(v); }
};

}  // namespace
