// Drives the filter step: plans, workspace, threads, and the order of reductions. Compiled for the baseline only.
#include <algorithm>
#include <bit>
#include <fstream>
#include <memory>
#include <span>
#include <string>
#include <thread>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "isa.h"
#include "workspace.h"

namespace dfformer {
namespace {

using namespace cpu;

// Total size of the machine's last-level caches, assuming all are like the first processor's. Read from sysfs: on many
// systems sysconf reports one cache per package, however many there are.
std::int64_t last_level_cache_bytes() {
    static const std::int64_t bytes = [] {
        std::int64_t kib = 0, sharing = 1;
        for (int index = 0;; index++) {
            const std::string folder = "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index);
            std::int64_t size;
            std::string processors;  // hexadecimal bit mask
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

// A thread costs more than it saves on fewer elements than this.
constexpr std::int64_t min_elements_per_thread = 16384;
// A smaller tile or basis is never shared between threads: barriers would take longer than the work.
constexpr std::int64_t min_shared_bytes = 256 * 1024;
// A larger tile is always shared if one tile per thread would not fit the last-level caches.
constexpr std::int64_t max_own_tile_bytes = 2 << 20;
// Partial sums of grad_basis, one per slot. Their number limits parallelism and must not depend on the threads, or the
// bits of the sum would.
constexpr std::int64_t max_slots = 16, max_slots_bytes = 16 << 20;
// A thread's tiles in flight stay in its L2 cache. If not even one fits, two are no slower and use both cache lines of
// a DRAM burst.
constexpr std::int64_t max_group_bytes = 640 * 1024;
// A group reads this much of a pixel at a time; more was no faster.
constexpr int max_pixel_bytes = 256;

// The OpenMP team, seen from one of its threads.
struct Team {
    int thread = 0, threads = 1;

    static Team current() {
#ifdef _OPENMP
        return {omp_get_thread_num(), omp_get_num_threads()};
#else
        return {};
#endif
    }

    // Static partition of [0, count), then a barrier: every thread of the team must call it.
    template <class Step>
    void for_range(std::int64_t count, const Step& step) const {
        const int first = static_cast<int>(count * thread / threads);
        const int last = static_cast<int>(count * (thread + 1) / threads);
        if (first < last) step(first, last);
#pragma omp barrier
    }
};

// One call: everything that depends only on its sizes, then the call itself.
//
// Tiles are numbered so that consecutive ones can form a group, and are split into units: ranges that one thread
// processes in order. grad_basis is a sum over all tiles, so a unit is the tiles of one slot. grad_weight is a sum over
// samples, so a unit is the tiles of one range of channels. Units are dealt out evenly. Those that remain are shared,
// all threads working on one tile at a time; all units are shared if the tiles in flight would not fit the last-level
// caches together.
class Driver {
  public:
    Driver(const FilterProblem& problem, const FilterTensors& tensors, int threads)
        : kernels_(active_kernels()),
          kernel_(kernels_.filter[static_cast<int>(problem.dtype)]),
          problem_(problem),
          backward_(tensors.grad_y) {
        const bool float64 = problem.dtype == DType::float64;
        row_plan_ = plan_for(static_cast<int>(problem.W), float64);
        column_plan_ = plan_for(static_cast<int>(problem.H), float64);
        call_ = {&problem_, &tensors, row_plan_.get(), column_plan_.get(), row_stride()};
        const std::int64_t lanes = kernels_.vector_bytes / (float64 ? sizeof(double) : sizeof(float));
        channel_tiles_ = (problem.C + lanes - 1) / lanes;
        tiles_ = problem.B * channel_tiles_;
        const FilterWorkspace workspace = kernel_.workspace(call_);
        tile_bytes_ = padded(workspace.tile_bytes);
        scratch_bytes_ = padded(workspace.scratch_bytes);
        basis_bytes_ = padded(workspace.basis_bytes);
        slot_bytes_ = workspace.slot_bytes;
        const std::int64_t elements = problem.B * problem.H * problem.W * problem.C;
        threads_ = static_cast<int>(std::clamp<std::int64_t>(elements / min_elements_per_thread, 1, threads));
        choose_units();
        share_units();
    }

    std::int64_t workspace_bytes() const { return allocated(tiles_bytes()) + allocated(slots_bytes()); }

    ScalarGrads run() {
        const Memory memory = allocate(tiles_bytes()), slots = allocate(slots_bytes());
        const std::vector<std::int32_t> pixel_at =
            problem_.channels_first ? pixel_table() : std::vector<std::int32_t>{};
        call_.pixel_at = pixel_at.data();
        call_.slots = slots.get();
        memory_ = memory.get();
        std::vector<ScalarGrads> sums(backward_ ? tiles_ : 0);
        sums_ = sums.data();
#pragma omp parallel num_threads(threads_) if (threads_ > 1)
        run_on_each_thread();
        return sum(sums);
    }

  private:
    // Where a tile's workspace holds each pixel, in registers.
    std::vector<std::int32_t> pixel_table() const {
        std::vector<std::int32_t> at(problem_.H * problem_.W);
        const int* rows = column_plan_->pairs;
        for (int i = 0; i < 2 * column_plan_->num_pairs; i++)
            for (int w = 0; rows[i] >= 0 && w < problem_.W; w++)
                at[rows[i] * problem_.W + w] =
                    static_cast<std::int32_t>(2 * (i / 2 * row_stride() + row_plan_->position[w]) + i % 2);
        return at;
    }

    // An odd stride spreads a column over all cache sets.
    std::int64_t row_stride() const { return problem_.W < 16 ? problem_.W : problem_.W | 1; }

    void choose_units() {
        const std::int64_t least = tile_bytes_ <= max_own_tile_bytes ? 2 : 1;
        const std::int64_t most = std::min(TileGroup::max_count, max_pixel_bytes / kernels_.vector_bytes);
        group_ = problem_.channels_first ? 1 : std::clamp(max_group_bytes / tile_bytes_, least, most);
        if (slot_bytes_)
            units_ = std::clamp<std::int64_t>(max_slots_bytes / slot_bytes_, 1, std::min(max_slots, tiles_));
        else if (by_channel())
            units_ = channel_tiles_;
        else if (can_be_shared() && tiles_ % threads_ && tiles_ < 8 * threads_)
            units_ = tiles_;
        else  // the same number for each thread, of at most one group each
            units_ = std::min(tiles_, threads_ * ((tiles_ - 1) / (threads_ * group_) + 1));
        group_ = std::min(group_, (tiles_ - 1) / units_ + 1);
        call_.num_slots = units_;
    }

    bool shares_basis() const { return basis_bytes_ >= min_shared_bytes; }
    bool can_be_shared() const { return threads_ > 1 && tile_bytes_ >= min_shared_bytes; }

    void share_units() {
        own_units_ = units_;
        if (can_be_shared()) {
            own_units_ -= units_ % threads_;
            const bool crowded = threads_ * tile_bytes_ > last_level_cache_bytes();
            if (crowded && tile_bytes_ > max_own_tile_bytes) own_units_ = 0;
        }
        if (own_units_ == units_) threads_ = static_cast<int>(std::min<std::int64_t>(threads_, units_));
    }

    // For grad_weight, a sum over samples, consecutive tiles belong to one channel range. Otherwise they belong to one
    // sample.
    bool by_channel() const { return problem_.F == 0 && !problem_.weight_per_sample && backward_; }

    // Workspace layout: first what threads share (a large basis, a tile), then for each thread a group, scratch and a
    // small basis.
    std::int64_t shared_bytes() const {
        return (shares_basis() ? basis_bytes_ : 0) + (own_units_ < units_ ? tile_bytes_ : 0);
    }
    std::int64_t own_bytes() const { return own_units_ > 0 ? group_ * tile_bytes_ : 0; }
    std::int64_t bytes_of_thread() const { return own_bytes() + scratch_bytes_ + (shares_basis() ? 0 : basis_bytes_); }
    std::int64_t tiles_bytes() const { return shared_bytes() + threads_ * bytes_of_thread(); }
    std::int64_t slots_bytes() const { return slot_bytes_ ? units_ * slot_bytes_ : 0; }
    std::int64_t first_tile(std::int64_t unit) const { return unit * tiles_ / units_; }

    // Up to `limit` tiles of one sample and unit, from `tile` on.
    TileGroup group(std::int64_t tile, std::int64_t unit, std::int64_t limit, char* workspace) const {
        TileGroup group{};
        for (; tile < first_tile(unit + 1) && group.count < limit; tile++) {
            const std::int64_t sample = by_channel() ? tile % problem_.B : tile / channel_tiles_;
            const std::int64_t channel_tile = by_channel() ? tile / problem_.B : tile % channel_tiles_;
            if (group.count && (sample != group.tasks[0].sample || by_channel())) break;
            const bool first = problem_.weight_per_sample || tile == first_tile(unit);
            group.tasks[group.count] = {sample, channel_tile, unit, first, workspace};
            workspace += tile_bytes_;
            group.count++;
        }
        return group;
    }

    void begin(const TileGroup& group) const {
        for (int g = 0; g < group.count; g++) kernel_.begin(call_, group.tasks[g]);
    }
    void end(const TileGroup& group, std::int64_t tile) const {
        for (int g = 0; backward_ && g < group.count; g++) kernel_.end(call_, group.tasks[g], sums_[tile + g].data());
    }

    void run_on_each_thread() const {
        const Team team = Team::current();
        char* const own = memory_ + shared_bytes() + team.thread * bytes_of_thread();
        char* const shared_tile = memory_ + (shares_basis() ? basis_bytes_ : 0);
        void* const scratch = own + own_bytes();
        const int columns = static_cast<int>(problem_.W / 2 + 1), pairs = column_plan_->num_pairs;
        const struct {
            FilterStep run;
            int count;
        } all_steps[] = {{kernel_.load_planes, pairs},
                         {kernel_.rows, pairs},
                         {kernel_.columns, columns},
                         {kernel_.inverse_rows, pairs},
                         {kernel_.store_planes, pairs}};
        const auto steps = problem_.channels_first ? std::span(all_steps) : std::span(all_steps).subspan(1, 3);
        FilterCall call = call_;
        if (shares_basis()) {
            call.basis = memory_;
            team.for_range(columns, [&](int first, int last) { kernel_.arrange_basis(call, first, last); });
        } else {  // a copy per thread: faster than fetching one from another core's cache
            call.basis = own + own_bytes() + scratch_bytes_;
            kernel_.arrange_basis(call, 0, columns);
        }
#pragma omp for schedule(static) nowait
        for (std::int64_t unit = 0; unit < own_units_; unit++)
            for (std::int64_t tile = first_tile(unit); tile < first_tile(unit + 1);) {
                const TileGroup own_group = group(tile, unit, group_, own);
                begin(own_group);
                for (const auto& step : steps) step.run(call, own_group, scratch, 0, step.count);
                end(own_group, tile);
                tile += own_group.count;
            }
        for (std::int64_t unit = own_units_; unit < units_; unit++)
            for (std::int64_t tile = first_tile(unit); tile < first_tile(unit + 1); tile++) {
                const TileGroup shared = group(tile, unit, 1, shared_tile);
#pragma omp single
                begin(shared);
                for (const auto& step : steps)
                    team.for_range(step.count,
                                   [&](int first, int last) { step.run(call, shared, scratch, first, last); });
#pragma omp single
                end(shared, tile);
            }
        if (!slot_bytes_) return;
#pragma omp barrier
        team.for_range(problem_.H, [&](int first, int last) { kernel_.sum_slots(call_, first, last); });
    }

    const Kernels& kernels_;
    const FilterKernel& kernel_;
    const FilterProblem problem_;
    const bool backward_;
    std::shared_ptr<const LineOrder> row_plan_, column_plan_;
    FilterCall call_;
    std::int64_t channel_tiles_, tiles_, units_, own_units_, group_;
    std::int64_t slot_bytes_, tile_bytes_, scratch_bytes_, basis_bytes_;
    int threads_;
    char* memory_ = nullptr;
    ScalarGrads* sums_ = nullptr;
};

}  // namespace

ScalarGrads filter(const FilterProblem& problem, const FilterTensors& tensors, int threads) {
    return Driver(problem, tensors, threads).run();
}

std::int64_t filter_workspace(const FilterProblem& problem, const FilterTensors& tensors, int threads) {
    return Driver(problem, tensors, threads).workspace_bytes();
}

}  // namespace dfformer
