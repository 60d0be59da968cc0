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

void check_range(const char* expected, std::int64_t value, std::int64_t least, std::int64_t most) {
    if (value < least || value > most)
        throw std::invalid_argument(expected + std::to_string(least) + " to " + std::to_string(most) + ", got " +
                                    std::to_string(value));
}

DType checked_dtype(int dtype) {
    check_range("dtype: expected code ", dtype, 0, num_dtypes - 1);
    return static_cast<DType>(dtype);
}

void check_threads(int threads) { check_range("threads: expected ", threads, 1, 4096); }

void* pointer(const char* name, Address address, bool needed = true) {
    if (needed && address == 0)
        throw std::invalid_argument(std::string(name) + ": expected a tensor's address, got a null pointer");
    return reinterpret_cast<void*>(address);
}

ScalarGrads bind_star_relu(std::int64_t n, int dtype_code, int threads, double scale, double bias, Address x, Address y,
                           Address grad_y, Address grad_x) {
    const DType dtype = checked_dtype(dtype_code);
    check_range("n: expected ", n, 0, any_size / item_size[dtype_code]);
    check_threads(threads);
    const bool backward = grad_y || grad_x;
    const StarReLUTensors tensors{.x = pointer("x", x, n > 0),
                                  .y = pointer("y", y, n > 0 && !backward),
                                  .grad_y = pointer("grad_y", grad_y, n > 0 && backward),
                                  .grad_x = pointer("grad_x", grad_x, false)};
    return star_relu(tensors, n, dtype, scale, bias, threads);
}

void check_product(std::initializer_list<std::int64_t> sizes) {
    std::int64_t result = 1;
    for (std::int64_t size : sizes)
        if (__builtin_mul_overflow(result, size, &result))
            throw std::invalid_argument("shape: expected no more bytes of a tensor than 64 bits count, got more");
}

// Softmax, weight_per_sample and channels_first of a problem.
using Form = std::array<bool, 3>;

// `shape` is (B, H, W, C, F). Rejects sizes for which an offset would overflow.
FilterProblem checked_problem(const std::array<std::int64_t, 5>& shape, int dtype_code,
                              std::optional<std::pair<double, double>> star_relu, const Form& form) {
    const auto [B, H, W, C, F] = shape;
    const DType dtype = checked_dtype(dtype_code);
    check_range("shape: expected B = ", B, 1, any_size);
    check_range("shape: expected H = ", H, 1, max_side);
    check_range("shape: expected W = ", W, 1, max_side);
    check_range("shape: expected C = ", C, 1, any_size);
    check_range("shape: expected F = ", F, 0, max_filters);
    // 32 bytes per element: the largest complex item, doubled because C is rounded up to whole registers
    check_product({B, H, W, C, 32});
    check_product({B, std::max<std::int64_t>(F, 1), C, 32});
    const auto [softmax, weight_per_sample, channels_first] = form;
    check_product({weight_per_sample ? B : 1, H, W / 2 + 1, std::max(F, C), 32});
    const auto [scale, bias] = star_relu.value_or(std::pair{0.0, 0.0});
    return {B, H, W, C, F, dtype, star_relu.has_value(), scale, bias, softmax, weight_per_sample, channels_first};
}

// `run` is `filter` or `filter_workspace`.
template <auto run>
auto bind_filter(const std::array<std::int64_t, 5>& shape, int dtype,
                 std::optional<std::pair<double, double>> star_relu, const Form& form, int threads, Address x,
                 Address logits, Address filters, Address y, Address grad_y, Address grad_x, Address grad_logits,
                 Address grad_filters, bool need_scalars) {
    const FilterProblem problem = checked_problem(shape, dtype, star_relu, form);
    check_threads(threads);
    if (need_scalars && !problem.star_relu)
        throw std::invalid_argument("need_scalars: expected false without StarReLU, got true");
    if (grad_logits && problem.F == 0)
        throw std::invalid_argument("grad_logits: expected 0 for a global filter (F = 0), got an address");
    const bool backward = grad_y || grad_x || grad_logits || grad_filters || need_scalars;
    const FilterTensors tensors{.x = pointer("x", x),
                                .logits = pointer("logits", logits, problem.F > 0),
                                .filters = pointer("filters", filters),
                                .y = pointer("y", y, !backward),
                                .grad_y = pointer("grad_y", grad_y, backward),
                                .grad_x = pointer("grad_x", grad_x, false),
                                .grad_logits = pointer("grad_logits", grad_logits, false),
                                .grad_filters = pointer("grad_filters", grad_filters, false),
                                .need_scalars = need_scalars};
    const py::gil_scoped_release no_gil;
    return run(problem, tensors, threads);
}

}  // namespace

// The module needs no GIL: calls share only the plans' cache, which has a mutex, and the instruction set, an atomic.
PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
    m.doc() = "The compiled core. It takes raw addresses: call it through dfformer_kernels.backend.cpu only.";
    m.def("supported_isas", &supported_isas);
    m.def("active_isa", &active_isa);
    m.def("set_active_isa", &set_active_isa, "name"_a);
    m.attr("max_side") = max_side;
    const py::call_guard<py::gil_scoped_release> no_gil;
    m.def("star_relu", &bind_star_relu, no_gil, "n"_a, "dtype"_a, "threads"_a, "scale"_a, "bias"_a, "x"_a, "y"_a = 0,
          "grad_y"_a = 0, "grad_x"_a = 0);
    const auto def_filter = [&](const char* name, auto function) {
        m.def(name, function, "shape"_a, "dtype"_a, "star_relu"_a, "form"_a, "threads"_a, "x"_a, "logits"_a,
              "filters"_a, "y"_a = 0, "grad_y"_a = 0, "grad_x"_a = 0, "grad_logits"_a = 0, "grad_filters"_a = 0,
              "need_scalars"_a = false);
    };
    def_filter("filter", &bind_filter<filter>);
    def_filter("filter_workspace", &bind_filter<filter_workspace>);
}
