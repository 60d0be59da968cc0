// Runs cuFFT's host code on the fake library, for sanitizers: check_cufft PATH-OF-THE-FAKE
#include <dlfcn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "cuda/cufft.h"

namespace {

using namespace dfformer;
using cufft::Transform;

[[noreturn]] void fail(const std::string& what) {
    std::fprintf(stderr, "FAILED: %s\n", what.c_str());
    std::_Exit(1);
}

struct Fake {
    void (*fail)(const char*, int);
    void (*meet)(int);
    int (*set_device)(int);
    int (*waiting)();
    int (*live_plans)();
    const char* (*violation)();

    explicit Fake(const char* path) {
        void* library = dlopen(path, RTLD_NOW);
        if (!library) ::fail(dlerror());
        const auto find = [&](auto& function, const char* name) {
            function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
            if (!function) ::fail(name);
        };
        find(fail, "fake_cufft_fail");
        find(meet, "fake_cufft_meet");
        find(waiting, "fake_cufft_waiting");
        find(set_device, "fake_cufft_set_device");
        find(live_plans, "fake_cufft_live_plans");
        find(violation, "fake_cufft_violation");
    }
};

// Of exactly the size that is needed, so that an address sanitizer sees one element more.
void run(const Transform& transform, void* input, void* output) {
    std::vector<char> workspace(cufft::plan(transform, false));
    cufft::run(transform, false,
               {input, output, workspace.data(), static_cast<std::int64_t>(workspace.size()), nullptr});
}

// rfft2 and irfft2 of planes of 0, 1, 2, ...; what comes back is H*W times them.
template <class T>
void check_round_trip(Transform transform) {
    const auto [device, H, W, N, dtype, inverse] = transform;
    std::vector<T> planes(H * W * N), spectra(2 * H * (W / 2 + 1) * N), back(H * W * N);
    for (std::size_t i = 0; i < planes.size(); i++) planes[i] = static_cast<T>(i);
    run(transform, planes.data(), spectra.data());
    transform.inverse = true;
    run(transform, spectra.data(), back.data());
    for (std::size_t i = 0; i < planes.size(); i++) {
        const double wanted = static_cast<double>(planes[i]) * static_cast<double>(H * W);
        if (!(std::abs(back[i] - wanted) <= 1e-6 * static_cast<double>(H * W) * static_cast<double>(planes.size())))
            fail("round trip of " + std::to_string(H) + "x" + std::to_string(W) + "x" + std::to_string(N));
    }
}

void check_round_trips() {
    for (std::int64_t H : {1, 2, 5, 8})
        for (std::int64_t W : {1, 2, 7, 10})
            for (std::int64_t N : {1, 3}) {
                check_round_trip<float>({0, H, W, N, DType::float32, false});
                check_round_trip<double>({0, H, W, N, DType::float64, false});
            }
}

void check_errors(const Fake& fake) {
    for (const char* function : {"cufftCreate", "cufftSetAutoAllocation", "cufftMakePlanMany64", "cufftSetWorkArea",
                                 "cufftSetStream", "cufftExecR2C", "cufftDestroy"}) {
        cufft::clear(0);
        fake.fail(function, 2);
        std::string message;
        try {
            check_round_trip<float>({0, 4, 6, 2, DType::float32, false});
            cufft::clear(0);
        } catch (const std::runtime_error& error) {
            message = error.what();
        }
        const bool raised = message.find(std::string(function) + " returned CUFFT_ALLOC_FAILED") == 0;
        if (raised == (function == std::string("cufftDestroy"))) fail(std::string(function) + ": " + message);
    }
}

// More transforms than plans are kept, on two devices, in opposite directions: plans are dropped while others use them.
void check_threads(const Fake& fake) {
    constexpr int count = cufft::plans_per_device + 8;
    std::vector<std::thread> threads;
    for (int t = 0; t < 8; t++)
        threads.emplace_back([&fake, t] {
            fake.set_device(t % 2);
            for (int i = 0; i < 2 * count; i++) {
                const int n = (t / 4 * count / 2 + (t % 4 < 2 ? i : 2 * count - i)) % count;
                check_round_trip<float>({t % 2, 1 + n % 3, 2 + n % 5, 1 + n, DType::float32, false});
                if (i % 50 == 49) cufft::clear(t % 2);
            }
        });
    for (std::thread& thread : threads) thread.join();
}

// A child forked while a thread is inside the library, and holds its plan, has neither that thread nor the plan.
void check_fork(const Fake& fake) {
    const auto transform = [] { check_round_trip<float>({0, 4, 6, 2, DType::float32, false}); };
    transform();
    const int live = fake.live_plans();
    fake.meet(2);
    std::thread inside(transform);
    while (fake.waiting() < 1) std::this_thread::yield();
    const pid_t child = fork();
    if (child == 0) {
        alarm(60);
        fake.meet(0);
        transform();
        cufft::clear(0);
        std::_Exit(fake.live_plans() == live ? 0 : 1);
    }
    std::thread other([] { check_round_trip<float>({0, 4, 6, 3, DType::float32, false}); });
    inside.join();
    other.join();
    int status = 0;
    waitpid(child, &status, 0);
    if (status != 0) fail("the forked child: status " + std::to_string(status));
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 2) {
        std::fprintf(stderr, "usage: check_cufft PATH-OF-THE-FAKE\n");
        return 2;
    }
    const Fake fake(argv[1]);
    cufft::open(argv[1]);
    check_round_trips();
    check_errors(fake);
    check_threads(fake);
    check_fork(fake);
    for (int device : {0, 1}) {
        fake.set_device(device);
        cufft::clear(device);
    }
    if (fake.live_plans() != 0) fail("plans were lost: " + std::to_string(fake.live_plans()));
    if (*fake.violation()) fail(fake.violation());
    std::printf("round trips, errors, threads and a fork: no plan lost\n");
}
