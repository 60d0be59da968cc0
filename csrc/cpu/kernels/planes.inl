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

    static constexpr auto identity = [](V x) UNROLLED_BODY { return x; };
    // fn(what is applied to x as it is loaded)
    template <class Fn>
    static void with_activation(const Tile& tile, const Fn& fn) {
        const V scale = V{} + T(tile.problem.scale), bias = V{} + T(tile.problem.bias);
        if (!tile.problem.star_relu) return fn(identity);
        fn([=](V x) UNROLLED_BODY { return StarReLU<L>::forward_lane(x, scale, bias); });
    }

    static std::int64_t plane(const Tile& tile) { return std::int64_t{tile.H} * tile.W; }

    // The pixels of a plane are divided evenly into as many segments as the tile has pairs of rows, in whole registers.
    // fn(first pixel, number of pixels) for each register of segments [first, last).
    template <class Fn>
    FFT_INLINE static void for_each_register_of(const Tile& tile, int first, int last, const Fn& fn) {
        const std::int64_t size = plane(tile), registers = (size + lanes - 1) / lanes;
        for_each_register<lanes>(first * registers / tile.pairs * lanes, last * registers / tile.pairs * lanes, size,
                                 fn);
    }

    template <class Act>
    static void load_segments(const Tile& tile, const void* tensor, Line* spectrum, int first, int last,
                              const Act& act) {
        const auto* from = static_cast<const Storage*>(tensor) + tile.row_offset(0);
        const std::int64_t next = plane(tile);
        const std::int32_t* at = tile.call.pixel_at;
        V* registers = reinterpret_cast<V*>(spectrum);
        V square[lanes];
        for_each_register_of(tile, first, last, [&](std::int64_t p, auto count) UNROLLED_BODY {
            if (tile.used == lanes)
                unrolled<0, lanes>([&](auto c) UNROLLED_BODY { square[c] = load<L>(from + p + c * next, count); });
            else
                for (int c = 0; c < lanes; c++) square[c] = c < tile.used ? load<L>(from + p + c * next, count) : V{};
            Base::transpose(square);
            unrolled<0, lanes>([&](auto i) UNROLLED_BODY {
                if (i < count) registers[at[p + i]] = act(square[i]);
            });
        });
    }
    static void load_planes(const FilterCall& call, const TileGroup& group, void*, int first, int last) {
        for (int g = 0; g < group.count; g++) {
            const Tile tile{call, group.tasks[g]};
            if (tile.needs_x_spectrum())
                with_activation(tile, [&](const auto& act) {
                    load_segments(tile, tile.tensors.x, tile.x_spectrum, first, last, act);
                });
            if (tile.backward()) load_segments(tile, tile.tensors.grad_y, tile.y_spectrum, first, last, identity);
        }
    }

    // Each segment has its own sums of StarReLU's gradients, in one fixed order.
    template <bool star_relu_backward>
    static void store_segment(const Tile& tile, int segment) {
        const std::int64_t next = plane(tile), offset = tile.row_offset(0);
        const std::int32_t* at = tile.call.pixel_at;
        const V* registers = reinterpret_cast<const V*>(tile.y_spectrum);
        const auto* x = static_cast<const Storage*>(tile.tensors.x) + offset;
        auto* result = static_cast<Storage*>(tile.result());
        if (result) result += offset;
        const V two_scale = V{} + T(2 * tile.problem.scale);
        typename StarReLU<L>::Sums sums;
        V square[lanes];
        for_each_register_of(tile, segment, segment + 1, [&](std::int64_t p, auto count) UNROLLED_BODY {
            unrolled<0, lanes>([&](auto i) UNROLLED_BODY { square[i] = i < count ? registers[at[p + i]] : V{}; });
            Base::transpose(square);
            unrolled<0, lanes>([&](auto c) UNROLLED_BODY {
                if (c >= tile.used) return;
                V value = square[c];
                if constexpr (star_relu_backward)
                    value = StarReLU<L>::backward_lane(value, load<L>(x + c * next + p, count), two_scale, sums);
                if (!star_relu_backward || result) store<L>(result + c * next + p, value, count);
            });
        });
        if (star_relu_backward) sums.end(tile.star_relu_sums + 2 * segment);
    }
    static void store_planes(const FilterCall& call, const TileGroup& group, void*, int first, int last) {
        for (int g = 0; g < group.count; g++) {
            const Tile tile{call, group.tasks[g]};
            if (!tile.needs_y_spectrum()) continue;
            for (int segment = first; segment < last; segment++)
                tile.backward() && tile.problem.star_relu ? store_segment<true>(tile, segment)
                                                          : store_segment<false>(tile, segment);
        }
    }
};

}  // namespace
