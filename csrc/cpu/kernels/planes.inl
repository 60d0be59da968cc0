// Channels-first tensors. In memory a register holds neighbouring pixels of one channel, in a tile it holds the
// channels of one pixel: `lanes` registers at a time are transposed as they are loaded, and back as they are stored.

namespace {

template <class L>
struct Planes : ColumnsOf<typename L::Vec> {
    using Storage = typename L::Scalar;
    using V = typename L::Vec;
    using Base = ColumnsOf<V>;
    using Base::lanes;
    using typename Base::Line, typename Base::Tile, typename Base::T;

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
    // fn(what is applied to x as it is loaded)
    template <class Fn>
    static void with_activation(const Tile& tile, const Fn& fn) {
        tile.problem.star_relu ? fn(Activation(tile)) : fn(Identity{});
    }

    static std::int64_t plane(const Tile& tile) { return std::int64_t{tile.H} * tile.W; }

    // The pixels of a plane are divided evenly into as many segments as the tile has pairs of rows, in whole registers.
    // fn(first pixel, number of pixels) for each register of segments [first, last). The number is a constant for full
    // registers.
    template <class Fn>
    FFT_INLINE static void for_each_register(const Tile& tile, int first, int last, const Fn& fn) {
        const std::int64_t size = plane(tile), registers = (size + lanes - 1) / lanes;
        const std::int64_t end = last * registers / tile.pairs * lanes;
        std::int64_t p = first * registers / tile.pairs * lanes;
        for (; p + lanes <= size && p < end; p += lanes) fn(p, Index<lanes>{});
        if (p < end) fn(p, int(size - p));
    }

    template <class Act>
    static void load_segments(const Tile& tile, const void* tensor, Line* spectrum, int first, int last,
                              const Act& act) {
        const auto* from = static_cast<const Storage*>(tensor) + tile.row_offset(0);
        const std::int64_t next = plane(tile);
        const std::int32_t* at = tile.call.pixel_at;
        V* registers = reinterpret_cast<V*>(spectrum);
        V block[lanes];
        for_each_register(tile, first, last, [&](std::int64_t p, auto count) UNROLLED_BODY {
            if (tile.used == lanes)
                unrolled<0, lanes>([&](auto c) UNROLLED_BODY { block[c] = load(from + p + c * next, count); });
            else
                for (int c = 0; c < lanes; c++) block[c] = c < tile.used ? load(from + p + c * next, count) : V{};
            Base::transpose(block);
            unrolled<0, lanes>([&](auto i) UNROLLED_BODY {
                if (i < count) registers[at[p + i]] = act(block[i]);
            });
        });
    }
    static void load_planes(const FilterCall& call, const TileGroup& group, void*, int first, int last) {
        for (int g = 0; g < group.count; g++) {
            const Tile tile(call, group.tasks[g]);
            if (tile.needs_x_spectrum())
                with_activation(tile, [&](const auto& act) {
                    load_segments(tile, tile.tensors.x, tile.x_spectrum, first, last, act);
                });
            if (tile.backward()) load_segments(tile, tile.tensors.grad_y, tile.y_spectrum, first, last, Identity{});
        }
    }

    struct PlainStore {
        Storage* to;
        FFT_INLINE void operator()(std::int64_t offset, V value, int pixels) { store(to + offset, value, pixels); }
        static void end(const Tile&, int) {}
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
        void end(const Tile& tile, int pair) { store_sums(tile, pair, sums); }
    };
    static void store_sums(const Tile& tile, int pair, typename StarReLU<L>::Sums& sums) {
        sums.flush();
        tile.star_relu_sums[2 * pair] = lane_sum(sums.scale.sum);
        tile.star_relu_sums[2 * pair + 1] = lane_sum(sums.bias.sum);
    }

    // Each segment has its own sums, in one fixed order. `store` is a copy: a reference's sums would not stay in
    // registers.
    template <class Store>
    static void store_segment(const Tile& tile, int segment, Store store) {
        const std::int64_t next = plane(tile), offset = tile.row_offset(0);
        const std::int32_t* at = tile.call.pixel_at;
        const V* registers = reinterpret_cast<const V*>(tile.y_spectrum);
        V block[lanes];
        for_each_register(tile, segment, segment + 1, [&](std::int64_t p, auto count) UNROLLED_BODY {
            unrolled<0, lanes>([&](auto i) UNROLLED_BODY { block[i] = i < count ? registers[at[p + i]] : V{}; });
            Base::transpose(block);
            unrolled<0, lanes>([&](auto c) UNROLLED_BODY {
                if (c < tile.used) store(offset + c * next + p, block[c], count);
            });
        });
        store.end(tile, segment);
    }
    static void store_planes(const FilterCall& call, const TileGroup& group, void*, int first, int last) {
        for (int g = 0; g < group.count; g++) {
            const Tile tile(call, group.tasks[g]);
            if (!tile.needs_y_spectrum()) continue;
            const auto* x = static_cast<const Storage*>(tile.tensors.x);
            auto* result = static_cast<Storage*>(tile.backward() ? tile.tensors.grad_x : tile.tensors.y);
            const V two_scale = V{} + T(2 * tile.problem.scale);
            for (int segment = first; segment < last; segment++)
                if (tile.backward() && tile.problem.star_relu)
                    store_segment(tile, segment, StarReLUStore{x, result, two_scale, {}});
                else
                    store_segment(tile, segment, PlainStore{result});
        }
    }
};

}  // namespace
