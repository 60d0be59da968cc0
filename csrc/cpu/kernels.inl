// All kernels of one instruction set. Included inside namespace dfformer::cpu by each isa_*.cpp.
#include "lanes.inl"
#include "star_relu.inl"

namespace {

// In DType's order.
constexpr Kernels make_kernels(const char* isa) {
    return {
        isa,
        {star_relu_kernel<Float32>, star_relu_kernel<Float64>, star_relu_kernel<BFloat16>, star_relu_kernel<Float16>}};
}

}  // namespace
