// Runs dynamic_filter.cu itself, compiled for a host with the macros it is specialised by, one host thread for every
// CUDA thread; for sanitizers.
//
//   run_cuda_shim B GRID WANTED MISSING_BARRIER INPUTS OUTPUTS
#include <thread>
#include <vector>

#include "cuda_shim.h"

#include "dynamic_filter.cu"

#include "cuda_tensors.h"

__align__(16) float2 shared[SHARED_BYTES / sizeof(float2)];

int main(int, char** arguments) {
    const Tensors<CtaLayout, Storage, DIRECTION> t(std::atoll(arguments[1]), std::atoll(arguments[2]),
                                                   std::atoi(arguments[3]), arguments[5]);
    missing_barrier = std::atoi(arguments[4]);
    gridDim.x = unsigned(t.grid);
    std::vector<float2> kept(CtaLayout::one_spectrum ? t.grid * CtaLayout::kept_size : 0);
    for (unsigned cta = 0; cta < gridDim.x; cta++) {
        std::memset(shared, 0xff, sizeof shared);
        std::barrier<> all(THREADS);
        cta_barrier = &all;
        std::vector<std::thread> threads;
        for (unsigned thread = 0; thread < THREADS; thread++)
            threads.emplace_back([&, cta, thread] {
                blockIdx.x = cta;
                threadIdx.x = thread;
#if DIRECTION == 0
                filter_forward(t.x.data(), t.y.data(), t.logits.data(), t.filters.data(), t.scale.data(), t.bias.data(),
                               CtaLayout::items_per_sample);
#else
                filter_backward(t.grad_y.data(), t.x.data(), t.logits.data(), t.filters.data(), t.scale.data(),
                                t.bias.data(), t.y.data(), t.grad_logits.data(), t.filter_slots.data(),
                                t.star_relu_slots.data(), kept.data(), t.B);
#endif
            });
        for (std::thread& thread : threads) thread.join();
    }
    t.write(arguments[6]);
}
