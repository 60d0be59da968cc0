// y = irfft2(rfft2(u) M), as the phases of a thread.

template <class L, class Storage>
struct Forward {
    using T = typename L::Number;
    static constexpr int phases = 3;
    const Storage* x;      // (B,H,W,C)
    Storage* y;            // (B,H,W,C)
    const float* logits;   // (B,F,C)
    const float* filters;  // (H,K,F,2), or (H,K,C,2): 16-byte aligned
    Scalars star_relu;
    int thread;
    unsigned item;  // b * items_per_sample + a group of channels
    unsigned next;  // the item that follows on the multiprocessor, or none of the `items`
    unsigned items;

    template <int phase, class Env>
    FFT_INLINE void run(Env& env) const {
        const Channel<L> channel(item / L::items_per_sample, item % L::items_per_sample, thread % L::across * L::width);
        if constexpr (phase == 0) transform_rows<L>(thread, env, channel, x, activation_of<L>(env, star_relu), 0);
        if constexpr (phase == 1) {
            filter_columns(env, channel);
            if (next < items) prefetch_pixels<L>(thread, env, x, next);
        }
        if constexpr (phase == 2) {
            inverse_rows<L>(thread, env, channel, 0, [&](int h, const T* values) UNROLLED_BODY {
                Storage* pixels = channel.in_row(y, h);
                unrolled<0, L::W>([&](auto w) UNROLLED_BODY { env.store(pixels + w * L::C, values[w]); });
            });
        }
    }

    template <class Env>
    FFT_INLINE void filter_columns(Env& env, const Channel<L>& channel) const {
        T r[L::filters];
        routing_weights(env, channel, logits, r);
#pragma unroll 1
        for (int own = thread / L::across; own < L::K; own += L::workers) {
            const int k = env.opaque(own);  // or each address made of it would be counted in a register of its own
            const int column = k * L::channels_per_cta + channel.offset;
            outer_stage<L, false>(env, column);
            counted<L::N1, L::rolled>([&](auto i) UNROLLED_BODY {
                const int at = column + i * L::N2 * L::row_stride;
                Complex<T> a[L::N2];
                inner_transform<L>(env, at, a);
                unrolled<0, L::N2>([&](auto j) UNROLLED_BODY {
                    a[j] = a[j] * Filters<L>(env, channel, filters, L::frequency(i, j), k).mixed(r);
                });
                inner_inverse<L>(env, at, i, a);
            });
            outer_stage<L, true>(env, column);
        }
    }
};
