// Rows of pixels to and from half spectra in shared memory, with the activation on load.

struct StarReLU {
    float scale, bias;

    // Lets NaN through, as torch does.
    static FFT_INLINE float relu(float x) { return x < 0 ? 0 : x; }
    template <class T>
    FFT_INLINE T operator()(T x) const {
        return each([&](float a) UNROLLED_BODY { return scale * relu(a) * relu(a) + bias; }, x);
    }
};
struct Identity {
    template <class T>
    FFT_INLINE T operator()(T x) const {
        return x;
    }
};

// StarReLU's parameters on the device, of one element each.
struct Scalars {
    const float *scale, *bias;
};

// The activation on load.
template <class L, class Env>
FFT_INLINE auto activation_of(Env& env, Scalars parameters) {
    if constexpr (L::star_relu)
        return StarReLU{env.template load<float>(parameters.scale), env.template load<float>(parameters.bias)};
    else
        return Identity{};
}

// Rows of a tensor to 2 rfft(row) in the half spectrum that begins at `base`. Two rows a and b are transformed as a + i
// b, or one as even + i odd samples.
template <class L, class Env, class Storage, class Activation>
FFT_INLINE void transform_rows(int thread, Env& env, const Channel<L>& channel, const Storage* tensor,
                               Activation activation, int base) {
    using T = typename L::Number;
    constexpr int W = L::W, channels = L::channels_per_cta;
    const auto load_row = [&](int slot, T* row) UNROLLED_BODY {
        const Storage* pixels = channel.in_row(tensor, L::row(slot));
        unrolled<0, W>([&](auto w) UNROLLED_BODY { row[w] = env.template load<T>(pixels + w * L::C); });
    };
#pragma unroll 1
    for (int item = thread / L::across; item < L::row_items; item += L::workers) {
        if constexpr (L::rows == ROW_PAIRS) {
            const int slot = 2 * item, at = base + slot * L::row_stride + channel.offset;
            const bool two = L::H % 2 == 0 || slot + 1 < L::H;
            T first[W] = {}, second[W] = {};
            if (channel.exists()) load_row(slot, first);
            if (channel.exists() && two) load_row(slot + 1, second);
            Complex<T> a[W];
            unrolled<0, W>([&](auto w) UNROLLED_BODY { a[w] = {activation(first[w]), activation(second[w])}; });
            butterfly<W>(a);
            unrolled<0, L::K>([&](auto k) UNROLLED_BODY {
                const Complex<T> p = a[k], q = a[(W - k) % W];
                env.set_spectrum(at + k * channels, Complex<T>{p.re + q.re, p.im - q.im});
                if (two) env.set_spectrum(at + k * channels + L::row_stride, Complex<T>{p.im + q.im, q.re - p.re});
            });
        } else {
            constexpr int M = W / 2;
            const int at = base + item * L::row_stride + channel.offset;
            T row[W] = {};
            if (channel.exists()) load_row(item, row);
            Complex<T> a[M];
            unrolled<0, M>([&](auto w) UNROLLED_BODY { a[w] = {activation(row[2 * w]), activation(row[2 * w + 1])}; });
            butterfly<M>(a);
            unrolled<0, M / 2 + 1>([&](auto k) UNROLLED_BODY {
                constexpr int mirrored = M - k.value;
                const Complex<T> p = a[k], q = a[mirrored % M];
                const Complex<T> even = {p.re + q.re, p.im - q.im};
                const Complex<T> odd = rotated<k.value, W>(Complex<T>{p.im + q.im, q.re - p.re});
                env.set_spectrum(at + k * channels, even + odd);
                if constexpr (mirrored != k.value) env.set_spectrum(at + mirrored * channels, conjugate(even - odd));
            });
        }
    }
}

// Asks the L2 cache for the pixels of an item. Columns need nothing of device memory, which would rest while they are
// transformed: what the next rows need can be on its way. A request costs the cache as much as it has lines of 128
// bytes, and CTAs whose channels share a line run at the same time: each asks for every `sharing`-th pixel of all.
template <class L, class Env, class Storage>
FFT_INLINE void prefetch_pixels(int thread, Env& env, const Storage* tensor, long long item) {
    constexpr int sector = 32 / sizeof(Storage), line = 4 * sector;  // channels
    constexpr int sharing = L::channels_per_cta < line ? line / L::channels_per_cta : 1,
                  sectors = sharing * L::channels_per_cta / sector;
    constexpr int pixels = L::H * L::W;
    constexpr int step = L::threads / sectors * sharing;
    const int group = int(item % L::items_per_sample), own = group % sharing;
    const int channel = (group - own) * L::channels_per_cta + thread % sectors * sector;
    if (L::C % (sharing * L::channels_per_cta) != 0 && channel >= L::C) return;
    int pixel = thread / sectors * sharing + own;
    const Storage* p = tensor + (item / L::items_per_sample * (pixels * L::C) + (pixel * L::C + channel));
#pragma unroll 1
    for (; pixel < pixels; pixel += step, p += step * L::C) env.prefetch(p);
}

// irfft of the spectrum's rows without its 1/W, dropping what is imaginary in columns 0 and W/2. Each
// goes to store_row(h, its W values).
template <class L, class Env, class StoreRow>
FFT_INLINE void inverse_rows(int thread, Env& env, const Channel<L>& channel, int base, StoreRow&& store_row) {
    using T = typename L::Number;
    constexpr int W = L::W, channels = L::channels_per_cta;
    if (!channel.exists()) return;
#pragma unroll 1
    for (int item = thread / L::across; item < L::row_items; item += L::workers) {
        if constexpr (L::rows == ROW_PAIRS) {
            const int slot = 2 * item, at = base + slot * L::row_stride + channel.offset;
            const bool two = L::H % 2 == 0 || slot + 1 < L::H;
            Complex<T> a[W];
            unrolled<0, L::K>([&](auto k) UNROLLED_BODY {
                const Complex<T> X = env.template spectrum<T>(at + k * channels);
                const Complex<T> Y = two ? env.template spectrum<T>(at + k * channels + L::row_stride) : Complex<T>{};
                if constexpr (k.value == 0 || 2 * k.value == W) {
                    a[k] = {X.re, Y.re};
                } else {
                    a[k] = {X.re - Y.im, X.im + Y.re};
                    a[W - k] = {X.re + Y.im, Y.re - X.im};
                }
            });
            inverse_butterfly<W>(a);
            T first[W], second[W];
            unrolled<0, W>([&](auto w) UNROLLED_BODY { first[w] = a[w].re, second[w] = a[w].im; });
            store_row(L::row(slot), first);
            if (two) store_row(L::row(slot + 1), second);
        } else {
            constexpr int M = W / 2;
            const int at = base + item * L::row_stride + channel.offset;
            Complex<T> a[M];
            unrolled<0, M / 2 + 1>([&](auto k) UNROLLED_BODY {
                constexpr int mirrored = M - k.value;
                Complex<T> X = env.template spectrum<T>(at + k * channels),
                           Y = env.template spectrum<T>(at + mirrored * channels);
                if constexpr (k.value == 0) X.im = Y.im = {};
                const Complex<T> even = X + conjugate(Y);
                const Complex<T> odd = conjugate(rotated<k.value, W>(conjugate(X) - Y));
                a[k] = {even.re - odd.im, even.im + odd.re};
                if constexpr (mirrored < M) a[mirrored] = {even.re + odd.im, odd.re - even.im};
            });
            inverse_butterfly<M>(a);
            T row[W];
            unrolled<0, M>([&](auto w) UNROLLED_BODY { row[2 * w] = a[w].re, row[2 * w + 1] = a[w].im; });
            store_row(L::row(item), row);
        }
    }
}
