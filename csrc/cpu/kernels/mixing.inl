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
        const int k;
        Line* const x;  // backward: this column of X, overwritten with Q
        const int* const frequency = tile.column_plan.frequency;
        // Elements from one position of the basis, or row of the weight, to the next; then from the first to this
        // column's.
        const std::int64_t row = 2 * (tile.F > 0 ? tile.F : tile.K * tile.problem.C);
        const std::int64_t sample = tile.problem.weight_per_sample ? tile.task.sample * tile.H * row : 0;
        const std::int64_t start = tile.F > 0 ? k * tile.H * row : sample + 2 * (k * tile.problem.C + tile.channel);
        const T* const filters = static_cast<const T*>(tile.F > 0 ? tile.call.basis : tile.tensors.filters) + start;
        const T grad_scale = T(tile.half_spectrum_weight(k) * tile.normalisation() / 2);  // of the weight

        FFT_INLINE const T* bin(int position) const { return filters + position * row; }  // [F][2] of the basis
        // Of the weight, from `filters` on.
        std::int64_t weight(int position) const { return frequency[position] * row; }
        Sum* grad_routing() const { return tile.grad_routing + std::int64_t{k} * tile.F; }
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
        const Tile& tile = column.tile;
        const int F = fixed_F ? fixed_F : tile.F;
        V registers[fixed_F + 1];
        for (int f = 0; f < fixed_F; f++) registers[f] = tile.routing[f];
        const V* routing = fixed_F ? registers : tile.routing;
        for (int r = 0; r < radix; r++) {
            const Line G = a[r];
            a[r] = conj_times(mixed<fixed_F>(routing, column.bin(first + r), F), G);
            if (tile.needs_x_spectrum()) column.x[first + r] = conj_times(column.x[first + r], G);
        }
        for (int r = 0; r < radix && tile.needs_x_spectrum(); r += points_together) {
            const int end = radix - r < points_together ? radix : r + points_together;
            constexpr int filters = fixed_F ? fixed_F : 1;
            for (int f = 0; f < F; f += filters) add_grad_routing<filters>(column, first + r, first + end, f);
        }
    }
    // The terms of `count` filters at positions [first, last).
    template <int count>
    FFT_INLINE static void add_grad_routing(const FilterColumn& column, int first, int last, int filter) {
        V grads[count] = {};
        for (int position = first; position < last; position++) {
            const Line Q = column.x[position];
            const T* bin = column.bin(position) + 2 * filter;
            for (int f = 0; f < count; f++) grads[f] += Q.re * bin[2 * f] + Q.im * bin[2 * f + 1];
        }
        for (int f = 0; f < count; f++) column.grad_routing()[filter + f] += __builtin_convertvector(grads[f], Sum);
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
        const V low = load<Arithmetic>(bin, used < lanes ? used : lanes);
        const V high = used > lanes ? load<Arithmetic>(bin + lanes, used - lanes) : V{};
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
            if (column.tile.tensors.grad_filters)
                add_grad_weight(column, first + r, conj_times(column.x[first + r], G));
        }
    }

    static void add_grad_weight(const FilterColumn& column, int position, Line Q) {
        const Tile& tile = column.tile;
        T elements[2 * lanes];
        Arithmetic::store(elements, interleave<false>(Q.re, Q.im) * column.grad_scale);
        Arithmetic::store(elements + lanes, interleave<true>(Q.re, Q.im) * column.grad_scale);
        T* sums = static_cast<T*>(tile.tensors.grad_filters) + column.start + column.weight(position);
        for (int i = 0; i < 2 * tile.used; i++) sums[i] = tile.task.first_of_slot ? elements[i] : sums[i] + elements[i];
    }

    // ---- before and after the transforms

    // Columns copied together: a few cache lines of each row.
    static constexpr int columns_together = 8;

    static void arrange_basis(const FilterCall& call, int first, int last) {
        call.problem->F == 4 ? arrange_columns(call, first, last, Index<4>{})
                             : arrange_columns(call, first, last, int(call.problem->F));
    }
    template <class Count>
    static void arrange_columns(const FilterCall& call, int first, int last, Count F) {
        const int* frequency = call.column_plan->frequency;
        const std::int64_t H = call.problem->H, K = call.problem->W / 2 + 1, bin = 2 * F;
        for (int start = first; start < last; start += columns_together)
            for (std::int64_t p = 0; p < H; p++) {
                const T* from = static_cast<const T*>(call.tensors->filters) + frequency[p] * K * bin;
                T* to = static_cast<T*>(call.basis) + p * bin;
                for (int k = start; k < last && k < start + columns_together; k++)
                    __builtin_memcpy(to + k * H * bin, from + k * bin, bin * sizeof(T));
            }
    }

    static const T* logits(const Tile& tile, int f) {
        const std::int64_t row = tile.task.sample * tile.F + f;
        return static_cast<const T*>(tile.tensors.logits) + row * tile.problem.C + tile.channel;
    }

    static void begin(const FilterCall& call, const TileTask& task) {
        const Tile tile{call, task};
        if (tile.F == 0) return;
        V* weights = tile.weights;
        V largest{}, sum{};
        for (int f = 0; f < tile.F; f++) {
            const T* from = logits(tile, f);
            weights[f] = load<Arithmetic>(from, tile.used);
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
        const Tile tile{call, task};
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
        const int* position = call.column_plan->frequency_at;
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
