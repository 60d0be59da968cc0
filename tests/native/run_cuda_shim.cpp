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
    const Tensors<Block, Storage, DIRECTION> t(std::atoll(arguments[1]), std::atoll(arguments[2]),
                                               std::atoi(arguments[3]), arguments[5]);
    missing_barrier = std::atoi(arguments[4]);
    gridDim.x = unsigned(t.grid);
    std::vector<float2> spectra(Block::in_turn ? t.grid * Block::spectrum_size : 0);
    for (unsigned block = 0; block < gridDim.x; block++) {
        std::memset(shared, 0xff, sizeof shared);
        std::barrier<> all(THREADS);
        block_barrier = &all;
        std::vector<std::thread> threads;
        for (unsigned thread = 0; thread < THREADS; thread++)
            threads.emplace_back([&, block, thread] {
                blockIdx.x = block;
                threadIdx.x = thread;
#if DIRECTION == 0
                filter_forward(t.x.data(), t.y.data(), t.logits.data(), t.filters.data(), t.scale.data(), t.bias.data(),
                               Block::channel_blocks);
#else
                filter_backward(t.grad_y.data(), t.x.data(), t.logits.data(), t.filters.data(), t.scale.data(),
                                t.bias.data(), t.y.data(), t.grad_logits.data(), t.filter_slots.data(),
                                t.star_relu_slots.data(), spectra.data(), t.B);
#endif
            });
        for (std::thread& thread : threads) thread.join();
    }
    t.write(arguments[6]);
}
