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

    // Columns of a tile's spectrum. Pair i M + m holds samples 2i M + m and (2i+1) M + m of the column plan, so that
    // one butterfly of its first pass takes both rows of a pair.
    static auto column_source(const Tile& tile, const Line* spectrum, const ColumnGroup& group) {
        const std::int64_t row_stride = tile.call.row_stride, inner = tile.column_plan.passes[0].inner;
        return [=, &group](std::int64_t j) UNROLLED_BODY {
            const Line *here = spectrum + group.here[j], *mirrored = spectrum + group.mirrored[j];
            return [=](Line* a, auto radix, std::int64_t, std::int64_t m) UNROLLED_BODY {
                for_each(radix, [&](auto r) UNROLLED_BODY {
                    const std::int64_t pair = (r / 2 * inner + m) * row_stride;
                    const Line z = here[pair], mirror = mirrored[pair];
                    a[r] = r % 2 ? Line{z.im + mirror.im, mirror.re - z.re} : Line{z.re + mirror.re, z.im - mirror.im};
                });
            };
        };
    }
    // Before the transform along H, columns 0 and W/2 of a real signal are real: their imaginary parts are dropped, as
    // irfft2 does.
    static auto column_sink(const Tile& tile, Line* spectrum, const ColumnGroup& group) {
        const std::int64_t row_stride = tile.call.row_stride, inner = tile.column_plan.passes[0].inner;
        return [=, &group](std::int64_t j) UNROLLED_BODY {
            Line *here = spectrum + group.here[j], *mirrored = spectrum + group.mirrored[j];
            return [=](Line* a, auto radix, std::int64_t, std::int64_t m) UNROLLED_BODY {
                for_each(radix, [&](auto r) UNROLLED_BODY {
                    if (r % 2) return;
                    const std::int64_t pair = (r / 2 * inner + m) * row_stride;
                    const Line first = a[r], second = r + 1 < radix ? a[r + 1] : Line{};
                    if (here == mirrored) {
                        here[pair] = {first.re, second.re};
                    } else {
                        here[pair] = {first.re - second.im, first.im + second.re};
                        mirrored[pair] = {first.re + second.im, second.re - first.im};
                    }
                });
            };
        };
    }

    using MixFunction = void (*)(const FilterColumn&, Line* a, int radix, int first);
    static MixFunction mix_of(const Tile& tile) {
        if (tile.F == 0) return tile.backward() ? Base::mix_global_backward : Base::mix_global;
        if (!tile.backward()) return Base::mix_basis;
        return tile.F == 4 ? Base::template mix_basis_backward<4> : Base::template mix_basis_backward<0>;
    }

    // The sink of the last pass: multiplies by the filter, then does the first butterfly of the inverse. `position` is
    // that of the first point in the column.
    template <class Mix, class Sink>
    static auto mixing_sink(const Pass<T>& pass, int position, const Mix& mix, const Sink& sink) {
        return [=, &pass](std::int64_t j) UNROLLED_BODY {
            return [=, &pass, mix = mix(j), sink = sink(j)](Line* a, auto radix, std::int64_t outer, std::int64_t m)
                       UNROLLED_BODY {
                           mix(a, radix, position + int(outer) * radix);
                           swap_parts<V>(radix, a);
                           pass_butterfly<V>(pass, radix, a);
                           swap_parts<V>(radix, a);
                           sink(a, radix, outer, m);
                       };
        };
    }

    static void columns(const FilterCall& call, const TileGroup& group, void* scratch, int first, int last) {
        for (int g = 0; g < group.count; g++) tile_columns(Tile{call, group.tasks[g]}, scratch, first, last);
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
            mix_columns(tile, group, x_lines, lines, scratch);
            if (tile.F > 0 && tile.tensors.grad_filters)
                for (int j = 0; j < group.count; j++)
                    Base::add_grad_basis(tile, group.k[j], x_lines + std::int64_t{j} * tile.H);
        }
    }

    // Forward with F = 4, the most frequent case, is inlined into the pass. All other cases share a pass that calls a
    // function.
    static void mix_columns(const Tile& tile, const ColumnGroup& group, Line* x_lines, Line* lines, Line* scratch) {
        if (tile.F == 4 && !tile.backward())
            return filter_columns(tile, group, lines, scratch, [&](std::int64_t j) UNROLLED_BODY {
                V routing[4];
                for (int f = 0; f < 4; f++) routing[f] = tile.routing[f];
                return [=, column = FilterColumn{tile, group.k[j], nullptr}](Line* a, auto radix, int first)
                           UNROLLED_BODY {
                               for_each(radix, [&](auto r) UNROLLED_BODY {
                                   a[r] = a[r] * Base::template mixed<4>(routing, column.bin(first + r));
                               });
                           };
            });
        const MixFunction mix = mix_of(tile);
        filter_columns(tile, group, lines, scratch, [&](std::int64_t j) UNROLLED_BODY {
            return [mix, column = FilterColumn{tile, group.k[j], x_lines + j * tile.H}](Line* a, int radix, int first)
                       UNROLLED_BODY { mix(column, a, radix, first); };
        });
    }

    // Backward: transforms columns of x along H.
    static void transform_columns(const Tile& tile, const ColumnGroup& group, Line* lines, Line* scratch) {
        const LinePlan<T>& plan = tile.column_plan;
        const Pass<T>& first = plan.passes[0];
        run_pass<false, V>(first, group.count, scratch, column_source(tile, tile.x_spectrum, group),
                           line_sink(lines, first.inner, tile.H));
        run_passes<false, V>(plan, 1, plan.num_passes, group.count, lines, tile.H, scratch);
    }

    // Transforms columns along H, multiplies by the filter, transforms back.
    template <class Mix>
    static void filter_columns(const Tile& tile, const ColumnGroup& group, Line* lines, Line* scratch, const Mix& mix) {
        const LinePlan<T>& plan = tile.column_plan;
        const Pass<T>& first = plan.passes[0];
        const auto from_columns = column_source(tile, tile.y_spectrum, group);
        const auto to_columns = column_sink(tile, tile.y_spectrum, group);
        if (plan.num_passes == 1)
            return run_pass<false, V, true>(first, group.count, scratch, from_columns,
                                            mixing_sink(first, 0, mix, to_columns));
        const Parts<V> parts(plan);
        Pass<T> last = plan.passes[plan.num_passes - 1];
        last.outer /= int(parts.count);
        const int split = parts.split > 1 ? parts.split : 1;
        run_pass<false, V>(first, group.count, scratch, from_columns, line_sink(lines, first.inner, tile.H));
        run_passes_of_part<false, V>(plan, 1, split, 1, group.count, lines, tile.H, scratch);
        for (std::int64_t part = 0; part < parts.count; part++) {
            Line* const line = lines + part * parts.length;
            run_passes_of_part<false, V>(plan, split, plan.num_passes - 1, parts.count, group.count, line, tile.H,
                                         scratch);
            run_pass<false, V, true>(last, group.count, scratch, line_source(line, 1, tile.H),
                                     mixing_sink(last, int(part * parts.length), mix, line_sink(line, 1, tile.H)));
            run_passes_of_part<true, V>(plan, split, plan.num_passes - 1, parts.count, group.count, line, tile.H,
                                        scratch);
        }
        run_passes_of_part<true, V>(plan, 1, split, 1, group.count, lines, tile.H, scratch);
        run_pass<true, V>(first, group.count, scratch, line_source(lines, first.inner, tile.H), to_columns);
    }

    static FilterWorkspace workspace(const FilterCall& call) {
        TileTask task{};
        task.workspace = reinterpret_cast<void*>(sizeof(Line));  // any address
        const Tile tile{call, task};
        const std::int64_t columns = columns_at_once(tile.H) * tile.H * (tile.backward() ? 2 : 1);
        const std::int64_t scratch =
            tile.row_plan.scratch > tile.column_plan.scratch ? tile.row_plan.scratch : tile.column_plan.scratch;
        const bool slots = tile.F > 0 && tile.tensors.grad_filters;
        return {tile.bytes(), (columns + scratch) * std::int64_t{sizeof(Line)},
                slots ? Base::slot_registers(tile.H, tile.K, tile.F) * std::int64_t{sizeof(V)} : 0,
                std::int64_t{tile.H} * tile.K * tile.F * 2 * std::int64_t{sizeof(T)}};
    }
};

}  // namespace
