// What one instruction set's translation unit provides to the drivers (dispatch.cpp, filter.cpp).
//
// Every isa_*.cpp compiles the same kernel source inside an anonymous namespace. The kernels use no std:: templates:
// an inline std function instantiated under a wider target would be a weak symbol that the linker may hand to a
// narrower one, and crash older machines.
#pragma once

#include <cstdint>

#include "../dynamic_filter.h"

namespace dfformer::cpu {

// Serial kernels over one run of elements; the driver owns threads and the order of reductions.
struct StarReLUKernel {
    void (*forward)(const void* x, void* y, std::int64_t n, double scale, double bias);
    // sums[0] = sum(grad_y * relu(x)^2), sums[1] = sum(grad_y); grad_x may be null.
    void (*backward)(const void* grad_y, const void* x, void* grad_x, std::int64_t n, double scale, double* sums);
};

// One call of a filter step as the kernels see it. The unit of work is a plane: a block of neighbouring channels, one
// per SIMD lane, of one sample.
struct FilterCall {
    const FilterProblem* problem;
    const FilterTensors* tensors;
    const void* row_plan;     // Plan<T> of length W, T the arithmetic type
    const void* column_plan;  // Plan<T> of length H
    std::int64_t channel_blocks;
    std::int64_t row_stride;  // complex lanes from one pair of rows to the next in a plane's workspace
    void* basis;              // a dynamic filter's, as `arrange_basis` lays it out
    void* slots;              // backward: partial sums of a basis' gradient, as the kernel lays them out
    std::int64_t num_slots;
};

struct PlaneTask {
    std::int64_t sample, channel_block;
    std::int64_t slot;   // backward: where it adds its part of grad_filters,
    bool first_of_slot;  // or, being the first, puts it
    void* workspace;
};

// Planes of neighbouring channel blocks that go through the steps together, so that those that touch tensors take a
// pixel's neighbouring cache lines one after the other.
struct PlaneGroup {
    static constexpr int max_count = 8;
    int count;
    PlaneTask tasks[max_count];
};

struct FilterWorkspace {
    std::int64_t plane_bytes;    // of a plane in progress
    std::int64_t scratch_bytes;  // of a thread
    std::int64_t slot_bytes;     // of a partial sum of a basis' gradient; 0 where that is not needed
    std::int64_t basis_bytes;    // of a dynamic filter's basis
};

// A group's steps in order. Those with a range [first, last) of row pairs or of columns may run on several threads,
// each with its own scratch, as long as all of one step are done before the next begins.
struct FilterKernel {
    FilterWorkspace (*workspace)(const FilterCall&);
    // Columns [first, last) of the basis, from (H,K,F,2) to the order in which columns use it. Before everything else.
    void (*arrange_basis)(const FilterCall&, int first, int last);
    void (*begin)(const FilterCall&, const PlaneTask&);
    void (*rows)(const FilterCall&, const PlaneGroup&, void* scratch, int first, int last);
    void (*columns)(const FilterCall&, const PlaneGroup&, void* scratch, int first, int last);
    void (*inverse_rows)(const FilterCall&, const PlaneGroup&, void* scratch, int first, int last);
    // star_relu_sums: this plane's part of StarReLU's two gradients
    void (*end)(const FilterCall&, const PlaneTask&, double* star_relu_sums);
    // rows [first, last) of a basis' gradient from the slots
    void (*sum_slots)(const FilterCall&, int first, int last);
};

// y (M,N) = norm(x) (M,K) W^T + bias (N) + residual, W (N,K) being packed; then, if asked for, before = y and
// y = star_relu(y).
struct ProductCall {
    std::int64_t M, N, K;
    const float* x;
    Norm norm;
    const float* panels;
    const float* bias;  // null for zero
    Residual residual;
    float* y;
    const float* star_relu;  // its scale and bias; null for none
    float* before;           // null for nowhere
};

// grad (N,K) = grad_y (M,N)^T x (M,K), or added to what is there.
struct GradientCall {
    std::int64_t M, N, K;
    const float* grad_y;
    const float* x;
    float* grad;
    bool add;
};

// A rectangle of a product: tiles of its rows, panels of its columns.
struct ProductPart {
    std::int64_t first_tile, last_tile, first_panel, last_panel;
};

struct ProductKernel {
    int tile_rows;               // at most, of a tile: rows are dealt out evenly
    int panel_width;             // columns of a panel, the last one padded with zeros
    int block_rows;              // that are normalised together, into a thread's scratch
    std::int64_t scratch_bytes;  // of a thread, for weight_gradient
    // Panels [first, last) of a weight (N,K), stored as rows or columns.
    void (*pack)(const float* weight, Layout layout, std::int64_t N, std::int64_t K, float* panels, std::int64_t first,
                 std::int64_t last);
    void (*multiply)(const ProductCall&, void* scratch, const ProductPart&);
    void (*weight_gradient)(const GradientCall&, void* scratch, const ProductPart&);
    // sum (K) of rows (rows,K), each normalised
    void (*norm_sum)(float eps, const float* x, std::int64_t rows, std::int64_t K, float* sum);
};

struct Kernels {
    const char* isa;
    int vector_bytes;
    StarReLUKernel star_relu[num_dtypes];  // indexed by DType
    FilterKernel filter[num_dtypes];
    ProductKernel product;
};

extern const Kernels baseline_kernels;  // SSE2 on x86-64, NEON on aarch64
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
#endif

const Kernels& active_kernels();

}  // namespace dfformer::cpu
