// libcufft's functions by name, plans that destroy themselves, and the plans in use.
#include "cufft.h"

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <iterator>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <stdexcept>
#include <type_traits>
#include <utility>

namespace dfformer::cufft {
namespace {

// cufftResult. Codes 10, 12 and 15 are those of cuFFT before version 12.
constexpr const char* result_names[] = {"CUFFT_SUCCESS",
                                        "CUFFT_INVALID_PLAN",
                                        "CUFFT_ALLOC_FAILED",
                                        "CUFFT_INVALID_TYPE",
                                        "CUFFT_INVALID_VALUE",
                                        "CUFFT_INTERNAL_ERROR",
                                        "CUFFT_EXEC_FAILED",
                                        "CUFFT_SETUP_FAILED",
                                        "CUFFT_INVALID_SIZE",
                                        "CUFFT_UNALIGNED_DATA",
                                        "CUFFT_INCOMPLETE_PARAMETER_LIST",
                                        "CUFFT_INVALID_DEVICE",
                                        "CUFFT_PARSE_ERROR",
                                        "CUFFT_NO_WORKSPACE",
                                        "CUFFT_NOT_IMPLEMENTED",
                                        "CUFFT_LICENSE_ERROR",
                                        "CUFFT_NOT_SUPPORTED",
                                        "CUFFT_MISSING_DEPENDENCY",
                                        "CUFFT_NVRTC_FAILURE",
                                        "CUFFT_NVJITLINK_FAILURE",
                                        "CUFFT_NVSHMEM_FAILURE"};

std::string result_name(int code) {
    return code >= 0 && code < static_cast<int>(std::size(result_names)) ? result_names[code]
                                                                         : "code " + std::to_string(code);
}

std::string name_of(const Transform& t) {
    return std::string(t.inverse ? "irfft2" : "rfft2") + " of " +
           (t.dtype == DType::float64 ? "float64 " : "float32 ") + std::to_string(t.H) + "x" + std::to_string(t.W) +
           " planes, N=" + std::to_string(t.N) + ", on device " + std::to_string(t.device);
}

template <class... Arguments>
struct Function {
    const char* name;
    int (*address)(Arguments...) = nullptr;
};

struct CloseLibrary {
    void operator()(void* library) const { dlclose(library); }
};

using PlanId = int;      // cufftHandle
using Size = long long;  // of the functions for sizes beyond 32 bits

struct Library {
    std::unique_ptr<void, CloseLibrary> loaded;
    Function<PlanId*> create{"cufftCreate"};
    Function<PlanId> destroy{"cufftDestroy"};
    Function<PlanId, int> set_auto_allocation{"cufftSetAutoAllocation"};
    Function<PlanId, int, Size*, Size*, Size, Size, Size*, Size, Size, int, Size, std::size_t*> make_plan_many{
        "cufftMakePlanMany64"};
    Function<PlanId, void*> set_work_area{"cufftSetWorkArea"}, set_stream{"cufftSetStream"};
    // by DType, then inverse
    Function<PlanId, void*, void*> execute[2][2] = {{{"cufftExecR2C"}, {"cufftExecC2R"}},
                                                    {{"cufftExecD2Z"}, {"cufftExecZ2D"}}};

    explicit Library(const std::string& path) : loaded(dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) {
        if (!loaded) throw std::runtime_error(dlerror());
        resolve(path, create, destroy, set_auto_allocation, make_plan_many, set_work_area, set_stream, execute[0][0],
                execute[0][1], execute[1][0], execute[1][1]);
    }

  private:
    template <class... Functions>
    void resolve(const std::string& path, Functions&... functions) {
        const auto find = [&](auto& function) {
            void* symbol = dlsym(loaded.get(), function.name);
            if (!symbol) throw std::runtime_error(path + " has no function " + function.name);
            function.address = reinterpret_cast<decltype(function.address)>(symbol);
        };
        (find(functions), ...);
    }
};

template <class... Arguments>
void call(const Transform& transform, const Function<Arguments...>& function,
          std::type_identity_t<Arguments>... arguments) {
    if (const int code = function.address(arguments...))
        throw std::runtime_error(std::string(function.name) + " returned " + result_name(code) + " for " +
                                 name_of(transform));
}

class Handle {
  public:
    Handle(const Library& library, const Transform& transform) : library_(library) {
        call(transform, library.create, &id_);
    }
    Handle(const Handle&) = delete;
    // What it returns is of no use: after a fault on the device every call fails, and nothing can be done about it.
    ~Handle() { library_.destroy.address(id_); }

    PlanId id() const { return id_; }

  private:
    const Library& library_;
    PlanId id_ = -1;
};

class Plan {
  public:
    const Transform transform;

    Plan(std::shared_ptr<const Library> library, const Transform& t)
        : transform(t), library_(std::move(library)), handle_(*library_, t) {
        constexpr int types[2][2] = {{0x2a, 0x2c}, {0x6a, 0x6c}};  // cufftType R2C, C2R, D2Z, Z2D
        Size n[] = {t.H, t.W}, spectrum[] = {t.H, t.W / 2 + 1};
        Size* const input = t.inverse ? spectrum : n;
        Size* const output = t.inverse ? n : spectrum;
        // The workspace comes from the caller, who has an allocator for it.
        call(t, library_->set_auto_allocation, handle_.id(), 0);
        call(t, library_->make_plan_many, handle_.id(), 2, n, input, t.N, 1, output, t.N, 1,
             types[static_cast<int>(t.dtype)][t.inverse], t.N, &workspace_bytes_);
    }

    std::int64_t workspace_bytes() const { return static_cast<std::int64_t>(workspace_bytes_); }

    void run(const Buffers& buffers) {
        if (buffers.workspace_bytes < workspace_bytes())
            throw std::invalid_argument("workspace_bytes: got " + std::to_string(buffers.workspace_bytes) + ", " +
                                        name_of(transform) + " needs " + std::to_string(workspace_bytes_));
        const std::lock_guard lock(mutex_);  // from setting the workspace and stream to the launch that uses them
        call(transform, library_->set_work_area, handle_.id(), buffers.workspace);
        call(transform, library_->set_stream, handle_.id(), buffers.stream);
        call(transform, library_->execute[static_cast<int>(transform.dtype)][transform.inverse], handle_.id(),
             buffers.input, buffers.output);
    }

  private:
    std::shared_ptr<const Library> library_;
    Handle handle_;
    std::size_t workspace_bytes_ = 0;
    std::mutex mutex_;
};

struct Plans {
    std::map<int, std::list<std::shared_ptr<Plan>>> recent;  // by device, most recently used first
    std::set<std::shared_ptr<Plan>> captured;                // that graphs refer to
};

struct Cache {
    std::mutex mutex;
    std::shared_ptr<const Library> library;
    Plans plans;
};

// Never destroyed: when a process ends the driver may be gone before the plans.
Cache& cache = *new Cache;

// A forked child has copies of its parent's plans, which are not its own to destroy: it forgets them.
void forget_plans() {
    new Plans(std::exchange(cache.plans, {}));
    cache.mutex.unlock();
}
[[maybe_unused]] const int at_fork =
    pthread_atfork([] { cache.mutex.lock(); }, [] { cache.mutex.unlock(); }, &forget_plans);

std::shared_ptr<Plan> plan_for(const Transform& transform, bool capturing) {
    const std::lock_guard lock(cache.mutex);
    if (!cache.library) throw std::runtime_error("libcufft has not been opened");
    auto& plans = cache.plans.recent[transform.device];
    const auto found =
        std::find_if(plans.begin(), plans.end(), [&](const auto& plan) { return plan->transform == transform; });
    if (found != plans.end()) {
        plans.splice(plans.begin(), plans, found);
    } else {
        if (capturing)
            throw std::runtime_error(name_of(transform) +
                                     " cannot be planned while a CUDA graph is captured: call the operator once "
                                     "before capturing");
        plans.push_front(std::make_shared<Plan>(cache.library, transform));
        if (plans.size() > plans_per_device) plans.pop_back();
    }
    if (capturing) cache.plans.captured.insert(plans.front());
    return plans.front();
}

}  // namespace

void open(const std::string& path) {
    auto library = std::make_shared<const Library>(path);
    const std::lock_guard lock(cache.mutex);
    cache.library = std::move(library);
    cache.plans = {};
}

std::int64_t plan(const Transform& transform, bool capturing) {
    return plan_for(transform, capturing)->workspace_bytes();
}

void run(const Transform& transform, bool capturing, const Buffers& buffers) {
    plan_for(transform, capturing)->run(buffers);
}

void clear(int device) {
    const std::lock_guard lock(cache.mutex);
    cache.plans.recent.erase(device);
}

std::int64_t plan_count(int device) {
    const std::lock_guard lock(cache.mutex);
    const auto plans = cache.plans.recent.find(device);
    return plans == cache.plans.recent.end() ? 0 : static_cast<std::int64_t>(plans->second.size());
}

}  // namespace dfformer::cufft
