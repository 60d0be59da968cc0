// The filter step and its gradients on one plane: a block of channels, one per lane, of one sample. Included once per
// instruction set, after transform.inl.
//
//   forward    y = irfft2(rfft2(u) M)
//   backward   X = rfft2(u), G = rfft2(grad_y), Q = G conj(X), D = 1 for k = 0 and k = W/2, else 2
//              grad_u = irfft2(conj(M) G)
//              grad_routing[f] = sum_hk D Re(Q conj(basis[h,k,f])),   grad_basis[h,k,f] = sum_bc D routing[f] Q
//
// Two rows are transformed as one complex line, row 2q + i row 2q+1: Z. Column k of both is Z[k] + conj(Z[-k]) and
// -i (Z[k] - conj(Z[-k])), so a column and its mirror image hold all that the column pass needs, and what it makes goes
// back to the same two places. A plane's workspace is as large as the plane. Nothing is normalised on the way: the
// factor 2 above and the transforms' 1/sqrt(H W) are put into the routing weights.

namespace {

template <class L>
struct Filter {
    using Storage = typename L::Scalar;
    using V = typename L::Vec;
    using T = typename ScalarOf<V>::Type;
    using Line = Complex<V>;
    using Arithmetic = Plain<T, V>;  // lane type of tensors kept in the arithmetic type
    static constexpr int lanes = L::count;

    // Columns that a pass takes together: neighbours in memory, few enough for L1 (or L2, where a line is long).
    static constexpr std::int64_t column_block_bytes = 16384;
    static constexpr int max_column_block = 8;
    static constexpr std::int64_t row_block_bytes = 16384;

    struct Plane {
        const FilterCall& call;
        const FilterProblem& problem;
        const FilterTensors& tensors;
        const PlaneTask& task;
        const Plan<T>&row_plan, &column_plan;
        int H, W, K, F, pairs;
        std::int64_t channel;
        int used;  // lanes that hold a channel
        Line *x_spectrum, *y_spectrum;
        V* routing;              // [F] softmax(logits) / (2HW)
        V* grad_routing;         // [K][F]: each column's part
        double* star_relu_sums;  // [pairs][2]: each row pair's part

        Plane(const FilterCall& call_, const PlaneTask& task_)
            : call(call_),
              problem(*call_.problem),
              tensors(*call_.tensors),
              task(task_),
              row_plan(*static_cast<const Plan<T>*>(call_.row_plan)),
              column_plan(*static_cast<const Plan<T>*>(call_.column_plan)),
              H(problem.H),
              W(problem.W),
              K(W / 2 + 1),
              F(problem.F),
              pairs((H + 1) / 2),
              channel(task_.channel_block * lanes),
              used(problem.C - channel < lanes ? int(problem.C - channel) : lanes) {
            x_spectrum = static_cast<Line*>(task.workspace);
            y_spectrum = x_spectrum + (backward() && needs_x_spectrum() ? pairs * call.row_stride : 0);
            routing = reinterpret_cast<V*>(y_spectrum + pairs * call.row_stride);
            grad_routing = routing + F;
            star_relu_sums = reinterpret_cast<double*>(grad_routing + (backward() ? std::int64_t{K} * F : 0));
        }
        bool backward() const { return tensors.grad_y; }
        bool needs_x_spectrum() const { return !backward() || tensors.grad_filters || tensors.grad_logits; }
        bool needs_y_spectrum() const { return !backward() || tensors.grad_x || tensors.need_scalars; }

        const Storage* pixels(const void* tensor, std::int64_t row) const {
            return static_cast<const Storage*>(tensor) + ((task.sample * H + row) * W) * problem.C + channel;
        }
        Storage* pixels(void* tensor, std::int64_t row) const {
            return const_cast<Storage*>(pixels(static_cast<const void*>(tensor), row));
        }
        const T* filters(std::int64_t h, std::int64_t k) const {
            const std::int64_t bin = h * K + k;
            const auto* start = static_cast<const T*>(tensors.filters);
            return start + 2 * (F > 0 ? bin * F : bin * problem.C + channel);
        }
        double half_spectrum_weight(int k) const { return k == 0 || 2 * k == W ? 1 : 2; }
        double normalisation() const { return 0.5 / (double(H) * W); }
    };

    static V load(const Storage* from, int used) {
        return used == lanes ? L::load(from) : load_first<L>(from, used);
    }
    static void store(Storage* to, V v, int used) {
        if (used == lanes)
            L::store(to, v);
        else
            store_first<L>(to, v, used);
    }

    // ---- rows

    // Rows 2q and 2q+1 of a tensor to one line; past the last row there are zeros.
    template <class Activation>
    static void load_pair(const Plane& plane, const void* tensor, int pair, Line* line, const Activation& activation) {
        const int* position = plane.row_plan.position;
        const std::int64_t C = plane.problem.C;
        const Storage* first = plane.pixels(tensor, 2 * pair);
        if (2 * pair + 1 < plane.H) {
            const Storage* second = first + plane.W * C;
            for (std::int64_t w = 0; w < plane.W; w++)
                line[position[w]] = {activation(load(first + w * C, plane.used)),
                                     activation(load(second + w * C, plane.used))};
        } else {
            for (std::int64_t w = 0; w < plane.W; w++)
                line[position[w]] = {activation(load(first + w * C, plane.used)), V{}};
        }
    }

    template <class Load>
    static void transform_rows(const Plane& plane, Line* spectrum, void* scratch, int first, int last, Load load_line) {
        const std::int64_t stride = plane.call.row_stride;
        const int block = block_of(row_block_bytes, stride);
        for (int start = first; start < last; start += block) {
            const int end = start + block < last ? start + block : last;
            for (int pair = start; pair < end; pair++) load_line(pair, spectrum + pair * stride);
            transform<false>(plane.row_plan, spectrum + start * stride, end - start, stride,
                             static_cast<Line*>(scratch));
        }
    }

    static int block_of(std::int64_t bytes, std::int64_t line) {
        const std::int64_t lines = bytes / (line * std::int64_t{sizeof(Line)});
        return lines < 1 ? 1 : int(lines);
    }

    static void rows(const FilterCall& call, const PlaneTask& task, void* scratch, int first, int last) {
        const Plane plane(call, task);
        if (plane.needs_x_spectrum()) {
            const V scale = V{} + T(plane.problem.scale), bias = V{} + T(plane.problem.bias);
            transform_rows(plane, plane.x_spectrum, scratch, first, last, [&](int pair, Line* line) {
                if (plane.problem.star_relu)
                    load_pair(plane, plane.tensors.x, pair, line,
                              [&](V x) { return StarReLU<L>::forward_lane(x, scale, bias); });
                else
                    load_pair(plane, plane.tensors.x, pair, line, [](V x) { return x; });
            });
        }
        if (plane.backward())
            transform_rows(plane, plane.y_spectrum, scratch, first, last, [&](int pair, Line* line) {
                load_pair(plane, plane.tensors.grad_y, pair, line, [](V g) { return g; });
            });
    }

    static void inverse_rows(const FilterCall& call, const PlaneTask& task, void* scratch, int first, int last) {
        const Plane plane(call, task);
        if (!plane.needs_y_spectrum()) return;
        const std::int64_t stride = call.row_stride;
        const int block = block_of(row_block_bytes, stride);
        for (int start = first; start < last; start += block) {
            const int end = start + block < last ? start + block : last;
            transform<true>(plane.row_plan, plane.y_spectrum + start * stride, end - start, stride,
                            static_cast<Line*>(scratch));
            for (int pair = start; pair < end; pair++) {
                const Line* line = plane.y_spectrum + pair * stride;
                if (!plane.backward())
                    store_pair(plane, plane.tensors.y, pair, line);
                else if (!plane.problem.star_relu)
                    store_pair(plane, plane.tensors.grad_x, pair, line);
                else
                    store_pair_star_relu(plane, pair, line);
            }
        }
    }

    static void store_pair(const Plane& plane, void* tensor, int pair, const Line* line) {
        const int* position = plane.row_plan.position;
        const std::int64_t C = plane.problem.C;
        Storage* first = plane.pixels(tensor, 2 * pair);
        if (2 * pair + 1 < plane.H) {
            Storage* second = first + plane.W * C;
            for (std::int64_t w = 0; w < plane.W; w++) {
                store(first + w * C, line[position[w]].re, plane.used);
                store(second + w * C, line[position[w]].im, plane.used);
            }
        } else {
            for (std::int64_t w = 0; w < plane.W; w++) store(first + w * C, line[position[w]].re, plane.used);
        }
    }

    // grad_x from grad_u, and this pair's part of StarReLU's own gradients.
    static void store_pair_star_relu(const Plane& plane, int pair, const Line* line) {
        const int* position = plane.row_plan.position;
        const std::int64_t C = plane.problem.C;
        const V two_scale = V{} + T(2 * plane.problem.scale);
        typename StarReLU<L>::Sums sums;
        for (int row = 2 * pair; row < 2 * pair + 2 && row < plane.H; row++) {
            const Storage* x = plane.pixels(plane.tensors.x, row);
            for (std::int64_t w = 0; w < plane.W; w++) {
                const Line& grad_u = line[position[w]];
                const V grad_x = StarReLU<L>::backward_lane(row % 2 ? grad_u.im : grad_u.re,
                                                            load(x + w * C, plane.used), two_scale, sums);
                if (plane.tensors.grad_x)
                    store(plane.pixels(plane.tensors.grad_x, row) + w * C, grad_x, plane.used);
            }
        }
        sums.flush();
        plane.star_relu_sums[2 * pair] = lane_sum(sums.scale.sum);
        plane.star_relu_sums[2 * pair + 1] = lane_sum(sums.bias.sum);
    }

    // ---- columns

    struct ColumnBlock {
        int count;
        int k[max_column_block];
        int here[max_column_block], mirrored[max_column_block];  // positions of k and -k in a line

        ColumnBlock(const Plane& plane, int first, int count_) : count(count_) {
            for (int j = 0; j < count; j++) {
                k[j] = plane.row_plan.columns[first + j];
                here[j] = plane.row_plan.frequency_at[k[j]];
                mirrored[j] = plane.row_plan.frequency_at[(plane.W - k[j]) % plane.W];
            }
        }
    };

    static void load_columns(const Plane& plane, const ColumnBlock& block, const Line* spectrum, Line* columns) {
        const int* position = plane.column_plan.position;
        for (int pair = 0; pair < plane.pairs; pair++) {
            const Line* line = spectrum + pair * plane.call.row_stride;
            for (int j = 0; j < block.count; j++) {
                const Line z = line[block.here[j]], mirror = line[block.mirrored[j]];
                Line* column = columns + j * plane.H;
                column[position[2 * pair]] = {z.re + mirror.re, z.im - mirror.im};
                if (2 * pair + 1 < plane.H) column[position[2 * pair + 1]] = {z.im + mirror.im, mirror.re - z.re};
            }
        }
    }

    // Columns 0 and W/2 of a real signal's spectrum are real before the transform along H: what is left of an imaginary
    // part is dropped, as irfft2 does.
    static void store_columns(const Plane& plane, const ColumnBlock& block, const Line* columns, Line* spectrum) {
        const int* position = plane.column_plan.position;
        for (int pair = 0; pair < plane.pairs; pair++) {
            Line* line = spectrum + pair * plane.call.row_stride;
            for (int j = 0; j < block.count; j++) {
                const Line* column = columns + j * plane.H;
                const Line first = column[position[2 * pair]];
                const Line second = 2 * pair + 1 < plane.H ? column[position[2 * pair + 1]] : Line{};
                if (block.here[j] == block.mirrored[j]) {
                    line[block.here[j]] = {first.re, second.re};
                } else {
                    line[block.here[j]] = {first.re - second.im, first.im + second.re};
                    line[block.mirrored[j]] = {first.re + second.im, second.re - first.im};
                }
            }
        }
    }

    static void columns(const FilterCall& call, const PlaneTask& task, void* scratch, int first, int last) {
        const Plane plane(call, task);
        Line* x_columns = static_cast<Line*>(scratch);
        const int size = column_block(plane);
        Line* y_columns = plane.y_spectrum == plane.x_spectrum ? x_columns : x_columns + std::int64_t{size} * plane.H;
        Line* pass_scratch = y_columns + std::int64_t{size} * plane.H;
        for (int start = first; start < last; start += size) {
            const ColumnBlock block(plane, start, start + size < last ? size : last - start);
            if (plane.needs_x_spectrum()) {
                load_columns(plane, block, plane.x_spectrum, x_columns);
                transform<false>(plane.column_plan, x_columns, block.count, plane.H, pass_scratch);
            }
            if (plane.backward()) {
                load_columns(plane, block, plane.y_spectrum, y_columns);
                transform<false>(plane.column_plan, y_columns, block.count, plane.H, pass_scratch);
            }
            for (int j = 0; j < block.count; j++)
                mix_column(plane, block.k[j], x_columns + j * plane.H, y_columns + j * plane.H);
            if (!plane.needs_y_spectrum()) continue;
            transform<true>(plane.column_plan, y_columns, block.count, plane.H, pass_scratch);
            store_columns(plane, block, y_columns, plane.y_spectrum);
        }
    }

    static int column_block(const Plane& plane) {
        const int block = block_of(column_block_bytes, plane.H);
        return block < max_column_block ? block : max_column_block;
    }

    static void mix_column(const Plane& plane, int k, Line* x, Line* y) {
        if (plane.F == 0)
            plane.backward() ? mix_global_backward(plane, k, x, y) : mix_global(plane, k, y);
        else if (plane.F == 4)
            plane.backward() ? mix_backward<4>(plane, k, x, y) : mix<4>(plane, k, y);
        else
            plane.backward() ? mix_backward<0>(plane, k, x, y) : mix<0>(plane, k, y);
    }

    // ---- the filter: fixed_F is F where that is known, else 0

    template <int fixed_F>
    struct Routing {
        V r[fixed_F];
        explicit Routing(const Plane& plane) {
            for (int f = 0; f < fixed_F; f++) r[f] = plane.routing[f];
        }
        V operator[](int f) const { return r[f]; }
    };

    template <int fixed_F, class R>
    static Line mixed(const R& routing, const T* basis, int F) {
        Line M = {routing[0] * basis[0], routing[0] * basis[1]};
        for (int f = 1; f < (fixed_F ? fixed_F : F); f++) {
            M.re += routing[f] * basis[2 * f];
            M.im += routing[f] * basis[2 * f + 1];
        }
        return M;
    }

    template <int fixed_F>
    static auto routing_of(const Plane& plane) {
        if constexpr (fixed_F > 0)
            return Routing<fixed_F>(plane);
        else
            return static_cast<const V*>(plane.routing);
    }

    template <int fixed_F>
    static void mix(const Plane& plane, int k, Line* column) {
        const auto routing = routing_of<fixed_F>(plane);
        for (int p = 0; p < plane.H; p++)
            column[p] = column[p] * mixed<fixed_F>(routing, plane.filters(plane.column_plan.frequency[p], k), plane.F);
    }

    static Line conj_times(Line a, Line b) { return {a.re * b.re + a.im * b.im, a.re * b.im - a.im * b.re}; }

    template <int fixed_F>
    static void mix_backward(const Plane& plane, int k, const Line* x, Line* y) {
        const int F = fixed_F ? fixed_F : plane.F;
        const auto routing = routing_of<fixed_F>(plane);
        const bool need_parameters = plane.needs_x_spectrum();
        V local_grads[fixed_F ? fixed_F : 1] = {};
        V* grads = fixed_F ? local_grads : plane.grad_routing + std::int64_t{k} * F;
        if (need_parameters && !fixed_F)
            for (int f = 0; f < F; f++) grads[f] = V{};
        for (int p = 0; p < plane.H; p++) {
            const std::int64_t h = plane.column_plan.frequency[p];
            const T* basis = plane.filters(h, k);
            const Line G = y[p];
            y[p] = conj_times(mixed<fixed_F>(routing, basis, F), G);
            if (!need_parameters) continue;
            const Line Q = conj_times(x[p], G);
            for (int f = 0; f < F; f++) grads[f] += Q.re * basis[2 * f] + Q.im * basis[2 * f + 1];
            if (!plane.tensors.grad_filters) continue;
            T* sums = static_cast<T*>(plane.call.slots) + ((plane.task.slot * plane.H + h) * plane.K + k) * F * 2;
            constexpr int group = fixed_F && 2 * fixed_F < lanes ? 2 * fixed_F : fixed_F ? lanes : 2;
            for (int i = 0; i < 2 * F; i += group) {
                V parts[group];
                for (int n = 0; n < group; n += 2) {
                    parts[n] = routing[(i + n) / 2] * Q.re;
                    parts[n + 1] = routing[(i + n) / 2] * Q.im;
                }
                add_first<group>(sums + i, lane_sums<group>(parts), plane.task.first_of_slot);
            }
        }
        if (fixed_F && need_parameters)
            for (int f = 0; f < F; f++) plane.grad_routing[std::int64_t{k} * F + f] = local_grads[f];
    }

    template <int n>
    static void add_first(T* to, V v, bool replace) {
        T elements[lanes];
        Arithmetic::store(elements, v);
        for (int i = 0; i < n; i++) to[i] = replace ? elements[i] : to[i] + elements[i];
    }

    // ---- the filter: a weight for every channel

    static Line weight_at(const Plane& plane, std::int64_t h, std::int64_t k) {
        const T* weight = plane.filters(h, k);
        const int used = 2 * plane.used;
        const V low = used >= lanes ? Arithmetic::load(weight) : load_first<Arithmetic>(weight, used);
        const V high = used == 2 * lanes ? Arithmetic::load(weight + lanes)
                       : used > lanes    ? load_first<Arithmetic>(weight + lanes, used - lanes)
                                         : V{};
        return {alternate<0>(low, high), alternate<1>(low, high)};
    }

    static void mix_global(const Plane& plane, int k, Line* column) {
        const T scale = T(plane.normalisation());
        for (int p = 0; p < plane.H; p++) {
            const Line M = weight_at(plane, plane.column_plan.frequency[p], k);
            column[p] = column[p] * Line{M.re * scale, M.im * scale};
        }
    }

    static void mix_global_backward(const Plane& plane, int k, const Line* x, Line* y) {
        const T scale = T(plane.normalisation());
        const T weight_scale = T(plane.half_spectrum_weight(k) * plane.normalisation() / 2);
        for (int p = 0; p < plane.H; p++) {
            const std::int64_t h = plane.column_plan.frequency[p];
            const Line G = y[p], M = weight_at(plane, h, k);
            y[p] = conj_times({M.re * scale, M.im * scale}, G);
            if (!plane.tensors.grad_filters) continue;
            const Line Q = conj_times(x[p], G);
            add_weight(plane, h, k, {Q.re * weight_scale, Q.im * weight_scale});
        }
    }

    static void add_weight(const Plane& plane, std::int64_t h, std::int64_t k, Line grad) {
        T elements[2 * lanes];
        Arithmetic::store(elements, interleave<false>(grad.re, grad.im));
        Arithmetic::store(elements + lanes, interleave<true>(grad.re, grad.im));
        T* sums = static_cast<T*>(plane.tensors.grad_filters) + 2 * ((h * plane.K + k) * plane.problem.C + plane.channel);
        for (int i = 0; i < 2 * plane.used; i++) sums[i] = plane.task.first_of_slot ? elements[i] : sums[i] + elements[i];
    }

    // ---- before and after

    static const T* logits(const Plane& plane, int f) {
        const std::int64_t row = plane.task.sample * plane.F + f;
        return static_cast<const T*>(plane.tensors.logits) + row * plane.problem.C + plane.channel;
    }

    static void begin(const FilterCall& call, const PlaneTask& task) {
        const Plane plane(call, task);
        if (plane.F == 0) return;
        V* routing = plane.routing;
        V largest{}, sum{};
        for (int f = 0; f < plane.F; f++) {
            routing[f] = load_first<Arithmetic>(logits(plane, f), plane.used);
            largest = f == 0 || routing[f] > largest ? routing[f] : largest;
        }
        for (int f = 0; f < plane.F; f++) sum += routing[f] = exp_nonpositive(routing[f] - largest);
        for (int f = 0; f < plane.F; f++) routing[f] = routing[f] / sum * T(plane.normalisation());
    }

    // softmax's gradient: routing (grad_routing - sum_f routing grad_routing)
    static void end(const FilterCall& call, const PlaneTask& task, double* star_relu_sums) {
        const Plane plane(call, task);
        if (plane.tensors.grad_logits) {
            V* grads = plane.grad_routing;
            V mean{};
            for (int f = 0; f < plane.F; f++) {
                Accumulator<V> sum;
                for (int k = 0; k < plane.K; k++) sum.add(grads[k * plane.F + f] * T(plane.half_spectrum_weight(k)));
                grads[f] = __builtin_convertvector(sum.sum, V) * T(plane.normalisation() / 2);
                plane.routing[f] *= T(1 / plane.normalisation());
                mean += plane.routing[f] * grads[f];
            }
            for (int f = 0; f < plane.F; f++) {
                const std::int64_t offset = logits(plane, f) - static_cast<const T*>(plane.tensors.logits);
                store_first<Arithmetic>(static_cast<T*>(plane.tensors.grad_logits) + offset,
                                        plane.routing[f] * (grads[f] - mean), plane.used);
            }
        }
        star_relu_sums[0] = star_relu_sums[1] = 0;
        if (!plane.tensors.need_scalars) return;
        for (int pair = 0; pair < plane.pairs; pair++)
            for (int i = 0; i < 2; i++) star_relu_sums[i] += plane.star_relu_sums[2 * pair + i];
    }

    static void sum_slots(const FilterCall& call, int first, int last) {
        const FilterProblem& problem = *call.problem;
        const std::int64_t K = problem.W / 2 + 1, F2 = 2 * problem.F, size = problem.H * K * F2;
        auto* grad = static_cast<T*>(call.tensors->grad_filters);
        const auto* slots = static_cast<const T*>(call.slots);
        for (std::int64_t bin = first * K; bin < last * K; bin++) {
            const T weight = T(bin % K == 0 || 2 * (bin % K) == problem.W ? 0.5 : 1);
            for (std::int64_t i = bin * F2; i < (bin + 1) * F2; i++) {
                T sum{};
                for (std::int64_t slot = 0; slot < call.num_slots; slot++) sum += slots[slot * size + i];
                grad[i] = sum * weight;
            }
        }
    }

    static FilterWorkspace workspace(const FilterCall& call) {
        const Plane plane(call, PlaneTask{});
        const auto* end = reinterpret_cast<char*>(plane.star_relu_sums + (plane.backward() ? 2 * plane.pairs : 0));
        const std::int64_t scratch = plane.row_plan.scratch > plane.column_plan.scratch ? plane.row_plan.scratch
                                                                                        : plane.column_plan.scratch;
        const std::int64_t columns = (plane.backward() ? 2 : 1) * std::int64_t{column_block(plane)} * plane.H;
        return {end - static_cast<char*>(nullptr), (columns + scratch) * std::int64_t{sizeof(Line)}};
    }
};

template <class L>
constexpr FilterKernel filter_kernel = {Filter<L>::workspace,    Filter<L>::begin, Filter<L>::rows, Filter<L>::columns,
                                        Filter<L>::inverse_rows, Filter<L>::end,   Filter<L>::sum_slots};

}  // namespace
