// What one instruction set's translation unit provides to dispatch.cpp.
//
// Every isa_*.cpp compiles the same kernel source inside an anonymous namespace. The kernels use no std:: templates:
// an inline std function instantiated under a wider target would be a weak symbol that the linker may hand to a
// narrower one, and crash older machines.
#pragma once

#include <cstdint>

#include "../dynamic_filter.h"

namespace dfformer::cpu {

// Serial kernels over one run of elements; dispatch.cpp owns threads and the order of reductions.
struct StarReLUKernel {
    void (*forward)(const void* x, void* y, std::int64_t n, double scale, double bias);
    // sums[0] = sum(grad_y * relu(x)^2), sums[1] = sum(grad_y); grad_x may be null.
    void (*backward)(const void* grad_y, const void* x, void* grad_x, std::int64_t n, double scale, double* sums);
};

struct Kernels {
    const char* isa;
    StarReLUKernel star_relu[num_dtypes];  // indexed by DType
};

extern const Kernels baseline_kernels;  // SSE2 on x86-64, NEON on aarch64
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
#endif

}  // namespace dfformer::cpu
