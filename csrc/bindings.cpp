// The Python bindings, and the only file that includes Python: checks ranges and releases the GIL around the work.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <limits>
#include <optional>
#include <stdexcept>

#include "dynamic_filter.h"

namespace py = pybind11;
using namespace dfformer;
using namespace py::literals;

namespace {

using Address = std::uintptr_t;

// Limits far beyond any image or basis. Kernels use int for both, and square a side.
constexpr std::int64_t max_side = 32768, max_filters = 65536;

constexpr std::int64_t any_size = std::numeric_limits<std::int64_t>::max();

void check_range(const char* got, std::int64_t value, std::int64_t least, std::int64_t most) {
    if (value < least || value > most)
        throw std::invalid_argument(got + std::to_string(value) + ", accepted are " + std::to_string(least) + " to " +
                                    std::to_string(most));
}

DType checked_dtype(int dtype) {
    check_range("dtype: got code ", dtype, 0, num_dtypes - 1);
    return static_cast<DType>(dtype);
}

void check_size(std::int64_t n, DType dtype) {
    check_range("n: got ", n, 0, any_size / item_size[static_cast<int>(dtype)]);
}

void check_threads(int threads) { check_range("threads: got ", threads, 1, 4096); }

const void* input(const char* name, Address address, std::int64_t n) {
    if (n > 0 && address == 0)
        throw std::invalid_argument(std::string(name) + ": got a null pointer, accepted is a tensor's address");
    return reinterpret_cast<const void*>(address);
}

void* output(const char* name, Address address, std::int64_t n) { return const_cast<void*>(input(name, address, n)); }

void bind_star_relu(Address x, Address y, std::int64_t n, int dtype_code, double scale, double bias, int threads) {
    const DType dtype = checked_dtype(dtype_code);
    check_size(n, dtype);
    check_threads(threads);
    star_relu(input("x", x, n), output("y", y, n), n, dtype, scale, bias, threads);
}

std::pair<double, double> bind_star_relu_backward(Address grad_y, Address x, Address grad_x, std::int64_t n,
                                                  int dtype_code, double scale, int threads) {
    const DType dtype = checked_dtype(dtype_code);
    check_size(n, dtype);
    check_threads(threads);
    const StarReLUScalarGrads grads = star_relu_backward(input("grad_y", grad_y, n), input("x", x, n),
                                                         reinterpret_cast<void*>(grad_x), n, dtype, scale, threads);
    return {grads.scale, grads.bias};
}

void check_product(std::initializer_list<std::int64_t> sizes) {
    std::int64_t result = 1;
    for (std::int64_t size : sizes)
        if (__builtin_mul_overflow(result, size, &result))
            throw std::invalid_argument("shape: got a tensor of more bytes than 64 bits count");
}

// Softmax, weight_per_sample and channels_first of a problem.
using Form = std::array<bool, 3>;
constexpr Form usual_form = {true, false, false};

// `shape` is (B, H, W, C, F). Rejects sizes for which an offset would overflow.
FilterProblem checked_problem(const std::array<std::int64_t, 5>& shape, int dtype_code,
                              std::optional<std::pair<double, double>> star_relu, const Form& form) {
    const auto [B, H, W, C, F] = shape;
    const DType dtype = checked_dtype(dtype_code);
    check_range("shape: got B = ", B, 1, any_size);
    check_range("shape: got H = ", H, 1, max_side);
    check_range("shape: got W = ", W, 1, max_side);
    check_range("shape: got C = ", C, 1, any_size);
    check_range("shape: got F = ", F, 0, max_filters);
    // 32 bytes per element: the largest complex item, doubled because C is rounded up to whole registers
    check_product({B, H, W, C, 32});
    check_product({B, std::max<std::int64_t>(F, 1), C, 32});
    const auto [softmax, weight_per_sample, channels_first] = form;
    check_product({weight_per_sample ? B : 1, H, W / 2 + 1, std::max(F, C), 32});
    const auto [scale, bias] = star_relu.value_or(std::pair{0.0, 0.0});
    return {B, H, W, C, F, dtype, star_relu.has_value(), scale, bias, softmax, weight_per_sample, channels_first};
}

const void* required(const char* name, Address address) { return input(name, address, 1); }

FilterTensors required_inputs(const FilterProblem& problem, Address x, Address logits, Address filters) {
    return {.x = required("x", x),
            .logits = problem.F > 0 ? required("logits", logits) : nullptr,
            .filters = required("filters", filters)};
}

void bind_filter(const std::array<std::int64_t, 5>& shape, int dtype,
                 std::optional<std::pair<double, double>> star_relu, Address x, Address logits, Address filters,
                 Address y, int threads, const Form& form) {
    const FilterProblem problem = checked_problem(shape, dtype, star_relu, form);
    check_threads(threads);
    FilterTensors tensors = required_inputs(problem, x, logits, filters);
    tensors.y = output("y", y, 1);
    const py::gil_scoped_release no_gil;
    filter(problem, tensors, threads);
}

std::pair<double, double> bind_filter_backward(const std::array<std::int64_t, 5>& shape, int dtype,
                                               std::optional<std::pair<double, double>> star_relu, Address grad_y,
                                               Address x, Address logits, Address filters, Address grad_x,
                                               Address grad_logits, Address grad_filters, bool need_scalars,
                                               int threads, const Form& form) {
    const FilterProblem problem = checked_problem(shape, dtype, star_relu, form);
    check_threads(threads);
    if (need_scalars && !problem.star_relu)
        throw std::invalid_argument("need_scalars: got true, accepted without StarReLU is false");
    if (grad_logits && problem.F == 0)
        throw std::invalid_argument("grad_logits: got an address, accepted for a global filter (F = 0) is 0");
    FilterTensors tensors = required_inputs(problem, x, logits, filters);
    tensors.grad_y = required("grad_y", grad_y);
    tensors.grad_x = reinterpret_cast<void*>(grad_x);
    tensors.grad_logits = reinterpret_cast<void*>(grad_logits);
    tensors.grad_filters = reinterpret_cast<void*>(grad_filters);
    tensors.need_scalars = need_scalars;
    const py::gil_scoped_release no_gil;
    const StarReLUScalarGrads grads = filter_backward(problem, tensors, threads);
    return {grads.scale, grads.bias};
}

std::int64_t bind_filter_workspace(const std::array<std::int64_t, 5>& shape, int dtype, bool backward, int threads) {
    check_threads(threads);
    return filter_workspace(checked_problem(shape, dtype, std::pair{1.0, 0.0}, usual_form), backward, threads);
}

}  // namespace

// The module needs no GIL: calls share only the plans' cache, which has a mutex, and the instruction set, an atomic.
PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
    m.doc() = "The compiled core. It takes raw addresses: call it through dfformer_kernels.backends.cpu only.";
    m.def("supported_isas", &supported_isas);
    m.def("active_isa", &active_isa);
    m.def("set_active_isa", &set_active_isa, "name"_a);
    m.attr("max_side") = max_side;
    const py::call_guard<py::gil_scoped_release> no_gil;
    m.def("star_relu", &bind_star_relu, no_gil, "x"_a, "y"_a, "n"_a, "dtype"_a, "scale"_a, "bias"_a, "threads"_a);
    m.def("star_relu_backward", &bind_star_relu_backward, no_gil, "grad_y"_a, "x"_a, "grad_x"_a, "n"_a, "dtype"_a,
          "scale"_a, "threads"_a);
    m.def("filter", &bind_filter, "shape"_a, "dtype"_a, "star_relu"_a, "x"_a, "logits"_a, "filters"_a, "y"_a,
          "threads"_a, "form"_a = usual_form);
    m.def("filter_backward", &bind_filter_backward, "shape"_a, "dtype"_a, "star_relu"_a, "grad_y"_a, "x"_a, "logits"_a,
          "filters"_a, "grad_x"_a, "grad_logits"_a, "grad_filters"_a, "need_scalars"_a, "threads"_a,
          "form"_a = usual_form);
    m.def("filter_workspace", &bind_filter_workspace, "shape"_a, "dtype"_a, "backward"_a, "threads"_a,
          "Bytes of workspace that a call allocates.");
}
