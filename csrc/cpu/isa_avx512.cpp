// AVX-512 F/BW/DQ/VL (Skylake-X, Zen 4 and later).
#if defined(__x86_64__)
#include <immintrin.h>

#include "isa.h"

#define VECTOR_BYTES 64

BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")
namespace dfformer::cpu {
#include "kernels/kernels.inl"
constinit const Kernels avx512_kernels = make_kernels("avx512");
}  // namespace dfformer::cpu
END_TARGET
#endif
