// A tile: the H x W planes of neighbouring channels of one sample, one channel per SIMD lane. mixing.inl,
// columns.inl, rows.inl and planes.inl compute the filter step and its gradients on it:
//
//   forward    y = irfft2(rfft2(u) M)
//   backward   X = rfft2(u), G = rfft2(grad_y), Q = G conj(X), D = 1 for k = 0 and k = W/2, else 2
//              grad_u = irfft2(conj(M) G)
//              grad_routing[f] = sum_hk D Re(Q conj(basis[h,k,f])),   grad_basis[h,k,f] = sum_bc D routing[f] Q
//
// Two rows are transformed as one complex line: Z = fft(row a + i row b). Twice the spectra of rows a and b at column k
// are Z[k] + conj(Z[-k]) and -i (Z[k] - conj(Z[-k])). So the column pass reads only columns k and -k, and writes its
// results back to them: a tile's workspace is as large as the tile. Transforms are not normalised. The factor 2 and
// the 1/sqrt(H W) of both transforms are folded into the routing weights.

namespace {

template <class V>
struct TileOf {
    using T = typename ScalarOf<V>::Type;
    using Line = Complex<V>;
    using Arithmetic = NativeLane<T, V>;  // lane type of tensors kept in the arithmetic type
    using Sum = decltype(Accumulator<V>::sum);
    static constexpr int lanes = Arithmetic::count;

    // Lines that go through a pass together stay in L1 for the next pass.
    static constexpr std::int64_t bytes_at_once = 16384;

    static int lines_at_once(std::int64_t length) {
        const std::int64_t lines = bytes_at_once / (std::int64_t{sizeof(Line)} * length);
        return lines < 1 ? 1 : int(lines);
    }

    struct Tile {
        const FilterCall& call;
        const TileTask& task;
        const FilterProblem& problem = *call.problem;
        const FilterTensors& tensors = *call.tensors;
        const LinePlan<T>& row_plan = *static_cast<const LinePlan<T>*>(call.row_plan);
        const LinePlan<T>& column_plan = *static_cast<const LinePlan<T>*>(call.column_plan);
        const int H = int(problem.H), W = int(problem.W), K = W / 2 + 1, F = int(problem.F);
        const int pairs = column_plan.num_pairs;
        const std::int64_t channel = task.channel_tile * lanes, spectrum = pairs * call.row_stride;
        // Lanes in use: fewer than all in the last tile of a sample.
        const int used = problem.C - channel < lanes ? int(problem.C - channel) : lanes;

        // In the workspace: the spectra, softmax(logits) [F], these / (2HW) [F]
        Line* const x_spectrum = static_cast<Line*>(task.workspace);
        Line* const y_spectrum = x_spectrum + (backward() && needs_x_spectrum() ? spectrum : 0);
        V* const weights = reinterpret_cast<V*>(y_spectrum + spectrum);
        V* const routing = weights + F;
        // Backward, terms of each column [K][F], and grad_scale's and grad_bias' of each pair of rows [pairs][2].
        Sum* const grad_routing = reinterpret_cast<Sum*>(routing + F);
        double* const star_relu_sums = reinterpret_cast<double*>(grad_routing + std::int64_t{K} * F);

        std::int64_t bytes() const {
            const void* end = backward() ? static_cast<void*>(star_relu_sums + 2 * pairs) : grad_routing;
            return static_cast<const char*>(end) - static_cast<const char*>(task.workspace);
        }
        bool backward() const { return tensors.grad_y; }
        bool needs_x_spectrum() const { return !backward() || tensors.grad_filters || tensors.grad_logits; }
        bool needs_y_spectrum() const { return !backward() || tensors.grad_x || tensors.need_scalars; }
        void* result() const { return backward() ? tensors.grad_x : tensors.y; }

        // Offset, in elements, of this tile's first channel in the first pixel of a row.
        std::int64_t row_offset(std::int64_t row) const {
            if (problem.channels_first) return ((task.sample * problem.C + channel) * H + row) * W;
            return (task.sample * H + row) * W * problem.C + channel;
        }
        double half_spectrum_weight(int k) const { return k == 0 || 2 * k == W ? 1 : 2; }
        double normalisation() const { return 0.5 / (double(H) * W); }
    };

    // Transposes v[lanes][lanes]: first within 16 bytes, where shuffles are cheapest, then the 16 bytes.
    FFT_INLINE static void transpose(V* v) {
        constexpr int unit = 16 / sizeof(T), units = lanes / unit;
        unrolled<0, units>([&](auto i) UNROLLED_BODY { transpose_cells<1, unit, 1>(v + i.value * unit); });
        if constexpr (units > 1)
            unrolled<0, unit>([&](auto i) UNROLLED_BODY { transpose_cells<unit, lanes, unit>(v + i.value); });
    }
    // Transposes 2 x 2 or 4 x 4 cells of `size` lanes in each `width` lanes of v[0], v[step], ...
    template <int size, int width, int step>
    FFT_INLINE static void transpose_cells(V* v) {
        const V a = v[0], b = v[step];
        if constexpr (width == 2 * size) {
            v[0] = alternate<0, size, width>(a, b);
            v[step] = alternate<1, size, width>(a, b);
        } else {
            const V c = v[2 * step], d = v[3 * step];
            unrolled<0, 2>([&](auto i) UNROLLED_BODY {
                const V ab = alternate<i.value, 2 * size, width>(a, b), cd = alternate<i.value, 2 * size, width>(c, d);
                v[2 * i * step] = alternate<0, size, width>(ab, cd);
                v[(2 * i + 1) * step] = alternate<1, size, width>(ab, cd);
            });
        }
    }
};

}  // namespace
