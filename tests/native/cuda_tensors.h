// What the two programs that run the CUDA kernels on a host have in common: 16-bit numbers, and the kernels' tensors in
// memory that is exactly as large as they are, read from one file and written to another. Included after
// dynamic_filter.inl.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

inline float float_of(float value) { return value; }
inline float float_of(BFloat16 value) {
    const unsigned bits = unsigned(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}
inline float float_of(Float16 value) {
    _Float16 half;
    std::memcpy(&half, &value, sizeof half);
    return half;
}
template <class T>
T number_of(float value);  // rounded to nearest
template <>
inline float number_of<float>(float value) {
    return value;
}
template <>
inline BFloat16 number_of<BFloat16>(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (value != value) return {0x7fff};
    return {(unsigned short)((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};  // to nearest, ties to even
}
template <>
inline Float16 number_of<Float16>(float value) {
    const _Float16 half = value;
    Float16 result;
    std::memcpy(&result, &half, sizeof half);
    return result;
}

template <class T>
struct Tensor {
    long long count;
    struct Free {
        void operator()(T* p) const { ::operator delete(p, alignment); }
    };
    static constexpr std::align_val_t alignment{512};  // as torch allocates on a GPU
    std::unique_ptr<T, Free> values;

    explicit Tensor(long long count)
        : count(count), values(count ? static_cast<T*>(::operator new(bytes(), alignment)) : nullptr) {
        if (count) std::memset(static_cast<void*>(data()), 0xff, bytes());  // NaN, so that what nobody wrote is seen
    }
    long long bytes() const { return count * (long long)sizeof(T); }
    T* data() const { return values.get(); }

    void read(std::FILE* file) {
        if (count && (long long)std::fread(data(), sizeof(T), count, file) != count) std::exit(2);
    }
    void write(std::FILE* file) const {
        if (count && (long long)std::fwrite(data(), sizeof(T), count, file) != count) std::exit(2);
    }
};

// Which outputs of the backward kernel are wanted: the others are null pointers.
enum Wanted { GRAD_X = 1, GRAD_LOGITS = 2, GRAD_FILTERS = 4, GRAD_STAR_RELU = 8 };

// All inputs in a file in this order, all outputs in another. Which there are follows from the layout and what is
// wanted.
template <class L, class Storage, bool backward>
struct Tensors {
    long long B, grid;
    int wanted;
    long long pixels = B * L::H * L::W * L::C, routing = B * L::F * L::C;
    long long slots = L::per_channel ? grid / L::items_per_sample : grid * L::slots;
    Tensor<Storage> x{pixels}, grad_y{backward ? pixels : 0};
    Tensor<float> logits{routing}, filters{2LL * L::H * L::K * (L::per_channel ? L::C : L::F)};
    Tensor<float> scale{L::star_relu}, bias{L::star_relu};
    Tensor<Storage> y{!backward || wanted & GRAD_X ? pixels : 0};  // or grad_x
    Tensor<float> grad_logits{backward && wanted & GRAD_LOGITS ? routing : 0};
    Tensor<float> filter_slots{backward && wanted & GRAD_FILTERS ? slots * filters.count : 0};
    Tensor<float> star_relu_slots{backward && L::star_relu && wanted & GRAD_STAR_RELU ? 2 * grid : 0};

    Tensors(long long B, long long grid, int wanted, const char* path) : B(B), grid(grid), wanted(wanted) {
        std::FILE* file = std::fopen(path, "rb");
        if (!file) std::exit(2);
        x.read(file), grad_y.read(file), logits.read(file), filters.read(file), scale.read(file), bias.read(file);
        std::fclose(file);
    }
    void write(const char* path) const {
        std::FILE* file = std::fopen(path, "wb");
        if (!file) std::exit(2);
        y.write(file), grad_logits.write(file), filter_slots.write(file), star_relu_slots.write(file);
        std::fclose(file);
    }
};
