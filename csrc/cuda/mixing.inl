// Mixing the filters: softmax of the logits, and the weighted sum of the basis at one frequency.

// r[f] = softmax(logits)[f] / 2HW: the filters' weights with the normalisation of both transforms.
template <class L, class Env, class T>
FFT_INLINE void routing_weights(Env& env, const Channel<L>& channel, const float* logits, T* r) {
    if constexpr (L::per_channel) {
        r[0] = each([](float) UNROLLED_BODY { return L::normalisation; }, T{});
        return;
    }
    const float* own = channel.in_logits(logits);
    unrolled<0, L::F>([&](auto f)
                          UNROLLED_BODY { r[f] = channel.exists() ? env.template load<T>(own + f * L::C) : T{}; });
    T largest = r[0], sum = {};
    unrolled<1, L::F>([&](auto f) UNROLLED_BODY {
        largest = each([](float a, float b) UNROLLED_BODY { return a > b ? a : b; }, r[f], largest);
    });
    unrolled<0, L::F>([&](auto f) UNROLLED_BODY {
        r[f] = each([](float a) UNROLLED_BODY { return expf(a); }, r[f] - largest);
        sum += r[f];
    });
    const T scale = each([](float a) UNROLLED_BODY { return L::normalisation / a; }, sum);
    unrolled<0, L::F>([&](auto f) UNROLLED_BODY { r[f] = r[f] * scale; });
}

// count floats, a multiple of 2, as wide as their alignment allows: fn(vector width, offset) for each vector.
template <int count, class Fn>
FFT_INLINE void in_vectors(Fn&& fn) {
    constexpr int width = count % 4 == 0 ? 4 : 2;
    unrolled<0, count / width>([&](auto i) UNROLLED_BODY { fn(Index<width>{}, i * width); });
}

// The filters at one frequency: F basis filters, or each channel's own weight.
template <class L>
struct Filters {
    using T = typename L::Number;
    static constexpr int count = L::filters;
    typename Numbers<L::per_channel ? L::width : 1>::Type values[2 * count];  // re, im

    template <class Env>
    FFT_INLINE Filters(Env& env, const Channel<L>& channel, const float* filters, int h, int k) {
        const int point = h * L::K + k;
        if constexpr (L::per_channel) {
            const Complex<T> weight =
                channel.exists() ? env.template complex<T>(filters + 2 * (point * L::C + channel.index)) : Complex<T>{};
            values[0] = weight.re, values[1] = weight.im;
        } else {
            in_vectors<2 * count>([&](auto width, int offset) UNROLLED_BODY {
                env.template load<width.value>(filters + point * 2 * count + offset, values + offset);
            });
        }
    }

    // M / 2HW
    FFT_INLINE Complex<T> mixed(const T* r) const {
        Complex<T> M = {r[0] * values[0], r[0] * values[1]};
        unrolled<1, count>([&](auto f) UNROLLED_BODY {
            M.re += r[f] * values[2 * f];
            M.im += r[f] * values[2 * f + 1];
        });
        return M;
    }
};
