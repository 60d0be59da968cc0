// dynamic_filter.cu compiled for a host as a library, one host thread for every CUDA thread of a CTA: for the Python
// code that launches it. `launch` takes what cuLaunchKernel does.
#include <thread>
#include <vector>

#include "cuda_shim.h"

#include "dynamic_filter.cu"

#include "cuda_tensors.h"

__align__(16) float2 shared[SHARED_BYTES / sizeof(float2)];

// The value at an address, as whatever type the kernel's parameter has.
struct Argument {
    void* address;

    template <class T>
    operator T() const {
        return *static_cast<T*>(address);
    }
};

extern "C" void launch(unsigned ctas, unsigned shared_bytes, Argument* a) {
    if (shared_bytes != SHARED_BYTES) std::abort();
    gridDim.x = ctas;
    for (unsigned cta = 0; cta < ctas; cta++) {
        std::memset(shared, 0xff, sizeof shared);
        std::barrier<> all(THREADS);
        cta_barrier = &all;
        std::vector<std::thread> threads;
        for (unsigned thread = 0; thread < THREADS; thread++)
            threads.emplace_back([=] {
                blockIdx.x = cta;
                threadIdx.x = thread;
#if DIRECTION == 0
                filter_forward(a[0], a[1], a[2], a[3], a[4], a[5], a[6]);
#else
                filter_backward(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11]);
#endif
            });
        for (std::thread& thread : threads) thread.join();
    }
}
