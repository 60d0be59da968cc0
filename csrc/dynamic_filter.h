// The compiled core's contract: what bindings.cpp may call, and nothing else but cuda/cufft.h.
//
// Tensors arrive as raw pointers to dense memory in the layouts given below; the caller (dfformer_kernels/backends/cpu.py) owns
// device, dtype and contiguity checks, bindings.cpp owns range checks. No torch and no CUDA headers anywhere in csrc/.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace dfformer {

// Storage types. Arithmetic is float32 for the 16- and 32-bit types and float64 for float64.
enum class DType : int { float32, float64, bfloat16, float16 };
inline constexpr int num_dtypes = 4;
inline constexpr std::int64_t item_size[num_dtypes] = {4, 8, 2, 2};

// Instruction sets this machine can run, best first. The last entry is the one every machine can run.
std::vector<std::string> supported_isas();
std::string active_isa();
// Throws std::invalid_argument unless `name` is one of supported_isas().
void set_active_isa(const std::string& name);

// y = scale * relu(x)^2 + bias over n elements. y may be x; otherwise they must not overlap.
void star_relu(const void* x, void* y, std::int64_t n, DType dtype, double scale, double bias, int threads);

struct StarReLUScalarGrads {
    double scale;
    double bias;
};

// grad_x = 2 * scale * relu(x) * grad_y;  grad_scale = sum(grad_y * relu(x)^2);  grad_bias = sum(grad_y)
// grad_x may be null when it is not needed, and may be grad_y. The two sums are reduced in a fixed order: the same bits
// for any `threads`.
StarReLUScalarGrads star_relu_backward(const void* grad_y, const void* x, void* grad_x, std::int64_t n, DType dtype,
                                       double scale, int threads);

// A filter step on x (B,H,W,C): y = irfft2(rfft2(u) * M), u = star_relu(x) or x. The filter M is mixed from a basis
// (H,K,F,2) by softmax(logits), K = W/2 + 1, or, where F = 0, is the weight (H,K,C,2) itself.
struct FilterProblem {
    std::int64_t B, H, W, C, F;
    DType dtype;
    bool star_relu;
    double scale, bias;  // StarReLU's, where it is part of the step
};

// Dense tensors of x's dtype, or (logits, filters and their gradients) of its arithmetic type.
struct FilterTensors {
    const void* x;
    const void* logits;   // (B,F,C); null where F = 0
    const void* filters;  // basis or weight
    void* y;              // forward only
    // Backward only; a null gradient is not computed.
    const void* grad_y;
    void* grad_x;
    void* grad_logits;
    void* grad_filters;
    bool need_scalars;  // StarReLU's gradients
};

// Both throw std::bad_alloc if the workspace cannot be had.
void filter(const FilterProblem& problem, const FilterTensors& tensors, int threads);
// Reductions have a fixed order: the same bits for any `threads`.
StarReLUScalarGrads filter_backward(const FilterProblem& problem, const FilterTensors& tensors, int threads);

// Bytes that one of these calls allocates beside its tensors, whatever they hold.
std::int64_t filter_workspace(const FilterProblem& problem, bool backward, int threads);

// Products of dense float32 matrices. All sums have a fixed order: the same bits for any `threads`; and all throw
// std::bad_alloc if the workspace cannot be had.

// How a weight (N,K) lies in memory: as that, as (K,N), or as (panels,K,width) of `pack`.
enum class Layout : int { rows, columns, panels };
inline constexpr int num_layouts = 3;

// Columns of a panel for the active instruction set. Panels of one width are of no use to another.
int panel_width();
// A weight (N,K) as ceil(N / panel_width()) panels (K,width) of its columns transposed, the last one padded with zeros:
// what every product makes of its weight first.
void pack(const float* weight, std::int64_t N, std::int64_t K, float* panels, int threads);

// Layer norm of rows, without bias: (row - mean) / sqrt(variance + eps) * weight.
struct Norm {
    bool applied;
    const float* weight;  // null for ones
    float eps;
};

// What is added to a result (M,N): x (M,N) * scale (N).
struct Residual {
    const float* x;      // null for nothing
    const float* scale;  // null for ones
};

// y (M,N) = norm(x) (M,K) W^T + bias + residual; bias (N) may be null.
struct Product {
    std::int64_t M, N, K;
    const float* x;
    Norm norm;
    const float* weight;
    Layout layout;
    const float* bias;
    Residual residual;
    float* y;
};
void product(const Product& problem, int threads);

// grad (N,K) = grad_y (M,N)^T x (M,K), or added to what is there.
struct WeightGradient {
    std::int64_t M, N, K;
    const float* grad_y;
    const float* x;
    float* grad;
    bool add;
};
void weight_gradient(const WeightGradient& problem, int threads);

// y (M,N) = star_relu(norm(x) (M,K) W1^T) W2^T + bias2 + residual, W1 being (hidden,K) and W2 (N,hidden), both rows or
// both panels. What StarReLU is applied to is kept in `before` (M,hidden), which may be null: then no more than a few
// rows of it exist at a time.
struct Mlp {
    std::int64_t M, N, K, hidden;
    const float* x;
    Norm norm;
    const float* weight1;
    float scale, bias;
    const float* weight2;
    Layout layout;
    const float* bias2;  // (N), may be null
    Residual residual;
    float* before;
    float* y;
};
void mlp(const Mlp& problem, int threads);

// y (B,K) = the mean over P of norm(x), x being (B,P,K).
struct NormMean {
    std::int64_t B, P, K;
    const float* x;
    Norm norm;
    float* y;
};
void norm_mean(const NormMean& problem, int threads);

}  // namespace dfformer
