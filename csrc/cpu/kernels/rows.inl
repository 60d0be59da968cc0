// The transforms along W, between tensors of any storage type and a tile's workspace, with StarReLU and its gradient.

namespace {

template <class L>
struct Filter : ColumnsOf<typename L::Vec> {
    using Storage = typename L::Scalar;
    using V = typename L::Vec;
    using Base = ColumnsOf<V>;
    using Base::lanes;
    using typename Base::Line, typename Base::Tile, typename Base::T;

    static const Storage* pixels(const Tile& tile, const void* tensor, std::int64_t row) {
        return static_cast<const Storage*>(tensor) + tile.row_offset(row);
    }
    static Storage* pixels(const Tile& tile, void* tensor, std::int64_t row) {
        return static_cast<Storage*>(tensor) + tile.row_offset(row);
    }

    // The last tile of a sample may not use all lanes.
    static V load(const Storage* from, int used) { return used == lanes ? L::load(from) : load_first<L>(from, used); }
    static void store(Storage* to, V v, int used) { used == lanes ? L::store(to, v) : store_first<L>(to, v, used); }

    struct Identity {
        FFT_INLINE V operator()(V x) const { return x; }
    };
    struct Activation {
        V scale, bias;
        explicit Activation(const Tile& tile) : scale(V{} + T(tile.problem.scale)), bias(V{} + T(tile.problem.bias)) {}
        FFT_INLINE V operator()(V x) const { return StarReLU<L>::forward_lane(x, scale, bias); }
    };

    // Pairs of rows of a tensor, starting at pair `first`.
    struct RowPairs {
        const Tile& tile;
        const void* tensor;
        int first;
    };
    // Rows a and b form a line a + i b. A row without a partner is paired with itself: the column pass ignores b, and b
    // is stored before a. Pixels are too far apart for the hardware prefetcher, so the next pair's are prefetched here.
    struct RowPair {
        const int* sample;
        std::int64_t inner, C;
        Storage *a, *b, *next_a, *next_b;

        FFT_INLINE RowPair(const RowPairs& pairs, std::int64_t i)
            : sample(pairs.tile.row_plan.sample), inner(pairs.tile.row_plan.passes[0].inner), C(pairs.tile.problem.C) {
            const std::int64_t pair = pairs.first + i;
            rows(pairs, pair, a, b);
            rows(pairs, pair + 1 < pairs.tile.pairs ? pair + 1 : pair, next_a, next_b);
        }
        FFT_INLINE static void rows(const RowPairs& pairs, std::int64_t pair, Storage*& a, Storage*& b) {
            const int* row = pairs.tile.column_plan.pairs + 2 * pair;
            auto* pixels = static_cast<Storage*>(const_cast<void*>(pairs.tensor));
            a = pixels + pairs.tile.row_offset(row[0]);
            b = row[1] < 0 ? a : pixels + pairs.tile.row_offset(row[1]);
        }
        FFT_INLINE std::int64_t offset(std::int64_t r, std::int64_t m) const { return sample[r * inner + m] * C; }
    };
    template <class Act>
    struct RowSource : RowPairs {
        Act act;
        struct Pair : RowPair {
            Act act;
            template <class Radix>
            FFT_INLINE void operator()(Line* line, Radix radix, std::int64_t, std::int64_t m) const {
                for_each(radix, [&](auto r) UNROLLED_BODY {
                    const std::int64_t offset = this->offset(r, m);
                    __builtin_prefetch(this->next_a + offset, 0, 2);
                    __builtin_prefetch(this->next_b + offset, 0, 2);
                    line[r] = {act(L::load(this->a + offset)), act(L::load(this->b + offset))};
                });
            }
        };
        FFT_INLINE Pair of(std::int64_t i) const { return {RowPair(*this, i), act}; }
    };

    // If all lanes are used, the first pass reads the tensor directly, unless it is channels-first.
    template <class Act>
    static void transform_rows(const RowPairs& rows, int count, Line* line, Line* scratch, const Act& act) {
        const Plan<T>& plan = rows.tile.row_plan;
        const Pass<T>& first = plan.passes[0];
        const std::int64_t stride = rows.tile.call.row_stride;
        const bool channels_first = rows.tile.problem.channels_first;
        const bool from_tensor = rows.tile.used == lanes && !channels_first;
        if (from_tensor)
            run_pass<false, V>(first, count, scratch, RowSource<Act>{rows, act},
                               LineSink<V>{{line, first.inner, stride}});
        else
            for (int i = 0; i < count; i++)
                (channels_first ? load_planes<Act> : load_pair<Act>)(RowPair(rows, i), rows.tile, line + i * stride,
                                                                     act);
        run_passes<false, V>(plan, from_tensor ? 1 : 0, plan.num_passes, count, line, stride, scratch);
    }
    template <class Act>
    static void load_pair(const RowPair& pair, const Tile& tile, Line* line, const Act& act) {
        for (int p = 0; p < tile.W; p++) {
            const std::int64_t offset = pair.sample[p] * pair.C;
            line[p] = {act(load(pair.a + offset, tile.used)), act(load(pair.b + offset, tile.used))};
        }
    }

    // ---- channels-first: in memory a register holds pixels of one channel, here it holds channels of one pixel

    static constexpr int half = lanes / 2;
    static std::int64_t plane(const Tile& tile) { return std::int64_t{tile.H} * tile.W; }
    FFT_INLINE static V first_halves(V a, V b) { return alternate<0, half, lanes>(a, b); }

    // block[i] = the channels of pixel i. fetch(offset) returns pixels of the channel at that offset from the first.
    template <class Fetch>
    FFT_INLINE static void load_block(const Tile& tile, V* block, const Fetch& fetch) {
        const std::int64_t next = plane(tile);
        if (tile.used == lanes)
            unrolled<0, lanes>([&](auto c) UNROLLED_BODY { block[c] = fetch(c * next); });
        else
            for (int c = 0; c < lanes; c++) block[c] = c < tile.used ? fetch(c * next) : V{};
        Base::transpose(block);
    }
    template <class Act>
    static void load_planes(const RowPair& pair, const Tile& tile, Line* line, const Act& act) {
        V block[lanes];
        if (2 * tile.W <= lanes) {  // both rows in one register
            load_block(tile, block, [&](std::int64_t channel) UNROLLED_BODY {
                return first_halves(load(pair.a + channel, tile.W), load(pair.b + channel, tile.W));
            });
            unrolled<0, half>([&](auto i) UNROLLED_BODY {
                if (i < tile.W) line[tile.row_plan.position[i]] = {act(block[i]), act(block[i + half])};
            });
            return;
        }
        for (int w = 0; w < tile.W; w += lanes) {
            const int* position = tile.row_plan.position + w;
            const int pixels = tile.W - w < lanes ? tile.W - w : lanes;
            const auto load_row = [&](const Storage* row, const Storage* next) UNROLLED_BODY {
                load_block(tile, block, [&](std::int64_t channel) UNROLLED_BODY {
                    __builtin_prefetch(next + channel, 0, 2);
                    return load(row + channel, pixels);
                });
            };
            load_row(pair.a + w, pair.next_a + w);
            unrolled<0, lanes>([&](auto i) UNROLLED_BODY {
                if (i < pixels) line[position[i]].re = act(block[i]);
            });
            load_row(pair.b + w, pair.next_b + w);
            unrolled<0, lanes>([&](auto i) UNROLLED_BODY {
                if (i < pixels) line[position[i]].im = act(block[i]);
            });
        }
    }

    struct PlainStore {
        Storage* to;
        FFT_INLINE void operator()(std::int64_t offset, V value, int pixels) { store(to + offset, value, pixels); }
    };
    struct StarReLUStore {
        const Storage* x;
        Storage* grad_x;  // or null
        V two_scale;
        typename StarReLU<L>::Sums sums;
        FFT_INLINE void operator()(std::int64_t offset, V value, int pixels) {
            const V grad = StarReLU<L>::backward_lane(value, load(x + offset, pixels), two_scale, sums);
            if (grad_x) store(grad_x + offset, grad, pixels);
        }
    };
    // Transforms a pair's lines back and stores them. Returns `store`, which has sums: passed by reference, they would
    // not stay in registers.
    template <class Store>
    static Store store_planes(const Tile& tile, const int* rows, const Line* line, Store store) {
        const std::int64_t next = plane(tile), a = tile.row_offset(rows[0]);
        const std::int64_t b = rows[1] < 0 ? a : tile.row_offset(rows[1]);
        const auto each_channel = [&](auto put) UNROLLED_BODY {
            unrolled<0, lanes>([&](auto c) UNROLLED_BODY {
                if (c < tile.used) put(c, c * next);
            });
        };
        V block[lanes];
        if (2 * tile.W <= lanes) {
            const int* position = tile.row_plan.position;
            unrolled<0, half>([&](auto i) UNROLLED_BODY {
                const Line point = i < tile.W ? line[position[i]] : Line{};
                block[i] = point.re;
                block[i + half] = point.im;
            });
            Base::transpose(block);
            each_channel([&](auto c, std::int64_t channel) UNROLLED_BODY {
                store(a + channel, first_halves(block[c], V{}), tile.W);
                if (rows[1] >= 0) store(b + channel, alternate<1, half, lanes>(block[c], V{}), tile.W);
            });
            return store;
        }
        for (int w = 0; w < tile.W; w += lanes) {
            const int* position = tile.row_plan.position + w;
            const int pixels = tile.W - w < lanes ? tile.W - w : lanes;
            unrolled<0, lanes>([&](auto i) UNROLLED_BODY { block[i] = i < pixels ? line[position[i]].re : V{}; });
            Base::transpose(block);
            each_channel([&](auto c, std::int64_t channel) UNROLLED_BODY { store(a + channel + w, block[c], pixels); });
            if (rows[1] < 0) continue;
            unrolled<0, lanes>([&](auto i) UNROLLED_BODY { block[i] = i < pixels ? line[position[i]].im : V{}; });
            Base::transpose(block);
            each_channel([&](auto c, std::int64_t channel) UNROLLED_BODY { store(b + channel + w, block[c], pixels); });
        }
        return store;
    }

    static void rows(const FilterCall& call, const TileGroup& group, void* scratch_, int first, int last) {
        Line* scratch = static_cast<Line*>(scratch_);
        const int at_once = Base::lines_at_once(call.problem->W);
        for (int start = first; start < last; start += at_once)
            for (int g = 0; g < group.count; g++) {
                const Tile tile(call, group.tasks[g]);
                const int count = start + at_once < last ? at_once : last - start;
                const RowPairs x{tile, tile.tensors.x, start}, grad_y{tile, tile.tensors.grad_y, start};
                Line* x_line = tile.x_spectrum + start * call.row_stride;
                Line* y_line = tile.y_spectrum + start * call.row_stride;
                if (tile.needs_x_spectrum() && tile.problem.star_relu)
                    transform_rows(x, count, x_line, scratch, Activation(tile));
                else if (tile.needs_x_spectrum())
                    transform_rows(x, count, x_line, scratch, Identity{});
                if (tile.backward()) transform_rows(grad_y, count, y_line, scratch, Identity{});
            }
    }

    static void inverse_rows(const FilterCall& call, const TileGroup& group, void* scratch, int first, int last) {
        const Tile tile(call, group.tasks[0]);
        if (!tile.needs_y_spectrum()) return;
        const Plan<T>& plan = tile.row_plan;
        const int at_once = Base::lines_at_once(tile.W);
        for (int start = first; start < last; start += at_once) {
            const int count = start + at_once < last ? at_once : last - start;
            for (int g = 0; g < group.count; g++) {
                Line* line = Tile(call, group.tasks[g]).y_spectrum + start * call.row_stride;
                run_passes<true, V>(plan, 0, plan.num_passes, count, line, call.row_stride,
                                    static_cast<Line*>(scratch));
            }
            for (int pair = start; pair < start + count; pair++) store_pair(call, group, pair);
        }
        stream_fence();
    }

    static void store_pair(const FilterCall& call, const TileGroup& group, int pair) {
        const Tile tile(call, group.tasks[0]), last(call, group.tasks[group.count - 1]);
        const Line* line = tile.y_spectrum + pair * call.row_stride;
        const std::int64_t stride = group.count > 1 ? (last.y_spectrum - tile.y_spectrum) / (group.count - 1) : 0;
        if (tile.problem.channels_first)
            for (int g = 0; g < group.count; g++)
                store_pair_of_planes(Tile(call, group.tasks[g]), pair, line + g * stride);
        else if (tile.backward() && tile.problem.star_relu)
            for (int g = 0; g < group.count; g++)
                store_pair_star_relu(Tile(call, group.tasks[g]), pair, line + g * stride);
        else
            store_rows(tile, last.used, group.count, pair, line, stride);
    }

    // Stores all tiles of the group pixel by pixel, so that stores go to adjacent cache lines of one page.
    static void store_rows(const Tile& tile, int used_of_last, int count, int pair, const Line* line,
                           std::int64_t stride) {
        const RowPair rows({tile, tile.backward() ? tile.tensors.grad_x : tile.tensors.y, pair}, 0);
        if (used_of_last < lanes) {
            count--;
            for (int p = 0; p < tile.W; p++) {
                const std::int64_t offset = rows.sample[p] * rows.C + count * lanes;
                store_first<L>(rows.b + offset, line[p + count * stride].im, used_of_last);
                store_first<L>(rows.a + offset, line[p + count * stride].re, used_of_last);
            }
        }
        const bool non_temporal = use_non_temporal(tile, rows.a, count);
        switch (count) {
            case 1:
                return store_tiles<1>(rows, tile.W, line, stride, non_temporal);
            case 2:
                return store_tiles<2>(rows, tile.W, line, stride, non_temporal);
            case 3:
                return store_tiles<3>(rows, tile.W, line, stride, non_temporal);
            case 4:
                return store_tiles<4>(rows, tile.W, line, stride, non_temporal);
            case 5:
                return store_tiles<5>(rows, tile.W, line, stride, non_temporal);
            case 6:
                return store_tiles<6>(rows, tile.W, line, stride, non_temporal);
            case 7:
                return store_tiles<7>(rows, tile.W, line, stride, non_temporal);
            case 8:
                return store_tiles<8>(rows, tile.W, line, stride, non_temporal);
        }
    }
    template <int count>
    static void store_tiles(const RowPair& rows, int W, const Line* line, std::int64_t stride, bool non_temporal) {
        if (non_temporal) return store_tiles<count, can_stream>(rows, W, line, stride);
        store_tiles<count, false>(rows, W, line, stride);
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

    static void store_pair_of_planes(const Tile& tile, int pair, const Line* line) {
        const int* rows = tile.column_plan.pairs + 2 * pair;
        auto* grad_x = static_cast<Storage*>(tile.tensors.grad_x);
        if (tile.backward() && tile.problem.star_relu) {
            const auto* x = static_cast<const Storage*>(tile.tensors.x);
            const V two_scale = V{} + T(2 * tile.problem.scale);
            StarReLUStore stored = store_planes(tile, rows, line, StarReLUStore{x, grad_x, two_scale, {}});
            store_sums(tile, pair, stored.sums);
        } else {
            store_planes(tile, rows, line,
                         PlainStore{tile.backward() ? grad_x : static_cast<Storage*>(tile.tensors.y)});
        }
    }
    static void store_sums(const Tile& tile, int pair, typename StarReLU<L>::Sums& sums) {
        sums.flush();
        tile.star_relu_sums[2 * pair] = lane_sum(sums.scale.sum);
        tile.star_relu_sums[2 * pair + 1] = lane_sum(sums.bias.sum);
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
            const Storage* x = pixels(tile, tile.tensors.x, rows[i]);
            Storage* __restrict grad_x = tile.tensors.grad_x ? pixels(tile, tile.tensors.grad_x, rows[i]) : nullptr;
            for (std::int64_t w = 0; w < W; w++) {
                const Line& grad_u = line[position[w]];
                __builtin_prefetch(x + w * C + ahead, 0, 2);
                const V g =
                    StarReLU<L>::backward_lane(i ? grad_u.im : grad_u.re, load(x + w * C, tile.used), two_scale, sums);
                if (!grad_x) continue;
                __builtin_prefetch(grad_x + w * C + ahead, 1);
                store(grad_x + w * C, g, tile.used);
            }
        }
        store_sums(tile, pair, sums);
    }
};

template <class L>
constexpr FilterKernel filter_kernel = {Filter<L>::workspace, Filter<L>::arrange_basis, Filter<L>::begin,
                                        Filter<L>::rows,      Filter<L>::columns,       Filter<L>::inverse_rows,
                                        Filter<L>::end,       Filter<L>::sum_slots};

}  // namespace
