// Failures, tensors between guard pages, and numbers as tensors store them.
#pragma once

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "dynamic_filter.h"

namespace {

using namespace dfformer;
using Values = std::vector<double>;

// ---- failures

char current_case[200];

[[noreturn]] void fail(const std::string& what) {
    std::fprintf(stderr, "FAILED: %s: %s\n", current_case, what.c_str());
    std::_Exit(1);
}

void name_case() {
    const char prefix[] = "\nwhile checking ";
    for (const char* text : {prefix, static_cast<const char*>(current_case), "\n"})
        if (write(STDERR_FILENO, text, std::strlen(text)) < 0) return;
}

// Names the case, then restores the previous handler (a sanitizer's, a core dump's) and lets the fault happen again.
constexpr int faults[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};
struct sigaction previous[std::size(faults)];
void on_fault(int) {
    name_case();
    for (std::size_t i = 0; i < std::size(faults); i++) sigaction(faults[i], &previous[i], nullptr);
}
void name_case_on_faults() {
    struct sigaction action{};
    action.sa_handler = on_fault;
    for (std::size_t i = 0; i < std::size(faults); i++) sigaction(faults[i], &action, &previous[i]);
}

// ---- numbers as tensors store them

constexpr const char* dtype_names[num_dtypes] = {"float32", "float64", "bfloat16", "float16"};
// Largest allowed ||actual - expected|| / ||expected||: dfformer_kernels/tolerance.py says why.
constexpr double bounds[num_dtypes] = {1e-6, 1e-13, 0x1p-8, 0x1p-11};

DType arithmetic_of(DType dtype) { return dtype == DType::float64 ? dtype : DType::float32; }

// The 16-bit types, by IEEE 754's rules: a sign, an exponent and the mantissa's bits.
struct Format {
    int exponent_bits, mantissa_bits;

    int bias() const { return (1 << (exponent_bits - 1)) - 1; }
    unsigned infinity() const { return ((1u << exponent_bits) - 1) << mantissa_bits; }

    std::uint16_t encode(double value) const {
        const unsigned sign = std::signbit(value) ? 0x8000 : 0;
        if (value == 0) return static_cast<std::uint16_t>(sign);
        if (std::isnan(value)) return 0xffff;
        const int exponent = std::max(std::ilogb(value), 1 - bias());
        const double mantissa = std::nearbyint(std::ldexp(std::abs(value), mantissa_bits - exponent));
        // The mantissa's leading one, where it has one, adds the 1 that is missing in the exponent.
        const double bits = mantissa + std::ldexp(exponent + bias() - 1, mantissa_bits);
        return static_cast<std::uint16_t>(sign | static_cast<unsigned>(std::min<double>(bits, infinity())));
    }
    double decode(std::uint16_t bits) const {
        const unsigned magnitude = bits & 0x7fff, mantissa = magnitude & ((1u << mantissa_bits) - 1);
        const int exponent = static_cast<int>(magnitude >> mantissa_bits);
        const double sign = bits & 0x8000 ? -1 : 1;
        if (magnitude >= infinity()) return mantissa ? NAN : sign * INFINITY;
        if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias() - mantissa_bits);
        return sign * std::ldexp(mantissa + (1u << mantissa_bits), exponent - bias() - mantissa_bits);
    }
};
Format format_of(DType dtype) { return dtype == DType::bfloat16 ? Format{8, 7} : Format{5, 10}; }

template <class T>
void put(char* memory, T value) {
    std::memcpy(memory, &value, sizeof(value));
}
template <class T>
T get(const char* memory) {
    T value;
    std::memcpy(&value, memory, sizeof(value));
    return value;
}

void encode(DType dtype, double value, char* memory) {
    if (dtype == DType::float64) return put(memory, value);
    if (dtype == DType::float32) return put(memory, static_cast<float>(value));
    put(memory, format_of(dtype).encode(value));
}
double decode(DType dtype, const char* memory) {
    if (dtype == DType::float64) return get<double>(memory);
    if (dtype == DType::float32) return get<float>(memory);
    return format_of(dtype).decode(get<std::uint16_t>(memory));
}

std::int64_t size_of(DType dtype) { return item_size[static_cast<int>(dtype)]; }

Values decoded(DType dtype, const std::string& bytes) {
    Values values;
    for (std::size_t i = 0; i < bytes.size(); i += size_of(dtype)) values.push_back(decode(dtype, &bytes[i]));
    return values;
}
Values rounded(DType dtype, Values values) {
    char memory[sizeof(double)];
    for (double& value : values) {
        encode(dtype, value, memory);
        value = decode(dtype, memory);
    }
    return values;
}

// ---- memory

// A tensor directly before (Edge::upper) or after (Edge::lower) a page that must not be touched.
enum class Edge { lower, upper };

class Tensor {
  public:
    // An output: NaN.
    Tensor(std::int64_t n, DType dtype, Edge edge) : dtype_(dtype), bytes_(n * size_of(dtype)) {
        const std::int64_t page = sysconf(_SC_PAGESIZE);
        inside_ = std::max<std::int64_t>(1, (bytes_ + page - 1) / page) * page;
        mapped_ = inside_ + 2 * page;
        void* pages = mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (pages == MAP_FAILED) fail("no memory");
        pages_ = static_cast<char*>(pages);
        first_ = pages_ + page;
        data_ = edge == Edge::lower ? first_ : first_ + inside_ - bytes_;
        protect(PROT_READ | PROT_WRITE);
        std::memset(first_, 0xff, inside_);
    }
    // An input: read-only.
    Tensor(const Values& values, DType dtype, Edge edge)
        : Tensor(static_cast<std::int64_t>(values.size()), dtype, edge) {
        for (std::size_t i = 0; i < values.size(); i++) encode(dtype, values[i], data_ + i * size_of(dtype));
        protect(PROT_READ);
    }
    Tensor(const Tensor&) = delete;
    ~Tensor() { munmap(pages_, mapped_); }

    void* data() const { return data_; }
    std::string bytes() const { return {data_, static_cast<std::size_t>(bytes_)}; }
    Values values() const { return decoded(dtype_, bytes()); }

  private:
    void protect(int access) {
        if (mprotect(first_, inside_, access)) fail("mprotect does not work");
    }

    DType dtype_;
    std::int64_t bytes_, inside_, mapped_;
    char *pages_, *first_, *data_;
};

}  // namespace
