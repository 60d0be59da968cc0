// The transforms along H, with the filter between them. Depends on the arithmetic type only.

namespace {

template <class V>
struct ColumnsOf : MixingOf<V> {
    using Base = MixingOf<V>;
    using Base::lanes;
    using typename Base::Arithmetic, typename Base::Line, typename Base::Sum, typename Base::T, typename Base::Tile;
    using typename Base::FilterColumn;

    static constexpr int max_columns = 8;

    static int columns_at_once(std::int64_t H) {
        const int lines = Base::lines_at_once(H);
        return lines < max_columns ? lines : max_columns;
    }

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
                for_each(radix, [&](auto r) UNROLLED_BODY {
                    a[r] = a[r] * Base::template mixed<4>(routing, this->bin(first + r));
                });
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
        if (tile.F == 0) return tile.backward() ? Base::mix_global_backward : Base::mix_global;
        if (!tile.backward()) return Base::mix_basis;
        return tile.F == 4 ? Base::template mix_basis_backward<4> : Base::template mix_basis_backward<0>;
    }

    // The sink of the last pass: multiplies by the filter, then does the first butterfly of the inverse.
    template <class Mix, class Sink>
    struct MixingSink {
        const Pass<T>& pass;
        int position;  // of the first point in the column
        Mix mix;
        Sink sink;

        FFT_INLINE auto of(std::int64_t j) const {
            return MixingSink<decltype(mix.of(j)), decltype(sink.of(j))>{pass, position, mix.of(j), sink.of(j)};
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
                    Base::add_grad_basis(tile, group.k[j], x_lines + std::int64_t{j} * tile.H);
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
                             MixingSink<Mix, ColumnSink>{first, 0, mix, {columns}});
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
                             MixingSink<Mix, LineSink<V>>{last, int(part * parts.length), mix, {in_last}});
            run_passes_of_part<true, V>(plan, split, plan.num_passes - 1, parts.count, group.count, line, tile.H,
                                        scratch);
        }
        run_passes_of_part<true, V>(plan, 1, split, 1, group.count, lines, tile.H, scratch);
        run_pass<true, V>(first, group.count, scratch, LineSource<V>{in_first}, ColumnSink{columns});
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
                slots ? Base::slot_registers(problem.H, problem.W / 2 + 1, problem.F) * std::int64_t{sizeof(V)} : 0,
                std::int64_t{problem.H} * (problem.W / 2 + 1) * problem.F * 2 * std::int64_t{sizeof(T)}};
    }
};

}  // namespace
