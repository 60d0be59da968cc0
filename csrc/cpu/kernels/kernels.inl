// All kernels of one instruction set. Included inside namespace dfformer::cpu by each isa_*.cpp.
#include "lanes.inl"
#include "star_relu.inl"
#include "transform.inl"
#include "tile.inl"
#include "mixing.inl"
#include "columns.inl"
#include "planes.inl"
#include "rows.inl"

namespace {

// In DType's order.
constexpr Kernels make_kernels(const char* isa) {
    return {
        isa,
        VECTOR_BYTES,
        {star_relu_kernel<Float32>, star_relu_kernel<Float64>, star_relu_kernel<BFloat16>, star_relu_kernel<Float16>},
        {filter_kernel<Float32>, filter_kernel<Float64>, filter_kernel<BFloat16>, filter_kernel<Float16>}};
}

}  // namespace
