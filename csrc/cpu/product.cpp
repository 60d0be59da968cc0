// Drives matrix products: workspace, threads, and which part of a result each computes. Compiled for the baseline only.
#include <algorithm>
#include <utility>

#include "isa.h"
#include "workspace.h"

namespace dfformer {
namespace {

using namespace cpu;

// Below this many multiplications for each, threads cost more than they bring.
constexpr std::int64_t min_work_per_thread = 1 << 19;
// Hidden activations of an MLP on one thread stay in its L2 cache, with panels of the weights.
constexpr std::int64_t hidden_bytes_per_thread = 384 * 1024, min_rows_per_thread = 48;
// Rows that are added up in float32.
constexpr std::int64_t rows_in_slice = 256;

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

int threads_for(std::int64_t M, std::int64_t N, std::int64_t K, int threads) {
    // Packing a weight takes as long as a few rows do.
    const double work =
        static_cast<double>(std::max<std::int64_t>(M, 8)) * static_cast<double>(N) * static_cast<double>(K);
    return static_cast<int>(std::clamp(work / min_work_per_thread, 1.0, static_cast<double>(threads)));
}

// A result of so many tiles of rows and panels of columns, dealt out in equal rectangles: whole rows where there are
// enough, for the caches' sake.
class Parts {
  public:
    Parts(std::int64_t tiles, std::int64_t panels, int threads) : tiles_(tiles), panels_(panels), rows_(threads) {
        std::int64_t best = 0;
        for (int rows = threads; rows >= 1; rows--) {
            if (threads % rows) continue;
            const std::int64_t largest = ceil_div(tiles, rows) * ceil_div(panels, threads / rows);
            if (best && largest >= best) continue;
            best = largest;
            rows_ = rows;
            columns_ = threads / rows;
        }
    }
    ProductPart operator[](int i) const {
        const int row = i / columns_, column = i % columns_;
        return {row * tiles_ / rows_, (row + 1) * tiles_ / rows_, column * panels_ / columns_,
                (column + 1) * panels_ / columns_};
    }

  private:
    std::int64_t tiles_, panels_;
    int rows_, columns_ = 1;
};

// As many bytes for each thread.
class Scratch {
  public:
    Scratch(std::int64_t bytes, int threads) : bytes_(padded(bytes)), memory_(allocate(bytes_ * threads)) {}
    char* operator[](int thread) const { return memory_.get() + thread * bytes_; }

  private:
    std::int64_t bytes_;
    Memory memory_;
};

// For the rows that a product normalises.
Scratch row_scratch(const Norm& norm, std::int64_t K, int threads) {
    const std::int64_t row_bytes = K * std::int64_t{sizeof(float)};
    return {norm.applied ? active_kernels().product.block_rows * row_bytes : 0, threads};
}

// A weight as panels: packed here unless it came so. Its steps are called by all threads of a parallel region.
class Weight {
  public:
    Weight(const float* weight, Layout layout, std::int64_t N, std::int64_t K)
        : weight_(weight), layout_(layout), N_(N), K_(K), panels_(ceil_div(N, kernel_.panel_width)) {
        if (layout != Layout::panels)
            memory_ = allocate(padded(panels_ * kernel_.panel_width * K * std::int64_t{sizeof(float)}));
    }
    void pack() const {
        if (layout_ == Layout::panels) return;
#pragma omp for schedule(static)
        for (std::int64_t panel = 0; panel < panels_; panel++)
            kernel_.pack(weight_, layout_, N_, K_, packed(), panel, panel + 1);
    }
    // The call's y, by so many threads.
    void multiply(ProductCall call, const Scratch& scratch, int threads) const {
        call.panels = layout_ == Layout::panels ? weight_ : packed();
        const Parts parts(ceil_div(call.M, kernel_.tile_rows), panels_, threads);
#pragma omp for schedule(static)
        for (int i = 0; i < threads; i++) kernel_.multiply(call, scratch[i], parts[i]);
    }
    // The same by one thread alone.
    void multiply_alone(ProductCall call, const Scratch& scratch, int thread) const {
        call.panels = layout_ == Layout::panels ? weight_ : packed();
        kernel_.multiply(call, scratch[thread], {0, ceil_div(call.M, kernel_.tile_rows), 0, panels_});
    }

  private:
    float* packed() const { return reinterpret_cast<float*>(memory_.get()); }

    const ProductKernel& kernel_ = active_kernels().product;
    const float* weight_;
    Layout layout_;
    std::int64_t N_, K_, panels_;
    Memory memory_;
};

}  // namespace

int panel_width() { return active_kernels().product.panel_width; }

void pack(const float* weight, std::int64_t N, std::int64_t K, float* panels, int threads) {
    const ProductKernel& kernel = active_kernels().product;
    const std::int64_t count = ceil_div(N, kernel.panel_width);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (std::int64_t panel = 0; panel < count; panel++)
        kernel.pack(weight, Layout::rows, N, K, panels, panel, panel + 1);
}

void product(const Product& problem, int threads) {
    const auto [M, N, K, x, norm, stored, layout, bias, residual, y] = problem;
    const int used = threads_for(M, N, K, threads);
    const Weight weight(stored, layout, N, K);
    const Scratch rows = row_scratch(norm, K, used);
    const ProductCall call{M, N, K, x, norm, nullptr, bias, residual, y, nullptr, nullptr};
#pragma omp parallel num_threads(used) if (used > 1)
    {
        weight.pack();
        weight.multiply(call, rows, used);
    }
}

void weight_gradient(const WeightGradient& problem, int threads) {
    const auto [M, N, K, grad_y, x, grad, add] = problem;
    const ProductKernel& kernel = active_kernels().product;
    const int used = threads_for(M, N, K, threads);
    const Parts parts(ceil_div(N, kernel.tile_rows), ceil_div(K, kernel.panel_width), used);
    const Scratch scratch(kernel.scratch_bytes, used);
    const GradientCall call{M, N, K, grad_y, x, grad, add};
#pragma omp parallel for schedule(static) num_threads(used) if (used > 1)
    for (int i = 0; i < used; i++) kernel.weight_gradient(call, scratch[i], parts[i]);
}

void mlp(const Mlp& problem, int threads) {
    const auto [M, N, K, hidden, x, norm, stored1, scale, bias, stored2, layout, bias2, residual, before, y] = problem;
    const int used = threads_for(M, hidden, K + N, threads);
    const Weight weight1(stored1, layout, hidden, K), weight2(stored2, layout, N, hidden);
    const float star_relu[] = {scale, bias};
    const std::int64_t row_bytes = std::max<std::int64_t>(hidden, 1) * std::int64_t{sizeof(float)};
    const std::int64_t rows_in_chunk = std::max<std::int64_t>(hidden_bytes_per_thread / row_bytes, min_rows_per_thread);
    // Few rows are one chunk, shared by all threads. Of many, each thread has chunks of its own.
    const bool shared = M < used * min_rows_per_thread;
    const std::int64_t chunks = shared ? 1 : ceil_div(ceil_div(M, rows_in_chunk), used) * used;
    const Scratch activated(ceil_div(M, chunks) * row_bytes, shared ? 1 : used);
    const Scratch rows = row_scratch(norm, K, used);
    const auto calls = [&](std::int64_t chunk, int thread) {
        const std::int64_t m = chunk * M / chunks, count = (chunk + 1) * M / chunks - m;
        auto* const h = reinterpret_cast<float*>(activated[thread]);
        const Residual added{residual.x ? residual.x + m * N : nullptr, residual.scale};
        return std::pair{ProductCall{count,
                                     hidden,
                                     K,
                                     x + m * K,
                                     norm,
                                     nullptr,
                                     nullptr,
                                     {},
                                     h,
                                     star_relu,
                                     before ? before + m * hidden : nullptr},
                         ProductCall{count, N, hidden, h, {}, nullptr, bias2, added, y + m * N, nullptr, nullptr}};
    };
#pragma omp parallel num_threads(used) if (used > 1)
    {
        weight1.pack();
        weight2.pack();
        if (shared) {
            const auto [first, second] = calls(0, 0);
            weight1.multiply(first, rows, used);
            weight2.multiply(second, rows, used);
        } else {
#pragma omp for schedule(static)
            for (int thread = 0; thread < used; thread++)
                for (std::int64_t chunk = thread * chunks / used; chunk < (thread + 1) * chunks / used; chunk++) {
                    const auto [first, second] = calls(chunk, thread);
                    weight1.multiply_alone(first, rows, thread);
                    weight2.multiply_alone(second, rows, thread);
                }
        }
    }
}

void norm_mean(const NormMean& problem, int threads) {
    const auto [B, P, K, x, norm, y] = problem;
    const ProductKernel& kernel = active_kernels().product;
    const std::int64_t slices = std::max<std::int64_t>(ceil_div(P, rows_in_slice), 1);
    const Scratch sums(B * slices * K * std::int64_t{sizeof(float)}, 1);
    auto* const sum = reinterpret_cast<float*>(sums[0]);
    const int used = threads_for(B, P, K, threads);
#pragma omp parallel for schedule(static) num_threads(used) if (used > 1)
    for (int thread = 0; thread < used; thread++)
        for (std::int64_t i = thread * (B * slices) / used; i < (thread + 1) * (B * slices) / used; i++) {
            const std::int64_t slice = i % slices, first = slice * P / slices, last = (slice + 1) * P / slices;
            kernel.norm_sum(norm.eps, x + (i / slices * P + first) * K, last - first, K, sum + i * K);
        }
    for (std::int64_t i = 0; i < B * K; i++) {
        double total = 0;
        for (std::int64_t slice = 0; slice < slices; slice++) total += sum[(i / K * slices + slice) * K + i % K];
        y[i] = static_cast<float>(total / static_cast<double>(P)) * (norm.weight ? norm.weight[i % K] : 1);
    }
}

}  // namespace dfformer
