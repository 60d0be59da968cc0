// Transforms of lines of any length, following a LinePlan.
//
// Forward: in each pass a butterfly, then twiddles. Inverse: the passes in reverse order, twiddles before the
// butterfly, with real and imaginary parts swapped. Neither is normalised.
//
// A pass is a template over its source and sink, so that it can also convert from or to another layout. For line i,
// source(i)(a, radix, outer, m) loads a[0 .. radix) and sink(i)(a, radix, outer, m) stores it. `radix` is an Index<R>,
// and a[] is in registers, if that radix has an unrolled butterfly; otherwise it is an int.

namespace {

template <class V>
using PassOf = Pass<typename ScalarOf<V>::Type>;
template <class V>
using PlanOf = LinePlan<typename ScalarOf<V>::Type>;

template <class T>
FFT_INLINE Complex<T> pair_at(const T* pairs, std::int64_t i) {
    return {pairs[2 * i], pairs[2 * i + 1]};
}

// fn(0), ..., fn(radix - 1)
template <int R, class Fn>
FFT_INLINE void for_each(Index<R>, Fn&& fn) {
    unrolled<0, R>(fn);
}
template <class Fn>
FFT_INLINE void for_each(int radix, Fn&& fn) {
    for (int r = 0; r < radix; r++) fn(r);
}

// Lines in memory, `stride` apart, each [outer][radix][inner].
template <class V>
auto line_source(const Complex<V>* lines, std::int64_t inner, std::int64_t stride) {
    return [=](std::int64_t i) UNROLLED_BODY {
        return [=, line = lines + i * stride](Complex<V>* a, auto radix, std::int64_t outer, std::int64_t m)
                   UNROLLED_BODY {
                       const Complex<V>* first = line + outer * radix * inner + m;
                       for_each(radix, [&](auto r) UNROLLED_BODY { a[r] = first[r * inner]; });
                   };
    };
}
template <class V>
auto line_sink(Complex<V>* lines, std::int64_t inner, std::int64_t stride) {
    return [=](std::int64_t i) UNROLLED_BODY {
        return [=, line = lines + i * stride](Complex<V>* a, auto radix, std::int64_t outer, std::int64_t m)
                   UNROLLED_BODY {
                       Complex<V>* first = line + outer * radix * inner + m;
                       for_each(radix, [&](auto r) UNROLLED_BODY { first[r * inner] = a[r]; });
                   };
    };
}

// results[k] = sum_n x[n] exp(-2 pi i n k / radix) for `count` frequencies k from `first` on and their negatives, which
// share the loads. a[n] holds the sum x[n] + x[-n], a[radix - n] the difference x[n] - x[-n].
template <int count, class V>
void direct_frequencies(const PassOf<V>& pass, const Complex<V>* a, int first, Complex<V>* results) {
    const int radix = pass.radix, half = radix / 2;
    const auto* roots = pass.roots;
    Complex<V> even[count], odd[count];
    int turn[count];
    unrolled<0, count>([&](auto i) UNROLLED_BODY {
        even[i] = a[0];
        odd[i] = Complex<V>{};
        turn[i] = first + i;
    });
    for (int n = 1; n <= half; n++) {
        const Complex<V> sum = a[n], difference = a[radix - n];
        unrolled<0, count>([&](auto i) UNROLLED_BODY {
            const auto root = pair_at(roots, turn[i]);
            even[i] = {even[i].re + sum.re * root.re, even[i].im + sum.im * root.re};
            odd[i] = {odd[i].re + difference.re * root.im, odd[i].im + difference.im * root.im};
            turn[i] += first + i;
            turn[i] -= turn[i] >= radix ? radix : 0;
        });
    }
    unrolled<0, count>([&](auto i) UNROLLED_BODY {
        results[first + i] = {even[i].re - odd[i].im, even[i].im + odd[i].re};
        results[radix - first - i] = {even[i].re + odd[i].im, even[i].im - odd[i].re};
    });
}

// An odd radix by the definition, in place. `a` has room for 2 * radix points.
template <class V>
void direct_butterfly(const PassOf<V>& pass, Complex<V>* a) {
    const int radix = pass.radix, half = radix / 2;
    Complex<V>* results = a + radix;
    results[0] = a[0];
    for (int n = 1; n <= half; n++) {
        const Complex<V> sum = a[n] + a[radix - n], difference = a[n] - a[radix - n];
        a[n] = sum;
        a[radix - n] = difference;
        results[0] = results[0] + sum;
    }
    constexpr int together = VECTOR_BYTES == 64 ? 4 : 2;  // limited by the number of registers
    int k = 1;
    for (; k + together <= half + 1; k += together) direct_frequencies<together, V>(pass, a, k, results);
    for (; k <= half; k++) direct_frequencies<1, V>(pass, a, k, results);
    for (int i = 0; i < radix; i++) a[i] = results[i];
}

template <bool inverse, class V>
void transform_line(const PlanOf<V>& plan, Complex<V>* line);

// A prime p as a circular convolution of p - 1 points (Rader): with samples and frequencies numbered by powers of a
// generator, their product n k becomes a sum of exponents. `a` has room for 2 p - 1 points.
template <class V>
void rader_butterfly(const PassOf<V>& pass, Complex<V>* a) {
    const PlanOf<V>& convolution = *pass.convolution;
    const Complex<V> first = a[0];
    Complex<V>* line = a + pass.radix;
    for (int p = 0; p < convolution.size; p++) line[p] = a[pass.inputs[p]];
    transform_line<false, V>(convolution, line);
    Complex<V>& sum = line[convolution.frequency_at[0]];
    a[0] = first + sum;
    for (int p = 0; p < convolution.size; p++) line[p] = line[p] * pair_at(pass.spectrum, p);
    sum = sum + first;  // sample 0 is no power of the generator, and adds to every frequency
    transform_line<true, V>(convolution, line);
    for (int p = 0; p < convolution.size; p++) a[pass.outputs[p]] = line[p];
}

// A prime p for which p - 1 has large factors: a convolution with a chirp, of a smooth length (Bluestein). `a` has room
// for p points and the convolution's.
template <class V>
void bluestein_butterfly(const PassOf<V>& pass, Complex<V>* a) {
    const PlanOf<V>& convolution = *pass.convolution;
    Complex<V>* line = a + pass.radix;
    for (int p = 0; p < convolution.size; p++) line[p] = Complex<V>{};
    for (int n = 0; n < pass.radix; n++) line[convolution.position[n]] = a[n] * pair_at(pass.chirp, n);
    transform_line<false, V>(convolution, line);
    for (int p = 0; p < convolution.size; p++) line[p] = line[p] * pair_at(pass.spectrum, p);
    transform_line<true, V>(convolution, line);
    for (int k = 0; k < pass.radix; k++) a[k] = line[convolution.position[k]] * pair_at(pass.chirp, k);
}

template <class V, int R>
FFT_INLINE void pass_butterfly(const PassOf<V>&, Index<R>, Complex<V>* a) {
    butterfly<R>(a);
}
template <class V>
FFT_INLINE void pass_butterfly(const PassOf<V>& pass, int, Complex<V>* a) {
    if (pass.inputs) return rader_butterfly(pass, a);
    pass.chirp ? bluestein_butterfly(pass, a) : direct_butterfly(pass, a);
}

template <class V, class Radix>
FFT_INLINE void twiddle(const PassOf<V>& pass, Radix radix, std::int64_t m, Complex<V>* a) {
    const auto* twiddles = pass.twiddles + 2 * m * (radix - 1);
    for_each(radix, [&](auto r) UNROLLED_BODY {
        if (r > 0) a[r] = a[r] * pair_at(twiddles, r - 1);
    });
}

template <class V, class Radix>
FFT_INLINE void swap_parts(Radix radix, Complex<V>* a) {
    for_each(radix, [&](auto r) UNROLLED_BODY { a[r] = Complex<V>{a[r].im, a[r].re}; });
}

template <bool inverse, bool twiddled, class V, class Radix, class Source, class Sink>
FFT_INLINE void run_butterflies(const PassOf<V>& pass, std::int64_t lines, Radix radix, Complex<V>* a,
                                const Source& source, const Sink& sink) {
    const std::int64_t outers = pass.outer, inner = pass.inner;
    for (std::int64_t i = 0; i < lines; i++) {
        const auto from = source(i);
        const auto to = sink(i);
        for (std::int64_t outer = 0; outer < outers; outer++)
            for (std::int64_t m = 0; m < inner; m++) {
                from(a, radix, outer, m);
                if constexpr (inverse) swap_parts<V>(radix, a);
                if constexpr (inverse && twiddled) twiddle<V>(pass, radix, m, a);
                pass_butterfly<V>(pass, radix, a);
                if constexpr (!inverse && twiddled) twiddle<V>(pass, radix, m, a);
                if constexpr (inverse) swap_parts<V>(radix, a);
                to(a, radix, outer, m);
            }
    }
}

template <bool inverse, bool twiddled, int R, class V, class Source, class Sink>
void unrolled_pass(const PassOf<V>& pass, std::int64_t lines, const Source& source, const Sink& sink) {
    Complex<V> a[R];
    run_butterflies<inverse, twiddled, V>(pass, lines, Index<R>{}, a, source, sink);
}

// `scratch` holds LinePlan::scratch elements; only radices without an unrolled butterfly use it.
template <bool inverse, bool twiddled, class V, class Source, class Sink>
void run_pass_of_any_radix(const PassOf<V>& pass, std::int64_t lines, Complex<V>* scratch, const Source& source,
                           const Sink& sink) {
    if (pass.radix > 8) return run_butterflies<inverse, twiddled, V>(pass, lines, pass.radix, scratch, source, sink);
    unrolled<1, 9>([&](auto radix) UNROLLED_BODY {
        if constexpr (radix.value != 6)
            if (pass.radix == radix) unrolled_pass<inverse, twiddled, radix.value, V>(pass, lines, source, sink);
    });
}

// A plan's last pass has no twiddles.
template <bool inverse, class V, bool last = false, class Source, class Sink>
void run_pass(const PassOf<V>& pass, std::int64_t lines, Complex<V>* scratch, const Source& source, const Sink& sink) {
    if constexpr (!last)
        if (pass.twiddles) return run_pass_of_any_radix<inverse, true, V>(pass, lines, scratch, source, sink);
    run_pass_of_any_radix<inverse, false, V>(pass, lines, scratch, source, sink);
}

// Passes [first, last) of a plan, in place, over lines or, with parts > 1, over one part of each line: after a few
// passes a line consists of independent transforms. The inverse runs the passes in reverse order.
template <bool inverse, class V>
void run_passes_of_part(const PlanOf<V>& plan, int first, int last, std::int64_t parts, std::int64_t lines,
                        Complex<V>* line, std::int64_t stride, Complex<V>* scratch) {
    for (int i = first; i < last; i++) {
        PassOf<V> pass = plan.passes[inverse ? first + last - 1 - i : i];
        pass.outer /= int(parts);
        run_pass<inverse, V>(pass, lines, scratch, line_source(line, pass.inner, stride),
                             line_sink(line, pass.inner, stride));
    }
}

// A longer line, in bytes, does not stay in L1 from one pass to the next.
constexpr std::int64_t longest_whole_line = 32768;

// How a long line is split: passes from `split` on finish one part before they start the next. A short line is one
// part.
template <class V>
struct Parts {
    int split = 0;
    std::int64_t count, length;

    explicit Parts(const PlanOf<V>& plan) {
        const std::int64_t most = longest_whole_line / sizeof(Complex<V>);
        while (split + 1 < plan.num_passes && plan.size / plan.passes[split].outer > most) split++;
        count = plan.passes[split].outer;
        length = plan.size / count;
    }
};

template <bool inverse, class V>
void run_passes(const PlanOf<V>& plan, int first, int last, std::int64_t lines, Complex<V>* line, std::int64_t stride,
                Complex<V>* scratch) {
    const Parts<V> parts(plan);
    if (parts.count == 1) return run_passes_of_part<inverse, V>(plan, first, last, 1, lines, line, stride, scratch);
    const int split = first > parts.split ? first : parts.split;
    if (!inverse) run_passes_of_part<false, V>(plan, first, split, 1, lines, line, stride, scratch);
    for (std::int64_t i = 0; i < lines; i++)
        for (std::int64_t part = 0; part < parts.count; part++)
            run_passes_of_part<inverse, V>(plan, split, last, parts.count, 1, line + i * stride + part * parts.length,
                                           0, scratch);
    if (inverse) run_passes_of_part<true, V>(plan, first, split, 1, lines, line, stride, scratch);
}

template <bool inverse, class V>
void transform_line(const PlanOf<V>& plan, Complex<V>* line) {
    run_passes<inverse, V>(plan, 0, plan.num_passes, 1, line, 0, nullptr);
}

}  // namespace
