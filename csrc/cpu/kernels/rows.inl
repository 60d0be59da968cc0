// The transforms along W, between tensors of any storage type and a tile's workspace, with StarReLU and its gradient.

namespace {

template <class L>
struct Filter : Planes<L> {
    using Base = Planes<L>;
    using Base::lanes;
    using typename Base::Line, typename Base::Storage, typename Base::Tile, typename Base::T, typename Base::V;

    // Rows a and b form a line a + i b. A row without a partner is paired with itself: the column pass ignores b, and b
    // is stored before a. Pixels are too far apart for the hardware prefetcher, so the next pair's are prefetched here.
    struct RowPair {
        const int* sample;
        std::int64_t inner, C;
        Storage *a, *b, *next_a, *next_b;

        FFT_INLINE RowPair(const Tile& tile, const void* tensor, int pair)
            : sample(tile.row_plan.sample), inner(tile.row_plan.passes[0].inner), C(tile.problem.C) {
            rows(tile, tensor, pair, a, b);
            rows(tile, tensor, pair + 1 < tile.pairs ? pair + 1 : pair, next_a, next_b);
        }
        FFT_INLINE static void rows(const Tile& tile, const void* tensor, int pair, Storage*& a, Storage*& b) {
            const int* row = tile.column_plan.pairs + 2 * pair;
            auto* pixels = static_cast<Storage*>(const_cast<void*>(tensor));
            a = pixels + tile.row_offset(row[0]);
            b = row[1] < 0 ? a : pixels + tile.row_offset(row[1]);
        }
    };
    template <class Act>
    static auto row_source(const Tile& tile, const void* tensor, int first, const Act& act) {
        return [=, &tile](std::int64_t i) UNROLLED_BODY {
            // built in place: a copy would go through memory
            return [=, pair = RowPair(tile, tensor, first + int(i))](Line* line, auto radix, std::int64_t,
                                                                     std::int64_t m) UNROLLED_BODY {
                for_each(radix, [&](auto r) UNROLLED_BODY {
                    const std::int64_t offset = pair.sample[r * pair.inner + m] * pair.C;
                    __builtin_prefetch(pair.next_a + offset, 0, 2);
                    __builtin_prefetch(pair.next_b + offset, 0, 2);
                    line[r] = {act(L::load(pair.a + offset)), act(L::load(pair.b + offset))};
                });
            };
        };
    }

    // Transforms `count` pairs of rows from pair `first` on. If all lanes are used, the first pass reads the tensor
    // directly.
    template <class Act>
    static void transform_rows(const Tile& tile, const void* tensor, int first, int count, Line* line, Line* scratch,
                               const Act& act) {
        const LinePlan<T>& plan = tile.row_plan;
        const std::int64_t stride = tile.call.row_stride;
        const bool from_tensor = tile.used == lanes;
        if (from_tensor)
            run_pass<false, V>(plan.passes[0], count, scratch, row_source(tile, tensor, first, act),
                               line_sink(line, plan.passes[0].inner, stride));
        else
            for (int i = 0; i < count; i++) load_pair(RowPair(tile, tensor, first + i), tile, line + i * stride, act);
        run_passes<false, V>(plan, from_tensor ? 1 : 0, plan.num_passes, count, line, stride, scratch);
    }
    template <class Act>
    static void load_pair(const RowPair& pair, const Tile& tile, Line* line, const Act& act) {
        for (int p = 0; p < tile.W; p++) {
            const std::int64_t offset = pair.sample[p] * pair.C;
            line[p] = {act(load<L>(pair.a + offset, tile.used)), act(load<L>(pair.b + offset, tile.used))};
        }
    }

    // Channels-first, `load_planes` comes before. A row without a partner is paired with itself.
    static void transform_loaded_rows(const Tile& tile, int first, int count, Line* line, Line* scratch) {
        for (int i = 0; i < count; i++)
            if (tile.column_plan.pairs[2 * (first + i) + 1] < 0)
                for (Line *point = line + i * tile.call.row_stride, *end = point + tile.W; point < end; point++)
                    point->im = point->re;
        run_passes<false, V>(tile.row_plan, 0, tile.row_plan.num_passes, count, line, tile.call.row_stride, scratch);
    }

    static void rows(const FilterCall& call, const TileGroup& group, void* scratch_, int first, int last) {
        Line* scratch = static_cast<Line*>(scratch_);
        const int at_once = Base::lines_at_once(call.problem->W);
        for (int start = first; start < last; start += at_once)
            for (int g = 0; g < group.count; g++) {
                const Tile tile{call, group.tasks[g]};
                const int count = start + at_once < last ? at_once : last - start;
                Line* x_line = tile.x_spectrum + start * call.row_stride;
                Line* y_line = tile.y_spectrum + start * call.row_stride;
                if (tile.problem.channels_first) {
                    if (tile.needs_x_spectrum()) transform_loaded_rows(tile, start, count, x_line, scratch);
                    if (tile.backward()) transform_loaded_rows(tile, start, count, y_line, scratch);
                    continue;
                }
                if (tile.needs_x_spectrum())
                    Base::with_activation(tile, [&](const auto& act) {
                        transform_rows(tile, tile.tensors.x, start, count, x_line, scratch, act);
                    });
                if (tile.backward())
                    transform_rows(tile, tile.tensors.grad_y, start, count, y_line, scratch, Base::identity);
            }
    }

    static void inverse_rows(const FilterCall& call, const TileGroup& group, void* scratch, int first, int last) {
        const Tile tile{call, group.tasks[0]};
        if (!tile.needs_y_spectrum()) return;
        const LinePlan<T>& plan = tile.row_plan;
        const int at_once = Base::lines_at_once(tile.W);
        for (int start = first; start < last; start += at_once) {
            const int count = start + at_once < last ? at_once : last - start;
            for (int g = 0; g < group.count; g++) {
                Line* line = Tile{call, group.tasks[g]}.y_spectrum + start * call.row_stride;
                run_passes<true, V>(plan, 0, plan.num_passes, count, line, call.row_stride,
                                    static_cast<Line*>(scratch));
            }
            if (!tile.problem.channels_first)  // else `store_planes` comes next
                for (int pair = start; pair < start + count; pair++) store_pair(call, group, pair);
        }
        stream_fence();
    }

    static void store_pair(const FilterCall& call, const TileGroup& group, int pair) {
        const Tile tile{call, group.tasks[0]}, last{call, group.tasks[group.count - 1]};
        const Line* line = tile.y_spectrum + pair * call.row_stride;
        const std::int64_t stride = group.count > 1 ? (last.y_spectrum - tile.y_spectrum) / (group.count - 1) : 0;
        if (tile.backward() && tile.problem.star_relu)
            for (int g = 0; g < group.count; g++)
                store_pair_star_relu(Tile{call, group.tasks[g]}, pair, line + g * stride);
        else
            store_rows(tile, last.used, group.count, pair, line, stride);
    }

    // Stores all tiles of the group pixel by pixel, so that stores go to adjacent cache lines of one page.
    static void store_rows(const Tile& tile, int used_of_last, int count, int pair, const Line* line,
                           std::int64_t stride) {
        const RowPair rows(tile, tile.result(), pair);
        if (used_of_last < lanes) {
            count--;
            for (int p = 0; p < tile.W; p++) {
                const std::int64_t offset = rows.sample[p] * rows.C + count * lanes;
                store_first<L>(rows.b + offset, line[p + count * stride].im, used_of_last);
                store_first<L>(rows.a + offset, line[p + count * stride].re, used_of_last);
            }
        }
        const bool non_temporal = use_non_temporal(tile, rows.a, count);
        unrolled<1, TileGroup::max_count + 1>([&](auto tiles) UNROLLED_BODY {
            if (tiles == count && non_temporal) store_tiles<tiles.value, can_stream>(rows, tile.W, line, stride);
            if (tiles == count && !non_temporal) store_tiles<tiles.value, false>(rows, tile.W, line, stride);
        });
    }
    template <int count, bool non_temporal>
    static void store_tiles(const RowPair& rows, int W, const Line* line, std::int64_t stride) {
        const int* sample = rows.sample;
        Storage *a = rows.a, *b = rows.b;
        for (const Line* end = line + W; line < end; line++) {
            const std::int64_t offset = *sample++ * rows.C;
            if constexpr (non_temporal) {
                for (int g = 0; g < count; g++) stream(b + offset + g * lanes, line[g * stride].im);
                for (int g = 0; g < count; g++) stream(a + offset + g * lanes, line[g * stride].re);
            } else {
                for (int g = 0; g < count; g++) __builtin_prefetch(rows.next_b + offset + g * lanes, 1);
                for (int g = 0; g < count; g++) __builtin_prefetch(rows.next_a + offset + g * lanes, 1);
                for (int g = 0; g < count; g++) L::store(b + offset + g * lanes, line[g * stride].im);
                for (int g = 0; g < count; g++) L::store(a + offset + g * lanes, line[g * stride].re);
            }
        }
    }

    // Results that are too large to still be cached when they are read use non-temporal stores, which do not read the
    // line first. Single cache lines do not, because they would be slower.
    static constexpr std::int64_t min_non_temporal_bytes = 16 << 20;
    static bool use_non_temporal(const Tile& tile, const Storage* pixel, int tiles) {
        const FilterProblem& problem = tile.problem;
        const std::int64_t bytes_of_pixel = problem.C * std::int64_t{sizeof(Storage)};
        return can_stream && sizeof(Storage) == sizeof(T) && (tiles > 1 || problem.C == lanes) &&
               problem.B * problem.H * problem.W * bytes_of_pixel >= min_non_temporal_bytes &&
               (reinterpret_cast<std::uintptr_t>(pixel) | std::uintptr_t(bytes_of_pixel)) % VECTOR_BYTES == 0;
    }

    // grad_x from grad_u, and this pair's terms of StarReLU's grad_scale and grad_bias.
    static void store_pair_star_relu(const Tile& tile, int pair, const Line* __restrict line) {
        const int* __restrict position = tile.row_plan.position;
        const std::int64_t C = tile.problem.C, W = tile.W;
        const V two_scale = V{} + T(2 * tile.problem.scale);
        typename StarReLU<L>::Sums sums;
        const int* rows = tile.column_plan.pairs + 2 * pair;
        for (int i = 0; i < 2; i++) {
            if (rows[i] < 0) continue;
            const int next = pair + 1 < tile.pairs || i == 0 ? rows[i + 1] : -1;
            const std::int64_t ahead = next < 0 ? 0 : (next - rows[i]) * W * C;
            const std::int64_t offset = tile.row_offset(rows[i]);
            const Storage* x = static_cast<const Storage*>(tile.tensors.x) + offset;
            Storage* __restrict grad_x = static_cast<Storage*>(tile.tensors.grad_x);
            if (grad_x) grad_x += offset;
            for (std::int64_t w = 0; w < W; w++) {
                const Line& grad_u = line[position[w]];
                __builtin_prefetch(x + w * C + ahead, 0, 2);
                const V g = StarReLU<L>::backward_lane(i ? grad_u.im : grad_u.re, load<L>(x + w * C, tile.used),
                                                       two_scale, sums);
                if (!grad_x) continue;
                __builtin_prefetch(grad_x + w * C + ahead, 1);
                store<L>(grad_x + w * C, g, tile.used);
            }
        }
        sums.end(tile.star_relu_sums + 2 * pair);
    }
};

template <class L>
constexpr FilterKernel filter_kernel = {Filter<L>::workspace,    Filter<L>::arrange_basis, Filter<L>::begin,
                                        Filter<L>::load_planes,  Filter<L>::rows,          Filter<L>::columns,
                                        Filter<L>::inverse_rows, Filter<L>::store_planes,  Filter<L>::end,
                                        Filter<L>::sum_slots};

}  // namespace
