// The filter step's transforms along W, between tensors of any storage type and a plane's workspace; columns.inl has
// the mathematics and what happens in between. Included once per instruction set, after columns.inl.

namespace {

template <class L>
struct Filter : FilterOf<typename L::Vec> {
    using Storage = typename L::Scalar;
    using V = typename L::Vec;
    using Base = FilterOf<V>;
    using Base::lanes;
    using typename Base::Line, typename Base::Plane, typename Base::T;

    static const Storage* pixels(const Plane& plane, const void* tensor, std::int64_t row) {
        return static_cast<const Storage*>(tensor) + plane.row_offset(row);
    }
    static Storage* pixels(const Plane& plane, void* tensor, std::int64_t row) {
        return static_cast<Storage*>(tensor) + plane.row_offset(row);
    }

    // Pixels of the last block of channels, which may not fill all lanes.
    static V load(const Storage* from, int used) { return used == lanes ? L::load(from) : load_first<L>(from, used); }
    static void store(Storage* to, V v, int used) { used == lanes ? L::store(to, v) : store_first<L>(to, v, used); }

    struct Identity {
        FFT_INLINE V operator()(V x) const { return x; }
    };
    struct Activation {
        V scale, bias;
        explicit Activation(const Plane& plane)
            : scale(V{} + T(plane.problem.scale)), bias(V{} + T(plane.problem.bias)) {}
        FFT_INLINE V operator()(V x) const { return StarReLU<L>::forward_lane(x, scale, bias); }
    };

    // Pairs of rows of a tensor, from pair `first` on.
    struct RowPairs {
        const Plane& plane;
        const void* tensor;
        int first;
    };
    // Rows a and b are a line a + i b. A row without a partner is its own: the column pass takes no notice of b then,
    // and b is stored before a. Memory is asked for the pixels of the pair after it in time: pixels are a stride apart
    // that no hardware foresees.
    struct RowPair {
        const int* sample;
        std::int64_t inner, C;
        Storage *a, *b, *next_a, *next_b;

        FFT_INLINE RowPair(const RowPairs& pairs, std::int64_t i)
            : sample(pairs.plane.row_plan.sample),
              inner(pairs.plane.row_plan.passes[0].inner),
              C(pairs.plane.problem.C) {
            const std::int64_t pair = pairs.first + i;
            rows(pairs, pair, a, b);
            rows(pairs, pair + 1 < pairs.plane.pairs ? pair + 1 : pair, next_a, next_b);
        }
        FFT_INLINE static void rows(const RowPairs& pairs, std::int64_t pair, Storage*& a, Storage*& b) {
            const int* row = pairs.plane.column_plan.pairs + 2 * pair;
            auto* pixels = static_cast<Storage*>(const_cast<void*>(pairs.tensor));
            a = pixels + pairs.plane.row_offset(row[0]);
            b = row[1] < 0 ? a : pixels + pairs.plane.row_offset(row[1]);
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

    // A full block of channels is read by the first pass itself.
    template <class Act>
    static void transform_rows(const RowPairs& rows, int count, Line* line, Line* scratch, const Act& act) {
        const Plan<T>& plan = rows.plane.row_plan;
        const Pass<T>& first = plan.passes[0];
        const std::int64_t stride = rows.plane.call.row_stride;
        if (rows.plane.used == lanes)
            run_pass<false, V>(first, count, scratch, RowSource<Act>{rows, act},
                               LineSink<V>{{line, first.inner, stride}});
        else
            for (int i = 0; i < count; i++) load_pair(RowPair(rows, i), rows.plane, line + i * stride, act);
        run_passes<false, V>(plan, rows.plane.used == lanes ? 1 : 0, plan.num_passes, count, line, stride, scratch);
    }
    template <class Act>
    static void load_pair(const RowPair& pair, const Plane& plane, Line* line, const Act& act) {
        for (int p = 0; p < plane.W; p++) {
            const std::int64_t offset = pair.sample[p] * pair.C;
            line[p] = {act(load(pair.a + offset, plane.used)), act(load(pair.b + offset, plane.used))};
        }
    }

    static void rows(const FilterCall& call, const PlaneGroup& group, void* scratch_, int first, int last) {
        Line* scratch = static_cast<Line*>(scratch_);
        const int block = Base::block_of_lines(call.problem->W);
        for (int start = first; start < last; start += block)
            for (int g = 0; g < group.count; g++) {
                const Plane plane(call, group.tasks[g]);
                const int count = start + block < last ? block : last - start;
                const RowPairs x{plane, plane.tensors.x, start}, grad_y{plane, plane.tensors.grad_y, start};
                Line* x_line = plane.x_spectrum + start * call.row_stride;
                Line* y_line = plane.y_spectrum + start * call.row_stride;
                if (plane.needs_x_spectrum() && plane.problem.star_relu)
                    transform_rows(x, count, x_line, scratch, Activation(plane));
                else if (plane.needs_x_spectrum())
                    transform_rows(x, count, x_line, scratch, Identity{});
                if (plane.backward()) transform_rows(grad_y, count, y_line, scratch, Identity{});
            }
    }

    static void inverse_rows(const FilterCall& call, const PlaneGroup& group, void* scratch, int first, int last) {
        const Plane plane(call, group.tasks[0]);
        if (!plane.needs_y_spectrum()) return;
        const Plan<T>& plan = plane.row_plan;
        const int block = Base::block_of_lines(plane.W);
        for (int start = first; start < last; start += block) {
            const int count = start + block < last ? block : last - start;
            for (int g = 0; g < group.count; g++) {
                Line* line = Plane(call, group.tasks[g]).y_spectrum + start * call.row_stride;
                run_passes<true, V>(plan, 0, plan.num_passes, count, line, call.row_stride,
                                    static_cast<Line*>(scratch));
            }
            for (int pair = start; pair < start + count; pair++) store_pair(call, group, pair);
        }
        stream_fence();
    }

    static void store_pair(const FilterCall& call, const PlaneGroup& group, int pair) {
        const Plane plane(call, group.tasks[0]), last(call, group.tasks[group.count - 1]);
        const Line* line = plane.y_spectrum + pair * call.row_stride;
        const std::int64_t stride = group.count > 1 ? (last.y_spectrum - plane.y_spectrum) / (group.count - 1) : 0;
        if (plane.backward() && plane.problem.star_relu)
            for (int g = 0; g < group.count; g++)
                store_pair_star_relu(Plane(call, group.tasks[g]), pair, line + g * stride);
        else
            store_rows(plane, last.used, group.count, pair, line, stride);
    }

    // Pixel by pixel, all of the group's blocks: one after the other in the same memory page, in different cache sets.
    static void store_rows(const Plane& plane, int used_of_last, int count, int pair, const Line* line,
                           std::int64_t stride) {
        const RowPair rows({plane, plane.backward() ? plane.tensors.grad_x : plane.tensors.y, pair}, 0);
        if (used_of_last < lanes) {
            count--;
            for (int p = 0; p < plane.W; p++) {
                const std::int64_t offset = rows.sample[p] * rows.C + count * lanes;
                store_first<L>(rows.b + offset, line[p + count * stride].im, used_of_last);
                store_first<L>(rows.a + offset, line[p + count * stride].re, used_of_last);
            }
        }
        const bool past_caches = streams(plane, rows.a, count);
        switch (count) {
            case 1:
                return store_blocks<1>(rows, plane.W, line, stride, past_caches);
            case 2:
                return store_blocks<2>(rows, plane.W, line, stride, past_caches);
            case 3:
                return store_blocks<3>(rows, plane.W, line, stride, past_caches);
            case 4:
                return store_blocks<4>(rows, plane.W, line, stride, past_caches);
            case 5:
                return store_blocks<5>(rows, plane.W, line, stride, past_caches);
            case 6:
                return store_blocks<6>(rows, plane.W, line, stride, past_caches);
            case 7:
                return store_blocks<7>(rows, plane.W, line, stride, past_caches);
            case 8:
                return store_blocks<8>(rows, plane.W, line, stride, past_caches);
        }
    }
    template <int count>
    static void store_blocks(const RowPair& rows, int W, const Line* line, std::int64_t stride, bool past_caches) {
        if (past_caches) return store_blocks<count, can_stream>(rows, W, line, stride);
        store_blocks<count, false>(rows, W, line, stride);
    }
    template <int count, bool past_caches>
    static void store_blocks(const RowPair& rows, int W, const Line* line, std::int64_t stride) {
        const int* sample = rows.sample;
        Storage *a = rows.a, *b = rows.b;
        for (const Line* end = line + W; line < end; line++) {
            const std::int64_t offset = *sample++ * rows.C;
            if constexpr (past_caches) {
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

    // A result too large to be in any cache when somebody reads it is written past them, which spares reading what is
    // overwritten. One cache line at a time would be slower, though.
    static constexpr std::int64_t least_streamed_bytes = 16 << 20;
    static bool streams(const Plane& plane, const Storage* pixel, int blocks) {
        const FilterProblem& problem = plane.problem;
        const std::int64_t bytes_of_pixel = problem.C * std::int64_t{sizeof(Storage)};
        return can_stream && sizeof(Storage) == sizeof(T) && (blocks > 1 || problem.C == lanes) &&
               problem.B * problem.H * problem.W * bytes_of_pixel >= least_streamed_bytes &&
               (reinterpret_cast<std::uintptr_t>(pixel) | std::uintptr_t(bytes_of_pixel)) % VECTOR_BYTES == 0;
    }

    // grad_x from grad_u, and this pair's part of StarReLU's own gradients.
    static void store_pair_star_relu(const Plane& plane, int pair, const Line* __restrict line) {
        const int* __restrict position = plane.row_plan.position;
        const std::int64_t C = plane.problem.C, W = plane.W;
        const V two_scale = V{} + T(2 * plane.problem.scale);
        typename StarReLU<L>::Sums sums;
        const int* rows = plane.column_plan.pairs + 2 * pair;
        for (int i = 0; i < 2; i++) {
            if (rows[i] < 0) continue;
            const int next = pair + 1 < plane.pairs || i == 0 ? rows[i + 1] : -1;
            const std::int64_t ahead = next < 0 ? 0 : (next - rows[i]) * W * C;
            const Storage* x = pixels(plane, plane.tensors.x, rows[i]);
            Storage* __restrict grad_x = plane.tensors.grad_x ? pixels(plane, plane.tensors.grad_x, rows[i]) : nullptr;
            for (std::int64_t w = 0; w < W; w++) {
                const Line& grad_u = line[position[w]];
                __builtin_prefetch(x + w * C + ahead, 0, 2);
                const V g =
                    StarReLU<L>::backward_lane(i ? grad_u.im : grad_u.re, load(x + w * C, plane.used), two_scale, sums);
                if (!grad_x) continue;
                __builtin_prefetch(grad_x + w * C + ahead, 1);
                store(grad_x + w * C, g, plane.used);
            }
        }
        sums.flush();
        plane.star_relu_sums[2 * pair] = lane_sum(sums.scale.sum);
        plane.star_relu_sums[2 * pair + 1] = lane_sum(sums.bias.sum);
    }
};

template <class L>
constexpr FilterKernel filter_kernel = {Filter<L>::workspace, Filter<L>::arrange_basis, Filter<L>::begin,
                                        Filter<L>::rows,      Filter<L>::columns,       Filter<L>::inverse_rows,
                                        Filter<L>::end,       Filter<L>::sum_slots};

}  // namespace
