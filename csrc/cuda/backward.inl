// With G = rfft2(grad_y), D = 1 for k = 0 and W/2 and else 2, P = D G conj(X):
//
//   grad_u = irfft2(conj(M) G), then StarReLU's gradients;   grad_r[f] = sum_hk Re(P conj(basis[f])), then softmax's;
//   grad_basis = sum_bc r P;   grad of a weight = sum_b P
//
// The first spectrum in shared memory holds X, then P; the second G, then conj(M) G. Where there is room for one, X and
// then P are in device memory, and shared memory holds what becomes X, then G and conj(M) G. A null output is not
// wanted.
template <class L, class Storage>
struct Backward {
    using T = typename L::Number;
    static constexpr int phases = L::one_spectrum ? 5 : 3, end_phases = L::star_relu ? 2 : 0;
    const Storage* grad_y;  // (B,H,W,C)
    const Storage* x;       // (B,H,W,C)
    const float* logits;    // (B,F,C)
    const float* filters;   // (H,K,F,2), or (H,K,C,2): 16-byte aligned
    Scalars star_relu;
    Storage* grad_x;        // (B,H,W,C)
    float* grad_logits;     // (B,F,C)
    float* filter_slot;     // (slots,H,K,F,2): this CTA's part of the sum; or (H,K,C,2), of which it has its channels
    float* star_relu_slot;  // this CTA's part of grad_scale and grad_bias
    int thread;
    long long sample = 0;
    int group = 0;
    bool first = true;                  // of this CTA's items
    long long next = -1;                // item
    T grad_scale = {}, grad_bias = {};  // this thread's part

    // Work item b * items_per_sample + a group of channels; the next one is -1 after the last.
    FFT_INLINE void begin(long long item, bool is_first, long long next_item) {
        sample = item / L::items_per_sample, group = int(item % L::items_per_sample);
        first = is_first, next = next_item;
    }

    template <int phase, class Env>
    FFT_INLINE void run(Env& env) {
        const Channel<L> channel(sample, group, thread % L::across * L::width);
        if constexpr (phase == 0) transform_rows<L>(thread, env, channel, x, activation_of<L>(env, star_relu), 0);
        if constexpr (L::one_spectrum && phase == 1) keep_spectrum(env, channel);
        if constexpr (phase == phases - 3)
            transform_rows<L>(thread, env, channel, grad_y, Identity{}, L::gradient_spectrum);
        if constexpr (phase == phases - 2) {
            differentiate_columns(env, channel);
            if (next >= 0) {
                prefetch_pixels<L>(thread, env, x, next);
                prefetch_pixels<L>(thread, env, grad_y, next);
            }
        }
        if constexpr (phase == phases - 1) {
            differentiate_activation(env, channel);
            if constexpr (!L::per_channel) {
                if (filter_slot) sum_over_channels(env);
                if (grad_logits && thread < L::channels_per_cta) differentiate_softmax(env);
            }
        }
    }

    // After the last item: the CTA's sums over threads.
    template <int phase, class Env>
    FFT_INLINE void end(Env& env) {
        if constexpr (phase == 0) {
            env.set_scratch(L::sums_at + 2 * thread, sum_of(grad_scale));
            env.set_scratch(L::sums_at + 2 * thread + 1, sum_of(grad_bias));
        }
        if constexpr (phase == 1)
            if (star_relu_slot && thread < 2)
                env.store(star_relu_slot + thread, sum<2, L::threads>(env, L::sums_at + thread));
    }

    // Of a channel's point in slot s of column k.
    static FFT_INLINE int kept_at(int s, int k, int offset) { return (s * L::K + k) * L::channels_per_cta + offset; }

    template <class Env>
    FFT_INLINE void keep_spectrum(Env& env, const Channel<L>& channel) {
#pragma unroll 1
        for (int k = thread / L::across; k < L::K; k += L::workers) {
            const int column = k * L::channels_per_cta + channel.offset;
            outer_stage<L, false>(env, column);
            counted<L::N1, L::rolled>([&](auto i) UNROLLED_BODY {
                Complex<T> X[L::N2];
                inner_transform<L>(env, column + i * L::N2 * L::row_stride, X);
                unrolled<0, L::N2>(
                    [&](auto j) UNROLLED_BODY { env.set_kept(kept_at(i * L::N2 + j, k, channel.offset), X[j]); });
            });
        }
    }

    template <class Env>
    FFT_INLINE void differentiate_columns(Env& env, const Channel<L>& channel) {
        T r[L::filters], grad_r[L::filters];
        routing_weights(env, channel, logits, r);
        unrolled<0, L::F>([&](auto f) UNROLLED_BODY { grad_r[f] = {}; });
#pragma unroll 1
        for (int k = thread / L::across; k < L::K; k += L::workers) {
            const int column = k * L::channels_per_cta + channel.offset;
            const float half_D = k == 0 || 2 * k == L::W ? 0.5f : 1.0f;
            if constexpr (!L::one_spectrum) outer_stage<L, false>(env, column);
            outer_stage<L, false>(env, L::gradient_spectrum + column);
            counted<L::N1, L::rolled>([&](auto i) UNROLLED_BODY {
                const int at = column + i * L::N2 * L::row_stride;
                Complex<T> X[L::N2], G[L::N2];
                // Of these few points, before it meets the rest: an image's mean makes one point outweigh all others.
                T part[L::filters];
                unrolled<0, L::F>([&](auto f) UNROLLED_BODY { part[f] = {}; });
                if constexpr (!L::one_spectrum) inner_transform<L>(env, at, X);
                inner_transform<L>(env, L::gradient_spectrum + at, G);
                unrolled<0, L::N2>([&](auto j) UNROLLED_BODY {
                    const int place = kept_at(i * L::N2 + j, k, channel.offset);
                    if constexpr (L::one_spectrum) X[j] = env.template kept<T>(place);
                    const int h = L::frequency(i, j);
                    const Filters<L> basis(env, channel, filters, h, k);
                    const Complex<T> product = G[j] * conjugate(X[j]);
                    const Complex<T> P = {product.re * half_D, product.im * half_D};
                    if constexpr (L::per_channel)
                        add_to_weight(env, channel, h * L::K + k, P);
                    else if constexpr (L::one_spectrum)
                        env.set_kept(place, P);
                    else
                        env.set_spectrum(at + j * L::row_stride, P);
                    unrolled<0, L::F>([&](auto f) UNROLLED_BODY {
                        part[f] += P.re * basis.values[2 * f];
                        part[f] += P.im * basis.values[2 * f + 1];
                    });
                    G[j] = G[j] * conjugate(basis.mixed(r));
                });
                unrolled<0, L::F>([&](auto f) UNROLLED_BODY { grad_r[f] += part[f]; });
                inner_inverse<L>(env, L::gradient_spectrum + at, i, G);
            });
            outer_stage<L, true>(env, L::gradient_spectrum + column);
        }
        unrolled<0, L::F>([&](auto f) UNROLLED_BODY {
            env.set_scratch(L::sums_at + (f * L::threads + thread) * L::width, grad_r[f]);
            unrolled<0, L::width>([&](auto own) UNROLLED_BODY {
                if (thread < L::across)
                    env.set_scratch(L::weights_at + (channel.offset + own) * L::F + f, of_channel(r[f], own));
            });
        });
    }

    template <class Env>
    FFT_INLINE void add_to_weight(Env& env, const Channel<L>& channel, int point, Complex<T> P) const {
        if (!filter_slot || !channel.exists()) return;
        float values[2 * L::width];
        unrolled<0, L::width>([&](auto own) UNROLLED_BODY {
            values[2 * own] = of_channel(P.re, own) * L::normalisation;
            values[2 * own + 1] = of_channel(P.im, own) * L::normalisation;
        });
        env.template accumulate<2 * L::width>(filter_slot + 2 * (point * L::C + channel.index), values, first);
    }

    // grad_x from grad_u, and this thread's part of grad_scale and grad_bias.
    template <class Env>
    FFT_INLINE void differentiate_activation(Env& env, const Channel<L>& channel) {
        const auto activation = activation_of<L>(env, star_relu);
        inverse_rows<L>(thread, env, channel, L::gradient_spectrum, [&](int h, T* values) UNROLLED_BODY {
            if constexpr (L::star_relu) {
                const Storage* pixels = channel.in_row(x, h);
                T relu[L::W];
                unrolled<0, L::W>([&](auto w) UNROLLED_BODY {
                    relu[w] = each(StarReLU::relu, env.template load<T>(pixels + w * L::C));
                });
                unrolled<0, L::W>([&](auto w) UNROLLED_BODY {
                    grad_scale += values[w] * relu[w] * relu[w];
                    grad_bias += values[w];
                    // a select, so that an infinite gradient does not make 0 * inf where x <= 0
                    values[w] = each([&](float a, float grad_u)
                                         UNROLLED_BODY { return a == 0 ? 0 : 2 * activation.scale * a * grad_u; },
                                     relu[w], values[w]);
                });
            }
            if (!grad_x) return;
            Storage* gradients = channel.in_row(grad_x, h);
            unrolled<0, L::W>([&](auto w) UNROLLED_BODY { env.store(gradients + w * L::C, values[w]); });
        });
    }

    // grad_basis += sum over channels of r P: one thread per frequency, or several with some channels each.
    template <class Env>
    FFT_INLINE void sum_over_channels(Env& env) const {
        constexpr int channels = L::channels_per_cta / L::slots, F = L::F, tasks = L::H * L::K * L::slots;
#pragma unroll 1
        for (unsigned task = thread; task < tasks; task += L::threads) {
            const unsigned point = task / L::slots, part = task % L::slots;
            const unsigned slot = point / L::K, k = point % L::K;
            const unsigned at = slot * L::row_stride + k * L::channels_per_cta;
            // Threads whose channels lie in the same banks begin with different ones.
            const unsigned begin =
                (at + part * channels) / (channels < 16 ? 16 : channels) % channels + part * channels;
            float sums[2 * F] = {};
            unrolled<0, channels>([&](auto step) UNROLLED_BODY {
                const unsigned offset = begin ^ step;
                const Complex<float> P = L::one_spectrum
                                             ? env.template kept<float>(point * L::channels_per_cta + offset)
                                             : env.template spectrum<float>(at + offset);
                float r[F];
                load_weights(env, offset, r);
                unrolled<0, F>([&](auto f) UNROLLED_BODY {
                    sums[2 * f] += r[f] * P.re;
                    sums[2 * f + 1] += r[f] * P.im;
                });
            });
            const unsigned frequency = L::frequency(slot / L::N2, slot % L::N2) * L::K + k;
            float* own = filter_slot + (part * (L::H * L::K) + frequency) * (2 * F);
            in_vectors<2 * F>([&](auto width, int offset) UNROLLED_BODY {
                env.template accumulate<width.value>(own + offset, sums + offset, first);
            });
        }
    }

    // A channel's routing weights, kept in shared memory.
    template <class Env>
    static FFT_INLINE void load_weights(Env& env, unsigned offset, float* r) {
        constexpr int width = L::F % 4 == 0 && L::weights_at % 4 == 0 ? 4 : L::F % 2 == 0 ? 2 : 1;
        unrolled<0, L::F / width>([&](auto i) UNROLLED_BODY {
            env.template scratch<width>(L::weights_at + offset * L::F + i * width, r + i * width);
        });
    }

    // grad_logits[f] = r[f] sum_f' r[f'] (grad_r[f] - grad_r[f']), one thread per channel; exactly 0 where F = 1.
    template <class Env>
    FFT_INLINE void differentiate_softmax(Env& env) const {
        const Channel<L> channel(sample, group, thread);
        float r[L::F], grad_r[L::F];
        load_weights(env, thread, r);
        unrolled<0, L::F>([&](auto f) UNROLLED_BODY {
            grad_r[f] = sum<L::channels_per_cta, L::workers>(env, L::sums_at + f * L::threads * L::width + thread);
        });
        float* own = channel.in_logits(grad_logits);
        unrolled<0, L::F>([&](auto f) UNROLLED_BODY {
            float difference = 0;
            for (int other = 0; other < L::F; other++) difference += r[other] * (grad_r[f] - grad_r[other]);
            if (channel.exists()) env.store(own + f * L::C, r[f] / L::normalisation * difference);
        });
    }

    // Of `count` floats of shared memory, four chains of additions side by side.
    template <int stride, int count, class Env>
    static FFT_INLINE float sum(Env& env, int begin) {
        float sums[4] = {};
#pragma unroll 2
        for (int i = 0; i < count; i += 4)
            unrolled<0, 4>([&](auto chain) UNROLLED_BODY {
                if (count % 4 == 0 || i + chain < count) sums[chain] += env.scratch(begin + (i + chain) * stride);
            });
        return (sums[0] + sums[1]) + (sums[2] + sums[3]);
    }
};
