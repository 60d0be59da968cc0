// The filter itself: softmax of the logits, the mixture of the basis at each frequency, its product with a column of
// the spectrum, and the gradients of logits, basis and weight. Depends on the arithmetic type only.

namespace {

template <class V>
struct MixingOf : TileOf<V> {
    using Base = TileOf<V>;
    using Base::lanes;
    using typename Base::Arithmetic, typename Base::Line, typename Base::Sum, typename Base::T, typename Base::Tile;

    // ---- on one column: mix(a, radix, p) multiplies a[0 .. radix), the values at positions p .. p + radix

    struct FilterColumn {
        const Tile& tile;
        const int* frequency;
        const T* filters;   // this column of the basis (H,F,2) in order of position, or of the weight in its first row
        std::int64_t row;   // elements from one position of the basis, or row of the weight, to the next
        Line* x;            // backward: this column of X, overwritten with Q
        Sum* grad_routing;  // [F] this column's terms
        T* grad_weight;     // this column in the first row, like `filters`; null if not needed
        T grad_scale;       // of grad_weight: D and the normalisation

        FilterColumn(const Tile& tile_, int k, Line* x_)
            : tile(tile_),
              frequency(tile.column_plan.frequency),
              row(2 * (tile.F > 0 ? tile.F : tile.K * tile.problem.C)),
              x(x_),
              grad_routing(tile.grad_routing + std::int64_t{k} * tile.F),
              grad_weight(nullptr),
              grad_scale(T(tile.half_spectrum_weight(k) * tile.normalisation() / 2)) {
            if (tile.F > 0) {
                filters = static_cast<const T*>(tile.call.basis) + k * tile.H * row;
                return;
            }
            const std::int64_t sample = tile.problem.weight_per_sample ? tile.task.sample * tile.H * row : 0;
            const std::int64_t column = sample + 2 * (k * tile.problem.C + tile.channel);
            filters = static_cast<const T*>(tile.tensors.filters) + column;
            if (tile.tensors.grad_filters) grad_weight = static_cast<T*>(tile.tensors.grad_filters) + column;
        }
        FFT_INLINE const T* bin(int position) const { return filters + position * row; }  // [F][2] of the basis
        std::int64_t weight(int position) const { return frequency[position] * row; }
    };

    static Line conj_times(Line a, Line b) { return {a.re * b.re + a.im * b.im, a.re * b.im - a.im * b.re}; }

    // sum_f routing[f] bin[f]; fixed_F is F if it is known at compile time, else 0.
    template <int fixed_F>
    FFT_INLINE static Line mixed(const V* routing, const T* bin, int F = fixed_F) {
        Line M = {routing[0] * bin[0], routing[0] * bin[1]};
        for (int f = 1; f < (fixed_F ? fixed_F : F); f++) {
            M.re += routing[f] * bin[2 * f];
            M.im += routing[f] * bin[2 * f + 1];
        }
        return M;
    }

    static void mix_basis(const FilterColumn& column, Line* a, int radix, int first) {
        for (int r = 0; r < radix; r++)
            a[r] = a[r] * mixed<0>(column.tile.routing, column.bin(first + r), column.tile.F);
    }

    // grad_routing adds the terms of this many points in the arithmetic type, and then their sum in float64.
    static constexpr int points_together = 8;

    template <int fixed_F>
    static void mix_basis_backward(const FilterColumn& column, Line* a, int radix, int first) {
        for (int r = 0; r < radix; r += points_together) {
            const int points = radix - r < points_together ? radix - r : points_together;
            if constexpr (fixed_F > 0) {
                V routing[fixed_F], grads[fixed_F] = {};
                for (int f = 0; f < fixed_F; f++) routing[f] = column.tile.routing[f];
                mix_points_backward<fixed_F>(column, a + r, points, first + r, routing, grads, fixed_F);
                for (int f = 0; f < fixed_F; f++) column.grad_routing[f] += __builtin_convertvector(grads[f], Sum);
            } else {
                for (int f = 0; f < column.tile.F; f++) add_grad_routing(column, a + r, points, first + r, f);
                mix_points_backward<0>(column, a + r, points, first + r, column.tile.routing, nullptr, column.tile.F);
            }
        }
    }

    template <int fixed_F>
    FFT_INLINE static void mix_points_backward(const FilterColumn& column, Line* a, int points, int first,
                                               const V* routing, V* grads, int F) {
        const bool need_grads = column.tile.needs_x_spectrum();
        for (int i = 0; i < points; i++) {
            const T* bin = column.bin(first + i);
            const Line G = a[i];
            a[i] = conj_times(mixed<fixed_F>(routing, bin, F), G);
            if (!need_grads) continue;
            const Line Q = conj_times(column.x[first + i], G);
            for (int f = 0; grads && f < F; f++) grads[f] += Q.re * bin[2 * f] + Q.im * bin[2 * f + 1];
            column.x[first + i] = Q;
        }
    }

    // The terms of one filter, if F is not known at compile time.
    static void add_grad_routing(const FilterColumn& column, const Line* a, int points, int first, int f) {
        if (!column.tile.needs_x_spectrum()) return;
        V grad{};
        for (int i = 0; i < points; i++) {
            const Line Q = conj_times(column.x[first + i], a[i]);
            const T* bin = column.bin(first + i) + 2 * f;
            grad += Q.re * bin[0] + Q.im * bin[1];
        }
        column.grad_routing[f] += __builtin_convertvector(grad, Sum);
    }

    // Points of a column whose real and imaginary parts fill one register.
    static constexpr int points_of_register = lanes / 2;
    static std::int64_t slot_registers(int H, int K, int F) {
        return std::int64_t{K} * F * ((H + points_of_register - 1) / points_of_register);
    }

    // grad_basis[f] += sum_c routing[f][c] Q[c], for column k. Points are transposed a register at a time, so that
    // lanes are real and imaginary parts of points instead of channels; slots keep that layout.
    static void add_grad_basis(const Tile& tile, int k, const Line* Q) {
        const std::int64_t registers = slot_registers(tile.H, tile.K, tile.F);
        V* sums = static_cast<V*>(tile.call.slots) + tile.task.slot * registers + k * (registers / tile.K);
        for (int first = 0; first < tile.H; first += points_of_register) {
            V parts[lanes];
            unrolled<0, points_of_register>([&](auto i) UNROLLED_BODY {
                const Line point = first + i < tile.H ? Q[first + i] : Line{};
                parts[2 * i] = point.re;
                parts[2 * i + 1] = point.im;
            });
            Base::transpose(parts);
            for (int f = 0; f < tile.F; f++, sums++) {
                V sum = tile.task.first_of_slot ? V{} : *sums;
                unrolled<0, lanes>([&](auto c) UNROLLED_BODY { sum += parts[c] * tile.routing[f][c.value]; });
                *sums = sum;
            }
        }
    }

    // A weight per channel: (re, im) pairs in memory, split into two registers.
    static Line weight_at(const FilterColumn& column, int position) {
        const T* bin = column.filters + column.weight(position);
        const int used = 2 * column.tile.used;
        const V low = used >= lanes ? Arithmetic::load(bin) : load_first<Arithmetic>(bin, used);
        const V high = used == 2 * lanes ? Arithmetic::load(bin + lanes)
                       : used > lanes    ? load_first<Arithmetic>(bin + lanes, used - lanes)
                                         : V{};
        const T scale = T(column.tile.normalisation());
        return {alternate<0, 1, lanes>(low, high) * scale, alternate<1, 1, lanes>(low, high) * scale};
    }

    static void mix_global(const FilterColumn& column, Line* a, int radix, int first) {
        for (int r = 0; r < radix; r++) a[r] = a[r] * weight_at(column, first + r);
    }

    static void mix_global_backward(const FilterColumn& column, Line* a, int radix, int first) {
        for (int r = 0; r < radix; r++) {
            const Line G = a[r];
            a[r] = conj_times(weight_at(column, first + r), G);
            if (column.grad_weight) add_grad_weight(column, first + r, conj_times(column.x[first + r], G));
        }
    }

    static void add_grad_weight(const FilterColumn& column, int position, Line Q) {
        const Tile& tile = column.tile;
        T elements[2 * lanes];
        Arithmetic::store(elements, interleave<false>(Q.re, Q.im) * column.grad_scale);
        Arithmetic::store(elements + lanes, interleave<true>(Q.re, Q.im) * column.grad_scale);
        T* sums = column.grad_weight + column.weight(position);
        for (int i = 0; i < 2 * tile.used; i++) sums[i] = tile.task.first_of_slot ? elements[i] : sums[i] + elements[i];
    }

    // ---- before and after the transforms

    // Columns copied together: a few cache lines of each row.
    static constexpr int columns_together = 8;

    static void arrange_basis(const FilterCall& call, int first, int last) {
        for (int k = first; k < last; k += columns_together) {
            const int end = k + columns_together < last ? k + columns_together : last;
            call.problem->F == 4 ? arrange_columns<4>(call, k, end) : arrange_columns<0>(call, k, end);
        }
    }
    template <int fixed_F>
    static void arrange_columns(const FilterCall& call, int first, int last) {
        const FilterProblem& problem = *call.problem;
        const int* frequency = static_cast<const Plan<T>*>(call.column_plan)->frequency;
        const std::int64_t H = problem.H, K = problem.W / 2 + 1, bin = 2 * (fixed_F ? fixed_F : problem.F);
        for (std::int64_t p = 0; p < H; p++) {
            const T* from = static_cast<const T*>(call.tensors->filters) + (frequency[p] * K + first) * bin;
            T* to = static_cast<T*>(call.basis) + (first * H + p) * bin;
            for (int k = first; k < last; k++, from += bin, to += H * bin)
                if constexpr (fixed_F > 0)
                    __builtin_memcpy(to, from, 2 * fixed_F * sizeof(T));
                else
                    for (int i = 0; i < bin; i++) to[i] = from[i];
        }
    }

    static const T* logits(const Tile& tile, int f) {
        const std::int64_t row = tile.task.sample * tile.F + f;
        return static_cast<const T*>(tile.tensors.logits) + row * tile.problem.C + tile.channel;
    }

    static void begin(const FilterCall& call, const TileTask& task) {
        const Tile tile(call, task);
        if (tile.F == 0) return;
        V* weights = tile.weights;
        V largest{}, sum{};
        for (int f = 0; f < tile.F; f++) {
            const T* from = logits(tile, f);
            weights[f] = tile.used == lanes ? Arithmetic::load(from) : load_first<Arithmetic>(from, tile.used);
            largest = f == 0 || weights[f] > largest ? weights[f] : largest;
        }
        const bool softmax = tile.problem.softmax;
        for (int f = 0; f < tile.F && softmax; f++) sum += weights[f] = exp_nonpositive(weights[f] - largest);
        for (int f = 0; f < tile.F; f++) {
            if (softmax) weights[f] /= sum;
            tile.routing[f] = weights[f] * T(tile.normalisation());
        }
    }

    static void end(const FilterCall& call, const TileTask& task, double* star_relu_sums) {
        const Tile tile(call, task);
        if (tile.tensors.grad_logits) store_grad_logits(tile);
        star_relu_sums[0] = star_relu_sums[1] = 0;
        if (!tile.tensors.need_scalars) return;
        for (int pair = 0; pair < tile.pairs; pair++)
            for (int i = 0; i < 2; i++) star_relu_sums[i] += tile.star_relu_sums[2 * pair + i];
    }

    // grad_routing, or with a softmax its gradient: weights (grad_routing - sum_f weights grad_routing)
    static void store_grad_logits(const Tile& tile) {
        V* grads = tile.routing;  // no longer needed
        V mean{};
        for (int f = 0; f < tile.F; f++) {
            Sum sum{};
            for (int k = 0; k < tile.K; k++)
                sum += tile.grad_routing[std::int64_t{k} * tile.F + f] * tile.half_spectrum_weight(k);
            grads[f] = __builtin_convertvector(sum * (tile.normalisation() / 2), V);
            mean += tile.weights[f] * grads[f];
        }
        for (int f = 0; f < tile.F; f++) {
            const std::int64_t offset = logits(tile, f) - static_cast<const T*>(tile.tensors.logits);
            const V grad = tile.problem.softmax ? tile.weights[f] * (grads[f] - mean) : grads[f];
            store_first<Arithmetic>(static_cast<T*>(tile.tensors.grad_logits) + offset, grad, tile.used);
        }
    }

    static void sum_slots(const FilterCall& call, int first, int last) {
        const FilterProblem& problem = *call.problem;
        const int H = problem.H, K = problem.W / 2 + 1, F = problem.F;
        const int* position = static_cast<const Plan<T>*>(call.column_plan)->frequency_at;
        const std::int64_t registers = slot_registers(H, K, F);
        auto* grad = static_cast<T*>(call.tensors->grad_filters) + first * std::int64_t{K} * F * 2;
        for (int h = first; h < last; h++)
            for (int k = 0; k < K; k++) {
                const T weight = T(k == 0 || 2 * k == problem.W ? 0.5 : 1);
                const V* of_column = static_cast<const V*>(call.slots) + k * (registers / K);
                const V* of_points = of_column + position[h] / points_of_register * F;
                const int lane = 2 * (position[h] % points_of_register);
                for (int f = 0; f < F; f++, grad += 2) {
                    T re{}, im{};
                    for (std::int64_t slot = 0; slot < call.num_slots; slot++) {
                        const V& sum = of_points[slot * registers + f];
                        re += sum[lane];
                        im += sum[lane + 1];
                    }
                    grad[0] = re * weight;
                    grad[1] = im * weight;
                }
            }
    }
};

}  // namespace
