// Transforms of lines of any length, following a Plan. Included once per instruction set, after lanes.inl.
//
// Forward: butterfly, then twiddles, pass by pass. Inverse: the same backwards with real and imaginary parts exchanged,
// twiddles first. Neither is normalised. Lines are transformed in place, `count` of them `stride` elements apart.

namespace {

#include "../fft/butterflies.inl"

template <>
struct ScalarOf<F32> {
    using Type = float;
};
template <>
struct ScalarOf<F64> {
    using Type = double;
};

template <bool inverse, class V>
FFT_INLINE Complex<V> exchanged(Complex<V> a) {
    if constexpr (inverse) return {a.im, a.re};
    return a;
}

template <class T>
FFT_INLINE Complex<T> pair_at(const T* pairs, std::int64_t i) {
    return {pairs[2 * i], pairs[2 * i + 1]};
}

template <class V>
using PassOf = Pass<typename ScalarOf<V>::Type>;
template <class V>
using PlanOf = Plan<typename ScalarOf<V>::Type>;

template <int R, bool inverse, bool twiddled, class V>
void unrolled_pass(const PassOf<V>& pass, Complex<V>* lines, std::int64_t count, std::int64_t stride) {
    const std::int64_t inner = pass.inner;
    for (std::int64_t line = 0; line < count; line++)
        for (int outer = 0; outer < pass.outer; outer++) {
            Complex<V>* first = lines + line * stride + outer * R * inner;
            const auto* twiddles = pass.twiddles;
            for (std::int64_t m = 0; m < inner; m++, twiddles += 2 * (R - 1)) {
                Complex<V> a[R];
                unrolled<0, R>([&](auto r) UNROLLED_BODY {
                    a[r] = exchanged<inverse>(first[m + r * inner]);
                    if constexpr (inverse && twiddled && r.value > 0) a[r] = a[r] * pair_at(twiddles, r - 1);
                });
                butterfly<R>(a);
                unrolled<0, R>([&](auto r) UNROLLED_BODY {
                    if constexpr (!inverse && twiddled && r.value > 0) a[r] = a[r] * pair_at(twiddles, r - 1);
                    first[m + r * inner] = exchanged<inverse>(a[r]);
                });
            }
        }
}

// a[k] = sum_n a[n] exp(-2 pi i n k / radix) by its definition, for an odd radix: samples n and radix - n together.
template <class V>
void direct_butterfly(const PassOf<V>& pass, Complex<V>* a) {
    const int half = pass.radix / 2;
    Complex<V> mean = a[0];
    for (int n = 1; n <= half; n++) {
        const Complex<V> sum = a[n] + a[pass.radix - n], difference = a[n] - a[pass.radix - n];
        a[n] = sum;
        a[pass.radix - n] = difference;
        mean = mean + sum;
    }
    Complex<V>* results = a + pass.radix;
    results[0] = mean;
    for (int k = 1; k <= half; k++) {
        Complex<V> even = a[0], odd{};
        for (int n = 1, turn = k; n <= half; n++) {
            const auto root = pair_at(pass.roots, turn);
            even = {even.re + a[n].re * root.re, even.im + a[n].im * root.re};
            odd = {odd.re + a[pass.radix - n].re * root.im, odd.im + a[pass.radix - n].im * root.im};
            turn += k;
            if (turn >= pass.radix) turn -= pass.radix;
        }
        results[k] = {even.re - odd.im, even.im + odd.re};
        results[pass.radix - k] = {even.re + odd.im, even.im - odd.re};
    }
}

template <bool inverse, class V>
void transform(const PlanOf<V>& plan, Complex<V>* lines, std::int64_t count, std::int64_t stride, Complex<V>* scratch);

// A large prime: a chirp turns the transform into a convolution, done by transforms of a smooth length (Bluestein).
template <class V>
void chirp_butterfly(const PassOf<V>& pass, Complex<V>* a) {
    const PlanOf<V>& convolution = *pass.convolution;
    Complex<V>* line = a + pass.radix;
    for (int p = 0; p < convolution.size; p++) line[p] = Complex<V>{};
    for (int n = 0; n < pass.radix; n++) line[convolution.position[n]] = a[n] * pair_at(pass.chirp, n);
    transform<false>(convolution, line, 1, 0, line);
    for (int p = 0; p < convolution.size; p++) line[p] = line[p] * pair_at(pass.chirp_spectrum, p);
    transform<true>(convolution, line, 1, 0, line);
    for (int k = 0; k < pass.radix; k++) a[k] = line[convolution.position[k]] * pair_at(pass.chirp, k);
}

template <bool inverse, class V>
void prime_pass(const PassOf<V>& pass, Complex<V>* lines, std::int64_t count, std::int64_t stride, Complex<V>* scratch) {
    const int radix = pass.radix;
    const std::int64_t inner = pass.inner;
    for (std::int64_t line = 0; line < count; line++)
        for (std::int64_t i = 0; i < pass.outer * inner; i++) {
            const std::int64_t m = i % inner;
            Complex<V>* first = lines + line * stride + (i - m) * radix + m;
            const auto twiddled = [&](Complex<V> a, int r) {
                return pass.twiddles && r > 0 ? a * pair_at(pass.twiddles, m * (radix - 1) + r - 1) : a;
            };
            for (int r = 0; r < radix; r++) {
                const Complex<V> a = exchanged<inverse>(first[r * inner]);
                scratch[r] = inverse ? twiddled(a, r) : a;
            }
            const Complex<V>* results = scratch;
            if (pass.chirp) {
                chirp_butterfly(pass, scratch);
            } else {
                direct_butterfly(pass, scratch);
                results = scratch + radix;
            }
            for (int r = 0; r < radix; r++)
                first[r * inner] = exchanged<inverse>(inverse ? results[r] : twiddled(results[r], r));
        }
}

template <bool inverse, class V>
void run_pass(const PassOf<V>& pass, Complex<V>* lines, std::int64_t count, std::int64_t stride, Complex<V>* scratch) {
    const auto run = [&](auto radix) {
        if (pass.twiddles)
            unrolled_pass<radix.value, inverse, true>(pass, lines, count, stride);
        else
            unrolled_pass<radix.value, inverse, false>(pass, lines, count, stride);
    };
    switch (pass.radix) {
        case 2: return run(Index<2>{});
        case 3: return run(Index<3>{});
        case 4: return run(Index<4>{});
        case 5: return run(Index<5>{});
        case 6: return run(Index<6>{});
        case 7: return run(Index<7>{});
        case 8: return run(Index<8>{});
        case 9: return run(Index<9>{});
        case 10: return run(Index<10>{});
        case 11: return run(Index<11>{});
        case 12: return run(Index<12>{});
        case 13: return run(Index<13>{});
        case 14: return run(Index<14>{});
        case 16: return run(Index<16>{});
        default: return prime_pass<inverse>(pass, lines, count, stride, scratch);
    }
}

template <bool inverse, class V>
void transform(const PlanOf<V>& plan, Complex<V>* lines, std::int64_t count, std::int64_t stride, Complex<V>* scratch) {
    for (int i = 0; i < plan.num_passes; i++)
        run_pass<inverse>(plan.passes[inverse ? plan.num_passes - 1 - i : i], lines, count, stride, scratch);
}

}  // namespace
