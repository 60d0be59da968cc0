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

// y (rows, panel_width) = a (rows, depth) * b (depth, panel_width) + plus; a's element (r, k) is a[r * a_row + k] or,
// of a transposed matrix, a[r + k * a_row].
struct Tile {
    const float* a;
    std::int64_t a_row;
    const float* b;
    std::int64_t depth;
    const float* plus;  // null for zero
    std::int64_t plus_row;
    float* y;
    std::int64_t y_row;
    int width;  // of y and plus, where they end within the panel
};

// Loops over a tile are unrolled, or the sums would not be registers.
#define UNROLL _Pragma("GCC unroll 8")

template <int rows, bool transposed>
void multiply_tile(const Tile& t) {
    F32 sums[rows][tile_vectors];
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < tile_vectors; v++) sums[r][v] = F32{};
    for (std::int64_t k = 0; k < t.depth; k++) {
        F32 b[tile_vectors];
        UNROLL for (int v = 0; v < tile_vectors; v++) b[v] = Float32::load(t.b + k * panel_width + v * Float32::count);
        UNROLL for (int r = 0; r < rows; r++) {
            const F32 a = (transposed ? t.a[r + k * t.a_row] : t.a[r * t.a_row + k]) - F32{};
            UNROLL for (int v = 0; v < tile_vectors; v++) sums[r][v] += a * b[v];
        }
    }
    float edge[rows][panel_width];
    const bool whole = t.width == panel_width;
    float* y = whole ? t.y : edge[0];
    const std::int64_t y_row = whole ? t.y_row : panel_width;
    const auto add = [&](int r, int v) {
        return sums[r][v] + Float32::load(t.plus + r * t.plus_row + v * Float32::count);
    };
    if (whole && t.plus) {
        UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < tile_vectors; v++)
            Float32::store(y + r * y_row + v * Float32::count, add(r, v));
        return;
    }
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < tile_vectors; v++)
        Float32::store(y + r * y_row + v * Float32::count, sums[r][v]);
    if (whole) return;
    for (int r = 0; r < rows; r++)
        for (int n = 0; n < t.width; n++) t.y[r * t.y_row + n] = edge[r][n] + (t.plus ? t.plus[r * t.plus_row + n] : 0);
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

// activated = star_relu(y), of a panel's columns.
void activate(const ProductCall& call, std::int64_t first_row, std::int64_t last_row, std::int64_t column) {
    const F32 scale = F32{} + call.scale, bias = F32{} + call.bias;
    for (std::int64_t m = first_row; m < last_row; m++) {
        const float* y = call.y + m * call.N;
        float* activated = call.activated + m * call.N;
        for (std::int64_t n = column; n < least(column + panel_width, call.N); n += Float32::count) {
            const int left = int(least(call.N - n, Float32::count));
            const bool whole = left == Float32::count;
            const F32 in = whole ? Float32::load(y + n) : load_first<Float32>(y + n, left);
            const F32 out = StarReLU<Float32>::forward_lane(in, scale, bias);
            whole ? Float32::store(activated + n, out) : store_first<Float32>(activated + n, out, left);
        }
    }
}

// Tiles and panels [first, last) of y.
void multiply(const ProductCall& call, const ProductPart& part) {
    const std::int64_t tiles = ceil_div(call.M, tile_rows), steps = at_least_one(ceil_div(call.K, max_depth));
    const auto first_row = [&](std::int64_t tile) { return tile * call.M / tiles; };
    for (std::int64_t block = part.first_tile; block < part.last_tile; block += tiles_in_block)
        for (std::int64_t step = 0; step < steps; step++)
            for (std::int64_t panel = part.first_panel; panel < part.last_panel; panel++) {
                const std::int64_t end = least(block + tiles_in_block, part.last_tile), column = panel * panel_width;
                const std::int64_t k = step * call.K / steps, depth = (step + 1) * call.K / steps - k;
                const float* b = call.panels + column * call.K + k * panel_width;
                const int width = int(least(panel_width, call.N - column));
                for (std::int64_t tile = block; tile < end; tile++) {
                    const std::int64_t m = first_row(tile);
                    float* y = call.y + m * call.N + column;
                    const float* plus = step ? y : call.plus ? call.plus + column : nullptr;
                    const std::int64_t plus_row = step ? call.N : 0;
                    multiply_rows<false>({call.x + m * call.K + k, call.K, b, depth, plus, plus_row, y, call.N, width},
                                         int(first_row(tile + 1) - m));
                }
                if (call.activated && step == steps - 1) activate(call, first_row(block), first_row(end), column);
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
                const float* plus = step || call.add ? grad : nullptr;
                multiply_rows<true>({call.grad_y + m * call.N + n, call.N, b, depth, plus, call.K, grad, call.K, width},
                                    int((tile + 1) * call.N / tiles - n));
            }
        }
}

constexpr ProductKernel product_kernel = {
    tile_rows,   panel_width, gradient_depth * panel_width * std::int64_t{sizeof(float)},
    pack_panels, multiply,    weight_gradient};

}  // namespace
