// The only file that knows Python: range checks, and the GIL released around the work.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <limits>
#include <memory>
#include <optional>
#include <stdexcept>
#include <vector>

#include "cpu/blocks.h"
#include "cuda/cufft.h"
#include "dynamic_filter.h"

namespace py = pybind11;
using namespace dfformer;

namespace {

using Address = std::uintptr_t;

// Far beyond any image and any basis; the kernels count both in ints, and may square a side.
constexpr std::int64_t max_side = 32768, max_filters = 65536;

DType checked_dtype(int dtype) {
    if (dtype < 0 || dtype >= num_dtypes)
        throw std::invalid_argument("dtype: got code " + std::to_string(dtype) + ", accepted are 0 to " +
                                    std::to_string(num_dtypes - 1));
    return static_cast<DType>(dtype);
}

void check_size(std::int64_t n, DType dtype) {
    if (n < 0 || n > std::numeric_limits<std::int64_t>::max() / item_size[static_cast<int>(dtype)])
        throw std::invalid_argument("n: got " + std::to_string(n) + ", which is no number of elements");
}

void check_threads(int threads) {
    if (threads < 1 || threads > 4096)
        throw std::invalid_argument("threads: got " + std::to_string(threads) + ", accepted are 1 to 4096");
}

const void* input(const char* name, Address address, std::int64_t n) {
    if (n > 0 && address == 0) throw std::invalid_argument(std::string(name) + ": got a null pointer");
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

std::int64_t num_elements(std::initializer_list<std::int64_t> sizes) {
    std::int64_t result = 1;
    for (std::int64_t size : sizes)
        if (__builtin_mul_overflow(result, size, &result))
            throw std::invalid_argument("shape: the tensors of this problem have more bytes than 64 bits count");
    return result;
}

// (B, H, W, C, F) of a tensor that can exist, so that no offset computed from it overflows.
FilterProblem checked_problem(const std::array<std::int64_t, 5>& shape, int dtype_code,
                              std::optional<std::pair<double, double>> star_relu) {
    const auto [B, H, W, C, F] = shape;
    const DType dtype = checked_dtype(dtype_code);
    const auto check = [&](const char* name, std::int64_t size, std::int64_t least, std::int64_t most) {
        if (size < least || size > most)
            throw std::invalid_argument("shape: got " + std::string(name) + " = " + std::to_string(size) +
                                        ", accepted are " + std::to_string(least) + " to " + std::to_string(most));
    };
    constexpr std::int64_t most = std::numeric_limits<std::int64_t>::max();
    check("B", B, 1, most);
    check("H", H, 1, max_side);
    check("W", W, 1, max_side);
    check("C", C, 1, most);
    check("F", F, 0, max_filters);
    // 32 bytes an element: the largest item, complex, with room for rounding C up to the lanes
    num_elements({B, H, W, C, 32});
    num_elements({B, std::max<std::int64_t>(F, 1), C, 32});
    num_elements({H, W / 2 + 1, std::max(F, C), 32});
    const auto [scale, bias] = star_relu.value_or(std::pair{0.0, 0.0});
    return {B, H, W, C, F, dtype, star_relu.has_value(), scale, bias};
}

using MatrixSizes = std::array<std::int64_t, 3>;

// (M, N, K) of matrices that can exist, with room for rounding up to panels.
void check_matrices(const MatrixSizes& sizes) {
    const auto [M, N, K] = sizes;
    for (const std::int64_t size : sizes)
        if (size < 0) throw std::invalid_argument("sizes: got " + std::to_string(size) + ", accepted are 0 and more");
    constexpr std::int64_t room = 4096;
    for (const auto& [a, b] : {std::pair{M, N}, std::pair{M, K}, std::pair{N, K}}) {
        std::int64_t rows = 0;
        if (__builtin_add_overflow(a, room, &rows)) rows = std::numeric_limits<std::int64_t>::max();
        num_elements({rows, std::max<std::int64_t>(b, 1), room});
    }
}

const float* matrix(const char* name, Address address, std::int64_t n) {
    return static_cast<const float*>(input(name, address, n));
}
float* result(const char* name, Address address, std::int64_t n) {
    return const_cast<float*>(matrix(name, address, n));
}

Layout checked_layout(int layout) {
    if (layout < 0 || layout >= num_layouts)
        throw std::invalid_argument("layout: got code " + std::to_string(layout) + ", accepted are 0 to " +
                                    std::to_string(num_layouts - 1));
    return static_cast<Layout>(layout);
}

void bind_pack(std::int64_t N, std::int64_t K, Address weight, Address panels, int threads) {
    check_matrices({1, N, K});
    check_threads(threads);
    pack(matrix("weight", weight, N * K), N, K, result("panels", panels, N * K), threads);
}

// Address of a weight, or null, and eps.
using NormArguments = std::optional<std::pair<Address, double>>;
// Addresses of x and of a scale, which may be null.
using ResidualArguments = std::optional<std::pair<Address, Address>>;

Norm checked_norm(const NormArguments& norm) {
    if (!norm) return {};
    return {true, matrix("norm", norm->first, 0), static_cast<float>(norm->second)};
}

Residual checked_residual(const ResidualArguments& residual, std::int64_t n) {
    if (!residual) return {};
    return {matrix("residual", residual->first, n), matrix("residual's scale", residual->second, 0)};
}

void bind_product(const MatrixSizes& sizes, int layout, Address x, Address weight, Address bias, Address y,
                  const NormArguments& norm, const ResidualArguments& residual, int threads) {
    const auto [M, N, K] = sizes;
    check_matrices(sizes);
    check_threads(threads);
    product({M, N, K, matrix("x", x, M * K), checked_norm(norm), matrix("weight", weight, N * K),
             checked_layout(layout), matrix("bias", bias, 0), checked_residual(residual, M * N), result("y", y, M * N)},
            threads);
}

void bind_weight_gradient(const MatrixSizes& sizes, Address grad_y, Address x, Address grad, bool add, int threads) {
    const auto [M, N, K] = sizes;
    check_matrices(sizes);
    check_threads(threads);
    weight_gradient({M, N, K, matrix("grad_y", grad_y, M * N), matrix("x", x, M * K), result("grad", grad, N * K), add},
                    threads);
}

void bind_mlp(const MatrixSizes& sizes, std::int64_t hidden, int layout, Address x, Address weight1, double scale,
              double bias, Address weight2, Address bias2, Address before, Address y, const NormArguments& norm,
              const ResidualArguments& residual, int threads) {
    const auto [M, N, K] = sizes;
    check_matrices({M, hidden, K});
    check_matrices({M, N, hidden});
    check_threads(threads);
    if (checked_layout(layout) == Layout::columns)
        throw std::invalid_argument("layout: got code 1, accepted for an MLP are 0 and 2");
    mlp({M, N, K, hidden, matrix("x", x, M * K), checked_norm(norm), matrix("weight1", weight1, hidden * K),
         static_cast<float>(scale), static_cast<float>(bias), matrix("weight2", weight2, N * hidden),
         checked_layout(layout), matrix("bias2", bias2, 0), checked_residual(residual, M * N),
         result("before", before, 0), result("y", y, M * N)},
        threads);
}

void bind_norm_mean(const std::array<std::int64_t, 3>& sizes, Address x, const NormArguments& norm, Address y,
                    int threads) {
    const auto [B, P, K] = sizes;
    for (const std::int64_t size : sizes)
        if (size < 0) throw std::invalid_argument("sizes: got " + std::to_string(size) + ", accepted are 0 and more");
    num_elements({B, P, K, 8});
    check_threads(threads);
    norm_mean({B, P, K, matrix("x", x, B * P * K), checked_norm(norm), result("y", y, B * K)}, threads);
}

const void* required(const char* name, Address address) { return input(name, address, 1); }

void bind_filter(const std::array<std::int64_t, 5>& shape, int dtype,
                 std::optional<std::pair<double, double>> star_relu, Address x, Address logits, Address filters,
                 Address y, int threads) {
    const FilterProblem problem = checked_problem(shape, dtype, star_relu);
    check_threads(threads);
    FilterTensors tensors{};
    tensors.x = required("x", x);
    tensors.logits = problem.F > 0 ? required("logits", logits) : nullptr;
    tensors.filters = required("filters", filters);
    tensors.y = output("y", y, 1);
    const py::gil_scoped_release no_gil;
    filter(problem, tensors, threads);
}

std::pair<double, double> bind_filter_backward(const std::array<std::int64_t, 5>& shape, int dtype,
                                               std::optional<std::pair<double, double>> star_relu, Address grad_y,
                                               Address x, Address logits, Address filters, Address grad_x,
                                               Address grad_logits, Address grad_filters, bool need_scalars,
                                               int threads) {
    const FilterProblem problem = checked_problem(shape, dtype, star_relu);
    check_threads(threads);
    if (need_scalars && !problem.star_relu)
        throw std::invalid_argument("need_scalars: got true, but the problem has no StarReLU");
    if (grad_logits && problem.F == 0)
        throw std::invalid_argument("grad_logits: a global filter (F = 0) has no logits");
    FilterTensors tensors{};
    tensors.x = required("x", x);
    tensors.logits = problem.F > 0 ? required("logits", logits) : nullptr;
    tensors.filters = required("filters", filters);
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
    return filter_workspace(checked_problem(shape, dtype, std::pair{1.0, 0.0}), backward, threads);
}

// A tensor as Python libraries hand it to each other: version 0 of DLPack (https://dmlc.github.io/dlpack).
struct DLManagedTensor {
    void* data;
    std::int32_t device_type, device_index, ndim;
    std::uint8_t type_code, type_bits;
    std::uint16_t type_lanes;
    std::int64_t *shape, *strides;
    std::uint64_t byte_offset;
    void* owner;
    void (*deleter)(DLManagedTensor*);
};
constexpr std::int32_t dl_cpu = 1;
constexpr std::uint8_t dl_float = 2, dl_bfloat = 4;

struct LargeTensor : DLManagedTensor {
    std::vector<std::int64_t> sizes;
    std::int64_t bytes;

    LargeTensor(const std::vector<std::int64_t>& sizes_, DType dtype) : DLManagedTensor{}, sizes(sizes_), bytes(1) {
        const std::int64_t item = item_size[static_cast<int>(dtype)];
        for (const std::int64_t size : sizes)
            if (size < 0 || __builtin_mul_overflow(bytes, size, &bytes) || bytes > max_elements)
                throw std::invalid_argument("shape: no tensor has such sizes");
        bytes *= item;
        data = cpu::take_block(bytes);
        device_type = dl_cpu;
        ndim = static_cast<std::int32_t>(sizes.size());
        type_code = dtype == DType::bfloat16 ? dl_bfloat : dl_float;
        type_bits = static_cast<std::uint8_t>(8 * item);
        type_lanes = 1;
        shape = sizes.data();
        deleter = [](DLManagedTensor* tensor) { delete static_cast<LargeTensor*>(tensor); };
    }
    ~LargeTensor() { cpu::give_block(data, bytes); }
    static constexpr std::int64_t max_elements = std::int64_t{1} << 56;
};

// An uninitialised contiguous tensor as a capsule, for torch.from_dlpack.
py::capsule bind_large_tensor(const std::vector<std::int64_t>& shape, int dtype) {
    constexpr const char* untaken = "dltensor";
    auto tensor = std::make_unique<LargeTensor>(shape, checked_dtype(dtype));
    const py::capsule capsule(static_cast<DLManagedTensor*>(tensor.get()), untaken, [](PyObject* capsule) {
        if (!PyCapsule_IsValid(capsule, untaken)) return;
        auto* tensor = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, untaken));
        tensor->deleter(tensor);
    });
    tensor.release();
    return capsule;
}

// (H, W, N) of arrays that can exist.
cufft::Transform checked_transform(int device, const std::array<std::int64_t, 3>& shape, int dtype_code, bool inverse) {
    const auto [H, W, N] = shape;
    const DType dtype = checked_dtype(dtype_code);
    if (dtype != DType::float32 && dtype != DType::float64)
        throw std::invalid_argument("dtype: got code " + std::to_string(dtype_code) + ", accepted are 0 and 1");
    if (device < 0) throw std::invalid_argument("device: got " + std::to_string(device) + ", which is no index");
    if (H < 1 || H > max_side || W < 1 || W > max_side || N < 1)
        throw std::invalid_argument("shape: got H, W, N = " + std::to_string(H) + ", " + std::to_string(W) + ", " +
                                    std::to_string(N) + ", accepted are sides of 1 to " + std::to_string(max_side) +
                                    " and N >= 1");
    num_elements({H, W / 2 + 1, N, 16});
    return {device, H, W, N, dtype, inverse};
}

std::int64_t bind_cufft_plan(int device, const std::array<std::int64_t, 3>& shape, int dtype, bool inverse,
                             bool capturing) {
    return cufft::plan(checked_transform(device, shape, dtype, inverse), capturing);
}

void bind_cufft_run(int device, const std::array<std::int64_t, 3>& shape, int dtype, bool inverse, bool capturing,
                    Address input, Address output_address, Address workspace, std::int64_t workspace_bytes,
                    Address stream) {
    const cufft::Transform transform = checked_transform(device, shape, dtype, inverse);
    cufft::run(transform, capturing,
               {const_cast<void*>(required("input", input)), output("output", output_address, 1),
                output("workspace", workspace, workspace_bytes), workspace_bytes, reinterpret_cast<void*>(stream)});
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() =
        "dfformer_kernels' compiled core. Takes raw addresses: call it through dfformer_kernels.backends.cpu and libcufft only.";
    m.def("supported_isas", &supported_isas);
    m.def("active_isa", &active_isa);
    m.def("set_active_isa", &set_active_isa, py::arg("name"));
    m.attr("max_side") = max_side;
    m.attr("max_filters") = max_filters;
    const py::call_guard<py::gil_scoped_release> no_gil;
    m.def("star_relu", &bind_star_relu, no_gil, py::arg("x"), py::arg("y"), py::arg("n"), py::arg("dtype"),
          py::arg("scale"), py::arg("bias"), py::arg("threads"));
    m.def("star_relu_backward", &bind_star_relu_backward, no_gil, py::arg("grad_y"), py::arg("x"), py::arg("grad_x"),
          py::arg("n"), py::arg("dtype"), py::arg("scale"), py::arg("threads"));
    m.def("filter", &bind_filter, py::arg("shape"), py::arg("dtype"), py::arg("star_relu"), py::arg("x"),
          py::arg("logits"), py::arg("filters"), py::arg("y"), py::arg("threads"));
    m.def("filter_backward", &bind_filter_backward, py::arg("shape"), py::arg("dtype"), py::arg("star_relu"),
          py::arg("grad_y"), py::arg("x"), py::arg("logits"), py::arg("filters"), py::arg("grad_x"),
          py::arg("grad_logits"), py::arg("grad_filters"), py::arg("need_scalars"), py::arg("threads"));
    m.def("filter_workspace", &bind_filter_workspace, py::arg("shape"), py::arg("dtype"), py::arg("backward"),
          py::arg("threads"), "Bytes that a call allocates beside its tensors.");
    m.def("large_tensor", &bind_large_tensor, py::arg("shape"), py::arg("dtype"));
    m.def("free_kept_blocks", &cpu::free_kept_blocks);
    m.def("free_old_blocks", &cpu::free_old_blocks);
    m.def("panel_width", &panel_width);
    m.def("pack", &bind_pack, no_gil, py::arg("N"), py::arg("K"), py::arg("weight"), py::arg("panels"),
          py::arg("threads"));
    m.def("product", &bind_product, no_gil, py::arg("sizes"), py::arg("layout"), py::arg("x"), py::arg("weight"),
          py::arg("bias"), py::arg("y"), py::arg("norm"), py::arg("residual"), py::arg("threads"));
    m.def("weight_gradient", &bind_weight_gradient, no_gil, py::arg("sizes"), py::arg("grad_y"), py::arg("x"),
          py::arg("grad"), py::arg("add"), py::arg("threads"));
    m.def("mlp", &bind_mlp, no_gil, py::arg("sizes"), py::arg("hidden"), py::arg("layout"), py::arg("x"),
          py::arg("weight1"), py::arg("scale"), py::arg("bias"), py::arg("weight2"), py::arg("bias2"),
          py::arg("before"), py::arg("y"), py::arg("norm"), py::arg("residual"), py::arg("threads"));
    m.def("norm_mean", &bind_norm_mean, no_gil, py::arg("sizes"), py::arg("x"), py::arg("norm"), py::arg("y"),
          py::arg("threads"));
    m.attr("cufft_plans_per_device") = cufft::plans_per_device;
    m.def("cufft_open", &cufft::open, no_gil, py::arg("path"));
    m.def("cufft_plan", &bind_cufft_plan, no_gil, py::arg("device"), py::arg("shape"), py::arg("dtype"),
          py::arg("inverse"), py::arg("capturing"), "Bytes of workspace that cufft_run needs.");
    m.def("cufft_run", &bind_cufft_run, no_gil, py::arg("device"), py::arg("shape"), py::arg("dtype"),
          py::arg("inverse"), py::arg("capturing"), py::arg("input"), py::arg("output"), py::arg("workspace"),
          py::arg("workspace_bytes"), py::arg("stream"));
    m.def("cufft_clear", &cufft::clear, no_gil, py::arg("device"));
    m.def("cufft_plan_count", &cufft::plan_count, no_gil, py::arg("device"));
}
