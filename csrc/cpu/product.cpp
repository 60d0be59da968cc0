// Drives matrix products: workspace, threads, and which part of a result each computes. Compiled for the baseline only.
#include <algorithm>

#include "isa.h"
#include "workspace.h"

namespace dfformer {
namespace {

using namespace cpu;

// Below this many multiplications for each, threads cost more than they bring.
constexpr std::int64_t min_work_per_thread = 1 << 19;
// Hidden activations of an MLP on one thread stay in its L2 cache, with panels of the weights.
constexpr std::int64_t hidden_bytes_per_thread = 384 * 1024, min_rows_per_thread = 48;

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

int threads_for(std::int64_t M, std::int64_t N, std::int64_t K, int threads) {
    const double work = static_cast<double>(M) * static_cast<double>(N) * static_cast<double>(K);
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
    void multiply(ProductCall call, int threads) const {
        call.panels = layout_ == Layout::panels ? weight_ : packed();
        const Parts parts(ceil_div(call.M, kernel_.tile_rows), panels_, threads);
#pragma omp for schedule(static)
        for (int i = 0; i < threads; i++) kernel_.multiply(call, parts[i]);
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
    const auto [M, N, K, x, stored, layout, bias, y] = problem;
    const int used = threads_for(M, N, K, threads);
    const Weight weight(stored, layout, N, K);
    const ProductCall call{M, N, K, x, nullptr, bias, y, nullptr, 0, 0};
#pragma omp parallel num_threads(used) if (used > 1)
    {
        weight.pack();
        weight.multiply(call, used);
    }
}

void weight_gradient(const WeightGradient& problem, int threads) {
    const auto [M, N, K, grad_y, x, grad, add] = problem;
    const ProductKernel& kernel = active_kernels().product;
    const int used = threads_for(M, N, K, threads);
    const Parts parts(ceil_div(N, kernel.tile_rows), ceil_div(K, kernel.panel_width), used);
    const std::int64_t scratch_bytes = padded(kernel.scratch_bytes);
    const Memory scratch = allocate(used * scratch_bytes);
    const GradientCall call{M, N, K, grad_y, x, grad, add};
#pragma omp parallel for schedule(static) num_threads(used) if (used > 1)
    for (int i = 0; i < used; i++) kernel.weight_gradient(call, scratch.get() + i * scratch_bytes, parts[i]);
}

void mlp(const Mlp& problem, int threads) {
    const auto [M, N, K, hidden, x, stored1, scale, bias, stored2, layout, bias2, before, y] = problem;
    const int used = threads_for(M, hidden, K + N, threads);
    const Weight weight1(stored1, layout, hidden, K), weight2(stored2, layout, N, hidden);
    const std::int64_t row_bytes = std::max<std::int64_t>(hidden, 1) * std::int64_t{sizeof(float)};
    const std::int64_t rows_per_thread =
        std::max<std::int64_t>(hidden_bytes_per_thread / row_bytes, min_rows_per_thread);
    const std::int64_t chunks = std::max<std::int64_t>(ceil_div(M, rows_per_thread * used), 1);
    const Memory memory = allocate(padded(ceil_div(M, chunks) * row_bytes));
    auto* const activated = reinterpret_cast<float*>(memory.get());
#pragma omp parallel num_threads(used) if (used > 1)
    {
        weight1.pack();
        weight2.pack();
        for (std::int64_t chunk = 0; chunk < chunks; chunk++) {
            const std::int64_t m = chunk * M / chunks, rows = (chunk + 1) * M / chunks - m;
            float* const h = before ? before + m * hidden : activated;
            weight1.multiply({rows, hidden, K, x + m * K, nullptr, nullptr, h, activated, scale, bias}, used);
            weight2.multiply({rows, N, hidden, activated, nullptr, bias2, y + m * N, nullptr, 0, 0}, used);
        }
    }
}

}  // namespace dfformer
