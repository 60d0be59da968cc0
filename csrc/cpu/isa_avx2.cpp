// AVX2 with FMA and F16C (Haswell, Zen and later).
#if defined(__x86_64__)
#include <immintrin.h>

#include "isa.h"

#define VECTOR_BYTES 32

BEGIN_TARGET("avx2,fma,f16c")
namespace dfformer::cpu {
#include "kernels/kernels.inl"
constinit const Kernels avx2_kernels = make_kernels("avx2");
}  // namespace dfformer::cpu
END_TARGET
#endif
