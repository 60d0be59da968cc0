// The filter step and its gradients as one kernel each, for NVRTC with -default-device: dynamic_filter.inl on a GPU.
//
// Specialised by macros:
//
//   DIRECTION            0 filter_forward, 1 filter_backward
//   PLANE_H, PLANE_W     H and W
//   CHANNELS             C
//   FILTERS              F; 0: one weight per channel, (H,K,C,2)
//   CHANNELS_PER_CTA     channels of a CTA (a thread block)
//   THREADS              threads of a CTA
//   WIDTH                neighbouring channels of a thread: 1 or 2
//   ROWS, COLUMNS        how rows and columns are transformed: the enums of layout.inl
//   SECOND_FACTOR        N2 of H = N1 N2: a column's N1-point transforms come before its N2-point ones
//   SLOTS                parts of the basis' gradient that a CTA writes
//   STORAGE              of x, y and their gradients: 0 float32, 2 bfloat16, 3 float16
//   STAR_RELU            1: StarReLU on load
//   SPECTRA_IN_SHARED    half spectra of a CTA's channels in shared memory: 1 forward, 2 or 1 backward
//   MIN_CTAS             CTAs that shall fit a multiprocessor at once
//   SHARED_BYTES         dynamic shared memory at launch: must be the layout's

#ifdef __CUDACC_RTC__
#define FFT_INLINE __forceinline__
#define FFT_CONSTANT __constant__ const
#endif

#include "butterflies.inl"
#include "dynamic_filter.inl"

using CtaLayout = Layout<PLANE_H, PLANE_W, CHANNELS, FILTERS, CHANNELS_PER_CTA, THREADS, ROWS, COLUMNS, STAR_RELU,
                         DIRECTION, SPECTRA_IN_SHARED, WIDTH, SECOND_FACTOR, SLOTS>;
static_assert(CtaLayout::shared_bytes == SHARED_BYTES, "the caller computes shared memory as Layout does");

#if STORAGE == 0
using Storage = float;
#elif STORAGE == 2
using Storage = BFloat16;
#else
using Storage = Float16;
#endif

#ifdef __CUDACC_RTC__
// i itself, of which the compiler knows no more: what it computes from i it cannot have computed before.
FFT_INLINE int opaque(int i) {
    asm volatile("" : "+r"(i));
    return i;
}
FFT_INLINE void prefetch_to_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
FFT_INLINE float float_of(BFloat16 value) { return __uint_as_float((unsigned)value.bits << 16); }
FFT_INLINE float float_of(Float16 value) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
    return result;
}
template <class T>
FFT_INLINE T number_of(float value);  // rounded to nearest
template <>
FFT_INLINE Float16 number_of<Float16>(float value) {
    Float16 result;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    return result;
}
template <>
FFT_INLINE BFloat16 number_of<BFloat16>(float value) {
    BFloat16 result;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    return result;
}
#endif

extern __shared__ __align__(16) float2 shared[];

// Two channels' complex numbers lie one after the other.
FFT_INLINE Complex<Pair> complex_of(float4 v) { return {{v.x, v.z}, {v.y, v.w}}; }
FFT_INLINE Complex<float> complex_of(float2 v) { return {v.x, v.y}; }
FFT_INLINE float2 vector_of(Complex<float> a) { return make_float2(a.re, a.im); }
FFT_INLINE float4 vector_of(Complex<Pair> a) { return make_float4(a.re.first, a.im.first, a.re.second, a.im.second); }
template <int count>
struct Vector {
    using Type = float2;
};
template <>
struct Vector<4> {
    using Type = float4;
};
template <class T>
using VectorOf = Vector<2 * sizeof(T) / sizeof(float)>;

FFT_INLINE void unpack(float2 v, float* values) { values[0] = v.x, values[1] = v.y; }
FFT_INLINE void unpack(float4 v, float* values) { values[0] = v.x, values[1] = v.y, values[2] = v.z, values[3] = v.w; }

struct Environment {
    float2* kept_spectrum = nullptr;

    template <class T>
    FFT_INLINE T load(const float* p) const {
        if constexpr (sizeof(T) == sizeof *p) {
            return __ldg(p);
        } else {
            const float2 v = __ldg((const float2*)p);
            return {v.x, v.y};
        }
    }
    template <class T, class Half>
    FFT_INLINE T load(const Half* p) const {
        if constexpr (sizeof(T) == sizeof(float)) {
            return float_of(Half{__ldg(&p->bits)});
        } else {
            const unsigned both = __ldg((const unsigned*)p);
            return {float_of(Half{(unsigned short)both}), float_of(Half{(unsigned short)(both >> 16)})};
        }
    }
    template <class T>
    FFT_INLINE Complex<T> complex(const float* p) const {
        return complex_of(__ldg((const typename VectorOf<T>::Type*)p));
    }
    template <int count>
    FFT_INLINE void load(const float* p, float* values) const {
        unpack(__ldg((const typename Vector<count>::Type*)p), values);
    }

    FFT_INLINE void store(float* p, float value) const { *p = value; }
    FFT_INLINE void store(float* p, Pair value) const { *(float2*)p = make_float2(value.first, value.second); }
    template <class Half>
    FFT_INLINE void store(Half* p, float value) const {
        *p = number_of<Half>(value);
    }
    template <class Half>
    FFT_INLINE void store(Half* p, Pair value) const {
        *(unsigned*)p = number_of<Half>(value.first).bits | (unsigned)number_of<Half>(value.second).bits << 16;
    }

    template <int count>
    FFT_INLINE void accumulate(float* p, const float* values, bool first) const {
        if constexpr (count == 4) {
            float4 v = first ? make_float4(0, 0, 0, 0) : *(float4*)p;
            v.x += values[0], v.y += values[1], v.z += values[2], v.w += values[3];
            *(float4*)p = v;
        } else {
            float2 v = first ? make_float2(0, 0) : *(float2*)p;
            v.x += values[0], v.y += values[1];
            *(float2*)p = v;
        }
    }

    FFT_INLINE void prefetch(const void* p) const { prefetch_to_l2(p); }
    FFT_INLINE int opaque(int i) const { return ::opaque(i); }

    template <class T>
    static FFT_INLINE auto vectors(float2* p) {
        return (typename VectorOf<T>::Type*)p;
    }
    template <class T>
    FFT_INLINE Complex<T> spectrum(int i) const {
        return complex_of(*vectors<T>(shared + i));
    }
    template <class T>
    FFT_INLINE void set_spectrum(int i, Complex<T> value) const {
        *vectors<T>(shared + i) = vector_of(value);
    }
    template <class T>
    FFT_INLINE Complex<T> kept(int i) const {
        return complex_of(*vectors<T>(kept_spectrum + i));
    }
    template <class T>
    FFT_INLINE void set_kept(int i, Complex<T> value) const {
        *vectors<T>(kept_spectrum + i) = vector_of(value);
    }
    FFT_INLINE float scratch(int i) const { return ((const float*)shared)[i]; }
    template <int count>
    FFT_INLINE void scratch(int i, float* values) const {
        const float* p = (const float*)shared + i;
        if constexpr (count == 1)
            values[0] = *p;
        else
            unpack(*(const typename Vector<count>::Type*)p, values);
    }
    FFT_INLINE void set_scratch(int i, float value) const { store((float*)shared + i, value); }
    FFT_INLINE void set_scratch(int i, Pair value) const { store((float*)shared + i, value); }
};

#if DIRECTION == 0

// One work item per CTA: gridDim.x = B ceil(C / CHANNELS_PER_CTA), those of a sample side by side. `ahead` is how many
// CTAs the GPU runs at once: about what a multiprocessor's next CTA is ahead of this one.
extern "C" __global__ void __launch_bounds__(THREADS, MIN_CTAS)
    filter_forward(const Storage* x, Storage* y, const float* logits, const float* filters, const float* scale,
                   const float* bias, long long ahead) {
    using Step = Forward<CtaLayout, Storage>;
    Environment env;
    unrolled<0, Step::phases>([&](auto phase) {
        if (phase > 0) __syncthreads();
        // opaque, or addresses of the last phase would be computed in the first and wait in registers
        const unsigned item = opaque(blockIdx.x), next = item + (unsigned)ahead;
        const Step step{x, y, logits, filters, {scale, bias}, opaque(threadIdx.x), item, next, gridDim.x};
        step.template run<phase.value>(env);
    });
}

#else

// CTA i takes the work items i, i + gridDim.x, ... of B ceil(C / CHANNELS_PER_CTA), in order, and gridDim.x is at most
// their number. Its part of a sum over CTAs goes to a slot:
//
//   grad_basis   filter_slots[gridDim.x][slots][H][K][F][2], CTA i has the i-th `slots` of them, CtaLayout::slots
//   grad_weight  filter_slots[gridDim.x / items][H][K][C][2] with items = ceil(C / CHANNELS_PER_CTA): gridDim.x is a
//                multiple of them, so that a CTA's items are samples of the same channels, for which it fills slot
//                i / items
//   scalars      star_relu_slots[gridDim.x][2]: grad_scale, grad_bias
//
// `kept` is [gridDim.x][CtaLayout::kept_size] where SPECTRA_IN_SHARED is 1, and otherwise not used. An output that is
// null is not wanted.
extern "C" __global__ void __launch_bounds__(THREADS, MIN_CTAS)
    filter_backward(const Storage* grad_y, const Storage* x, const float* logits, const float* filters,
                    const float* scale, const float* bias, Storage* grad_x, float* grad_logits, float* filter_slots,
                    float* star_relu_slots, float2* kept, long long B) {
    using Step = Backward<CtaLayout, Storage>;
    constexpr int slot_ctas = FILTERS ? 1 : CtaLayout::items_per_sample, slot_size = CtaLayout::H * CtaLayout::K * 2;
    const long long slot = blockIdx.x / slot_ctas;
    if (filter_slots) filter_slots += slot * CtaLayout::slots * slot_size * (FILTERS ? FILTERS : CHANNELS);
    if (star_relu_slots) star_relu_slots += 2LL * blockIdx.x;

    Environment env{CtaLayout::one_spectrum ? kept + (long long)blockIdx.x * CtaLayout::kept_size : nullptr};
    Step step{grad_y, x,           logits,       filters,         {scale, bias},
              grad_x, grad_logits, filter_slots, star_relu_slots, (int)threadIdx.x};
    for (long long item = blockIdx.x; item < B * CtaLayout::items_per_sample; item += gridDim.x) {
        const long long next = item + gridDim.x;
        step.begin(item, item == blockIdx.x, next < B * CtaLayout::items_per_sample ? next : -1);
        unrolled<0, Step::phases>([&](auto phase) {
            step.template run<phase.value>(env);
            __syncthreads();
        });
    }
    unrolled<0, Step::end_phases>([&](auto phase) {
        if (phase > 0) __syncthreads();
        step.template end<phase.value>(env);
    });
}

#endif
