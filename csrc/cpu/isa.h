// The kernels that each instruction set's translation unit provides to the drivers (instruction_sets.cpp, filter.cpp).
//
// Every isa_*.cpp compiles the same kernel source inside an anonymous namespace. The kernels use no std:: templates:
// an inline std function instantiated under a wider target would be a weak symbol that the linker may hand to a
// narrower one, and crash older machines.
#pragma once

#include <cstdint>

#include "../dynamic_filter.h"
#include "plan.h"

// Functions between BEGIN_TARGET and END_TARGET are compiled for these instructions.
#define AS_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define BEGIN_TARGET(instructions) \
    AS_PRAGMA(clang attribute push(__attribute__((target(instructions))), apply_to = function))
#define END_TARGET _Pragma("clang attribute pop")
#else
#define BEGIN_TARGET(instructions) _Pragma("GCC push_options") AS_PRAGMA(GCC target(instructions))
#define END_TARGET _Pragma("GCC pop_options")
#endif

namespace dfformer::cpu {

// Serial kernels over elements [first, last); the driver owns threads and the order of reductions.
struct StarReLUKernel {
    void (*forward)(const StarReLUTensors&, std::int64_t first, std::int64_t last, double scale, double bias);
    // sums[0] = sum(grad_y * relu(x)^2), sums[1] = sum(grad_y)
    void (*backward)(const StarReLUTensors&, std::int64_t first, std::int64_t last, double scale, double* sums);
};

// One call of a filter step as the kernels see it. The unit of work is a tile: the H x W planes of neighbouring
// channels of one sample, one channel per SIMD lane.
struct FilterCall {
    const FilterProblem* problem;
    const FilterTensors* tensors;
    const LineOrder* row_plan;     // a LinePlan<T> of length W, where T is the arithmetic type
    const LineOrder* column_plan;  // of length H
    std::int64_t row_stride;       // from one pair of rows to the next in a tile's workspace, in complex registers
    void* basis;                   // of a dynamic filter, in the layout of `arrange_basis`
    void* slots;                   // backward: partial sums of grad_basis, in the kernel's own layout
    std::int64_t num_slots;
    const std::int32_t* pixel_at;  // channels-first: where a tile's workspace holds each pixel, in registers
};

struct TileTask {
    std::int64_t sample, channel_tile;
    std::int64_t slot;   // backward: which partial sum of grad_filters the tile adds to
    bool first_of_slot;  // the first tile of a slot overwrites it instead
    void* workspace;
};

// Tiles of neighbouring channels that go through the steps together, so that a pixel's adjacent cache lines are read
// and written one after the other.
struct TileGroup {
    static constexpr int max_count = 8;
    int count;
    TileTask tasks[max_count];
};

struct FilterWorkspace {
    std::int64_t tile_bytes;     // per tile in flight
    std::int64_t scratch_bytes;  // per thread
    std::int64_t slot_bytes;     // per partial sum of grad_basis; 0 if that is not needed
    std::int64_t basis_bytes;    // of the rearranged basis; 0 for a global filter
};

// A step over a range [first, last) may be split between threads, each with its own scratch; a barrier must separate
// one step from the next.
using FilterStep = void (*)(const FilterCall&, const TileGroup&, void* scratch, int first, int last);

// The steps of a group, in order.
struct FilterKernel {
    FilterWorkspace (*workspace)(const FilterCall&);
    // Copies columns [first, last) of the basis (H,K,F,2) into the order in which `columns` reads them. Comes first.
    void (*arrange_basis)(const FilterCall&, int first, int last);
    void (*begin)(const FilterCall&, const TileTask&);
    FilterStep load_planes;  // channels-first only; of the planes' segments, as many as pairs of rows
    FilterStep rows;         // of pairs of rows
    FilterStep columns;
    FilterStep inverse_rows;
    FilterStep store_planes;  // channels-first only
    // star_relu_sums: this tile's terms of StarReLU's grad_scale and grad_bias
    void (*end)(const FilterCall&, const TileTask&, double* star_relu_sums);
    // Rows [first, last) of grad_basis: the sum over slots.
    void (*sum_slots)(const FilterCall&, int first, int last);
};

struct Kernels {
    const char* isa;
    int vector_bytes;
    StarReLUKernel star_relu[num_dtypes];  // indexed by DType
    FilterKernel filter[num_dtypes];
};

extern const Kernels baseline_kernels;  // SSE2 on x86-64, NEON on aarch64
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
#endif

const Kernels& active_kernels();
ScalarGrads sum(const std::vector<ScalarGrads>& terms);

}  // namespace dfformer::cpu
