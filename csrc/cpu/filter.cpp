// Drives the filter step: plans, workspace, threads, and the order of reductions. Compiled for the baseline only.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>

#include <unistd.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "isa.h"
#include "plan.h"

namespace dfformer {
namespace {

using namespace cpu;

struct Free {
    void operator()(void* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<char, Free>;

std::int64_t padded(std::int64_t bytes) { return (bytes + 63) / 64 * 64; }

Memory allocate(std::int64_t bytes) {
    void* memory = bytes ? std::aligned_alloc(64, padded(bytes)) : nullptr;
    if (bytes && !memory) throw std::bad_alloc();
    return Memory(static_cast<char*>(memory));
}

std::int64_t last_level_cache_bytes() {
    static const std::int64_t bytes = [] {
        std::int64_t found = 0;
#ifdef _SC_LEVEL3_CACHE_SIZE
        found = std::max(sysconf(_SC_LEVEL2_CACHE_SIZE), sysconf(_SC_LEVEL3_CACHE_SIZE));
#endif
        return found > 0 ? found : std::int64_t{16} << 20;
    }();
    return bytes;
}

// Below this many elements for each, threads cost more than they bring.
constexpr std::int64_t min_elements_per_thread = 16384;
// Planes of fewer bytes are never shared between threads: they would wait for each other longer than they compute.
constexpr std::int64_t min_shared_plane_bytes = 256 * 1024;
// Partial sums of grad_basis: as many as fit, for threads to work on; the number must not depend on theirs.
constexpr std::int64_t max_slots = 32, max_slots_bytes = 16 << 20;

// Everything about one call that follows from its sizes.
class Driver {
   public:
    Driver(const FilterProblem& problem, const FilterTensors& tensors, int threads)
        : kernels_(active_kernels()),
          kernel_(kernels_.filter[static_cast<int>(problem.dtype)]),
          problem_(problem),
          backward_(tensors.grad_y) {
        const bool wide = problem.dtype == DType::float64;
        const auto plan = [&](std::int64_t size) -> std::shared_ptr<const void> {
            if (wide) return plan_for<double>(static_cast<int>(size));
            return plan_for<float>(static_cast<int>(size));
        };
        row_plan_ = plan(problem.W);
        column_plan_ = plan(problem.H);
        item_ = wide ? 8 : 4;
        const std::int64_t lanes = kernels_.vector_bytes / item_;
        const std::int64_t channel_blocks = (problem.C + lanes - 1) / lanes;
        planes_ = problem.B * channel_blocks;
        // An odd stride spreads a column over all of a cache's sets.
        const std::int64_t row_stride = problem.W < 16 ? problem.W : problem.W | 1;
        call_ = {&problem_, &tensors, row_plan_.get(), column_plan_.get(), channel_blocks, row_stride, nullptr, 0};
        slot_bytes_ = problem.F > 0 && tensors.grad_filters ? problem.H * (problem.W / 2 + 1) * problem.F * 2 * item_ : 0;
        units_ = planes_;
        if (problem.F == 0 && backward_) units_ = channel_blocks;
        if (slot_bytes_) units_ = std::clamp<std::int64_t>(max_slots_bytes / slot_bytes_, 1, std::min(max_slots, planes_));
        call_.num_slots = units_;
        const FilterWorkspace workspace = kernel_.workspace(call_);
        plane_bytes_ = padded(workspace.plane_bytes);
        scratch_bytes_ = padded(workspace.scratch_bytes);
        choose_threads(threads);
    }

    std::int64_t workspace_bytes() const {
        const std::int64_t sums = backward_ ? planes_ * 2 * static_cast<std::int64_t>(sizeof(double)) : 0;
        return shared_bytes() + threads_ * (own_bytes() + scratch_bytes_) + padded(sums) + units_ * slot_bytes_;
    }

    StarReLUScalarGrads run() {
        const Memory memory = allocate(shared_bytes() + threads_ * (own_bytes() + scratch_bytes_));
        const Memory slots = allocate(units_ * slot_bytes_);
        const Memory sums = allocate(backward_ ? planes_ * 2 * static_cast<std::int64_t>(sizeof(double)) : 0);
        memory_ = memory.get();
        call_.slots = slots.get();
        sums_ = reinterpret_cast<double*>(sums.get());
#pragma omp parallel num_threads(threads_) if (threads_ > 1)
        run_on_each_thread();
        StarReLUScalarGrads total{0, 0};
        for (std::int64_t plane = 0; backward_ && plane < planes_; plane++) {
            total.scale += sums_[2 * plane];
            total.bias += sums_[2 * plane + 1];
        }
        return total;
    }

   private:
    // Units are runs of planes that one thread takes in order. Those left over when every thread has had the same
    // number, or all of them where the planes in progress would not fit the last cache together, are shared: all threads
    // work on one plane at a time.
    void choose_threads(int threads) {
        const std::int64_t elements = problem_.B * problem_.H * problem_.W * problem_.C;
        const std::int64_t useful = std::max<std::int64_t>(1, elements / min_elements_per_thread);
        threads_ = static_cast<int>(std::min<std::int64_t>(threads, useful));
        own_units_ = units_;
        if (threads_ > 1 && plane_bytes_ >= min_shared_plane_bytes) {
            own_units_ -= units_ % threads_;
            if (threads_ * plane_bytes_ > last_level_cache_bytes()) own_units_ = 0;
        }
        if (own_units_ == units_) threads_ = static_cast<int>(std::min<std::int64_t>(threads_, units_));
    }

    std::int64_t shared_bytes() const { return own_units_ < units_ ? plane_bytes_ : 0; }
    std::int64_t own_bytes() const { return own_units_ > 0 ? plane_bytes_ : 0; }

    PlaneTask task(std::int64_t plane, std::int64_t unit, void* workspace) const {
        // A weight's gradient adds up over samples, so those are neighbours; else channels are.
        const bool by_channel = problem_.F == 0;
        const std::int64_t sample = by_channel ? plane % problem_.B : plane / call_.channel_blocks;
        const std::int64_t block = by_channel ? plane / problem_.B : plane % call_.channel_blocks;
        return {sample, block, unit, plane == first_plane(unit), workspace};
    }
    std::int64_t first_plane(std::int64_t unit) const { return unit * planes_ / units_; }

    void end(const PlaneTask& task, std::int64_t plane) const {
        double ignored[2];
        kernel_.end(call_, task, backward_ ? sums_ + 2 * plane : ignored);
    }

    void run_on_each_thread() const {
#ifdef _OPENMP
        const int thread = omp_get_thread_num();
#else
        const int thread = 0;
#endif
        char* const own = memory_ + shared_bytes() + thread * (own_bytes() + scratch_bytes_);
        void* const scratch = own + own_bytes();
        const int pairs = static_cast<int>((problem_.H + 1) / 2), columns = static_cast<int>(problem_.W / 2 + 1);
#pragma omp for schedule(static)
        for (std::int64_t unit = 0; unit < own_units_; unit++)
            for (std::int64_t plane = first_plane(unit); plane < first_plane(unit + 1); plane++) {
                const PlaneTask own_task = task(plane, unit, own);
                kernel_.begin(call_, own_task);
                kernel_.rows(call_, own_task, scratch, 0, pairs);
                kernel_.columns(call_, own_task, scratch, 0, columns);
                kernel_.inverse_rows(call_, own_task, scratch, 0, pairs);
                end(own_task, plane);
            }
        for (std::int64_t unit = own_units_; unit < units_; unit++)
            for (std::int64_t plane = first_plane(unit); plane < first_plane(unit + 1); plane++) {
                const PlaneTask shared_task = task(plane, unit, memory_);
#pragma omp single
                kernel_.begin(call_, shared_task);
                in_parts(kernel_.rows, shared_task, scratch, pairs);
                in_parts(kernel_.columns, shared_task, scratch, columns);
                in_parts(kernel_.inverse_rows, shared_task, scratch, pairs);
#pragma omp single
                end(shared_task, plane);
            }
        if (!slot_bytes_) return;
#pragma omp for schedule(static)
        for (std::int64_t h = 0; h < problem_.H; h++)
            kernel_.sum_slots(call_, static_cast<int>(h), static_cast<int>(h) + 1);
    }

    // All threads reach this together; it returns when the last is done.
    void in_parts(void (*step)(const FilterCall&, const PlaneTask&, void*, int, int), const PlaneTask& task, void* scratch,
                  int count) const {
        const int part = std::max(1, std::min(8, count / (2 * threads_)));
#pragma omp for schedule(static)
        for (int first = 0; first < count; first += part)
            step(call_, task, scratch, first, std::min(count, first + part));
    }

    const Kernels& kernels_;
    const FilterKernel& kernel_;
    const FilterProblem problem_;
    const bool backward_;
    std::shared_ptr<const void> row_plan_, column_plan_;
    FilterCall call_;
    std::int64_t item_, planes_, units_, own_units_, slot_bytes_, plane_bytes_, scratch_bytes_;
    int threads_;
    char* memory_ = nullptr;
    double* sums_ = nullptr;
};

}  // namespace

void filter(const FilterProblem& problem, const FilterTensors& tensors, int threads) {
    Driver(problem, tensors, threads).run();
}

StarReLUScalarGrads filter_backward(const FilterProblem& problem, const FilterTensors& tensors, int threads) {
    return Driver(problem, tensors, threads).run();
}

std::int64_t filter_workspace(const FilterProblem& problem, bool backward, int threads) {
    char anything;
    FilterTensors tensors{};
    if (backward) {
        tensors.grad_y = tensors.grad_x = tensors.grad_logits = tensors.grad_filters = &anything;
        tensors.need_scalars = problem.star_relu;
    }
    return Driver(problem, tensors, threads).workspace_bytes();
}

}  // namespace dfformer
