// How a line of any length is transformed: which passes, in what order, with which constants. Built once per length and
// shared by all instruction sets. The structs below are what kernels read; the tables behind them live in plan.cpp.
#pragma once

#include <cstdint>
#include <memory>

namespace dfformer::cpu {

template <class T>
struct Plan;

// Butterflies of `radix` points over a line seen as [outer][radix][inner].
template <class T>
struct Pass {
    int radix, outer, inner;
    const T* twiddles;           // [inner][radix - 1] pairs (cos, -sin); null where the factors are coprime
    const T* roots;              // a radix without code of its own: exp(-2 pi i j / radix) as pairs, [radix]
    const T* chirp;              // a large prime (Bluestein): exp(-pi i j^2 / radix) as pairs, [radix]
    const T* chirp_spectrum;     // and the transform of its conjugate, scaled, in the order of `convolution`, as pairs
    const Plan<T>* convolution;  // the plan of that transform's length
};

// A transform leaves frequencies in the order its passes produce; nothing is ever sorted. The inverse takes them there.
template <class T>
struct Plan {
    int size, num_passes, num_pairs;
    const Pass<T>* passes;
    const int* sample;        // [size] the sample that a line keeps at position p
    const int* position;      // [size] the position of sample n
    const int* frequency;     // [size] the frequency that ends at position p
    const int* frequency_at;  // [size] the position of frequency k
    const int* columns;       // [size/2 + 1] the frequencies 0 .. size/2 of a real signal, in order of position
    const int* pairs;         // [num_pairs][2] samples (-1: none) that the first pass takes together: see filter.inl
    std::int64_t scratch;     // complex elements that the passes need beside the line
};

// Radices that have code of their own.
inline constexpr int unrolled_radices[] = {2, 3, 4, 5, 7, 8};

// T is float or double. Thread-safe; plans are kept until `plan_cache_limit` others have been used since.
template <class T>
std::shared_ptr<const Plan<T>> plan_for(int size);
inline constexpr int plan_cache_limit = 64;
int cached_plans();

}  // namespace dfformer::cpu
