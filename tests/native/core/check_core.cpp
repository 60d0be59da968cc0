// Checks the compiled core against its definition, with every instruction set this machine runs. No Python, no torch:
// it also runs where those do not, in emulators of other processors and under sanitizers.
//
//   check_core            every case
//   check_core --quick    a few small ones, for emulators
//   check_core --threads  calls from many threads at once
#include <array>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cpu/plan.h"
#include "definition.h"
#include "shapes.h"
#include "tensors.h"

namespace {
std::atomic<std::int64_t> workspace_bytes{0};
}

// Replaces the C library's: counts the core's workspaces and fills them with NaN, so that an element nobody wrote is
// seen.
extern "C" void* aligned_alloc(std::size_t alignment, std::size_t bytes) noexcept {
    void* memory = nullptr;
    if (posix_memalign(&memory, alignment, bytes)) return nullptr;
    workspace_bytes += static_cast<std::int64_t>(bytes);
    return std::memset(memory, 0xff, bytes);
}

namespace {

// ---- inputs, as tests/cases.py makes them

Values normal(std::int64_t n, unsigned seed, double scale = 1) {
    std::mt19937_64 generator(seed);
    std::normal_distribution<double> distribution(0, scale);
    Values values(n);
    for (double& value : values) value = distribution(generator);
    return values;
}

// A gradient that leans towards the result: independent of it, the sums that gradients are would cancel.
Values leaning(DType dtype, const Values& towards) {
    Values values = normal(static_cast<std::int64_t>(towards.size()), 4, 0.5);
    for (std::size_t i = 0; i < values.size(); i++) values[i] += towards[i];
    return rounded(dtype, values);
}

// All but grad_y.
Inputs make_inputs(const FilterProblem& p) {
    const DType arithmetic = arithmetic_of(p.dtype);
    Values filters = normal(elements(p, grad_filters), 3, 0.7);
    // A weight's real parts are around one: bias' gradient is the zero frequency alone and must not be small.
    for (std::size_t i = 0; p.F == 0 && i < filters.size(); i += 2) filters[i] += 1;
    return {rounded(p.dtype, normal(elements(p, grad_x), 1)),
            rounded(arithmetic, normal(elements(p, grad_logits), 2)),
            rounded(arithmetic, filters),
            {}};
}

// ---- calls of the core

struct InputTensors {
    Edge edge;
    Tensor x, logits, filters, grad_y;

    InputTensors(const FilterProblem& p, const Inputs& in, Edge edge_)
        : edge(edge_),
          x(in.x, p.dtype, edge),
          logits(in.logits, arithmetic_of(p.dtype), edge),
          filters(in.filters, arithmetic_of(p.dtype), edge),
          grad_y(in.grad_y, p.dtype, edge) {}
};

using Wanted = unsigned;  // bit i: Output i
constexpr Wanted forward_only = 1u << y;
bool wants(Wanted wanted, Output output) { return wanted >> output & 1; }

std::string bytes_of(const ScalarGrads& grads) { return {reinterpret_cast<const char*>(grads.data()), sizeof(grads)}; }

using Bytes = std::array<std::string, num_outputs>;

DType dtype_of(const FilterProblem& p, Output output) {
    if (output == grad_scalars) return DType::float64;
    return output == y || output == grad_x ? p.dtype : arithmetic_of(p.dtype);
}

using Addresses = std::array<void*, num_outputs>;

FilterTensors tensors_of(const FilterProblem& p, const InputTensors& in, Wanted wanted, const Addresses& outputs) {
    return {.x = in.x.data(),
            .logits = p.F ? in.logits.data() : nullptr,
            .filters = in.filters.data(),
            .y = outputs[y],
            .grad_y = wanted == forward_only ? nullptr : in.grad_y.data(),
            .grad_x = outputs[grad_x],
            .grad_logits = outputs[grad_logits],
            .grad_filters = outputs[grad_filters],
            .need_scalars = wants(wanted, grad_scalars)};
}

// The wanted outputs of one call.
Bytes run(const FilterProblem& p, const InputTensors& in, Wanted wanted, int threads) {
    std::array<std::optional<Tensor>, num_outputs> outputs;
    Addresses address{};
    for (Output output : {y, grad_x, grad_logits, grad_filters}) {
        if (!wants(wanted, output)) continue;
        outputs[output].emplace(elements(p, output), dtype_of(p, output), in.edge);
        address[output] = outputs[output]->data();
    }
    Bytes results;
    const std::string sums = bytes_of(filter(p, tensors_of(p, in, wanted, address), threads));
    if (wanted != forward_only) results[grad_scalars] = sums;
    for (Output output : {y, grad_x, grad_logits, grad_filters})
        if (outputs[output]) results[output] = outputs[output]->bytes();
    return results;
}

// Every output that the problem has, one by one, and all gradients together.
std::vector<Wanted> wishes(const FilterProblem& p) {
    std::vector<Wanted> each = {forward_only, 1u << grad_x, 1u << grad_filters};
    if (p.F) each.push_back(1u << grad_logits);
    if (p.star_relu) each.push_back(1u << grad_scalars);
    Wanted all = 0;
    for (Wanted wanted : each) all |= wanted;
    each.push_back(all & ~forward_only);
    return each;
}

// ---- checks

struct Tally {
    std::int64_t checks = 0;
    double error = 0, bound = 1;  // the worst of them by their ratio
    std::string name;

    void within_bound(const std::string& what, DType dtype, const Values& actual, const Values& wanted) {
        const double allowed = bounds[static_cast<int>(dtype)];
        double difference = 0, size = 0;
        for (std::size_t i = 0; i < wanted.size(); i++) {
            difference += (actual[i] - wanted[i]) * (actual[i] - wanted[i]);
            size += wanted[i] * wanted[i];
        }
        const double found = difference == 0 ? 0 : std::sqrt(difference / size);
        char numbers[80];
        std::snprintf(numbers, sizeof(numbers), ": relative error %.2e, allowed %.2e", found, allowed);
        if (!(found <= allowed)) fail(what + numbers);
        checks++;
        if (found / allowed <= error / bound) return;
        error = found;
        bound = allowed;
        name = std::string(current_case) + ", " + what;
    }
    void same_bits(const std::string& what, const std::string& actual, const std::string& wanted) {
        if (actual != wanted) fail(what);
        checks++;
    }
};

std::string name_of(const FilterProblem& p) {
    char name[160];
    std::snprintf(name, sizeof(name), "B%d-%dx%d-C%d-F%d%s%s%s%s %s", int(p.B), int(p.H), int(p.W), int(p.C), int(p.F),
                  p.star_relu ? "-star_relu" : "", p.softmax ? "" : "-weights",
                  p.weight_per_sample ? "-weight_per_sample" : "", p.channels_first ? "-channels_first" : "",
                  dtype_names[static_cast<int>(p.dtype)]);
    return name;
}

void begin_case(const std::string& name) {
    std::snprintf(current_case, sizeof(current_case), "%s %s", active_isa().c_str(), name.c_str());
}

// A NaN in the plane of one sample and channel reaches no other plane.
void check_isolation(const FilterProblem& p, const Inputs& inputs, Tally& tally) {
    const std::int64_t b = p.B - 1, c = p.C / 2, pixel = position(p, b, p.H / 2 * p.W + p.W / 2, c);
    Inputs with_nan = inputs;
    with_nan.x[pixel] = with_nan.grad_y[pixel] = NAN;
    const InputTensors clean(p, inputs, Edge::lower), dirty(p, with_nan, Edge::lower);
    struct Layout {
        Output output;
        std::int64_t per_sample, per_channel;  // elements; per_sample 0: a sum over samples
    };
    const std::int64_t sample = p.H * p.W * p.C, pixels = p.channels_first ? p.H * p.W : 1;
    const std::int64_t weight = p.weight_per_sample ? p.H * (p.W / 2 + 1) * p.C * 2 : 0;
    std::vector<Layout> layouts = {{y, sample, pixels}, {grad_x, sample, pixels}};
    layouts.push_back(p.F ? Layout{grad_logits, p.F * p.C, 1} : Layout{grad_filters, weight, 2});
    for (Wanted wanted : {forward_only, wishes(p).back()}) {
        const Bytes was = run(p, clean, wanted, 1);
        Bytes is = run(p, dirty, wanted, 1);
        for (const auto& [output, per_sample, per_channel] : layouts) {
            if (!wants(wanted, output)) continue;
            const std::int64_t item = size_of(dtype_of(p, output));
            for (std::size_t i = 0; i < is[output].size() / item; i++) {
                if (std::int64_t(i) / per_channel % p.C != c || (per_sample && std::int64_t(i) / per_sample != b))
                    continue;
                if (output == y && !std::isnan(decode(p.dtype, &is[y][i * item]))) fail("a NaN in x is not in y");
                is[output].replace(i * item, item, was[output], i * item, item);
            }
            tally.same_bits(output_names[output] + std::string(" has a NaN of another plane"), is[output], was[output]);
        }
    }
}

void check_workspace(const FilterProblem& p, const InputTensors& in, Wanted wanted, int threads) {
    Addresses address{};
    for (Output output : {y, grad_x, grad_logits, grad_filters})
        if (wants(wanted, output)) address[output] = &address;  // not accessed
    const std::int64_t promised = filter_workspace(p, tensors_of(p, in, wanted, address), threads);
    const std::int64_t before = workspace_bytes;
    run(p, in, wanted, threads);
    if (workspace_bytes - before != promised) fail("filter_workspace is not what was allocated");
}

void check_filter(const FilterProblem& p, const Inputs& inputs, const Results& expected, Tally& tally) {
    const InputTensors upper(p, inputs, Edge::upper), lower(p, inputs, Edge::lower);
    for (Wanted wanted : wishes(p)) {
        const Bytes one = run(p, upper, wanted, 1);
        for (int i = 0; i < num_outputs; i++) {
            const auto output = static_cast<Output>(i);
            if (!wants(wanted, output)) continue;
            // what is neither x nor like it keeps the accuracy of the arithmetic
            const DType accuracy = output == grad_scalars ? arithmetic_of(p.dtype) : dtype_of(p, output);
            tally.within_bound(output_names[i], accuracy, decoded(dtype_of(p, output), one[i]), expected[i]);
        }
        for (int threads : {2, 7}) {
            const Bytes many = run(p, lower, wanted, threads);
            for (int i = 0; i < num_outputs; i++)
                tally.same_bits(output_names[i] + std::string(" depends on threads"), many[i], one[i]);
        }
    }
    for (int threads : {1, 7})
        for (Wanted wanted : {forward_only, wishes(p).back()}) check_workspace(p, upper, wanted, threads);
    check_isolation(p, inputs, tally);
}

void check_star_relu(std::int64_t n, DType dtype, Tally& tally) {
    constexpr double scale = 0.875, bias = 0.3125;
    const Values x = rounded(dtype, normal(n, 1));
    Results expected;
    for (double value : x) expected[y].push_back(scale * relu(value) * relu(value) + bias);
    const Values grad = leaning(dtype, expected[y]);
    expected[grad_scalars] = {0, 0};
    for (std::int64_t i = 0; i < n; i++) {
        expected[grad_x].push_back(2 * scale * relu(x[i]) * grad[i]);
        expected[grad_scalars][0] += grad[i] * relu(x[i]) * relu(x[i]);
        expected[grad_scalars][1] += grad[i];
    }
    Bytes one;
    for (int threads : {1, 2, 7}) {
        const Edge edge = threads == 1 ? Edge::upper : Edge::lower;
        const Tensor given(x, dtype, edge), grad_given(grad, dtype, edge), result(n, dtype, edge),
            grad_result(n, dtype, edge);
        const auto run = [&](void* y, const void* grad_y, void* grad_x) {
            return bytes_of(star_relu({given.data(), y, grad_y, grad_x}, n, dtype, scale, bias, threads));
        };
        run(result.data(), nullptr, nullptr);
        const std::string sums = run(nullptr, grad_given.data(), grad_result.data());
        tally.same_bits("sums depend on whether grad_x is wanted", run(nullptr, grad_given.data(), nullptr), sums);
        const Bytes many = {result.bytes(), grad_result.bytes(), "", "", sums};
        if (threads == 1) one = many;
        tally.same_bits("depends on threads", many[y] + many[grad_x] + sums, one[y] + one[grad_x] + one[grad_scalars]);
    }
    tally.within_bound("y", dtype, decoded(dtype, one[y]), expected[y]);
    tally.within_bound("grad_x", dtype, decoded(dtype, one[grad_x]), expected[grad_x]);
    tally.within_bound("grad_scalars", arithmetic_of(dtype), decoded(DType::float64, one[grad_scalars]),
                       expected[grad_scalars]);
}

// ---- every case

// Registers of every width with every tail, then chunks of 16384 with one element less or more.
std::vector<std::int64_t> star_relu_sizes(bool quick) {
    std::vector<std::int64_t> sizes = {1023, 16383, 16384, 16385};
    if (!quick) sizes.push_back(3 * 16384 + 5);
    for (int n = 0; n < 71; n++) sizes.push_back(n);
    return sizes;
}

using Tallies = std::map<std::string, std::array<Tally, num_dtypes>>;  // by instruction set

template <class Check>
void with_each_isa(const std::string& name, DType dtype, Tallies& tallies, const Check& check) {
    for (const std::string& isa : supported_isas()) {
        set_active_isa(isa);
        begin_case(name);
        check(tallies[isa][static_cast<int>(dtype)]);
    }
}

void check_problem(const FilterProblem& p, Tallies& tallies) {
    Inputs inputs = make_inputs(p);
    Reference reference(p, inputs);
    inputs.grad_y = leaning(p.dtype, reference.results[y]);
    reference.backward(inputs.grad_y);
    with_each_isa(name_of(p), p.dtype, tallies,
                  [&](Tally& tally) { check_filter(p, inputs, reference.results, tally); });
}

// The usual form of the step, and another: channels first without StarReLU, other weights with it. Each is checked as a
// dynamic and as a global filter, with StarReLU and without, in one dtype: every two such choices meet in every shape,
// and four shapes in succession have all combinations with dtypes.
void check_shape(const Shape& shape, int index, Tallies& tallies) {
    for (bool global : {false, true})
        for (bool star_relu : {false, true})
            for (bool other_form : {false, true}) {
                const int code = ((global ^ star_relu) + 2 * (global ^ other_form)) ^ index % num_dtypes;
                FilterProblem p{shape.B,   shape.H, shape.W, shape.C, global ? 0 : shape.F, static_cast<DType>(code),
                                star_relu, 0.875,   0.3125};
                if (other_form) {
                    p.channels_first = !star_relu || index / num_dtypes % 2;
                    p.softmax = !star_relu || global;
                    p.weight_per_sample = star_relu && global;
                }
                check_problem(p, tallies);
            }
}

void check_everything(bool quick) {
    Tallies tallies;
    for (int code = 0; code < num_dtypes; code++)
        for (std::int64_t n : star_relu_sizes(quick)) {
            const auto dtype = static_cast<DType>(code);
            with_each_isa("star_relu of " + std::to_string(n) + " " + dtype_names[code], dtype, tallies,
                          [&](Tally& tally) { check_star_relu(n, dtype, tally); });
        }
    int index = 0;
    for (const Shape& shape : quick ? quick_shapes : shapes) check_shape(shape, index++, tallies);
    for (const std::string& isa : supported_isas())
        for (int code = 0; code < num_dtypes; code++) {
            const Tally& tally = tallies[isa][code];
            std::printf("%-8s %-8s %6lld checks, worst error %.2e of %.2e: %s\n", isa.c_str(), dtype_names[code],
                        static_cast<long long>(tally.checks), tally.error, tally.bound, tally.name.c_str());
        }
}

// ---- many threads

struct Job {
    FilterProblem problem;
    Inputs inputs;
    Bytes forward, backward;

    Bytes call(Wanted wanted) const { return run(problem, InputTensors(problem, inputs, Edge::upper), wanted, 1); }
    Wanted gradients() const { return wishes(problem).back(); }
};

// More lengths than the cache of plans holds, so that plans are dropped while others are using them.
std::vector<Job> make_jobs() {
    std::vector<Job> jobs;
    constexpr int count = cpu::plan_cache_limit + 8;
    for (int i = 0; i < count; i++) {
        const DType dtype = i % 4 ? DType::float32 : DType::float64;
        const FilterProblem p{1, i + 1, count + i + 1, 3, i % 3 ? 4 : 0, dtype, i % 2 == 0, 0.875, 0.3125};
        Job job{p, make_inputs(p), {}, {}};
        job.inputs.grad_y = rounded(dtype, normal(elements(p, y), 4));
        job.forward = job.call(forward_only);
        job.backward = job.call(job.gradients());
        jobs.push_back(job);
    }
    return jobs;
}

void check_threads() {
    begin_case("eight threads");
    const std::vector<Job> jobs = make_jobs();
    const int count = static_cast<int>(jobs.size());
    std::vector<std::thread> threads;
    for (int t = 0; t < 8; t++)
        threads.emplace_back([&jobs, count, t] {
            for (int i = 0; i < count; i++) {
                // neighbours go through them in opposite directions: they meet at the same plans
                const Job& job = jobs[(t / 2 * count / 4 + (t % 2 ? count - i : i)) % count];
                if (job.call(forward_only) != job.forward) fail("forward of " + name_of(job.problem));
                if (job.call(job.gradients()) != job.backward) fail("backward of " + name_of(job.problem));
            }
        });
    for (std::thread& thread : threads) thread.join();
    std::printf("%s: 8 threads, %d problems\n", active_isa().c_str(), count);
}

}  // namespace

int main(int argc, char** argv) {
    const std::string mode = argc > 1 ? argv[1] : "";
    if (argc > 2 || (!mode.empty() && mode != "--quick" && mode != "--threads")) {
        std::fprintf(stderr, "usage: check_core [--quick | --threads]\n");
        return 2;
    }
    name_case_on_faults();
    mode == "--threads" ? check_threads() : check_everything(mode == "--quick");
}
