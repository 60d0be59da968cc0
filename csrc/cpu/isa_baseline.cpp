// The instruction set that every machine of the architecture has: SSE2 on x86-64, NEON on aarch64.
#include "isa.h"

#define VECTOR_BYTES 16

namespace dfformer::cpu {
#include "kernels/kernels.inl"
#if defined(__aarch64__)
constexpr const char* baseline_name = "neon";
#else
constexpr const char* baseline_name = "generic";
#endif
constinit const Kernels baseline_kernels = make_kernels(baseline_name);
}  // namespace dfformer::cpu
