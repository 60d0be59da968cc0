// As much of CUDA C++ as dynamic_filter.cu uses, for a host compiler: a thread of the host for every thread of a CTA.
// Included before it.
#pragma once

#include <atomic>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>

#define __global__
#define __shared__
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)

struct Dim {
    unsigned x;
};
inline thread_local Dim threadIdx, blockIdx;
inline Dim gridDim;

struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

template <class T>
T __ldg(const T* p) {
    if (reinterpret_cast<std::uintptr_t>(p) % alignof(T)) __builtin_trap();  // a GPU faults too
    return *p;
}
inline void prefetch_to_l2(const void*) {}
inline int opaque(int i) { return i; }
inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline std::barrier<>* cta_barrier;
inline int missing_barrier = -1;  // of a CTA's barriers, the one that does not wait
inline thread_local int barriers;
inline void __syncthreads() {
    if (barriers++ != missing_barrier) cta_barrier->arrive_and_wait();
}

struct BFloat16;
struct Float16;
float float_of(BFloat16);
float float_of(Float16);
template <class T>
T number_of(float);
template <>
BFloat16 number_of<BFloat16>(float);
template <>
Float16 number_of<Float16>(float);
