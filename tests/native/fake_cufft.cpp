// A libcufft for machines without a GPU: the functions the compiled core uses, on host memory, by the definition.
//
// It obeys the advanced data layout's rules and keeps its intermediate result in the work area, so that a wrong or
// shared one is seen in the numbers. What cuFFT would forbid or leave undefined is remembered as a violation.
#include <chrono>
#include <cmath>
#include <complex>
#include <condition_variable>
#include <cstdint>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <type_traits>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using Complex = std::complex<double>;
using Size = long long;

enum Result { success = 0, invalid_plan = 1, invalid_value = 4, unaligned_data = 9 };
enum Type { r2c = 0x2a, c2r = 0x2c, d2z = 0x6a, z2d = 0x6c };

struct Layout {
    Size width, stride, distance;  // of rows as they are stored
    Size at(Size row, Size column, Size batch) const { return batch * distance + (row * width + column) * stride; }
};

struct Plan {
    int device;
    bool auto_allocation = true, made = false, running = false;
    Size H = 0, W = 0, batch = 0;
    Layout input{}, output{};
    int type = 0;
    std::size_t work_size = 0;
    void* work_area = nullptr;
    bool work_area_set = false, stream_set = false;

    Size K() const { return W / 2 + 1; }
};

std::mutex mutex;
std::map<int, std::shared_ptr<Plan>> plans;
std::map<std::string, int> failures, calls;
std::string violation;
int last_id = 0;
void *last_work_area = nullptr, *last_stream = nullptr;
bool mixes_imaginary_parts = false;
int meeting = 0, waiting = 0;
std::condition_variable met;
thread_local int current_device = 0;

// With `mutex` held.
int violate(const char* function, const std::string& what) {
    if (violation.empty()) violation = std::string(function) + ": " + what;
    return invalid_value;
}

// Counts the call; the code it was told to fail with, once.
int begin(const char* function) {
    calls[function]++;
    const auto failure = failures.extract(function);
    return failure ? failure.mapped() : success;
}

// What every function on a plan begins with: `use(plan)` under the lock.
template <class Use>
int with_plan(const char* function, int id, Use use) {
    const std::lock_guard lock(mutex);
    if (const int code = begin(function)) return code;
    const auto found = plans.find(id);
    if (found == plans.end()) return violate(function, "no such plan"), invalid_plan;
    Plan& plan = *found->second;
    if (plan.device != current_device) return violate(function, "another device is current");
    if (plan.running) return violate(function, "the plan is running in another thread");
    return use(plan);
}

std::vector<Complex> roots(Size n, int sign) {
    std::vector<Complex> result;
    for (Size k = 0; k < n; k++)
        result.push_back(std::polar(1.0, sign * 2 * M_PI * static_cast<double>(k) / static_cast<double>(n)));
    return result;
}

template <class T>
void forward(const Plan& p, const T* input, std::complex<T>* output, Complex* work) {
    const auto row_roots = roots(p.W, -1), column_roots = roots(p.H, -1);
    for (Size n = 0; n < p.batch; n++)
        for (Size k = 0; k < p.K(); k++) {
            Complex* const column = work + (n * p.K() + k) * p.H;
            for (Size h = 0; h < p.H; h++) {
                column[h] = 0;
                for (Size w = 0; w < p.W; w++)
                    column[h] += row_roots[k * w % p.W] * static_cast<double>(input[p.input.at(h, w, n)]);
            }
            for (Size g = 0; g < p.H; g++) {
                Complex sum = 0;
                for (Size h = 0; h < p.H; h++) sum += column[h] * column_roots[g * h % p.H];
                output[p.output.at(g, k, n)] = std::complex<T>(sum);
            }
        }
}

template <class T>
void inverse(const Plan& p, std::complex<T>* input, T* output, Complex* work) {
    const auto row_roots = roots(p.W, 1), column_roots = roots(p.H, 1);
    const T nan = std::numeric_limits<T>::quiet_NaN();
    for (Size n = 0; n < p.batch; n++)
        for (Size k = 0; k < p.K(); k++)
            for (Size h = 0; h < p.H; h++) {
                Complex& sum = work[(n * p.K() + k) * p.H + h] = 0;
                for (Size g = 0; g < p.H; g++) sum += Complex(input[p.input.at(g, k, n)]) * column_roots[g * h % p.H];
            }
    for (Size n = 0; n < p.batch; n++)
        for (Size h = 0; h < p.H; h++) {
            for (Size k = 0; k < p.K(); k++) input[p.input.at(h, k, n)] = {nan, nan};  // as cuFFT may
            for (Size w = 0; w < p.W; w++) {
                double sum = 0;
                for (Size k = 0; k < p.K(); k++) {
                    const Complex value = work[(n * p.K() + k) * p.H + h];
                    const bool own_conjugate = 2 * k % p.W == 0;
                    const double real = (value * row_roots[k * w % p.W]).real();
                    sum += own_conjugate ? value.real() * row_roots[k * w % p.W].real() : 2 * real;
                    if (own_conjugate && mixes_imaginary_parts) sum += value.imag();
                }
                output[p.output.at(h, w, n)] = static_cast<T>(sum);
            }
        }
}

// Waits until as many calls as fake_cufft_meet() said are here at once.
void meet(std::unique_lock<std::mutex>& lock) {
    if (meeting == 0) return;
    if (++waiting == meeting) {
        meeting = waiting = 0;
        return met.notify_all();
    }
    if (!met.wait_for(lock, std::chrono::seconds(20), [] { return meeting == 0; }))
        violate("meet", "transforms do not run at the same time");
}

template <class From, class To>
int execute(const char* function, int type, int id, From* input, To* output) {
    std::shared_ptr<Plan> plan;
    const int code = with_plan(function, id, [&](Plan& p) {
        const auto alignment = 2 * sizeof(std::conditional_t<(sizeof(From) < sizeof(To)), From, To>);
        if (!p.made || p.type != type) return violate(function, "not a plan for this");
        if (!p.work_area_set || !p.work_area || !p.stream_set)
            return violate(function, "work area and stream are to be set before every call");
        if (static_cast<void*>(input) == output) return violate(function, "in place");
        for (const void* address : {static_cast<void*>(input), static_cast<void*>(output)})
            if (reinterpret_cast<std::uintptr_t>(address) % alignment) return static_cast<int>(unaligned_data);
        p.running = true;
        p.work_area_set = p.stream_set = false;
        plan = plans[id];
        return static_cast<int>(success);
    });
    if (code) return code;
    std::unique_lock lock(mutex);
    meet(lock);
    lock.unlock();
    if constexpr (sizeof(From) < sizeof(To))
        forward(*plan, input, output, static_cast<Complex*>(plan->work_area));
    else
        inverse(*plan, input, output, static_cast<Complex*>(plan->work_area));
    lock.lock();
    plan->running = false;
    return success;
}

}  // namespace

EXPORT int cufftCreate(int* id) {
    const std::lock_guard lock(mutex);
    if (const int code = begin("cufftCreate")) return code;
    *id = ++last_id;
    plans[*id] = std::make_shared<Plan>(Plan{current_device});
    return success;
}

EXPORT int cufftDestroy(int id) {
    const int code = with_plan("cufftDestroy", id, [](Plan&) { return success; });
    const std::lock_guard lock(mutex);
    plans.erase(id);
    return code;
}

EXPORT int cufftSetAutoAllocation(int id, int automatic) {
    return with_plan("cufftSetAutoAllocation", id, [&](Plan& plan) {
        plan.auto_allocation = automatic;
        return success;
    });
}

EXPORT int cufftMakePlanMany64(int id, int rank, Size* n, Size* inembed, Size istride, Size idist, Size* onembed,
                               Size ostride, Size odist, int type, Size batch, std::size_t* work_size) {
    return with_plan("cufftMakePlanMany64", id, [&](Plan& plan) {
        const bool backward = type == c2r || type == z2d;
        if (plan.auto_allocation) return violate("cufftMakePlanMany64", "would allocate the work area itself");
        if (plan.made || rank != 2 || !inembed || !onembed) return violate("cufftMakePlanMany64", "not as expected");
        plan.made = true;
        plan.H = n[0];
        plan.W = n[1];
        plan.batch = batch;
        plan.type = type;
        plan.input = {inembed[1], istride, idist};
        plan.output = {onembed[1], ostride, odist};
        const Layout &real = backward ? plan.output : plan.input, &spectrum = backward ? plan.input : plan.output;
        if (real.width < plan.W || spectrum.width < plan.K()) return violate("cufftMakePlanMany64", "rows overlap");
        *work_size = plan.work_size = static_cast<std::size_t>(plan.H * plan.K() * batch) * sizeof(Complex);
        return static_cast<int>(success);
    });
}

EXPORT int cufftSetWorkArea(int id, void* work_area) {
    return with_plan("cufftSetWorkArea", id, [&](Plan& plan) {
        plan.work_area = last_work_area = work_area;
        plan.work_area_set = true;
        return success;
    });
}

EXPORT int cufftSetStream(int id, void* stream) {
    return with_plan("cufftSetStream", id, [&](Plan& plan) {
        last_stream = stream;
        plan.stream_set = true;
        return success;
    });
}

EXPORT int cufftExecR2C(int id, float* input, std::complex<float>* output) {
    return execute("cufftExecR2C", r2c, id, input, output);
}
EXPORT int cufftExecC2R(int id, std::complex<float>* input, float* output) {
    return execute("cufftExecC2R", c2r, id, input, output);
}
EXPORT int cufftExecD2Z(int id, double* input, std::complex<double>* output) {
    return execute("cufftExecD2Z", d2z, id, input, output);
}
EXPORT int cufftExecZ2D(int id, std::complex<double>* input, double* output) {
    return execute("cufftExecZ2D", z2d, id, input, output);
}

// ---- for tests

// The next call of the function returns the code and does nothing, but for cufftDestroy.
EXPORT void fake_cufft_fail(const char* function, int code) {
    const std::lock_guard lock(mutex);
    failures[function] = code;
}
// The next calls of cufftExec* wait until there are so many of them.
EXPORT void fake_cufft_meet(int count) {
    const std::lock_guard lock(mutex);
    meeting = count;
    waiting = 0;
}
// What libraries do with the imaginary parts that columns k = 0 and k = W/2 have after the transform along H: whether
// they reach the result of c2r.
EXPORT void fake_cufft_mix_imaginary_parts(bool mixes) {
    const std::lock_guard lock(mutex);
    mixes_imaginary_parts = mixes;
}
// The calling thread's device, as cudaSetDevice would.
EXPORT int fake_cufft_set_device(int device) {
    const int previous = current_device;
    current_device = device;
    return previous;
}
EXPORT int fake_cufft_live_plans() {
    const std::lock_guard lock(mutex);
    return static_cast<int>(plans.size());
}
EXPORT int fake_cufft_calls(const char* function) {
    const std::lock_guard lock(mutex);
    return calls[function];
}
EXPORT void* fake_cufft_last_work_area() { return last_work_area; }
EXPORT void* fake_cufft_last_stream() { return last_stream; }
// The first violation, empty if there was none. Valid until the next call of fake_cufft_reset().
EXPORT const char* fake_cufft_violation() {
    const std::lock_guard lock(mutex);
    return violation.c_str();
}
// Forgets everything but the plans.
EXPORT void fake_cufft_reset() {
    const std::lock_guard lock(mutex);
    failures.clear();
    calls.clear();
    violation.clear();
    mixes_imaginary_parts = false;
    meeting = waiting = 0;
}
