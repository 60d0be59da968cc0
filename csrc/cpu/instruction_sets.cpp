// The choice of an instruction set, and the driver of StarReLU: its threads and order of sums. Compiled for the
// baseline only.
#include <algorithm>
#include <atomic>
#include <stdexcept>

#include "isa.h"

namespace dfformer {
namespace {

using cpu::Kernels;

std::vector<const Kernels*> supported_kernels() {
    std::vector<const Kernels*> kernels;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        kernels.push_back(&cpu::avx512_kernels);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        kernels.push_back(&cpu::avx2_kernels);
#endif
    kernels.push_back(&cpu::baseline_kernels);
    return kernels;
}

std::atomic<const Kernels*>& active() {
    static std::atomic<const Kernels*> kernels{supported_kernels().front()};
    return kernels;
}

// Elements per chunk. Chunks are the unit of work and of the fixed reduction order: 64 KiB of float32, so that the
// parts of x and y (or grad) stay in L2 and small tensors do not start threads.
constexpr std::int64_t chunk = 16384;

}  // namespace

ScalarGrads cpu::sum(const std::vector<ScalarGrads>& terms) {
    ScalarGrads total{};
    for (const auto& [scale, bias] : terms) total = {total[0] + scale, total[1] + bias};
    return total;
}

const Kernels& cpu::active_kernels() { return *active().load(); }

std::vector<std::string> supported_isas() {
    std::vector<std::string> names;
    for (const Kernels* kernels : supported_kernels()) names.emplace_back(kernels->isa);
    return names;
}

std::string active_isa() { return active().load()->isa; }

void set_active_isa(const std::string& name) {
    for (const Kernels* kernels : supported_kernels())
        if (name == kernels->isa) {
            active() = kernels;
            return;
        }
    std::string accepted;
    for (const std::string& isa : supported_isas()) accepted += (accepted.empty() ? "" : ", ") + isa;
    throw std::invalid_argument("isa: expected what this machine runs, " + accepted + ", got '" + name + "'");
}

ScalarGrads star_relu(const StarReLUTensors& tensors, std::int64_t n, DType dtype, double scale, double bias,
                      int threads) {
    const auto& kernel = cpu::active_kernels().star_relu[static_cast<int>(dtype)];
    const std::int64_t chunks = (n + chunk - 1) / chunk;
    std::vector<ScalarGrads> partial(tensors.grad_y ? chunks : 0);
    [[maybe_unused]] const int used = static_cast<int>(std::min<std::int64_t>(threads, chunks));
#pragma omp parallel for schedule(static) num_threads(used) if (used > 1)
    for (std::int64_t c = 0; c < chunks; c++) {
        const std::int64_t first = c * chunk, last = std::min(n, first + chunk);
        if (tensors.grad_y)
            kernel.backward(tensors, first, last, scale, partial[c].data());
        else
            kernel.forward(tensors, first, last, scale, bias);
    }
    return cpu::sum(partial);
}

}  // namespace dfformer
