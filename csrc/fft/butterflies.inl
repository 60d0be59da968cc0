// X[k] = sum_n a[n] exp(-2 pi i n k / N) for small N, in registers.
//
// Templated on the lane type T: a SIMD vector of channels on a CPU, a float in a GPU thread. No std headers and no
// namespace of its own: the includer provides both, and may define FFT_INLINE, and UNROLLED_BODY for lambdas. The
// inverse transform needs no code: it is the forward one with real and imaginary parts exchanged before and after.

#ifndef FFT_INLINE
#define FFT_INLINE inline __attribute__((always_inline))
#endif
#ifndef UNROLLED_BODY
#define UNROLLED_BODY __attribute__((always_inline))
#endif

template <class T>
struct Complex {
    T re, im;
};

// The type of a constant that multiplies a T, and whether instructions contain constants (a GPU's do) or registers hold
// them (a CPU's). The includer specialises it for vectors.
template <class T>
struct ScalarOf {
    using Type = T;
    static constexpr bool immediate = true;
};

template <class T>
FFT_INLINE Complex<T> operator+(Complex<T> a, Complex<T> b) {
    return {a.re + b.re, a.im + b.im};
}
template <class T>
FFT_INLINE Complex<T> operator-(Complex<T> a, Complex<T> b) {
    return {a.re - b.re, a.im - b.im};
}
template <class T, class W>
FFT_INLINE Complex<T> operator*(Complex<T> a, Complex<W> w) {
    return {a.re * w.re - a.im * w.im, a.re * w.im + a.im * w.re};
}

// Trigonometry at compile time: sine and cosine series on [0, pi/4], exact to float64's last bit or so.
constexpr double sine_series(double x) {
    double term = x, sum = x;
    for (int i = 1; i < 12; i++) sum += term *= -x * x / ((2 * i) * (2 * i + 1));
    return sum;
}
constexpr double cosine_series(double x) {
    double term = 1, sum = 1;
    for (int i = 1; i < 12; i++) sum += term *= -x * x / ((2 * i - 1) * (2 * i));
    return sum;
}
constexpr double pi = 3.14159265358979323846;

// cos(2 pi k / n), by symmetry from an angle of at most pi/4, so that it is exact where the cosine is 0, 1/2 or 1.
constexpr double cos_turn(long long k, long long n) {
    k %= n;
    if (k < 0) k += n;
    if (2 * k > n) k = n - k;
    if (4 * k > n) return -cos_turn(n - 2 * k, 2 * n);
    return 8 * k > n ? sine_series(pi * double(n - 4 * k) / double(2 * n))
                     : cosine_series(2 * pi * double(k) / double(n));
}
constexpr double sin_turn(long long k, long long n) { return cos_turn(4 * k - n, 4 * n); }

template <int I>
struct Index {
    static constexpr int value = I;
    constexpr operator int() const { return I; }
};

// fn(Index<first>), ..., fn(Index<last - 1>): a loop whose indices are constants, even if the compiler does not unroll.
template <int first, int last, class Fn>
FFT_INLINE void unrolled(Fn&& fn) {
    if constexpr (first < last) {
        fn(Index<first>{});
        unrolled<first + 1, last>(fn);
    }
}

constexpr int greatest_common_divisor(int a, int b) { return b ? greatest_common_divisor(b, a % b) : a; }

// The x in 0..n-1 with a x = 1 (mod n), for coprime a and n.
constexpr int inverse_modulo(int a, int n) {
    for (int x = 0; x < n; x++)
        if ((long long)(a % n) * x % n == 1 % n) return x;
    return 0;
}

// a exp(-2 pi i K / N)
template <int K, int N, class T>
FFT_INLINE Complex<T> rotated(Complex<T> a) {
    using S = typename ScalarOf<T>::Type;
    if constexpr (K % N == 0)
        return a;
    else if constexpr (4 * K == N)
        return {a.im, -a.re};
    else if constexpr (2 * K == N)
        return {-a.re, -a.im};
    else if constexpr (4 * K == 3 * N)
        return {-a.im, a.re};
    else if constexpr (8 * K == N)
        return {(a.re + a.im) * S(cos_turn(1, 8)), (a.im - a.re) * S(cos_turn(1, 8))};
    else if constexpr (8 * K == 3 * N)
        return {(a.im - a.re) * S(cos_turn(1, 8)), (a.re + a.im) * S(-cos_turn(1, 8))};
    else
        return a * Complex<S>{S(cos_turn(K, N)), S(-sin_turn(K, N))};
}

// The factor that N is split by; N itself if it is transformed directly.
constexpr int first_factor(int N) {
    if (N == 2 || N == 4) return N;
    const int factors[] = {4, 2, 3, 5, 7, 11, 13};
    for (int R : factors)
        if (N % R == 0) return R;
    return N;
}

template <int N, class T>
FFT_INLINE void butterfly(Complex<T>* a);

// For an odd prime N, sums of a[n] and a[N-n] are multiplied by cosines, and differences by sines. In a GPU thread the
// sines are divided by the first of them, and the fused multiply-adds of the last step restore the factor. That saves
// two multiplications for each k. On a CPU it costs time: registers hold the constants, and there are more of them.
template <int N, class T>
FFT_INLINE void odd_prime_butterfly(Complex<T>* a) {
    using S = typename ScalarOf<T>::Type;
    constexpr int half = (N - 1) / 2;
    Complex<T> sum[half], difference[half];
    const Complex<T> a0 = a[0];
    unrolled<0, half>([&](auto n) UNROLLED_BODY {
        sum[n] = a[n + 1] + a[N - 1 - n];
        difference[n] = a[n + 1] - a[N - 1 - n];
        a[0] = a[0] + sum[n];
    });
    unrolled<1, half + 1>([&](auto k) UNROLLED_BODY {
        constexpr int K = k.value;  // in an inner lambda, not every compiler accepts k.value as a constant
        constexpr bool divided = ScalarOf<T>::immediate;
        constexpr double divisor = divided ? sin_turn(K, N) : 1;
        Complex<T> even = a0, odd = difference[0];
        unrolled<0, half>([&](auto n) UNROLLED_BODY {
            constexpr S c = S(cos_turn(K * (n.value + 1), N)), s = S(sin_turn(K * (n.value + 1), N) / divisor);
            even.re += sum[n].re * c;
            even.im += sum[n].im * c;
            if constexpr (n.value > 0) {
                odd.re += difference[n].re * s;
                odd.im += difference[n].im * s;
            } else if constexpr (!divided) {
                odd = {odd.re * s, odd.im * s};
            }
        });
        constexpr S s = S(divisor);
        a[k] = {even.re + odd.im * s, even.im - odd.re * s};
        a[N - k] = {even.re - odd.im * s, even.im + odd.re * s};
    });
}

// N = R M: M transforms of R points, then R of M. Coprime factors need no twiddles between them (Good-Thomas).
template <int N, int R, class T>
FFT_INLINE void composite_butterfly(Complex<T>* a) {
    constexpr int M = N / R;
    constexpr bool coprime = greatest_common_divisor(R, M) == 1;
    Complex<T> grid[N];
    unrolled<0, M>([&](auto column_index) UNROLLED_BODY {
        constexpr int m = column_index.value;
        Complex<T> column[R];
        unrolled<0, R>([&](auto r)
                           UNROLLED_BODY { column[r] = a[coprime ? (M * r.value + R * m) % N : M * r.value + m]; });
        butterfly<R>(column);
        unrolled<0, R>([&](auto r)
                           UNROLLED_BODY { grid[r * M + m] = rotated<coprime ? 0 : r.value * m, N>(column[r]); });
    });
    unrolled<0, R>([&](auto row_index) UNROLLED_BODY {
        constexpr int r = row_index.value;
        butterfly<M>(grid + r * M);
        unrolled<0, M>([&](auto m) UNROLLED_BODY {
            constexpr int k =
                coprime ? (r * M * inverse_modulo(M, R) + m.value * R * inverse_modulo(R, M)) % N : r + R * m.value;
            a[k] = grid[r * M + m];
        });
    });
}

template <int N, class T>
FFT_INLINE void butterfly(Complex<T>* a) {
    if constexpr (N == 2) {
        const Complex<T> a0 = a[0];
        a[0] = a0 + a[1];
        a[1] = a0 - a[1];
    } else if constexpr (N == 4) {
        const Complex<T> s02 = a[0] + a[2], d02 = a[0] - a[2], s13 = a[1] + a[3], d13 = rotated<1, 4>(a[1] - a[3]);
        a[0] = s02 + s13;
        a[1] = d02 + d13;
        a[2] = s02 - s13;
        a[3] = d02 - d13;
    } else if constexpr (N > 1) {
        constexpr int R = first_factor(N);
        if constexpr (R == N)
            odd_prime_butterfly<N>(a);
        else
            composite_butterfly<N, R>(a);
    }
}
