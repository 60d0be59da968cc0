// The filter step and its gradients on one tile: the H x W planes of neighbouring channels of one sample, one channel
// per SIMD lane. Included once per instruction set, after transform.inl. This file has everything between the
// transforms along W, which depends on the arithmetic type only; filter.inl has those transforms.
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

// The part that does not depend on the storage type.
template <class V>
struct FilterOf {
    using T = typename ScalarOf<V>::Type;
    using Line = Complex<V>;
    using Arithmetic = Plain<T, V>;  // lane type of tensors kept in the arithmetic type
    using Sum = decltype(Accumulator<V>::sum);
    static constexpr int lanes = Arithmetic::count;

    // Lines that go through a pass together stay in L1 for the next pass.
    static constexpr std::int64_t bytes_at_once = 16384;
    static constexpr int max_columns = 8;

    static int lines_at_once(std::int64_t length) {
        const std::int64_t lines = bytes_at_once / (std::int64_t{sizeof(Line)} * length);
        return lines < 1 ? 1 : int(lines);
    }
    static int columns_at_once(std::int64_t H) {
        const int lines = lines_at_once(H);
        return lines < max_columns ? lines : max_columns;
    }

    struct Tile {
        const FilterCall& call;
        const FilterProblem& problem;
        const FilterTensors& tensors;
        const TileTask& task;
        const Plan<T>&row_plan, &column_plan;
        int H, W, K, F, pairs;
        std::int64_t channel;
        int used;  // lanes in use: fewer than all in the last tile of a sample
        Line *x_spectrum, *y_spectrum;
        V* weights;              // [F] softmax(logits)
        V* routing;              // [F] weights / (2HW)
        Sum* grad_routing;       // [K][F] terms of each column
        double* star_relu_sums;  // [pairs][2] terms of each pair of rows: grad_scale, grad_bias

        Tile(const FilterCall& call_, const TileTask& task_)
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
              channel(task_.channel_tile * lanes),
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

        // Offset, in elements, of this tile's first channel in the first pixel of a row.
        std::int64_t row_offset(std::int64_t row) const {
            if (problem.channels_first) return ((task.sample * problem.C + channel) * H + row) * W;
            return (task.sample * H + row) * W * problem.C + channel;
        }
        double half_spectrum_weight(int k) const { return k == 0 || 2 * k == W ? 1 : 2; }
        double normalisation() const { return 0.5 / (double(H) * W); }
    };

    // ---- columns

    // Columns [first, first + count) in the row plan's order, which are neighbours in memory.
    struct ColumnGroup {
        int count;
        int k[max_columns];
        std::int64_t here[max_columns], mirrored[max_columns];  // positions of k and -k in a line

        ColumnGroup(const Tile& tile, int first, int count_) : count(count_) {
            for (int j = 0; j < count; j++) {
                k[j] = tile.row_plan.columns[first + j];
                here[j] = tile.row_plan.frequency_at[k[j]];
                mirrored[j] = tile.row_plan.frequency_at[(tile.W - k[j]) % tile.W];
            }
        }
    };

    struct Column {
        Line *here, *mirrored;
        std::int64_t row_stride, inner;

        FFT_INLINE std::int64_t pair(std::int64_t r, std::int64_t m) const { return (r / 2 * inner + m) * row_stride; }
    };
    // Columns of a tile's spectrum. Pair i M + m holds samples 2i M + m and (2i+1) M + m of the column plan, so that
    // one butterfly of its first pass takes both rows of a pair.
    struct Columns {
        Line* spectrum;
        const ColumnGroup& group;
        std::int64_t row_stride, inner;

        FFT_INLINE Column column(std::int64_t j) const {
            return Column{spectrum + group.here[j], spectrum + group.mirrored[j], row_stride, inner};
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
    // Before the transform along H, columns 0 and W/2 of a real signal are real: their imaginary parts are dropped, as
    // irfft2 does.
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

    // The sink of the last pass: multiplies by the filter, then does the first butterfly of the inverse.
    template <class Mix, class Sink>
    struct Mixing {
        const Pass<T>& pass;
        int position;  // of the first point in the column
        Mix mix;
        Sink sink;

        FFT_INLINE auto of(std::int64_t j) const {
            return Mixing<decltype(mix.of(j)), decltype(sink.of(j))>{pass, position, mix.of(j), sink.of(j)};
        }
        template <class Radix>
        FFT_INLINE void operator()(Line* a, Radix radix, std::int64_t outer, std::int64_t m) const {
            mix(a, radix, position + int(outer) * radix);
            swap_parts<V>(radix, a);
            pass_butterfly<V>(pass, radix, a);
            swap_parts<V>(radix, a);
            sink(a, radix, outer, m);
        }
    };

    static void columns(const FilterCall& call, const TileGroup& group, void* scratch, int first, int last) {
        for (int g = 0; g < group.count; g++) tile_columns(Tile(call, group.tasks[g]), scratch, first, last);
    }

    static void tile_columns(const Tile& tile, void* scratch_, int first, int last) {
        const int size = columns_at_once(tile.H);
        Line* x_lines = static_cast<Line*>(scratch_);
        Line* lines = x_lines + (tile.backward() ? std::int64_t{size} * tile.H : 0);
        Line* scratch = lines + std::int64_t{size} * tile.H;
        for (int start = first; start < last; start += size) {
            const ColumnGroup group(tile, start, start + size < last ? size : last - start);
            if (tile.backward() && tile.needs_x_spectrum()) transform_columns(tile, group, x_lines, scratch);
            for (int j = 0; j < group.count && tile.backward(); j++)
                for (int f = 0; f < tile.F; f++) tile.grad_routing[std::int64_t{group.k[j]} * tile.F + f] = Sum{};
            if (tile.F == 4 && !tile.backward())
                filter_columns(tile, group, lines, scratch, InlineMix{tile, group});
            else
                filter_columns(tile, group, lines, scratch, CalledMix{tile, group, x_lines, mix_of(tile)});
            if (tile.F > 0 && tile.tensors.grad_filters)
                for (int j = 0; j < group.count; j++)
                    add_grad_basis(tile, group.k[j], x_lines + std::int64_t{j} * tile.H);
        }
    }

    // Backward: transforms columns of x along H.
    static void transform_columns(const Tile& tile, const ColumnGroup& group, Line* lines, Line* scratch) {
        const Plan<T>& plan = tile.column_plan;
        const Pass<T>& first = plan.passes[0];
        run_pass<false, V>(first, group.count, scratch,
                           ColumnSource{{tile.x_spectrum, group, tile.call.row_stride, first.inner}},
                           LineSink<V>{{lines, first.inner, tile.H}});
        run_passes<false, V>(plan, 1, plan.num_passes, group.count, lines, tile.H, scratch);
    }

    // Transforms columns along H, multiplies by the filter, transforms back.
    template <class Mix>
    static void filter_columns(const Tile& tile, const ColumnGroup& group, Line* lines, Line* scratch, Mix mix) {
        const Plan<T>& plan = tile.column_plan;
        const Pass<T>& first = plan.passes[0];
        const Columns columns{tile.y_spectrum, group, tile.call.row_stride, first.inner};
        if (plan.num_passes == 1) {
            run_last_pass<V>(first, group.count, scratch, ColumnSource{columns},
                             Mixing<Mix, ColumnSink>{first, 0, mix, {columns}});
            return;
        }
        const InLine<V> in_first{lines, first.inner, tile.H};
        const Parts<V> parts(plan);
        Pass<T> last = plan.passes[plan.num_passes - 1];
        last.outer /= int(parts.count);
        const int split = parts.split > 1 ? parts.split : 1;
        run_pass<false, V>(first, group.count, scratch, ColumnSource{columns}, LineSink<V>{in_first});
        run_passes_of_part<false, V>(plan, 1, split, 1, group.count, lines, tile.H, scratch);
        for (std::int64_t part = 0; part < parts.count; part++) {
            Line* const line = lines + part * parts.length;
            const InLine<V> in_last{line, 1, tile.H};
            run_passes_of_part<false, V>(plan, split, plan.num_passes - 1, parts.count, group.count, line, tile.H,
                                         scratch);
            run_last_pass<V>(last, group.count, scratch, LineSource<V>{in_last},
                             Mixing<Mix, LineSink<V>>{last, int(part * parts.length), mix, {in_last}});
            run_passes_of_part<true, V>(plan, split, plan.num_passes - 1, parts.count, group.count, line, tile.H,
                                        scratch);
        }
        run_passes_of_part<true, V>(plan, 1, split, 1, group.count, lines, tile.H, scratch);
        run_pass<true, V>(first, group.count, scratch, LineSource<V>{in_first}, ColumnSink{columns});
    }

    // ---- the filter on one column: mix(a, radix, p) multiplies a[0 .. radix), the values at positions p .. p + radix

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

    // Forward with F = 4, the most frequent case, is inlined into the pass. All other cases share a pass that calls a
    // function.
    struct InlineMix {
        const Tile& tile;
        const ColumnGroup& group;
        struct Filtered : FilterColumn {
            V routing[4];
            FFT_INLINE Filtered(const Tile& tile, int k) : FilterColumn(tile, k, nullptr) {
                for (int f = 0; f < 4; f++) routing[f] = tile.routing[f];
            }
            template <class Radix>
            FFT_INLINE void operator()(Line* a, Radix radix, int first) const {
                for_each(radix, [&](auto r) UNROLLED_BODY { a[r] = a[r] * mixed<4>(routing, this->bin(first + r)); });
            }
        };
        FFT_INLINE Filtered of(std::int64_t j) const { return Filtered(tile, group.k[j]); }
    };

    using MixFunction = void (*)(const FilterColumn&, Line* a, int radix, int first);
    struct CalledMix {
        const Tile& tile;
        const ColumnGroup& group;
        Line* x_lines;
        MixFunction mix;
        struct Filtered : FilterColumn {
            MixFunction mix;
            Filtered(const Tile& tile, int k, Line* x, MixFunction mix_) : FilterColumn(tile, k, x), mix(mix_) {}
            FFT_INLINE void operator()(Line* a, int radix, int first) const { mix(*this, a, radix, first); }
        };
        FFT_INLINE Filtered of(std::int64_t j) const { return Filtered(tile, group.k[j], x_lines + j * tile.H, mix); }
    };

    static MixFunction mix_of(const Tile& tile) {
        if (tile.F == 0) return tile.backward() ? mix_global_backward : mix_global;
        if (!tile.backward()) return mix_basis;
        return tile.F == 4 ? mix_basis_backward<4> : mix_basis_backward<0>;
    }

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
            transpose(parts);
            for (int f = 0; f < tile.F; f++, sums++) {
                V sum = tile.task.first_of_slot ? V{} : *sums;
                unrolled<0, lanes>([&](auto c) UNROLLED_BODY { sum += parts[c] * tile.routing[f][c.value]; });
                *sums = sum;
            }
        }
    }

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
        const std::int64_t columns = columns_at_once(problem.H) * problem.H * (backward ? 2 : 1);
        const std::int64_t scratch = row_plan.scratch > column_plan.scratch ? row_plan.scratch : column_plan.scratch;
        const bool slots = backward && problem.F > 0 && call.tensors->grad_filters;
        return {(both_spectra ? 2 : 1) * spectrum + routing + (backward ? grad_routing + star_relu_sums : 0),
                (columns + scratch) * bytes_of_line,
                slots ? slot_registers(problem.H, problem.W / 2 + 1, problem.F) * std::int64_t{sizeof(V)} : 0,
                std::int64_t{problem.H} * (problem.W / 2 + 1) * problem.F * 2 * std::int64_t{sizeof(T)}};
    }
};

}  // namespace
