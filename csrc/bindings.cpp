// The only file that knows Python: range checks, and the GIL released around the work.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <stdexcept>

#include "dynamic_filter.h"

namespace py = pybind11;
using namespace dfformer;

namespace {

using Address = std::uintptr_t;

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

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "dfformer_kernels' compiled core. Takes raw addresses: call it through dfformer_kernels.cpu only.";
    m.def("supported_isas", &supported_isas);
    m.def("active_isa", &active_isa);
    m.def("set_active_isa", &set_active_isa, py::arg("name"));
    const py::call_guard<py::gil_scoped_release> no_gil;
    m.def("star_relu", &bind_star_relu, no_gil, py::arg("x"), py::arg("y"), py::arg("n"), py::arg("dtype"),
          py::arg("scale"), py::arg("bias"), py::arg("threads"));
    m.def("star_relu_backward", &bind_star_relu_backward, no_gil, py::arg("grad_y"), py::arg("x"), py::arg("grad_x"),
          py::arg("n"), py::arg("dtype"), py::arg("scale"), py::arg("threads"));
}
