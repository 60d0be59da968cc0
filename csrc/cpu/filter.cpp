// Drives the filter step: plans, workspace, threads, and the order of reductions. Compiled for the baseline only.
#include <algorithm>
#include <bit>
#include <fstream>
#include <memory>
#include <string>
#include <thread>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "isa.h"
#include "plan.h"
#include "workspace.h"

namespace dfformer {
namespace {

using namespace cpu;

// The last caches of all processors this process may use, as Linux tells them of the first; sysconf counts a package's
// as one on many systems.
std::int64_t last_caches_bytes() {
    static const std::int64_t bytes = [] {
        std::int64_t kib = 0, sharing = 1;
        for (int index = 0;; index++) {
            const std::string folder = "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index);
            std::int64_t size;
            std::string processors;  // a bit for each, in hexadecimal
            if (!(std::ifstream(folder + "/size") >> size && std::ifstream(folder + "/shared_cpu_map") >> processors))
                break;
            if (size < kib) continue;
            kib = size;
            sharing = 0;
            for (const char digit : processors)
                if (digit != ',') sharing += std::popcount(std::stoul(std::string(1, digit), nullptr, 16));
        }
        if (kib == 0 || sharing == 0) return std::int64_t{16} << 20;
        return kib * 1024 * ((std::thread::hardware_concurrency() + sharing - 1) / sharing);
    }();
    return bytes;
}

// Below this many elements for each, threads cost more than they bring.
constexpr std::int64_t min_elements_per_thread = 16384;
// A plane or a basis of fewer bytes is never shared between threads: they would wait for each other longer than they
// compute.
constexpr std::int64_t min_shared_bytes = 256 * 1024;
// Larger ones always are where every thread's own would crowd each other out of the last caches.
constexpr std::int64_t max_own_plane_bytes = 2 << 20;
// Partial sums of grad_basis: as many as fit, for threads to work on; the number must not depend on theirs.
constexpr std::int64_t max_slots = 16, max_slots_bytes = 16 << 20;
// Planes in progress on one thread stay in its L2 cache. Where even one does not, two are no worse off, and use both of
// the cache lines that memory sends together.
constexpr std::int64_t max_group_bytes = 640 * 1024;
// More of a pixel's neighbouring channels than this bring nothing.
constexpr int max_bytes_of_pixel = 256;

// The threads that run together, as one of them sees them.
struct Team {
    int thread = 0, threads = 1;

    static Team here() {
#ifdef _OPENMP
        return {omp_get_thread_num(), omp_get_num_threads()};
#else
        return {};
#endif
    }

    // Each does step(first, last) for its part of [0, count). All reach this together; it returns when all are done.
    template <class Step>
    void share(std::int64_t count, const Step& step) const {
        const int first = static_cast<int>(count * thread / threads);
        const int last = static_cast<int>(count * (thread + 1) / threads);
        if (first < last) step(first, last);
#pragma omp barrier
    }
};

// Everything about one call that follows from its sizes.
//
// Planes are numbered so that neighbours can be a group, and cut into units: runs that one thread takes in order. A
// basis' gradient adds up over all planes, so its units are those that share a slot; a weight's over samples, so the
// units are its channel blocks. Units left over when every thread has had the same number, or all of them where the
// planes in progress would not fit the last cache together, are shared: all threads work on one plane at a time.
class Driver {
  public:
    Driver(const FilterProblem& problem, const FilterTensors& tensors, int threads)
        : kernels_(active_kernels()),
          kernel_(kernels_.filter[static_cast<int>(problem.dtype)]),
          problem_(problem),
          backward_(tensors.grad_y) {
        if (problem.dtype == DType::float64)
            set_plans<double>();
        else
            set_plans<float>();
        const std::int64_t lanes = kernels_.vector_bytes / item_;
        const std::int64_t channel_blocks = (problem.C + lanes - 1) / lanes;
        planes_ = problem.B * channel_blocks;
        // An odd stride spreads a column over all of a cache's sets.
        const std::int64_t row_stride = problem.W < 16 ? problem.W : problem.W | 1;
        call_ = {&problem_, &tensors, row_plan_.get(), column_plan_.get(), channel_blocks, row_stride, nullptr,
                 nullptr,   0};
        const FilterWorkspace workspace = kernel_.workspace(call_);
        plane_bytes_ = padded(workspace.plane_bytes);
        scratch_bytes_ = padded(workspace.scratch_bytes);
        basis_bytes_ = padded(workspace.basis_bytes);
        const std::int64_t elements = problem.B * problem.H * problem.W * problem.C;
        threads_ = static_cast<int>(std::clamp<std::int64_t>(elements / min_elements_per_thread, 1, threads));
        slot_bytes_ = workspace.slot_bytes;
        choose_units();
        share_units();
    }

    std::int64_t workspace_bytes() const {
        return allocated(planes_bytes()) + allocated(slots_bytes()) + allocated(sums_bytes());
    }

    StarReLUScalarGrads run() {
        const Memory memory = allocate(planes_bytes());
        const Memory slots = allocate(slots_bytes());
        const Memory sums = allocate(sums_bytes());
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
    template <class T>
    void set_plans() {
        const auto row_plan = plan_for<T>(static_cast<int>(problem_.W));
        const auto column_plan = plan_for<T>(static_cast<int>(problem_.H));
        row_plan_ = row_plan;
        column_plan_ = column_plan;
        num_pairs_ = column_plan->num_pairs;
        item_ = sizeof(T);
    }

    void choose_units() {
        const std::int64_t least = plane_bytes_ <= max_own_plane_bytes ? 2 : 1;
        const std::int64_t most = std::min(PlaneGroup::max_count, max_bytes_of_pixel / kernels_.vector_bytes);
        group_ = std::clamp(max_group_bytes / plane_bytes_, least, most);
        if (slot_bytes_)
            units_ = std::clamp<std::int64_t>(max_slots_bytes / slot_bytes_, 1, std::min(max_slots, planes_));
        else if (by_channel())
            units_ = call_.channel_blocks;
        else if (can_be_shared() && planes_ % threads_ && planes_ < 8 * threads_)
            units_ = planes_;
        else  // as many for each thread, of a group or less
            units_ = std::min(planes_, threads_ * ((planes_ - 1) / (threads_ * group_) + 1));
        group_ = std::min(group_, (planes_ - 1) / units_ + 1);
        call_.num_slots = units_;
    }

    bool shares_basis() const { return basis_bytes_ >= min_shared_bytes; }
    bool can_be_shared() const { return threads_ > 1 && plane_bytes_ >= min_shared_bytes; }

    void share_units() {
        own_units_ = units_;
        if (can_be_shared()) {
            own_units_ -= units_ % threads_;
            const bool crowded = threads_ * plane_bytes_ > last_caches_bytes();
            if (crowded && plane_bytes_ > max_own_plane_bytes) own_units_ = 0;
        }
        if (own_units_ == units_) threads_ = static_cast<int>(std::min<std::int64_t>(threads_, units_));
    }

    // A weight's gradient adds up over samples, so those are neighbours; else channel blocks are.
    bool by_channel() const { return problem_.F == 0 && backward_; }

    // Memory: what threads share, the basis first, then each thread's own: a group, scratch and a small basis.
    std::int64_t shared_bytes() const {
        return (shares_basis() ? basis_bytes_ : 0) + (own_units_ < units_ ? plane_bytes_ : 0);
    }
    std::int64_t own_bytes() const { return own_units_ > 0 ? group_ * plane_bytes_ : 0; }
    std::int64_t bytes_of_thread() const { return own_bytes() + scratch_bytes_ + (shares_basis() ? 0 : basis_bytes_); }
    std::int64_t planes_bytes() const { return shared_bytes() + threads_ * bytes_of_thread(); }
    std::int64_t sums_bytes() const { return backward_ ? planes_ * 2 * std::int64_t{sizeof(double)} : 0; }
    std::int64_t slots_bytes() const { return slot_bytes_ ? units_ * slot_bytes_ : 0; }
    std::int64_t first_plane(std::int64_t unit) const { return unit * planes_ / units_; }

    // Up to `limit` planes from `plane` on, of one sample and unit.
    PlaneGroup group(std::int64_t plane, std::int64_t unit, std::int64_t limit, char* workspace) const {
        PlaneGroup group{};
        for (; plane < first_plane(unit + 1) && group.count < limit; plane++) {
            const std::int64_t sample = by_channel() ? plane % problem_.B : plane / call_.channel_blocks;
            const std::int64_t block = by_channel() ? plane / problem_.B : plane % call_.channel_blocks;
            if (group.count && (sample != group.tasks[0].sample || by_channel())) break;
            group.tasks[group.count] = {sample, block, unit, plane == first_plane(unit), workspace};
            workspace += plane_bytes_;
            group.count++;
        }
        return group;
    }

    void begin(const PlaneGroup& group) const {
        for (int g = 0; g < group.count; g++) kernel_.begin(call_, group.tasks[g]);
    }
    void end(const PlaneGroup& group, std::int64_t plane) const {
        double ignored[2];
        for (int g = 0; g < group.count; g++)
            kernel_.end(call_, group.tasks[g], backward_ ? sums_ + 2 * (plane + g) : ignored);
    }

    void run_on_each_thread() const {
        const Team team = Team::here();
        char* const own = memory_ + shared_bytes() + team.thread * bytes_of_thread();
        char* const shared_plane = memory_ + (shares_basis() ? basis_bytes_ : 0);
        void* const scratch = own + own_bytes();
        const int columns = static_cast<int>(problem_.W / 2 + 1);
        FilterCall call = call_;
        if (shares_basis()) {
            call.basis = memory_;
            team.share(columns, [&](int first, int last) { kernel_.arrange_basis(call, first, last); });
        } else {  // less work than to wait for another thread's to come from its cache
            call.basis = own + own_bytes() + scratch_bytes_;
            kernel_.arrange_basis(call, 0, columns);
        }
#pragma omp for schedule(static) nowait
        for (std::int64_t unit = 0; unit < own_units_; unit++)
            for (std::int64_t plane = first_plane(unit); plane < first_plane(unit + 1);) {
                const PlaneGroup own_group = group(plane, unit, group_, own);
                begin(own_group);
                kernel_.rows(call, own_group, scratch, 0, num_pairs_);
                kernel_.columns(call, own_group, scratch, 0, columns);
                kernel_.inverse_rows(call, own_group, scratch, 0, num_pairs_);
                end(own_group, plane);
                plane += own_group.count;
            }
        for (std::int64_t unit = own_units_; unit < units_; unit++)
            for (std::int64_t plane = first_plane(unit); plane < first_plane(unit + 1); plane++) {
                const PlaneGroup shared = group(plane, unit, 1, shared_plane);
#pragma omp single
                begin(shared);
                team.share(num_pairs_, [&](int first, int last) { kernel_.rows(call, shared, scratch, first, last); });
                team.share(columns, [&](int first, int last) { kernel_.columns(call, shared, scratch, first, last); });
                team.share(num_pairs_,
                           [&](int first, int last) { kernel_.inverse_rows(call, shared, scratch, first, last); });
#pragma omp single
                end(shared, plane);
            }
        if (!slot_bytes_) return;
#pragma omp barrier
        team.share(problem_.H, [&](int first, int last) { kernel_.sum_slots(call_, first, last); });
    }

    const Kernels& kernels_;
    const FilterKernel& kernel_;
    const FilterProblem problem_;
    const bool backward_;
    std::shared_ptr<const void> row_plan_, column_plan_;
    FilterCall call_;
    std::int64_t item_, planes_, units_, own_units_, group_, slot_bytes_, plane_bytes_, scratch_bytes_, basis_bytes_;
    int threads_, num_pairs_;
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
