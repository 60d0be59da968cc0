// The filter step and its gradients on one plane: a block of channels, one per lane, of one sample. Included once per
// instruction set, after transform.inl. Here: what happens between the transforms along W, which no storage type
// touches; filter.inl has the rest.
//
//   forward    y = irfft2(rfft2(u) M)
//   backward   X = rfft2(u), G = rfft2(grad_y), Q = G conj(X), D = 1 for k = 0 and k = W/2, else 2
//              grad_u = irfft2(conj(M) G)
//              grad_routing[f] = sum_hk D Re(Q conj(basis[h,k,f])),   grad_basis[h,k,f] = sum_bc D routing[f] Q
//
// Two rows are transformed as one complex line, Z = rfft(row a) + i rfft(row b). Column k of both is Z[k] + conj(Z[-k])
// and -i (Z[k] - conj(Z[-k])), so a column and its mirror image hold all that the column pass needs, and what it makes
// goes back to the same two places. A plane's workspace is as large as the plane. Nothing is normalised on the way: the
// factor 2 above and the transforms' 1/sqrt(H W) are put into the routing weights.

namespace {

// What does not depend on the storage type.
template <class V>
struct FilterOf {
    using T = typename ScalarOf<V>::Type;
    using Line = Complex<V>;
    using Arithmetic = Plain<T, V>;  // lane type of tensors kept in the arithmetic type
    using Sum = decltype(Accumulator<V>::sum);
    static constexpr int lanes = Arithmetic::count;

    // Lines that go through a pass together: few enough to stay in L1 for the next one.
    static constexpr std::int64_t block_bytes = 16384;
    static constexpr int max_column_block = 8;

    static int block_of_lines(std::int64_t length) {
        const std::int64_t lines = block_bytes / (std::int64_t{sizeof(Line)} * length);
        return lines < 1 ? 1 : int(lines);
    }
    static int block_of_columns(std::int64_t H) {
        const int block = block_of_lines(H);
        return block < max_column_block ? block : max_column_block;
    }

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
        V* weights;              // [F] softmax(logits)
        V* routing;              // [F] weights / (2HW)
        Sum* grad_routing;       // [K][F]: each column's part
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
              pairs(column_plan.num_pairs),
              channel(task_.channel_block * lanes),
              used(problem.C - channel < lanes ? int(problem.C - channel) : lanes) {
            x_spectrum = static_cast<Line*>(task.workspace);
            y_spectrum = x_spectrum + (backward() && needs_x_spectrum() ? pairs * call.row_stride : 0);
            weights = reinterpret_cast<V*>(y_spectrum + pairs * call.row_stride);
            routing = weights + F;
            grad_routing = reinterpret_cast<Sum*>(routing + F);
            star_relu_sums = reinterpret_cast<double*>(grad_routing + (backward() ? std::int64_t{K} * F : 0));
        }
        bool backward() const { return tensors.grad_y; }
        bool needs_x_spectrum() const { return !backward() || tensors.grad_filters || tensors.grad_logits; }
        bool needs_y_spectrum() const { return !backward() || tensors.grad_x || tensors.need_scalars; }

        // Elements before this plane's first channel at the start of a row of pixels.
        std::int64_t row_offset(std::int64_t row) const { return (task.sample * H + row) * W * problem.C + channel; }
        double half_spectrum_weight(int k) const { return k == 0 || 2 * k == W ? 1 : 2; }
        double normalisation() const { return 0.5 / (double(H) * W); }
    };

    // ---- columns

    // Columns [first, first + count) of the row plan's order: neighbours in memory.
    struct ColumnBlock {
        int count;
        int k[max_column_block];
        std::int64_t here[max_column_block], mirrored[max_column_block];  // positions of k and -k in a line

        ColumnBlock(const Plane& plane, int first, int count_) : count(count_) {
            for (int j = 0; j < count; j++) {
                k[j] = plane.row_plan.columns[first + j];
                here[j] = plane.row_plan.frequency_at[k[j]];
                mirrored[j] = plane.row_plan.frequency_at[(plane.W - k[j]) % plane.W];
            }
        }
    };

    struct Column {
        Line *here, *mirrored;
        std::int64_t row_stride, inner;

        FFT_INLINE std::int64_t pair(std::int64_t r, std::int64_t m) const { return (r / 2 * inner + m) * row_stride; }
    };
    // Columns of a plane's spectrum. Pair i M + m holds the column plan's samples 2i M + m and (2i+1) M + m, so that a
    // butterfly of its first pass finds both rows of a pair.
    struct Columns {
        Line* spectrum;
        const ColumnBlock& block;
        std::int64_t row_stride, inner;

        FFT_INLINE Column column(std::int64_t j) const {
            return Column{spectrum + block.here[j], spectrum + block.mirrored[j], row_stride, inner};
        }
    };
    struct ColumnOut : Column {
        template <class Radix>
        FFT_INLINE void operator()(Line* a, Radix radix, std::int64_t, std::int64_t m) const {
            for_each(radix, [&](auto r) UNROLLED_BODY {
                const Line z = this->here[this->pair(r, m)], mirror = this->mirrored[this->pair(r, m)];
                a[r] = r % 2 ? Line{z.im + mirror.im, mirror.re - z.re} : Line{z.re + mirror.re, z.im - mirror.im};
            });
        }
    };
    // Columns 0 and W/2 of a real signal's spectrum are real before the transform along H: what is left of an imaginary
    // part is dropped, as irfft2 does.
    struct ColumnIn : Column {
        template <class Radix>
        FFT_INLINE void operator()(Line* a, Radix radix, std::int64_t, std::int64_t m) const {
            for_each(radix, [&](auto r) UNROLLED_BODY {
                if (r % 2) return;
                const Line first = a[r], second = r + 1 < radix ? a[r + 1] : Line{};
                if (this->here == this->mirrored) {
                    this->here[this->pair(r, m)] = {first.re, second.re};
                } else {
                    this->here[this->pair(r, m)] = {first.re - second.im, first.im + second.re};
                    this->mirrored[this->pair(r, m)] = {first.re + second.im, second.re - first.im};
                }
            });
        }
    };
    struct ColumnSource : Columns {
        FFT_INLINE ColumnOut of(std::int64_t j) const { return {this->column(j)}; }
    };
    struct ColumnSink : Columns {
        FFT_INLINE ColumnIn of(std::int64_t j) const { return {this->column(j)}; }
    };

    // What the last pass' butterflies go through: the filter, and the way back.
    template <class Mix, class Sink>
    struct Mixing {
        const Pass<T>& pass;
        int position;  // in the column, of the first point
        Mix mix;
        Sink sink;

        FFT_INLINE auto of(std::int64_t j) const {
            return Mixing<decltype(mix.of(j)), decltype(sink.of(j))>{pass, position, mix.of(j), sink.of(j)};
        }
        template <class Radix>
        FFT_INLINE void operator()(Line* a, Radix radix, std::int64_t outer, std::int64_t m) const {
            mix(a, radix, position + int(outer) * radix);
            exchange<V>(radix, a);
            pass_butterfly<V>(pass, radix, a);
            exchange<V>(radix, a);
            sink(a, radix, outer, m);
        }
    };

    static void columns(const FilterCall& call, const PlaneGroup& group, void* scratch, int first, int last) {
        for (int g = 0; g < group.count; g++) plane_columns(Plane(call, group.tasks[g]), scratch, first, last);
    }

    static void plane_columns(const Plane& plane, void* scratch_, int first, int last) {
        const int size = block_of_columns(plane.H);
        Line* x_lines = static_cast<Line*>(scratch_);
        Line* lines = x_lines + (plane.backward() ? std::int64_t{size} * plane.H : 0);
        Line* scratch = lines + std::int64_t{size} * plane.H;
        for (int start = first; start < last; start += size) {
            const ColumnBlock block(plane, start, start + size < last ? size : last - start);
            if (plane.backward() && plane.needs_x_spectrum()) transform_columns(plane, block, x_lines, scratch);
            for (int j = 0; j < block.count && plane.backward(); j++)
                for (int f = 0; f < plane.F; f++) plane.grad_routing[std::int64_t{block.k[j]} * plane.F + f] = Sum{};
            if (plane.F == 4 && !plane.backward())
                filter_columns(plane, block, lines, scratch, InlineMix{plane, block});
            else
                filter_columns(plane, block, lines, scratch, CalledMix{plane, block, x_lines, mix_of(plane)});
            if (plane.F > 0 && plane.tensors.grad_filters)
                for (int j = 0; j < block.count; j++)
                    add_grad_basis(plane, block.k[j], x_lines + std::int64_t{j} * plane.H);
        }
    }

    // Columns of x, which backward needs beside those of grad_y.
    static void transform_columns(const Plane& plane, const ColumnBlock& block, Line* lines, Line* scratch) {
        const Plan<T>& plan = plane.column_plan;
        const Pass<T>& first = plan.passes[0];
        run_pass<false, V>(first, block.count, scratch,
                           ColumnSource{{plane.x_spectrum, block, plane.call.row_stride, first.inner}},
                           LineSink<V>{{lines, first.inner, plane.H}});
        run_passes<false, V>(plan, 1, plan.num_passes, block.count, lines, plane.H, scratch);
    }

    // Along H: transform, filter, transform back.
    template <class Mix>
    static void filter_columns(const Plane& plane, const ColumnBlock& block, Line* lines, Line* scratch, Mix mix) {
        const Plan<T>& plan = plane.column_plan;
        const Pass<T>& first = plan.passes[0];
        const Columns columns{plane.y_spectrum, block, plane.call.row_stride, first.inner};
        if (plan.num_passes == 1) {
            run_last_pass<V>(first, block.count, scratch, ColumnSource{columns},
                             Mixing<Mix, ColumnSink>{first, 0, mix, {columns}});
            return;
        }
        const InLine<V> in_first{lines, first.inner, plane.H};
        const Parts<V> parts(plan);
        Pass<T> last = plan.passes[plan.num_passes - 1];
        last.outer /= int(parts.count);
        const int split = parts.split > 1 ? parts.split : 1;
        run_pass<false, V>(first, block.count, scratch, ColumnSource{columns}, LineSink<V>{in_first});
        run_passes_of_part<false, V>(plan, 1, split, 1, block.count, lines, plane.H, scratch);
        for (std::int64_t part = 0; part < parts.count; part++) {
            Line* const line = lines + part * parts.length;
            const InLine<V> in_last{line, 1, plane.H};
            run_passes_of_part<false, V>(plan, split, plan.num_passes - 1, parts.count, block.count, line, plane.H,
                                         scratch);
            run_last_pass<V>(last, block.count, scratch, LineSource<V>{in_last},
                             Mixing<Mix, LineSink<V>>{last, int(part * parts.length), mix, {in_last}});
            run_passes_of_part<true, V>(plan, split, plan.num_passes - 1, parts.count, block.count, line, plane.H,
                                        scratch);
        }
        run_passes_of_part<true, V>(plan, 1, split, 1, block.count, lines, plane.H, scratch);
        run_pass<true, V>(first, block.count, scratch, LineSource<V>{in_first}, ColumnSink{columns});
    }

    // ---- the filter of one column: mix(a, radix, p) filters a[0 .. radix), the values at positions p .. p + radix

    struct FilterColumn {
        const Plane& plane;
        const int* frequency;
        const T* filters;   // this column of the basis, (H,F,2) in order of position, or of the weight's first row
        std::int64_t row;   // elements from one position to the next, or from one row of the weight
        Line* x;            // backward: the column of x's spectrum X; Q takes its place
        Sum* grad_routing;  // [F], this column's part
        T* grad_weight;     // like `filters`: where to add this plane's part; null where that is not needed
        T grad_scale;       // of a weight's gradient: D and what is not normalised

        FilterColumn(const Plane& plane_, int k, Line* x_)
            : plane(plane_),
              frequency(plane.column_plan.frequency),
              row(2 * (plane.F > 0 ? plane.F : plane.K * plane.problem.C)),
              x(x_),
              grad_routing(plane.grad_routing + std::int64_t{k} * plane.F),
              grad_weight(nullptr),
              grad_scale(T(plane.half_spectrum_weight(k) * plane.normalisation() / 2)) {
            if (plane.F > 0) {
                filters = static_cast<const T*>(plane.call.basis) + k * plane.H * row;
                return;
            }
            const std::int64_t column = 2 * (k * plane.problem.C + plane.channel);
            filters = static_cast<const T*>(plane.tensors.filters) + column;
            if (plane.tensors.grad_filters) grad_weight = static_cast<T*>(plane.tensors.grad_filters) + column;
        }
        FFT_INLINE const T* bin(int position) const { return filters + position * row; }  // of the basis
        std::int64_t weight(int position) const { return frequency[position] * row; }
    };

    // The case that matters most has its filter inlined into the pass; the others share one pass, which calls theirs.
    struct InlineMix {
        const Plane& plane;
        const ColumnBlock& block;
        struct Filtered : FilterColumn {
            V routing[4];
            FFT_INLINE Filtered(const Plane& plane, int k) : FilterColumn(plane, k, nullptr) {
                for (int f = 0; f < 4; f++) routing[f] = plane.routing[f];
            }
            template <class Radix>
            FFT_INLINE void operator()(Line* a, Radix radix, int first) const {
                for_each(radix, [&](auto r) UNROLLED_BODY { a[r] = a[r] * mixed<4>(routing, this->bin(first + r)); });
            }
        };
        FFT_INLINE Filtered of(std::int64_t j) const { return Filtered(plane, block.k[j]); }
    };

    using MixFunction = void (*)(const FilterColumn&, Line* a, int radix, int first);
    struct CalledMix {
        const Plane& plane;
        const ColumnBlock& block;
        Line* x_lines;
        MixFunction mix;
        struct Filtered : FilterColumn {
            MixFunction mix;
            Filtered(const Plane& plane, int k, Line* x, MixFunction mix_) : FilterColumn(plane, k, x), mix(mix_) {}
            FFT_INLINE void operator()(Line* a, int radix, int first) const { mix(*this, a, radix, first); }
        };
        FFT_INLINE Filtered of(std::int64_t j) const { return Filtered(plane, block.k[j], x_lines + j * plane.H, mix); }
    };

    static MixFunction mix_of(const Plane& plane) {
        if (plane.F == 0) return plane.backward() ? mix_global_backward : mix_global;
        if (!plane.backward()) return mix_basis;
        return plane.F == 4 ? mix_basis_backward<4> : mix_basis_backward<0>;
    }

    static Line conj_times(Line a, Line b) { return {a.re * b.re + a.im * b.im, a.re * b.im - a.im * b.re}; }

    // sum_f routing[f] bin[f]; fixed_F is F where that is known, else 0
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
            a[r] = a[r] * mixed<0>(column.plane.routing, column.bin(first + r), column.plane.F);
    }

    // Sums over a few points in the arithmetic type, then in float64.
    static constexpr int points_together = 8;

    template <int fixed_F>
    static void mix_basis_backward(const FilterColumn& column, Line* a, int radix, int first) {
        for (int r = 0; r < radix; r += points_together) {
            const int points = radix - r < points_together ? radix - r : points_together;
            if constexpr (fixed_F > 0) {
                V routing[fixed_F], grads[fixed_F] = {};
                for (int f = 0; f < fixed_F; f++) routing[f] = column.plane.routing[f];
                mix_points_backward<fixed_F>(column, a + r, points, first + r, routing, grads, fixed_F);
                for (int f = 0; f < fixed_F; f++) column.grad_routing[f] += __builtin_convertvector(grads[f], Sum);
            } else {
                for (int f = 0; f < column.plane.F; f++) add_grad_routing(column, a + r, points, first + r, f);
                mix_points_backward<0>(column, a + r, points, first + r, column.plane.routing, nullptr, column.plane.F);
            }
        }
    }

    template <int fixed_F>
    FFT_INLINE static void mix_points_backward(const FilterColumn& column, Line* a, int points, int first,
                                               const V* routing, V* grads, int F) {
        const bool need_grads = column.plane.needs_x_spectrum();
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

    // One filter's part, where there is no telling how many there are.
    static void add_grad_routing(const FilterColumn& column, const Line* a, int points, int first, int f) {
        if (!column.plane.needs_x_spectrum()) return;
        V grad{};
        for (int i = 0; i < points; i++) {
            const Line Q = conj_times(column.x[first + i], a[i]);
            const T* bin = column.bin(first + i) + 2 * f;
            grad += Q.re * bin[0] + Q.im * bin[1];
        }
        column.grad_routing[f] += __builtin_convertvector(grad, Sum);
    }

    // Points of a column whose real and imaginary parts fill a register.
    static constexpr int points_of_register = lanes / 2;
    static std::int64_t slot_registers(int H, int K, int F) {
        return std::int64_t{K} * F * ((H + points_of_register - 1) / points_of_register);
    }

    // grad_basis[f] += sum_c routing[f][c] Q[c], for column k. A few points are turned on their side, so that a lane is
    // no longer a channel but a point's real or imaginary part, and stay like that in the slot.
    static void add_grad_basis(const Plane& plane, int k, const Line* Q) {
        const std::int64_t registers = slot_registers(plane.H, plane.K, plane.F);
        V* sums = static_cast<V*>(plane.call.slots) + plane.task.slot * registers + k * (registers / plane.K);
        for (int first = 0; first < plane.H; first += points_of_register) {
            V parts[lanes];
            unrolled<0, points_of_register>([&](auto i) UNROLLED_BODY {
                const Line point = first + i < plane.H ? Q[first + i] : Line{};
                parts[2 * i] = point.re;
                parts[2 * i + 1] = point.im;
            });
            transpose<1>(parts);
            for (int f = 0; f < plane.F; f++, sums++) {
                V sum = plane.task.first_of_slot ? V{} : *sums;
                unrolled<0, lanes>([&](auto c) UNROLLED_BODY { sum += parts[c] * plane.routing[f][c.value]; });
                *sums = sum;
            }
        }
    }

    // v[i][j] becomes v[j][i], by interleaving halves as often as their number can be halved.
    template <int done>
    FFT_INLINE static void transpose(V* v) {
        if constexpr (done < lanes) {
            V turned[lanes];
            unrolled<0, lanes / 2>([&](auto i) UNROLLED_BODY {
                turned[2 * i] = interleave<false>(v[i], v[i + lanes / 2]);
                turned[2 * i + 1] = interleave<true>(v[i], v[i + lanes / 2]);
            });
            transpose<2 * done>(turned);
            unrolled<0, lanes>([&](auto i) UNROLLED_BODY { v[i] = turned[i]; });
        }
    }

    // A weight for every channel, its real and imaginary parts in turn.
    static Line weight_at(const FilterColumn& column, int position) {
        const T* bin = column.filters + column.weight(position);
        const int used = 2 * column.plane.used;
        const V low = used >= lanes ? Arithmetic::load(bin) : load_first<Arithmetic>(bin, used);
        const V high = used == 2 * lanes ? Arithmetic::load(bin + lanes)
                       : used > lanes    ? load_first<Arithmetic>(bin + lanes, used - lanes)
                                         : V{};
        const T scale = T(column.plane.normalisation());
        return {alternate<0>(low, high) * scale, alternate<1>(low, high) * scale};
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
        const Plane& plane = column.plane;
        T elements[2 * lanes];
        Arithmetic::store(elements, interleave<false>(Q.re, Q.im) * column.grad_scale);
        Arithmetic::store(elements + lanes, interleave<true>(Q.re, Q.im) * column.grad_scale);
        T* sums = column.grad_weight + column.weight(position);
        for (int i = 0; i < 2 * plane.used; i++)
            sums[i] = plane.task.first_of_slot ? elements[i] : sums[i] + elements[i];
    }

    // ---- before and after

    // Columns whose bins are copied together: a few cache lines of each row.
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

    static const T* logits(const Plane& plane, int f) {
        const std::int64_t row = plane.task.sample * plane.F + f;
        return static_cast<const T*>(plane.tensors.logits) + row * plane.problem.C + plane.channel;
    }

    static void begin(const FilterCall& call, const PlaneTask& task) {
        const Plane plane(call, task);
        if (plane.F == 0) return;
        V* weights = plane.weights;
        V largest{}, sum{};
        for (int f = 0; f < plane.F; f++) {
            const T* from = logits(plane, f);
            weights[f] = plane.used == lanes ? Arithmetic::load(from) : load_first<Arithmetic>(from, plane.used);
            largest = f == 0 || weights[f] > largest ? weights[f] : largest;
        }
        for (int f = 0; f < plane.F; f++) sum += weights[f] = exp_nonpositive(weights[f] - largest);
        for (int f = 0; f < plane.F; f++) {
            weights[f] /= sum;
            plane.routing[f] = weights[f] * T(plane.normalisation());
        }
    }

    static void end(const FilterCall& call, const PlaneTask& task, double* star_relu_sums) {
        const Plane plane(call, task);
        if (plane.tensors.grad_logits) store_grad_logits(plane);
        star_relu_sums[0] = star_relu_sums[1] = 0;
        if (!plane.tensors.need_scalars) return;
        for (int pair = 0; pair < plane.pairs; pair++)
            for (int i = 0; i < 2; i++) star_relu_sums[i] += plane.star_relu_sums[2 * pair + i];
    }

    // softmax's gradient: weights (grad_routing - sum_f weights grad_routing)
    static void store_grad_logits(const Plane& plane) {
        V* grads = plane.routing;  // which is not needed any more
        V mean{};
        for (int f = 0; f < plane.F; f++) {
            Sum sum{};
            for (int k = 0; k < plane.K; k++)
                sum += plane.grad_routing[std::int64_t{k} * plane.F + f] * plane.half_spectrum_weight(k);
            grads[f] = __builtin_convertvector(sum * (plane.normalisation() / 2), V);
            mean += plane.weights[f] * grads[f];
        }
        for (int f = 0; f < plane.F; f++) {
            const std::int64_t offset = logits(plane, f) - static_cast<const T*>(plane.tensors.logits);
            store_first<Arithmetic>(static_cast<T*>(plane.tensors.grad_logits) + offset,
                                    plane.weights[f] * (grads[f] - mean), plane.used);
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

    static FilterWorkspace workspace(const FilterCall& call) {
        const FilterProblem& problem = *call.problem;
        const auto& row_plan = *static_cast<const Plan<T>*>(call.row_plan);
        const auto& column_plan = *static_cast<const Plan<T>*>(call.column_plan);
        const bool backward = call.tensors->grad_y;
        const bool both_spectra = backward && (call.tensors->grad_filters || call.tensors->grad_logits);
        const std::int64_t pairs = column_plan.num_pairs, bytes_of_line = sizeof(Line);
        const std::int64_t spectrum = pairs * call.row_stride * bytes_of_line;
        const std::int64_t routing = 2 * problem.F * std::int64_t{sizeof(V)};
        const std::int64_t grad_routing = (problem.W / 2 + 1) * problem.F * std::int64_t{sizeof(Sum)};
        const std::int64_t star_relu_sums = 2 * pairs * std::int64_t{sizeof(double)};
        const std::int64_t columns = block_of_columns(problem.H) * problem.H * (backward ? 2 : 1);
        const std::int64_t scratch = row_plan.scratch > column_plan.scratch ? row_plan.scratch : column_plan.scratch;
        const bool slots = backward && problem.F > 0 && call.tensors->grad_filters;
        return {(both_spectra ? 2 : 1) * spectrum + routing + (backward ? grad_routing + star_relu_sums : 0),
                (columns + scratch) * bytes_of_line,
                slots ? slot_registers(problem.H, problem.W / 2 + 1, problem.F) * std::int64_t{sizeof(V)} : 0,
                std::int64_t{problem.H} * (problem.W / 2 + 1) * problem.F * 2 * std::int64_t{sizeof(T)}};
    }
};

}  // namespace
