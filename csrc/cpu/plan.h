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
    const T* twiddles;  // [inner][radix - 1] pairs (cos, -sin); null where the factors are coprime
    // A radix without code of its own, which is a prime, goes one of three ways.
    const T* roots;      // by definition: exp(-2 pi i j / radix) as pairs, [radix]
    const int* inputs;   // as a convolution of radix - 1 points (Rader): [radix - 1] the sample at each position
    const int* outputs;  // before it, and the frequency after it; both are powers of a generator
    const T* chirp;      // as a longer one (Bluestein): exp(-pi i j^2 / radix) as pairs, [radix]
    const Plan<T>* convolution;  // the plan of either convolution's length
    const T* spectrum;           // and the transform of what is convolved with, scaled, in its order, as pairs
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
