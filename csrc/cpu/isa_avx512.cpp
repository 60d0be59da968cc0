// AVX-512 F/BW/DQ/VL (Skylake-X, Zen 4 and later).
#if defined(__x86_64__)
#include <immintrin.h>

#include "isa.h"
#include "plan.h"

#define VECTOR_BYTES 64
#define HAS_F16C 1

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")
#endif

namespace dfformer::cpu {
#include "kernels/kernels.inl"
constinit const Kernels avx512_kernels = make_kernels("avx512");
}  // namespace dfformer::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
