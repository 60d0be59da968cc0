// A plan says how a line of a given length is transformed: which passes, in what order, with which constants. Built
// once per length, shared by all instruction sets. Kernels read these structs; plan.cpp owns the tables they point to.
#pragma once

#include <cstdint>
#include <memory>

namespace dfformer::cpu {

template <class T>
struct LinePlan;

// Butterflies of `radix` points over a line seen as [outer][radix][inner].
template <class T>
struct Pass {
    int radix, outer, inner;
    const T* twiddles;  // [inner][radix - 1] pairs (cos, -sin); null if the factors are coprime
    // A radix without an unrolled butterfly is a prime. It is transformed in one of three ways.
    // By definition:
    const T* roots;  // [radix] pairs exp(-2 pi i j / radix)
    // Rader, a convolution of radix - 1 points; both tables are powers of a generator:
    const int* inputs;   // [radix - 1] the sample at each position before the convolution
    const int* outputs;  // [radix - 1] the frequency at each position after it
    // Bluestein, a longer convolution:
    const T* chirp;  // [radix] pairs exp(-pi i j^2 / radix)
    // Rader and Bluestein:
    const LinePlan<T>* convolution;  // plan of the convolution's length
    const T* spectrum;               // transform of the kernel, scaled, in the order of `convolution`, as pairs
};

// A transform leaves frequencies in the order its passes produce them, and the inverse reads them in that order: there
// is no reordering pass.
struct LineOrder {
    int size, num_passes, num_pairs;
    const int* sample;        // [size] the sample at position p
    const int* position;      // [size] the position of sample n
    const int* frequency;     // [size] the frequency at position p
    const int* frequency_at;  // [size] the position of frequency k
    const int* columns;       // [size/2 + 1] the frequencies 0 .. size/2, in order of position
    const int* pairs;      // [num_pairs][2] samples (-1: none) adjacent in the first pass' butterflies: see columns.inl
    std::int64_t scratch;  // complex elements of scratch that the passes need
};
template <class T>
struct LinePlan : LineOrder {
    const Pass<T>* passes;
};

// A LinePlan<double> or LinePlan<float>. Thread-safe. The `plan_cache_limit` most recently used plans of each are
// cached.
std::shared_ptr<const LineOrder> plan_for(int size, bool float64);
inline constexpr int plan_cache_limit = 64;

}  // namespace dfformer::cpu
