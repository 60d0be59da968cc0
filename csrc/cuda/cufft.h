// 2-D real transforms by libcufft, which is opened at run time: nothing of CUDA is needed to build or to load this.
//
// Planes lie side by side: real ones as (H,W,N), their spectra as (H,K,N) complex, K = W/2 + 1, N fastest. One sample
// in channels-last layout is such an array (N = C). Transforms are not scaled and never in place.
#pragma once

#include <cstdint>
#include <string>

#include "../dynamic_filter.h"

namespace dfformer::cufft {

// A plan makes one kind of transform on one device; this says which, and is what plans are found by.
struct Transform {
    int device;
    std::int64_t H, W, N;
    DType dtype;   // float32 or float64
    bool inverse;  // rfft2: (H,W,N) to (H,K,N); inverse, irfft2: (H,K,N) to (H,W,N)

    bool operator==(const Transform&) const = default;
};

// Device addresses of dense arrays aligned to a complex element; `stream` is a cudaStream_t.
struct Buffers {
    void* input;  // irfft2 overwrites it
    void* output;
    void* workspace;
    std::int64_t workspace_bytes;
    void* stream;
};

// So many plans are kept for each device, those used last.
inline constexpr std::int64_t plans_per_device = 64;

// All functions are thread-safe. Those below throw std::runtime_error with the name of cuFFT's function, of the code it
// returned, and the transform. The caller makes the transform's device the current one.

// The library that plans are made by from now on; those of one opened before are dropped. `path` is as dlopen takes it.
void open(const std::string& path);

// Bytes of workspace that a run needs. Makes the plan if there is none, except while a CUDA graph is being captured.
// The graph refers to the plan's memory and may be replayed for ever: a plan found while `capturing` is never
// destroyed.
std::int64_t plan(const Transform& transform, bool capturing);

// Queues the transform on the stream. Throws std::invalid_argument if the workspace is too small.
void run(const Transform& transform, bool capturing, const Buffers& buffers);

// Drops the plans of a device that no graph needs. Those that are running go when they have finished.
void clear(int device);
// How many clear() would drop.
std::int64_t plan_count(int device);

}  // namespace dfformer::cufft
