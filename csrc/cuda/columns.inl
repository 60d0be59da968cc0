// Transforms along columns: of a prime or few points in registers, of more as two factors.

// fn(0), ..., fn(count - 1): in a loop, or one after the other with constants.
template <int count, bool rolled, class Fn>
FFT_INLINE void counted(Fn&& fn) {
    if constexpr (rolled) {
#pragma unroll 1
        for (int i = 0; i < count; i++) fn(i);
    } else {
        unrolled<0, count>(fn);
    }
}

template <class T>
FFT_INLINE Complex<T> exchanged(Complex<T> a) {
    return {a.im, a.re};
}
template <class T>
FFT_INLINE Complex<T> conjugate(Complex<T> a) {
    return {a.re, -a.im};
}

// a[n] = sum_k a[k] exp(+2 pi i n k / N)
template <int N, class T>
FFT_INLINE void inverse_butterfly(Complex<T>* a) {
    unrolled<0, N>([&](auto n) UNROLLED_BODY { a[n] = exchanged(a[n]); });
    butterfly<N>(a);
    unrolled<0, N>([&](auto n) UNROLLED_BODY { a[n] = exchanged(a[n]); });
}

template <int N>
struct Roots {
    Complex<float> values[N];
    constexpr Roots() : values() {
        for (int k = 0; k < N; k++) values[k] = {float(cos_turn(k, N)), float(-sin_turn(k, N))};
    }
};
template <int N>
FFT_CONSTANT Roots<N> roots{};

// a exp(-2 pi i factor m / H) between the two stages of a column, where they need it.
template <class L, int factor, int m, class T>
FFT_INLINE Complex<T> twiddled(Complex<T> a, Index<factor>, Index<m>) {
    return rotated<L::coprime ? 0 : factor * m, L::H>(a);
}
template <class L, int factor, class T>
FFT_INLINE Complex<T> twiddled(Complex<T> a, Index<factor>, int m) {
    if constexpr (L::coprime || factor == 0)
        return a;
    else
        return a * roots<L::H>.values[factor * m];
}

// The N1-point transforms of one column, in place; the forward ones with the twiddles that follow them.
template <class L, bool inverse, class Env>
FFT_INLINE void outer_stage(Env& env, int column) {
    using T = typename L::Number;
    constexpr int N1 = L::N1;
    if constexpr (N1 > 1)
        counted<L::N2, L::rolled>([&](auto j) UNROLLED_BODY {
            const auto at = [&](int i) UNROLLED_BODY { return column + (j + L::N2 * i) * L::row_stride; };
            Complex<T> a[N1];
            unrolled<0, N1>([&](auto i) UNROLLED_BODY { a[i] = env.template spectrum<T>(at(i)); });
            if constexpr (inverse)
                inverse_butterfly<N1>(a);
            else
                butterfly<N1>(a);
            unrolled<0, N1>([&](auto i)
                                UNROLLED_BODY { env.set_spectrum(at(i), inverse ? a[i] : twiddled<L>(a[i], i, j)); });
        });
}

// a[j] = the N2-point transform of what the stage before left, i.e. spectrum [frequency(i, j)].
template <class L, class Env, class T>
FFT_INLINE void inner_transform(Env& env, int at, Complex<T>* a) {
    unrolled<0, L::N2>([&](auto j) UNROLLED_BODY { a[j] = env.template spectrum<T>(at + j * L::row_stride); });
    butterfly<L::N2>(a);
}

// Its inverse, with the twiddles that precede the N1-point transforms.
template <class L, class Env, class I, class T>
FFT_INLINE void inner_inverse(Env& env, int at, I i, Complex<T>* a) {
    inverse_butterfly<L::N2>(a);
    unrolled<0, L::N2>([&](auto j) UNROLLED_BODY {
        env.set_spectrum(at + j * L::row_stride, exchanged(twiddled<L>(exchanged(a[j]), j, i)));
    });
}
