// The compiled core's interface.
//
// Tensors are raw pointers to contiguous memory. Their device, dtype and layout are checked by the caller
// (dfformer_kernels/backend/cpu.py), sizes and ranges by bindings.cpp. csrc/ includes no header of torch or CUDA.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace dfformer {

// Storage types. Arithmetic is float32 for the 16- and 32-bit types and float64 for float64.
enum class DType : int { float32, float64, bfloat16, float16 };
inline constexpr int num_dtypes = 4;
inline constexpr std::int64_t item_size[num_dtypes] = {4, 8, 2, 2};

// Instruction sets this machine can run, best first. Every machine can run the last one.
std::vector<std::string> supported_isas();
std::string active_isa();
// Throws std::invalid_argument unless `name` is one of supported_isas().
void set_active_isa(const std::string& name);

// StarReLU's grad_scale and grad_bias.
using ScalarGrads = std::array<double, 2>;

// Of n elements each. y may be x, and grad_x may be grad_y or null; otherwise they must not overlap.
struct StarReLUTensors {
    const void* x;
    void* y;
    const void* grad_y;  // null: forward
    void* grad_x;
};

// Forward:  y = scale * relu(x)^2 + bias
// Backward: grad_x = 2 * scale * relu(x) * grad_y;  grad_scale = sum(grad_y * relu(x)^2);  grad_bias = sum(grad_y)
// The sums are reduced in a fixed order: the same bits for any `threads`.
ScalarGrads star_relu(const StarReLUTensors& tensors, std::int64_t n, DType dtype, double scale, double bias,
                      int threads);

// The filter step on x (B,H,W,C), or (B,C,H,W) if channels_first: y = irfft2(rfft2(u) * M), u = star_relu(x) or x,
// K = W/2 + 1. M is softmax(logits), or the logits themselves, times a basis (H,K,F,2). If F = 0 it is a weight
// (H,K,C,2), or (B,H,K,C,2) if each sample has its own.
struct FilterProblem {
    std::int64_t B, H, W, C, F;
    DType dtype;
    bool star_relu;
    double scale, bias;  // of StarReLU
    bool softmax = true, weight_per_sample = false, channels_first = false;
};

// x, y and their gradients have the problem's dtype and format; logits, filters and their gradients its arithmetic
// type.
struct FilterTensors {
    const void* x;
    const void* logits;   // (B,F,C); null if F = 0
    const void* filters;  // basis or weight
    void* y;              // forward only
    const void* grad_y;   // null: forward. Of the backward, gradients that are null are not computed.
    void* grad_x;
    void* grad_logits;
    void* grad_filters;
    bool need_scalars;  // whether to compute StarReLU's gradients
};

// Forward or backward. Reductions are done in a fixed order: the same bits for any `threads`. Throws std::bad_alloc if
// the workspace cannot be allocated.
ScalarGrads filter(const FilterProblem& problem, const FilterTensors& tensors, int threads);

// Bytes of workspace that the same call of `filter` allocates. Does not access the tensors' memory.
std::int64_t filter_workspace(const FilterProblem& problem, const FilterTensors& tensors, int threads);

}  // namespace dfformer
