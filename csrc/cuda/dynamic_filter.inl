// The filter step and its gradients on one CTA (a thread block), plane by plane in shared memory.
//
//   y = irfft2(rfft2(u) M),   u = star_relu(x) or x,   M[h,k] = a weight or sum_f softmax(logits)[f] basis[h,k,f]
//
// Written as phases of one thread with a barrier between two of them, templated on a Layout, how tensors store numbers
// and an environment, which is everything a phase touches: tensors, shared memory. On a GPU the environment is a few
// instructions; on a host it watches for races, bank conflicts and addresses outside. Included after butterflies.inl;
// no std headers. An environment has, for p into a tensor and i into shared memory:
//
//   load<T>(p)                              of a read-only tensor, T is float or Pair: a number, or two side by side
//   load<count>(p, values)                  2 or 4 aligned floats of one
//   complex<T>(p)                           complex floats of one
//   store(p, value)                         a float or a Pair, rounded to nearest
//   accumulate<count>(p, values, first)     2 or 4 aligned floats this CTA alone adds to; the first time they are set
//   prefetch(p)                             the sector of device memory around p is wanted soon
//   opaque(i)                               i, of which the compiler knows no more
//   spectrum<T>(i), set_spectrum(i, value)  complex numbers of shared memory, Complex<T> from the i-th on
//   scratch(i), set_scratch(i, value)       floats of shared memory, i counting from the same start; set a Pair at once
//   scratch<count>(i, values)               1, 2 or 4 aligned ones
//   kept<T>(i), set_kept(i, value)          complex numbers of the CTA's own device memory: the spectrum that waits
//                                           where shared memory has room for one
//
// The arithmetic is float32.

// Tables indexed at run time. The includer may define it, as it may FFT_INLINE.
#ifndef FFT_CONSTANT
#define FFT_CONSTANT constexpr
#endif

#include "numbers.inl"
#include "layout.inl"
#include "columns.inl"
#include "rows.inl"
#include "mixing.inl"
#include "forward.inl"
#include "backward.inl"
