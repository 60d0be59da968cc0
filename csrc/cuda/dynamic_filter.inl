// The filter step and its gradients on one block of threads, plane by plane in shared memory.
//
//   y = irfft2(rfft2(u) M),   u = star_relu(x) or x,   M[h,k] = a weight or sum_f softmax(logits)[f] basis[h,k,f]
//
// Written as phases of one thread with a barrier between two of them, templated on a Layout, how tensors store numbers
// and an environment, which is everything a phase touches: tensors, shared memory. On a GPU the environment is a few
// instructions; on a host it watches for races, bank conflicts and addresses outside. Included after butterflies.inl;
// no std headers. An environment has, for p into a tensor and i into shared memory:
//
//   load<T>(p)                           of a read-only tensor, T is float or Pair: a number, or two side by side
//   load<count>(p, values)               2 or 4 aligned floats of one
//   complex<T>(p)                        complex floats of one
//   store(p, value)                      a float or a Pair, rounded to nearest
//   accumulate<count>(p, values, first)  2 or 4 aligned floats this block alone adds to; the first time they are set
//   prefetch(p)                          the sector of device memory around p is wanted soon
//   opaque(i)                            i, of which the compiler knows no more
//   plane<T>(i), set_plane(i, value)     complex numbers of shared memory, Complex<T> from the i-th on
//   scratch(i), set_scratch(i, value)    floats of shared memory, i counting from the same start; set a Pair at once
//   scratch<count>(i, values)            1, 2 or 4 aligned ones
//   spectrum<T>(i), set_spectrum(i, value)  the same of the block's own device memory, for spectra taken in turn
//
// The arithmetic is float32.

// Tables indexed at run time. The includer may define it, as it may FFT_INLINE.
#ifndef FFT_CONSTANT
#define FFT_CONSTANT constexpr
#endif

struct BFloat16 {
    unsigned short bits;
};
struct Float16 {
    unsigned short bits;
};

// Numbers of two neighbouring channels, which a thread computes side by side: half the accesses and addresses.
struct Pair {
    float first, second;
};
FFT_INLINE Pair operator+(Pair a, Pair b) { return {a.first + b.first, a.second + b.second}; }
FFT_INLINE Pair operator-(Pair a, Pair b) { return {a.first - b.first, a.second - b.second}; }
FFT_INLINE Pair operator-(Pair a) { return {-a.first, -a.second}; }
FFT_INLINE Pair operator*(Pair a, Pair b) { return {a.first * b.first, a.second * b.second}; }
FFT_INLINE Pair operator*(Pair a, float b) { return {a.first * b, a.second * b}; }
FFT_INLINE void operator+=(Pair& a, Pair b) { a = a + b; }
template <>
struct ScalarOf<Pair> {
    using Type = float;
    static constexpr bool immediate = true;
};

template <int width>
struct Numbers {
    using Type = float;
};
template <>
struct Numbers<2> {
    using Type = Pair;
};

template <int channel>
FFT_INLINE float of_channel(float a, Index<channel>) {
    return a;
}
template <int channel>
FFT_INLINE float of_channel(Pair a, Index<channel>) {
    return channel ? a.second : a.first;
}

FFT_INLINE float sum_of(float a) { return a; }
FFT_INLINE float sum_of(Pair a) { return a.first + a.second; }

// fn(a, ...) of each channel's numbers.
template <class Fn, class... Others>
FFT_INLINE float each(Fn&& fn, float a, Others... others) {
    return fn(a, others...);
}
template <class Fn, class... Others>
FFT_INLINE Pair each(Fn&& fn, Pair a, Others... others) {
    return {fn(a.first, others.first...), fn(a.second, others.second...)};
}

enum Rows { ROW_PAIRS = 0, HALF_ROWS = 1 };
enum Columns { COLUMNS_IN_REGISTERS = 0, COLUMNS_UNROLLED = 1, COLUMNS_ROLLED = 2 };

// N2 of H = N1 N2, N1 >= N2: coprime (no twiddles between the two) and of at most 16 if there is such a pair, otherwise
// as equal as possible.
constexpr int second_factor(int H) {
    int best = 1;
    bool best_is_coprime = false;
    for (int N2 = 2; N2 * N2 <= H; N2++) {
        if (H % N2) continue;
        const bool coprime = greatest_common_divisor(H / N2, N2) == 1 && H / N2 <= 16;
        if (best_is_coprime && !coprime) continue;
        best = N2;
        best_is_coprime = coprime;
    }
    return best;
}

// The largest power of 2 that leaves a thread for each of them at every frequency, and two lanes for each thread.
constexpr int slots_of_block(int frequencies, int lanes, int threads) {
    int slots = 1;
    while (4 * slots <= lanes && 2 * slots * frequencies <= threads) slots *= 2;
    return slots;
}

// How threads and shared memory are laid out for one problem. `lanes` neighbouring channels of one sample are a block's
// work item. A thread works on `width` of them: `across` = lanes / width threads lie side by side, thread t works on
// lane width (t % across) and the next, and takes every (threads / across)-th row or column.
//
// Shared memory: `planes` half spectra, complex [H][row_stride] with [K][lanes] in a row; then, backward only, floats:
// [lanes][F] routing weights and [sums][threads][width] partial sums. Backward has two planes, or where those do not
// fit takes X and G in turn through one: X waits in the block's own device memory, complex [H][K][lanes] =
// [spectrum_size].
//
//   row_stride   = K lanes            lanes >= 16
//                  (K | 1) lanes      half rows: an odd number of lanes' banks from one row to the next
//                  K lanes + lanes/2  row pairs: the same from one pair to the next
//   shared_bytes = 8 planes H row_stride + 4 (F lanes + sums threads width)
//   planes       = 1 forward, 2 or 1 backward;   sums = 0 forward, max(F, 2 if StarReLU) backward
//
// so that the 16 / lanes rows that half a warp touches at once lie in different banks.
//
// Along a column slot s = j + N2 i (j < N2, i < N1) holds row(s), and after N1-point transforms over i and N2-point
// transforms over j frequency(i, j).
template <int H_, int W_, int C_, int F_, int lanes_, int threads_, int rows_, int columns_, bool star_relu_,
          bool backward_, int planes_, int width_>
struct Layout {
    static constexpr int H = H_, W = W_, C = C_, F = F_, K = W / 2 + 1, lanes = lanes_, threads = threads_;
    static constexpr int rows = rows_, width = width_;
    using Number = typename Numbers<width>::Type;
    static constexpr int filters = F ? F : 1;  // at one frequency of one channel
    static constexpr bool star_relu = star_relu_, per_channel = F == 0, rolled = columns_ == COLUMNS_ROLLED;
    static_assert(rows == ROW_PAIRS || (rows == HALF_ROWS && W % 2 == 0), "half rows are halves of even rows");
    static_assert(lanes >= 2 && lanes <= 32 && (lanes & (lanes - 1)) == 0, "lanes are 2, 4, 8, 16 or 32");
    static_assert(width == 1 || (width == 2 && C % 2 == 0 && lanes >= 4), "two channels are read at once");
    static_assert(threads % (lanes / width) == 0 && threads <= 1024, "every lane has as many threads");
    static_assert((long long)H * W * C < (1LL << 31) && F <= 16, "offsets within a sample are ints");

    static constexpr int channel_blocks = (C + lanes - 1) / lanes;
    static constexpr int across = lanes / width, workers = threads / across;
    static constexpr int row_items = rows == ROW_PAIRS ? (H + 1) / 2 : H;

    static constexpr int row_stride = lanes >= 16         ? K * lanes
                                      : rows == HALF_ROWS ? (K | 1) * lanes
                                                          : K * lanes + lanes / 2;
    static constexpr int plane = H * row_stride;
    static constexpr int sums = backward_ ? (star_relu && F < 2 ? 2 : F) : 0;
    static constexpr bool in_turn = backward_ && planes_ == 1;
    static_assert(planes_ == (backward_ && !in_turn ? 2 : 1), "forward has a plane, backward one or two");
    static constexpr int gradient_plane = in_turn ? 0 : plane, spectrum_size = H * K * lanes;  // where G begins
    static constexpr int weights_at = 2 * planes_ * plane;
    static constexpr int sums_at = weights_at + (backward_ ? F * lanes : 0);
    static constexpr int shared_bytes = 4 * (sums_at + sums * threads * width);

    // Threads that share the sum over lanes at one frequency where those are few; each has a slot of its own.
    static constexpr int slots = per_channel ? 1 : slots_of_block(H * K, lanes, threads);

    static constexpr int N2 = columns_ == COLUMNS_IN_REGISTERS ? H : second_factor(H), N1 = H / N2;
    static constexpr bool coprime = greatest_common_divisor(N1, N2) == 1;
    static constexpr int from_i = N2 * inverse_modulo(N2, N1) % H, from_j = N1 * inverse_modulo(N1, N2) % H;

    static constexpr FFT_INLINE int row(int slot) { return coprime ? (N2 * (slot / N2) + N1 * (slot % N2)) % H : slot; }
    static constexpr FFT_INLINE int frequency(int i, int j) {
        if (!coprime) return i + N1 * j;
        const int h = i * from_i % H + j * from_j % H;
        return h < H ? h : h - H;
    }

    // The transforms' 1 / HW, and 1/2 for the factor 2 that rows are left with by taking them apart.
    static constexpr float normalisation = float(0.5 / (double(H) * W));
};

// One channel of one sample, or the first of two: what a thread works on.
template <class L>
struct Channel {
    long long sample;
    int lane, index;

    FFT_INLINE Channel(long long sample, int block, int lane)
        : sample(sample), lane(lane), index(block * L::lanes + lane) {}

    // The last block's lanes may reach beyond C.
    FFT_INLINE bool exists() const { return L::C % L::lanes == 0 || index < L::C; }

    // Its pixel [h][0]; pixel [h][w] lies w C further, an offset that fits an instruction.
    template <class T>
    FFT_INLINE T* in_row(T* tensor, int h) const {
        return tensor + (sample * (L::H * L::W * L::C) + (h * (L::W * L::C) + index));
    }
    template <class T>
    FFT_INLINE T* in_logits(T* tensor) const {
        return tensor + sample * (L::F * L::C) + index;
    }
};

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

// Rows of a tensor to 2 rfft(row) in the plane that begins at `base`. Two rows a and b are transformed as a + i b, or
// one as even + i odd samples.
template <class L, class Env, class Storage, class Activation>
FFT_INLINE void transform_rows(int thread, Env& env, const Channel<L>& channel, const Storage* tensor,
                               Activation activation, int base) {
    using T = typename L::Number;
    constexpr int W = L::W, lanes = L::lanes;
    const auto load_row = [&](int slot, T* row) UNROLLED_BODY {
        const Storage* pixels = channel.in_row(tensor, L::row(slot));
        unrolled<0, W>([&](auto w) UNROLLED_BODY { row[w] = env.template load<T>(pixels + w * L::C); });
    };
#pragma unroll 1
    for (int item = thread / L::across; item < L::row_items; item += L::workers) {
        if constexpr (L::rows == ROW_PAIRS) {
            const int slot = 2 * item, at = base + slot * L::row_stride + channel.lane;
            const bool two = L::H % 2 == 0 || slot + 1 < L::H;
            T first[W] = {}, second[W] = {};
            if (channel.exists()) load_row(slot, first);
            if (channel.exists() && two) load_row(slot + 1, second);
            Complex<T> a[W];
            unrolled<0, W>([&](auto w) UNROLLED_BODY { a[w] = {activation(first[w]), activation(second[w])}; });
            butterfly<W>(a);
            unrolled<0, L::K>([&](auto k) UNROLLED_BODY {
                const Complex<T> p = a[k], q = a[(W - k) % W];
                env.set_plane(at + k * lanes, Complex<T>{p.re + q.re, p.im - q.im});
                if (two) env.set_plane(at + k * lanes + L::row_stride, Complex<T>{p.im + q.im, q.re - p.re});
            });
        } else {
            constexpr int M = W / 2;
            const int at = base + item * L::row_stride + channel.lane;
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
                env.set_plane(at + k * lanes, even + odd);
                if constexpr (mirrored != k.value) env.set_plane(at + mirrored * lanes, conjugate(even - odd));
            });
        }
    }
}

// Asks the L2 cache for the pixels of an item. Columns need nothing of device memory, which would rest while they are
// transformed: what the next rows need can be on its way. A request costs the cache as much as it has lines of 128
// bytes, and blocks whose channels share a line run at the same time: each asks for every `sharing`-th pixel of all.
template <class L, class Env, class Storage>
FFT_INLINE void prefetch_pixels(int thread, Env& env, const Storage* tensor, long long item) {
    constexpr int sector = 32 / sizeof(Storage), line = 4 * sector;  // channels
    constexpr int sharing = L::lanes < line ? line / L::lanes : 1, sectors = sharing * L::lanes / sector;
    constexpr int pixels = L::H * L::W;
    constexpr int step = L::threads / sectors * sharing;
    const int block = int(item % L::channel_blocks), own = block % sharing;
    const int channel = (block - own) * L::lanes + thread % sectors * sector;
    if (L::C % (sharing * L::lanes) != 0 && channel >= L::C) return;
    int pixel = thread / sectors * sharing + own;
    const Storage* p = tensor + (item / L::channel_blocks * (pixels * L::C) + (pixel * L::C + channel));
#pragma unroll 1
    for (; pixel < pixels; pixel += step, p += step * L::C) env.prefetch(p);
}

// The way back: irfft of the plane's rows without its 1/W, dropping what is imaginary in columns 0 and W/2. Each
// goes to store_row(h, its W values).
template <class L, class Env, class StoreRow>
FFT_INLINE void inverse_rows(int thread, Env& env, const Channel<L>& channel, int base, StoreRow&& store_row) {
    using T = typename L::Number;
    constexpr int W = L::W, lanes = L::lanes;
    if (!channel.exists()) return;
#pragma unroll 1
    for (int item = thread / L::across; item < L::row_items; item += L::workers) {
        if constexpr (L::rows == ROW_PAIRS) {
            const int slot = 2 * item, at = base + slot * L::row_stride + channel.lane;
            const bool two = L::H % 2 == 0 || slot + 1 < L::H;
            Complex<T> a[W];
            unrolled<0, L::K>([&](auto k) UNROLLED_BODY {
                const Complex<T> X = env.template plane<T>(at + k * lanes);
                const Complex<T> Y = two ? env.template plane<T>(at + k * lanes + L::row_stride) : Complex<T>{};
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
            const int at = base + item * L::row_stride + channel.lane;
            Complex<T> a[M];
            unrolled<0, M / 2 + 1>([&](auto k) UNROLLED_BODY {
                constexpr int mirrored = M - k.value;
                Complex<T> X = env.template plane<T>(at + k * lanes), Y = env.template plane<T>(at + mirrored * lanes);
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

// The N1-point transforms of one column, in place; with the twiddles that follow them on the way there.
template <class L, bool inverse, class Env>
FFT_INLINE void outer_stage(Env& env, int column) {
    using T = typename L::Number;
    constexpr int N1 = L::N1;
    if constexpr (N1 > 1)
        counted<L::N2, L::rolled>([&](auto j) UNROLLED_BODY {
            const auto at = [&](int i) UNROLLED_BODY { return column + (j + L::N2 * i) * L::row_stride; };
            Complex<T> a[N1];
            unrolled<0, N1>([&](auto i) UNROLLED_BODY { a[i] = env.template plane<T>(at(i)); });
            if constexpr (inverse)
                inverse_butterfly<N1>(a);
            else
                butterfly<N1>(a);
            unrolled<0, N1>([&](auto i)
                                UNROLLED_BODY { env.set_plane(at(i), inverse ? a[i] : twiddled<L>(a[i], i, j)); });
        });
}

// a[j] = the N2-point transform of what the stage before left, i.e. spectrum [frequency(i, j)].
template <class L, class Env, class T>
FFT_INLINE void inner_transform(Env& env, int at, Complex<T>* a) {
    unrolled<0, L::N2>([&](auto j) UNROLLED_BODY { a[j] = env.template plane<T>(at + j * L::row_stride); });
    butterfly<L::N2>(a);
}

// And back, with the twiddles that precede the N1-point transforms.
template <class L, class Env, class I, class T>
FFT_INLINE void inner_inverse(Env& env, int at, I i, Complex<T>* a) {
    inverse_butterfly<L::N2>(a);
    unrolled<0, L::N2>([&](auto j) UNROLLED_BODY {
        env.set_plane(at + j * L::row_stride, exchanged(twiddled<L>(exchanged(a[j]), j, i)));
    });
}

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
    unsigned item;  // b * channel_blocks + a block of channels
    unsigned next;  // the item that follows on a multiprocessor, or none of the `items`
    unsigned items;

    template <int phase, class Env>
    FFT_INLINE void run(Env& env) const {
        const Channel<L> channel(item / L::channel_blocks, item % L::channel_blocks, thread % L::across * L::width);
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
            const int column = k * L::lanes + channel.lane;
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

// With G = rfft2(grad_y), D = 1 for k = 0 and W/2 and else 2, P = D G conj(X):
//
//   grad_u = irfft2(conj(M) G), then StarReLU's gradients;   grad_r[f] = sum_hk Re(P conj(basis[f])), then softmax's;
//   grad_basis = sum_bc r P;   grad of a weight = sum_b P
//
// Plane 0 holds X, then P; plane 1 holds G, then conj(M) G. In turn, X and then P are in device memory, and the plane
// holds what becomes X, then G and conj(M) G. A null output is not wanted.
template <class L, class Storage>
struct Backward {
    using T = typename L::Number;
    static constexpr int phases = L::in_turn ? 5 : 3, end_phases = L::star_relu ? 2 : 0;
    const Storage* grad_y;  // (B,H,W,C)
    const Storage* x;       // (B,H,W,C)
    const float* logits;    // (B,F,C)
    const float* filters;   // (H,K,F,2), or (H,K,C,2): 16-byte aligned
    Scalars star_relu;
    Storage* grad_x;        // (B,H,W,C)
    float* grad_logits;     // (B,F,C)
    float* filter_slot;     // (slots,H,K,F,2): this block's part of the sum; or (H,K,C,2), of which it has its channels
    float* star_relu_slot;  // this block's part of grad_scale and grad_bias
    int thread;
    long long sample = 0;
    int channel_block = 0;
    bool first = true;                  // of this block's items
    long long next = -1;                // item
    T grad_scale = {}, grad_bias = {};  // this thread's part

    // Work item b * channel_blocks + a block of channels; the next one is -1 after the last.
    FFT_INLINE void begin(long long item, bool is_first, long long next_item) {
        sample = item / L::channel_blocks, channel_block = int(item % L::channel_blocks);
        first = is_first, next = next_item;
    }

    template <int phase, class Env>
    FFT_INLINE void run(Env& env) {
        const Channel<L> channel(sample, channel_block, thread % L::across * L::width);
        if constexpr (phase == 0) transform_rows<L>(thread, env, channel, x, activation_of<L>(env, star_relu), 0);
        if constexpr (L::in_turn && phase == 1) keep_spectrum(env, channel);
        if constexpr (phase == phases - 3)
            transform_rows<L>(thread, env, channel, grad_y, Identity{}, L::gradient_plane);
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
                if (filter_slot) sum_over_lanes(env);
                if (grad_logits && thread < L::lanes) differentiate_softmax(env);
            }
        }
    }

    // After the last item: the block's sums over threads.
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
    static FFT_INLINE int spectrum_at(int s, int k, int lane) { return (s * L::K + k) * L::lanes + lane; }

    template <class Env>
    FFT_INLINE void keep_spectrum(Env& env, const Channel<L>& channel) {
#pragma unroll 1
        for (int k = thread / L::across; k < L::K; k += L::workers) {
            const int column = k * L::lanes + channel.lane;
            outer_stage<L, false>(env, column);
            counted<L::N1, L::rolled>([&](auto i) UNROLLED_BODY {
                Complex<T> X[L::N2];
                inner_transform<L>(env, column + i * L::N2 * L::row_stride, X);
                unrolled<0, L::N2>(
                    [&](auto j) UNROLLED_BODY { env.set_spectrum(spectrum_at(i * L::N2 + j, k, channel.lane), X[j]); });
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
            const int column = k * L::lanes + channel.lane;
            const float half_D = k == 0 || 2 * k == L::W ? 0.5f : 1.0f;
            if constexpr (!L::in_turn) outer_stage<L, false>(env, column);
            outer_stage<L, false>(env, L::gradient_plane + column);
            counted<L::N1, L::rolled>([&](auto i) UNROLLED_BODY {
                const int at = column + i * L::N2 * L::row_stride;
                Complex<T> X[L::N2], G[L::N2];
                // Of these few points, before it meets the rest: an image's mean makes one point outweigh all others.
                T part[L::filters];
                unrolled<0, L::F>([&](auto f) UNROLLED_BODY { part[f] = {}; });
                if constexpr (!L::in_turn) inner_transform<L>(env, at, X);
                inner_transform<L>(env, L::gradient_plane + at, G);
                unrolled<0, L::N2>([&](auto j) UNROLLED_BODY {
                    const int kept = spectrum_at(i * L::N2 + j, k, channel.lane);
                    if constexpr (L::in_turn) X[j] = env.template spectrum<T>(kept);
                    const int h = L::frequency(i, j);
                    const Filters<L> basis(env, channel, filters, h, k);
                    const Complex<T> product = G[j] * conjugate(X[j]);
                    const Complex<T> P = {product.re * half_D, product.im * half_D};
                    if constexpr (L::per_channel)
                        add_to_weight(env, channel, h * L::K + k, P);
                    else if constexpr (L::in_turn)
                        env.set_spectrum(kept, P);
                    else
                        env.set_plane(at + j * L::row_stride, P);
                    unrolled<0, L::F>([&](auto f) UNROLLED_BODY {
                        part[f] += P.re * basis.values[2 * f];
                        part[f] += P.im * basis.values[2 * f + 1];
                    });
                    G[j] = G[j] * conjugate(basis.mixed(r));
                });
                unrolled<0, L::F>([&](auto f) UNROLLED_BODY { grad_r[f] += part[f]; });
                inner_inverse<L>(env, L::gradient_plane + at, i, G);
            });
            outer_stage<L, true>(env, L::gradient_plane + column);
        }
        unrolled<0, L::F>([&](auto f) UNROLLED_BODY {
            env.set_scratch(L::sums_at + (f * L::threads + thread) * L::width, grad_r[f]);
            unrolled<0, L::width>([&](auto own) UNROLLED_BODY {
                if (thread < L::across)
                    env.set_scratch(L::weights_at + (channel.lane + own) * L::F + f, of_channel(r[f], own));
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
        inverse_rows<L>(thread, env, channel, L::gradient_plane, [&](int h, T* values) UNROLLED_BODY {
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

    // grad_basis += sum over lanes of r P: one thread a frequency, or several with some lanes each.
    template <class Env>
    FFT_INLINE void sum_over_lanes(Env& env) const {
        constexpr int lanes = L::lanes / L::slots, F = L::F, tasks = L::H * L::K * L::slots;
#pragma unroll 1
        for (unsigned task = thread; task < tasks; task += L::threads) {
            const unsigned point = task / L::slots, part = task % L::slots;
            const unsigned slot = point / L::K, k = point % L::K;
            const unsigned at = slot * L::row_stride + k * L::lanes;
            // Threads whose lanes lie in the same banks begin with different ones.
            const unsigned begin = (at + part * lanes) / (lanes < 16 ? 16 : lanes) % lanes + part * lanes;
            float sums[2 * F] = {};
            unrolled<0, lanes>([&](auto step) UNROLLED_BODY {
                const unsigned lane = begin ^ step;
                const Complex<float> P = L::in_turn ? env.template spectrum<float>(point * L::lanes + lane)
                                                    : env.template plane<float>(at + lane);
                float r[F];
                load_weights(env, lane, r);
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
    static FFT_INLINE void load_weights(Env& env, unsigned lane, float* r) {
        constexpr int width = L::F % 4 == 0 && L::weights_at % 4 == 0 ? 4 : L::F % 2 == 0 ? 2 : 1;
        unrolled<0, L::F / width>([&](auto i) UNROLLED_BODY {
            env.template scratch<width>(L::weights_at + lane * L::F + i * width, r + i * width);
        });
    }

    // grad_logits[f] = r[f] sum_f' r[f'] (grad_r[f] - grad_r[f']), one thread a channel; exactly 0 where F = 1.
    template <class Env>
    FFT_INLINE void differentiate_softmax(Env& env) const {
        const Channel<L> channel(sample, channel_block, thread);
        float r[L::F], grad_r[L::F];
        load_weights(env, thread, r);
        unrolled<0, L::F>([&](auto f) UNROLLED_BODY {
            grad_r[f] = sum<L::lanes, L::workers>(env, L::sums_at + f * L::threads * L::width + thread);
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
