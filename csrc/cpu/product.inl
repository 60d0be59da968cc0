// Products of float32 matrices with one register tile: a few rows of the left matrix, broadcast element by element,
// times a panel of the right one. Included once per instruction set after star_relu.inl.

namespace {

#if defined(__aarch64__) || VECTOR_BYTES == 64
constexpr int tile_vectors = 4;  // 24 of 32 registers hold sums
#else
constexpr int tile_vectors = 2;  // 12 of 16
#endif
constexpr int tile_rows = 6, panel_width = tile_vectors * Float32::count;
// Depth of what is added up in registers. A panel of that depth and the rows it meets stay in L2, and so does what a
// weight's gradient takes from its two matrices.
constexpr std::int64_t max_depth = 512, gradient_depth = 256;
// Tiles of rows that meet a panel while both are near.
constexpr std::int64_t tiles_in_block = 16;

// y (rows, panel_width) = a (rows, depth) * b (depth, panel_width) + plus + residual; a's element (r, k) is
// a[r * a_row + k] or, of a transposed matrix, a[r + k * a_row]. Then, if asked for, before = y and y = star_relu(y).
struct Tile {
    const float* a;
    std::int64_t a_row;
    const float* b;
    std::int64_t depth;
    const float* plus = nullptr;  // null for zero
    std::int64_t plus_row = 0;
    float* y = nullptr;
    std::int64_t y_row = 0;   // also of the residual and of before
    int width = panel_width;  // of all of them, where they end within the panel
    Residual residual = {};
    const float* star_relu = nullptr;
    float* before = nullptr;
    std::int64_t ahead = 0;  // of a transposed matrix, rows from one to the one that is needed after this tile's
};

// Loops over a tile are unrolled, or the sums would not be registers.
#define UNROLL _Pragma("GCC unroll 8")

template <int rows, bool transposed>
void multiply_tile(const Tile& t) {
    constexpr int count = Float32::count;
    F32 sums[rows][tile_vectors];
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < tile_vectors; v++) sums[r][v] = F32{};
    for (std::int64_t k = 0; k < t.depth; k++) {
        F32 b[tile_vectors];
        UNROLL for (int v = 0; v < tile_vectors; v++) b[v] = Float32::load(t.b + k * panel_width + v * count);
        if (transposed) __builtin_prefetch(t.a + (k + t.ahead) * t.a_row, 0, 2);
        UNROLL for (int r = 0; r < rows; r++) {
            const F32 a = (transposed ? t.a[r + k * t.a_row] : t.a[r * t.a_row + k]) - F32{};
            UNROLL for (int v = 0; v < tile_vectors; v++) sums[r][v] += a * b[v];
        }
    }
    if (t.plus)
        UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < tile_vectors; v++) sums[r][v] +=
            Float32::load(t.plus + r * t.plus_row + v * count);
    if (t.residual.x) UNROLL for (int v = 0; v < tile_vectors; v++) {
            const F32 scale = t.residual.scale ? Float32::load(t.residual.scale + v * count) : F32{} + 1;
            UNROLL for (int r = 0; r < rows; r++) sums[r][v] +=
                scale * Float32::load(t.residual.x + r * t.y_row + v * count);
        }
    if (t.before)
        UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < tile_vectors; v++)
            Float32::store(t.before + r * t.y_row + v * count, sums[r][v]);
    if (t.star_relu) {
        const F32 scale = F32{} + t.star_relu[0], bias = F32{} + t.star_relu[1];
        UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < tile_vectors; v++) sums[r][v] =
            StarReLU<Float32>::forward_lane(sums[r][v], scale, bias);
    }
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < tile_vectors; v++)
        Float32::store(t.y + r * t.y_row + v * count, sums[r][v]);
}

template <bool transposed>
void multiply_rows(const Tile& tile, int rows) {
    static_assert(tile_rows == 6);
    switch (rows) {
        case 1:
            return multiply_tile<1, transposed>(tile);
        case 2:
            return multiply_tile<2, transposed>(tile);
        case 3:
            return multiply_tile<3, transposed>(tile);
        case 4:
            return multiply_tile<4, transposed>(tile);
        case 5:
            return multiply_tile<5, transposed>(tile);
        default:
            return multiply_tile<6, transposed>(tile);
    }
}

// Rows of a tile that ends within its panel, filled up with zeros; null for null.
inline const float* filled_up(const float* from, std::int64_t row, int rows, int width, float* to) {
    if (!from) return nullptr;
    for (int r = 0; r < rows; r++) {
        for (int v = 0; v < tile_vectors; v++) Float32::store(to + r * panel_width + v * Float32::count, F32{});
        for (int n = 0; n < width; n++) to[r * panel_width + n] = from[r * row + n];
    }
    return to;
}

// The same of such a tile: what it reads and writes of y's rows is copied, so that the sums never have to leave their
// registers on the way. They are copied and no more, for qemu's sake: of a scalar multiply-add's operand it reads a
// whole register, beyond the end of the last row.
template <bool transposed>
void multiply_edge(const Tile& t, int rows) {
    float plus[tile_rows][panel_width], residual[tile_rows][panel_width], scale[panel_width];
    float y[tile_rows][panel_width], before[tile_rows][panel_width];
    Tile padded = t;
    padded.plus = filled_up(t.plus, t.plus_row, rows, t.width, plus[0]);
    padded.residual = {filled_up(t.residual.x, t.y_row, rows, t.width, residual[0]),
                       filled_up(t.residual.scale, 0, 1, t.width, scale)};
    padded.y = y[0], padded.plus_row = padded.y_row = panel_width;
    if (t.before) padded.before = before[0];
    multiply_rows<transposed>(padded, rows);
    for (int r = 0; r < rows; r++)
        for (int n = 0; n < t.width; n++) {
            t.y[r * t.y_row + n] = y[r][n];
            if (t.before) t.before[r * t.y_row + n] = before[r][n];
        }
}

template <bool transposed>
void multiply_part(const Tile& tile, int rows) {
    tile.width == panel_width ? multiply_rows<transposed>(tile, rows) : multiply_edge<transposed>(tile, rows);
}

template <int by, int... I>
inline F32 rotate(F32 v, Indices<I...>) {
    return __builtin_shufflevector(v, v, ((I + by) % sizeof...(I))...);
}
template <int lanes = Float32::count>
inline float lane_sum(F32 v) {
    if constexpr (lanes == 1)
        return v[0];
    else
        return lane_sum<lanes / 2>(v + rotate<lanes / 2>(v, typename CountTo<Float32::count>::Type{}));
}

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
// A sum of nothing is still written.
inline std::int64_t at_least_one(std::int64_t n) { return n > 0 ? n : 1; }
inline std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

// The lanes of count registers become the registers: log2(count) times, halves of the list are interleaved.
inline void transpose(F32 (&v)[Float32::count]) {
    constexpr int count = Float32::count;
    for (int round = 1; round < count; round *= 2) {
        F32 w[count];
        for (int i = 0; i < count / 2; i++) {
            w[2 * i] = interleave<false>(v[i], v[i + count / 2]);
            w[2 * i + 1] = interleave<true>(v[i], v[i + count / 2]);
        }
        for (int i = 0; i < count; i++) v[i] = w[i];
    }
}

// Depth [first, last) of a panel of columns [column, column + width) of b, whose element (k, n) is b[k * row + n];
// what is beyond width is zero.
inline void pack_rows(const float* b, std::int64_t row, std::int64_t depth, std::int64_t width, float* panel) {
    for (std::int64_t k = 0; k < depth; k++)
        for (int v = 0; v < tile_vectors; v++) {
            const std::int64_t column = v * Float32::count, left = width - column;
            const float* from = b + k * row + column;
            __builtin_prefetch(from + panel_width);
            Float32::store(panel + k * panel_width + column, left >= Float32::count ? Float32::load(from)
                                                             : left > 0 ? load_first<Float32>(from, int(left))
                                                                        : F32{});
        }
}

// The same of b transposed: element (k, n) is b[n * row + k].
inline void pack_columns(const float* b, std::int64_t row, std::int64_t depth, std::int64_t width, float* panel) {
    constexpr int count = Float32::count;
    for (int column = 0; column < panel_width; column += count)
        for (std::int64_t k = 0; k < depth; k += count) {
            const int deep = int(least(count, depth - k));
            F32 v[count];
            for (int i = 0; i < count; i++) {
                const float* from = b + (column + i) * row + k;
                __builtin_prefetch(from + count * row);
                v[i] = column + i >= width ? F32{}
                       : deep == count     ? Float32::load(from)
                                           : load_first<Float32>(from, deep);
            }
            transpose(v);
            for (int i = 0; i < deep; i++) Float32::store(panel + (k + i) * panel_width + column, v[i]);
        }
}

void pack_panels(const float* weight, Layout layout, std::int64_t N, std::int64_t K, float* panels, std::int64_t first,
                 std::int64_t last) {
    for (std::int64_t p = first; p < last; p++) {
        const std::int64_t column = p * panel_width, width = N - column;
        float* panel = panels + column * K;
        if (layout == Layout::rows)
            pack_columns(weight + column * K, K, K, width, panel);
        else
            pack_rows(weight + column, N, K, width, panel);
    }
}

// of a row
struct Moments {
    float mean, scale;  // 1 / sqrt(variance + eps)
};

inline Moments moments(const float* x, std::int64_t K, float eps) {
    constexpr int count = Float32::count;
    const std::int64_t whole = K - K % count;
    F32 sums{}, squares{};
    float sum = 0, square = 0;
    for (std::int64_t k = 0; k < whole; k += count) sums += Float32::load(x + k);
    for (std::int64_t k = whole; k < K; k++) sum += x[k];
    const float mean = (sum + lane_sum(sums)) / float(K);
    for (std::int64_t k = 0; k < whole; k += count) {
        const F32 centred = Float32::load(x + k) - mean;
        squares += centred * centred;
    }
    for (std::int64_t k = whole; k < K; k++) square += (x[k] - mean) * (x[k] - mean);
    return {mean, 1 / __builtin_sqrtf((square + lane_sum(squares)) / float(K) + eps)};
}

void normalise(const Norm& norm, const float* x, std::int64_t rows, std::int64_t K, float* to) {
    constexpr int count = Float32::count;
    const std::int64_t whole = K - K % count;
    const float* weight = norm.weight;
    for (std::int64_t r = 0; r < rows; r++, x += K, to += K) {
        const auto [mean, scale] = moments(x, K, norm.eps);
        for (std::int64_t k = 0; k < whole; k += count) {
            const F32 y = (Float32::load(x + k) - mean) * scale;
            Float32::store(to + k, weight ? y * Float32::load(weight + k) : y);
        }
        for (std::int64_t k = whole; k < K; k++) to[k] = (x[k] - mean) * scale * (weight ? weight[k] : 1);
    }
}

void norm_sum(float eps, const float* x, std::int64_t rows, std::int64_t K, float* sum) {
    for (std::int64_t k = 0; k < K; k++) sum[k] = 0;
    for (std::int64_t r = 0; r < rows; r++, x += K) {
        const auto [mean, scale] = moments(x, K, eps);
        for (std::int64_t k = 0; k < K; k++) sum[k] += (x[k] - mean) * scale;
    }
}

// Tiles and panels [first, last) of y.
void multiply(const ProductCall& call, void* scratch, const ProductPart& part) {
    const std::int64_t tiles = ceil_div(call.M, tile_rows), steps = at_least_one(ceil_div(call.K, max_depth));
    const auto first_row = [&](std::int64_t tile) { return tile * call.M / tiles; };
    for (std::int64_t block = part.first_tile; block < part.last_tile; block += tiles_in_block) {
        const std::int64_t end = least(block + tiles_in_block, part.last_tile), first = first_row(block);
        const float* x = call.x + first * call.K;
        if (call.norm.applied) {
            normalise(call.norm, x, first_row(end) - first, call.K, static_cast<float*>(scratch));
            x = static_cast<float*>(scratch);
        }
        for (std::int64_t step = 0; step < steps; step++)
            for (std::int64_t panel = part.first_panel; panel < part.last_panel; panel++) {
                const std::int64_t column = panel * panel_width;
                const std::int64_t k = step * call.K / steps, depth = (step + 1) * call.K / steps - k;
                for (std::int64_t tile = block; tile < end; tile++) {
                    const std::int64_t m = first_row(tile), at = m * call.N + column;
                    Tile t = {x + (m - first) * call.K + k, call.K, call.panels + column * call.K + k * panel_width,
                              depth};
                    t.y = call.y + at, t.y_row = call.N, t.width = int(least(panel_width, call.N - column));
                    if (step) {
                        t.plus = t.y, t.plus_row = call.N;
                    } else {
                        t.plus = call.bias ? call.bias + column : nullptr;
                        if (call.residual.x) t.residual.x = call.residual.x + at;
                        if (call.residual.scale) t.residual.scale = call.residual.scale + column;
                    }
                    if (step == steps - 1) {
                        t.star_relu = call.star_relu;
                        if (call.before) t.before = call.before + at;
                    }
                    multiply_part<false>(t, int(first_row(tile + 1) - m));
                }
            }
    }
}

// Tiles and panels [first, last) of grad (N,K) = grad_y (M,N)^T x (M,K).
void weight_gradient(const GradientCall& call, void* scratch, const ProductPart& part) {
    auto* b = static_cast<float*>(scratch);
    const std::int64_t tiles = ceil_div(call.N, tile_rows), steps = at_least_one(ceil_div(call.M, gradient_depth));
    for (std::int64_t step = 0; step < steps; step++)
        for (std::int64_t panel = part.first_panel; panel < part.last_panel; panel++) {
            const std::int64_t m = step * call.M / steps, depth = (step + 1) * call.M / steps - m;
            const std::int64_t column = panel * panel_width;
            const int width = int(least(panel_width, call.K - column));
            pack_rows(call.x + m * call.K + column, call.K, depth, width, b);
            for (std::int64_t tile = part.first_tile; tile < part.last_tile; tile++) {
                const std::int64_t n = tile * call.N / tiles;
                float* grad = call.grad + n * call.K + column;
                Tile t = {call.grad_y + m * call.N + n, call.N, b, depth};
                if (step || call.add) t.plus = grad, t.plus_row = call.K;
                t.y = grad, t.y_row = call.K, t.width = width;
                if (panel + 1 == part.last_panel && step + 1 < steps) t.ahead = depth;
                multiply_part<true>(t, int((tile + 1) * call.N / tiles - n));
            }
        }
}

constexpr ProductKernel product_kernel = {tile_rows,
                                          panel_width,
                                          tiles_in_block * tile_rows,
                                          gradient_depth * panel_width * std::int64_t{sizeof(float)},
                                          pack_panels,
                                          multiply,
                                          weight_gradient,
                                          norm_sum};

}  // namespace
