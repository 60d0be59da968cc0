// Checks the compiled core against its definition, with every instruction set this machine runs. No Python, no torch:
// it also runs where those do not, in emulators of other processors and under sanitizers.
//
//   check_core            every case
//   check_core --quick    a few small ones, for emulators
//   check_core --threads  calls from many threads at once
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <complex>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cpu/blocks.h"
#include "cpu/plan.h"
#include "dynamic_filter.h"

namespace {
std::atomic<std::int64_t> workspace_bytes{0};
}

// In place of the C library's. The core's workspaces begin as NaN, so that what nobody wrote is seen, and are counted.
extern "C" void* aligned_alloc(std::size_t alignment, std::size_t bytes) noexcept {
    void* memory = nullptr;
    if (posix_memalign(&memory, alignment, bytes)) return nullptr;
    workspace_bytes += static_cast<std::int64_t>(bytes);
    return std::memset(memory, 0xff, bytes);
}

namespace {

using namespace dfformer;
using Values = std::vector<double>;
using Complex = std::complex<double>;
using Spectrum = std::vector<Complex>;  // (H,K)

// ---- failures

char current_case[200];

[[noreturn]] void fail(const std::string& what) {
    std::fprintf(stderr, "FAILED: %s: %s\n", current_case, what.c_str());
    std::_Exit(1);
}

void name_case() {
    const char prefix[] = "\nwhile checking ";
    for (const char* text : {prefix, static_cast<const char*>(current_case), "\n"})
        if (write(STDERR_FILENO, text, std::strlen(text)) < 0) return;
}

// Names the case, then lets the fault happen again, for the handler that was there before (a sanitizer's, a core dump).
constexpr int faults[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};
struct sigaction previous[std::size(faults)];
void on_fault(int) {
    name_case();
    for (std::size_t i = 0; i < std::size(faults); i++) sigaction(faults[i], &previous[i], nullptr);
}
void name_case_on_faults() {
    struct sigaction action{};
    action.sa_handler = on_fault;
    for (std::size_t i = 0; i < std::size(faults); i++) sigaction(faults[i], &action, &previous[i]);
}

// ---- numbers as tensors store them

constexpr const char* dtype_names[num_dtypes] = {"float32", "float64", "bfloat16", "float16"};
// Largest allowed ||actual - expected|| / ||expected||: dfformer_kernels/tolerance.py says why.
constexpr double bounds[num_dtypes] = {1e-6, 1e-13, 0x1p-8, 0x1p-11};

DType arithmetic_of(DType dtype) { return dtype == DType::float64 ? dtype : DType::float32; }

// The 16-bit types, by IEEE 754's rules: a sign, an exponent and the mantissa's bits.
struct Format {
    int exponent_bits, mantissa_bits;

    int bias() const { return (1 << (exponent_bits - 1)) - 1; }
    unsigned infinity() const { return ((1u << exponent_bits) - 1) << mantissa_bits; }

    std::uint16_t encode(double value) const {
        const unsigned sign = std::signbit(value) ? 0x8000 : 0;
        if (value == 0) return static_cast<std::uint16_t>(sign);
        if (std::isnan(value)) return 0xffff;
        const int exponent = std::max(std::ilogb(value), 1 - bias());
        const double mantissa = std::nearbyint(std::ldexp(std::abs(value), mantissa_bits - exponent));
        // The mantissa's leading one, where it has one, adds the 1 that is missing in the exponent.
        const double bits = mantissa + std::ldexp(exponent + bias() - 1, mantissa_bits);
        return static_cast<std::uint16_t>(sign | static_cast<unsigned>(std::min<double>(bits, infinity())));
    }
    double decode(std::uint16_t bits) const {
        const unsigned magnitude = bits & 0x7fff, mantissa = magnitude & ((1u << mantissa_bits) - 1);
        const int exponent = static_cast<int>(magnitude >> mantissa_bits);
        const double sign = bits & 0x8000 ? -1 : 1;
        if (magnitude >= infinity()) return mantissa ? NAN : sign * INFINITY;
        if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias() - mantissa_bits);
        return sign * std::ldexp(mantissa + (1u << mantissa_bits), exponent - bias() - mantissa_bits);
    }
};
Format format_of(DType dtype) { return dtype == DType::bfloat16 ? Format{8, 7} : Format{5, 10}; }

template <class T>
void put(char* memory, T value) {
    std::memcpy(memory, &value, sizeof(value));
}
template <class T>
T get(const char* memory) {
    T value;
    std::memcpy(&value, memory, sizeof(value));
    return value;
}

void encode(DType dtype, double value, char* memory) {
    if (dtype == DType::float64) return put(memory, value);
    if (dtype == DType::float32) return put(memory, static_cast<float>(value));
    put(memory, format_of(dtype).encode(value));
}
double decode(DType dtype, const char* memory) {
    if (dtype == DType::float64) return get<double>(memory);
    if (dtype == DType::float32) return get<float>(memory);
    return format_of(dtype).decode(get<std::uint16_t>(memory));
}

std::int64_t size_of(DType dtype) { return item_size[static_cast<int>(dtype)]; }

Values decoded(DType dtype, const std::string& bytes) {
    Values values;
    for (std::size_t i = 0; i < bytes.size(); i += size_of(dtype)) values.push_back(decode(dtype, &bytes[i]));
    return values;
}
Values rounded(DType dtype, Values values) {
    char memory[sizeof(double)];
    for (double& value : values) {
        encode(dtype, value, memory);
        value = decode(dtype, memory);
    }
    return values;
}

// ---- memory

// A tensor directly before (Edge::upper) or after (Edge::lower) a page that must not be touched.
enum class Edge { lower, upper };

class Tensor {
  public:
    // An output: NaN.
    Tensor(std::int64_t n, DType dtype, Edge edge) : dtype_(dtype), bytes_(n * size_of(dtype)) {
        const std::int64_t page = sysconf(_SC_PAGESIZE);
        inside_ = std::max<std::int64_t>(1, (bytes_ + page - 1) / page) * page;
        mapped_ = inside_ + 2 * page;
        void* pages = mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (pages == MAP_FAILED) fail("no memory");
        pages_ = static_cast<char*>(pages);
        first_ = pages_ + page;
        data_ = edge == Edge::lower ? first_ : first_ + inside_ - bytes_;
        protect(PROT_READ | PROT_WRITE);
        std::memset(first_, 0xff, inside_);
    }
    // An input: read-only.
    Tensor(const Values& values, DType dtype, Edge edge)
        : Tensor(static_cast<std::int64_t>(values.size()), dtype, edge) {
        for (std::size_t i = 0; i < values.size(); i++) encode(dtype, values[i], data_ + i * size_of(dtype));
        protect(PROT_READ);
    }
    Tensor(const Tensor&) = delete;
    ~Tensor() { munmap(pages_, mapped_); }

    void* data() const { return data_; }
    std::string bytes() const { return {data_, static_cast<std::size_t>(bytes_)}; }
    Values values() const { return decoded(dtype_, bytes()); }

  private:
    void protect(int access) {
        if (mprotect(first_, inside_, access)) fail("mprotect does not work");
    }

    DType dtype_;
    std::int64_t bytes_, inside_, mapped_;
    char *pages_, *first_, *data_;
};

// ---- the definition, in float64

// exp(-2 pi i j / n) for j = 0 .. n - 1
const Spectrum& roots(int n) {
    static std::map<int, Spectrum> known;
    Spectrum& table = known[n];
    for (int j = static_cast<int>(table.size()); j < n; j++) table.push_back(std::polar(1.0, -2 * M_PI * j / n));
    return table;
}

Complex times(Complex a, Complex b) {  // not *, which looks for infinities
    return {a.real() * b.real() - a.imag() * b.imag(), a.real() * b.imag() + a.imag() * b.real()};
}

// sum_j a[j stride] exp(-+ 2 pi i j k / n)
Complex dft_bin(const Complex* a, std::int64_t stride, int n, int k, bool inverse) {
    const Spectrum& root = roots(n);
    Complex sum = 0;
    for (int j = 0, turn = 0; j < n; j++) {
        sum += times(a[j * stride], inverse ? std::conj(root[turn]) : root[turn]);
        turn += k;
        if (turn >= n) turn -= n;
    }
    return sum;
}

struct Plane {
    int H, W, K;
    double norm;

    explicit Plane(const FilterProblem& p)
        : H(static_cast<int>(p.H)), W(static_cast<int>(p.W)), K(W / 2 + 1), norm(1 / std::sqrt(double(H) * W)) {}

    // How many columns of the full spectrum column k stands for.
    double weight(int k) const { return k == 0 || 2 * k == W ? 1 : 2; }

    Spectrum along_columns(const Spectrum& Z, bool inverse) const {
        Spectrum result(Z.size());
        for (int h = 0; h < H; h++)
            for (int k = 0; k < K; k++) result[h * K + k] = dft_bin(&Z[k], K, H, h, inverse);
        return result;
    }
    Spectrum rfft2(const Values& u) const {
        const Spectrum line(u.begin(), u.end());
        Spectrum rows(std::size_t(H) * K);
        for (int h = 0; h < H; h++)
            for (int k = 0; k < K; k++) rows[h * K + k] = norm * dft_bin(&line[h * W], 1, W, k, false);
        return along_columns(rows, false);
    }
    // Inverse along H, then a c2r along W, which takes no notice of the imaginary part of columns 0 and W/2.
    Values irfft2(const Spectrum& Z) const {
        const Spectrum rows = along_columns(Z, true), &root = roots(W);
        Values y(std::size_t(H) * W);
        for (int h = 0; h < H; h++)
            for (int w = 0; w < W; w++)
                for (int k = 0; k < K; k++)
                    y[h * W + w] +=
                        norm * weight(k) * times(rows[h * K + k], std::conj(root[std::int64_t{w} * k % W])).real();
        return y;
    }
};

double relu(double x) { return x < 0 ? 0 : x; }

enum Output { y, grad_x, grad_logits, grad_filters, grad_scalars, num_outputs };
constexpr const char* output_names[num_outputs] = {"y", "grad_x", "grad_logits", "grad_filters", "grad_scalars"};
using Results = std::array<Values, num_outputs>;

std::int64_t elements(const FilterProblem& p, Output output) {
    if (output == y || output == grad_x) return p.B * p.H * p.W * p.C;
    if (output == grad_logits) return p.B * p.F * p.C;
    return output == grad_filters ? p.H * (p.W / 2 + 1) * (p.F ? p.F : p.C) * 2 : 2;
}

struct Inputs {
    Values x, logits, filters, grad_y;
};

class Reference {
  public:
    Reference(const FilterProblem& problem, const Inputs& inputs) : p_(problem), plane_(problem), in_(inputs) {
        mix();
        results[y].resize(in_.x.size());
        for_each_plane([&](std::int64_t b, std::int64_t c) {
            Values u = gathered(in_.x, b, c);
            for (double& value : u)
                if (p_.star_relu) value = p_.scale * relu(value) * relu(value) + p_.bias;
            Spectrum Z = X_.emplace_back(plane_.rfft2(u));
            const Spectrum M = mixed(b, c);
            for (std::size_t i = 0; i < Z.size(); i++) Z[i] = times(Z[i], M[i]);
            scatter(plane_.irfft2(Z), results[y], b, c);
        });
    }

    // P = D G conj(X); grad_u = irfft2(conj(M) G)
    void backward(const Values& grad_y) {
        for (Output output : {grad_x, grad_logits, grad_filters, grad_scalars})
            results[output].assign(elements(p_, output), 0);
        auto X = X_.begin();
        for_each_plane([&](std::int64_t b, std::int64_t c) {
            const Spectrum G = plane_.rfft2(gathered(grad_y, b, c)), M = mixed(b, c);
            Spectrum Z(G.size()), P(G.size());
            for (std::size_t i = 0; i < G.size(); i++) {
                Z[i] = times(std::conj(M[i]), G[i]);
                P[i] = plane_.weight(static_cast<int>(i % plane_.K)) * times(G[i], std::conj((*X)[i]));
            }
            X++;
            add_input_gradients(plane_.irfft2(Z), b, c);
            p_.F ? add_basis_gradients(P, b, c) : add_weight_gradient(P, c);
        });
    }

    Results results;

  private:
    template <class Run>
    void for_each_plane(const Run& run) const {
        for (std::int64_t b = 0; b < p_.B; b++)
            for (std::int64_t c = 0; c < p_.C; c++) run(b, c);
    }
    Values gathered(const Values& tensor, std::int64_t b, std::int64_t c) const {
        Values values(p_.H * p_.W);
        for (std::int64_t i = 0; i < p_.H * p_.W; i++) values[i] = tensor[(b * p_.H * p_.W + i) * p_.C + c];
        return values;
    }
    void scatter(const Values& values, Values& tensor, std::int64_t b, std::int64_t c) const {
        for (std::int64_t i = 0; i < p_.H * p_.W; i++) tensor[(b * p_.H * p_.W + i) * p_.C + c] = values[i];
    }

    // routing = softmax(logits) over F
    void mix() {
        routing_ = in_.logits;
        for_each_plane([&](std::int64_t b, std::int64_t c) {
            double sum = 0;
            for (int f = 0; f < p_.F; f++) sum += std::exp(in_.logits[at(b, f, c)]);
            for (int f = 0; f < p_.F; f++) routing_[at(b, f, c)] = std::exp(in_.logits[at(b, f, c)]) / sum;
        });
    }
    std::int64_t at(std::int64_t b, int f, std::int64_t c) const { return (b * p_.F + f) * p_.C + c; }
    Complex basis(std::size_t bin, int f) const {
        const double* pair = &in_.filters[2 * (bin * p_.F + f)];
        return {pair[0], pair[1]};
    }
    Spectrum mixed(std::int64_t b, std::int64_t c) const {
        Spectrum M(std::size_t(plane_.H) * plane_.K);
        for (std::size_t bin = 0; bin < M.size(); bin++) {
            if (p_.F == 0) M[bin] = {in_.filters[2 * (bin * p_.C + c)], in_.filters[2 * (bin * p_.C + c) + 1]};
            for (int f = 0; f < p_.F; f++) M[bin] += routing_[at(b, f, c)] * basis(bin, f);
        }
        return M;
    }

    void add_input_gradients(Values grad_u, std::int64_t b, std::int64_t c) {
        const Values x = gathered(in_.x, b, c);
        for (std::size_t i = 0; p_.star_relu && i < x.size(); i++) {
            results[grad_scalars][0] += grad_u[i] * relu(x[i]) * relu(x[i]);
            results[grad_scalars][1] += grad_u[i];
            grad_u[i] *= 2 * p_.scale * relu(x[i]);
        }
        scatter(grad_u, results[grad_x], b, c);
    }
    void add_weight_gradient(const Spectrum& P, std::int64_t c) {
        for (std::size_t bin = 0; bin < P.size(); bin++) add(P[bin], &results[grad_filters][2 * (bin * p_.C + c)]);
    }
    void add_basis_gradients(const Spectrum& P, std::int64_t b, std::int64_t c) {
        Values grad_routing(p_.F);
        double mean = 0;
        for (int f = 0; f < p_.F; f++) {
            const double routing = routing_[at(b, f, c)];
            for (std::size_t bin = 0; bin < P.size(); bin++) {
                grad_routing[f] += times(P[bin], std::conj(basis(bin, f))).real();
                add(routing * P[bin], &results[grad_filters][2 * (bin * p_.F + f)]);
            }
            mean += routing * grad_routing[f];
        }
        for (int f = 0; f < p_.F; f++)
            results[grad_logits][at(b, f, c)] = routing_[at(b, f, c)] * (grad_routing[f] - mean);
    }
    static void add(Complex value, double* pair) {
        pair[0] += value.real();
        pair[1] += value.imag();
    }

    const FilterProblem& p_;
    const Plane plane_;
    const Inputs& in_;
    std::vector<Spectrum> X_;
    Values routing_;
};

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

std::string bytes_of(StarReLUScalarGrads grads) {
    std::string bytes(2 * sizeof(double), 0);
    put(&bytes[0], grads.scale);
    put(&bytes[sizeof(double)], grads.bias);
    return bytes;
}

using Bytes = std::array<std::string, num_outputs>;

DType dtype_of(const FilterProblem& p, Output output) {
    if (output == grad_scalars) return DType::float64;
    return output == y || output == grad_x ? p.dtype : arithmetic_of(p.dtype);
}

// The wanted outputs of one call.
Bytes run(const FilterProblem& p, const InputTensors& in, Wanted wanted, int threads) {
    std::array<std::optional<Tensor>, num_outputs> outputs;
    std::array<void*, num_outputs> address{};
    for (Output output : {y, grad_x, grad_logits, grad_filters}) {
        if (!wants(wanted, output)) continue;
        outputs[output].emplace(elements(p, output), dtype_of(p, output), in.edge);
        address[output] = outputs[output]->data();
    }
    FilterTensors tensors{};
    tensors.x = in.x.data();
    tensors.logits = p.F ? in.logits.data() : nullptr;
    tensors.filters = in.filters.data();
    tensors.y = address[y];
    tensors.grad_x = address[grad_x];
    tensors.grad_logits = address[grad_logits];
    tensors.grad_filters = address[grad_filters];
    tensors.need_scalars = wants(wanted, grad_scalars);
    Bytes results;
    if (wanted == forward_only) {
        filter(p, tensors, threads);
    } else {
        tensors.grad_y = in.grad_y.data();
        results[grad_scalars] = bytes_of(filter_backward(p, tensors, threads));
    }
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

    // roundings: how often a result is rounded to the dtype on its way
    void within_bound(const std::string& what, DType dtype, const Values& actual, const Values& wanted,
                      int roundings = 1) {
        const double allowed = roundings * bounds[static_cast<int>(dtype)];
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
    char name[120];
    std::snprintf(name, sizeof(name), "B%d-%dx%d-C%d-F%d%s %s", int(p.B), int(p.H), int(p.W), int(p.C), int(p.F),
                  p.star_relu ? "-star_relu" : "", dtype_names[static_cast<int>(p.dtype)]);
    return name;
}

void begin_case(const std::string& name) {
    std::snprintf(current_case, sizeof(current_case), "%s %s", active_isa().c_str(), name.c_str());
}

// A NaN in the plane of one sample and channel reaches no other plane.
void check_isolation(const FilterProblem& p, const Inputs& inputs, Tally& tally) {
    const std::int64_t b = p.B - 1, c = p.C / 2, pixel = ((b * p.H + p.H / 2) * p.W + p.W / 2) * p.C + c;
    Inputs with_nan = inputs;
    with_nan.x[pixel] = with_nan.grad_y[pixel] = NAN;
    const InputTensors clean(p, inputs, Edge::lower), dirty(p, with_nan, Edge::lower);
    struct Layout {
        Output output;
        std::int64_t per_sample, per_channel;  // elements; per_sample 0: a sum over samples
    };
    const std::int64_t plane = p.H * p.W * p.C;
    std::vector<Layout> layouts = {{y, plane, 1}, {grad_x, plane, 1}};
    layouts.push_back(p.F ? Layout{grad_logits, p.F * p.C, 1} : Layout{grad_filters, 0, 2});
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
    const std::int64_t before = workspace_bytes, promised = filter_workspace(p, wanted != forward_only, threads);
    run(p, in, wanted, threads);
    // each of up to three blocks of memory is rounded up for its alignment
    if (std::abs(workspace_bytes - before - promised) > 3 * 128) fail("filter_workspace is not what was allocated");
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
        star_relu(given.data(), result.data(), n, dtype, scale, bias, threads);
        const std::string sums =
            bytes_of(star_relu_backward(grad_given.data(), given.data(), grad_result.data(), n, dtype, scale, threads));
        tally.same_bits(
            "sums depend on whether grad_x is wanted",
            bytes_of(star_relu_backward(grad_given.data(), given.data(), nullptr, n, dtype, scale, threads)), sums);
        const Bytes many = {result.bytes(), grad_result.bytes(), "", "", sums};
        if (threads == 1) one = many;
        tally.same_bits("depends on threads", many[y] + many[grad_x] + sums, one[y] + one[grad_x] + one[grad_scalars]);
    }
    tally.within_bound("y", dtype, decoded(dtype, one[y]), expected[y]);
    tally.within_bound("grad_x", dtype, decoded(dtype, one[grad_x]), expected[grad_x]);
    tally.within_bound("grad_scalars", arithmetic_of(dtype), decoded(DType::float64, one[grad_scalars]),
                       expected[grad_scalars]);
}

// a (M,K) b (K,N), each element of the first two by its function of row and column.
template <class A, class B>
Values multiplied(std::int64_t M, std::int64_t N, std::int64_t K, const A& a, const B& b) {
    Values result(M * N, 0.0);
    for (std::int64_t m = 0; m < M; m++)
        for (std::int64_t k = 0; k < K; k++)
            for (std::int64_t n = 0; n < N; n++) result[m * N + n] += a(m, k) * b(k, n);
    return result;
}

struct MatrixSizes {
    std::int64_t M, N, K;
};

constexpr DType single = DType::float32;

const float* floats(const Tensor& t) { return reinterpret_cast<const float*>(t.data()); }
float* floats(Tensor& t) { return reinterpret_cast<float*>(t.data()); }

// The result of a product (given where to write it and how many threads), whatever the threads.
template <class Run>
void check_product(const std::string& what, const Values& expected, Tally& tally, const Run& run, int roundings = 1) {
    std::string one;
    for (int threads : {1, 2, 7}) {
        Tensor result(expected.size(), single, threads == 1 ? Edge::upper : Edge::lower);
        run(floats(result), threads);
        if (threads == 1) one = result.bytes();
        tally.same_bits(what + " depends on threads", result.bytes(), one);
    }
    tally.within_bound(what, single, decoded(single, one), expected, roundings);
}

void check_products(const MatrixSizes& sizes, Tally& tally) {
    const auto [M, N, K] = sizes;
    const Values x = rounded(single, normal(M * K, 1)), weight = rounded(single, normal(N * K, 2)),
                 bias = rounded(single, normal(N, 3)), second = rounded(single, normal(K * N, 4));
    const auto element = [](const Values& matrix, std::int64_t columns) {
        return [&matrix, columns](std::int64_t row, std::int64_t column) { return matrix[row * columns + column]; };
    };
    const auto transposed = [](const Values& matrix, std::int64_t columns) {
        return [&matrix, columns](std::int64_t row, std::int64_t column) { return matrix[column * columns + row]; };
    };
    const Values product_alone = multiplied(M, N, K, element(x, K), transposed(weight, K));
    Values y = product_alone;
    for (std::int64_t i = 0; i < M * N; i++) y[i] += bias[i % N];
    const Values grad_y = leaning(single, y);
    for (Edge edge : {Edge::upper, Edge::lower}) {
        const Tensor given_x(x, single, edge), given_weight(weight, single, edge), given_bias(bias, single, edge),
            given_grad(grad_y, single, edge), given_second(second, single, edge);
        const std::int64_t width = panel_width(), panels = (N + width - 1) / width, panels2 = (K + width - 1) / width;
        Tensor packed(panels * K * width, single, edge), packed2(panels2 * N * width, single, edge);
        pack(floats(given_weight), N, K, floats(packed), 2);
        pack(floats(given_second), K, N, floats(packed2), 1);
        for (Layout layout : {Layout::rows, Layout::panels})
            check_product("y", y, tally, [&, M = M, N = N, K = K](float* result, int threads) {
                product({M,
                         N,
                         K,
                         floats(given_x),
                         {},
                         floats(layout == Layout::rows ? given_weight : packed),
                         layout,
                         floats(given_bias),
                         {},
                         result},
                        threads);
            });
        check_product(
            "grad_x", multiplied(M, K, N, element(grad_y, N), element(weight, K)), tally,
            [&, M = M, N = N, K = K](float* result, int threads) {
                product({M, K, N, floats(given_grad), {}, floats(given_weight), Layout::columns, nullptr, {}, result},
                        threads);
            });
        Values gradient = multiplied(N, K, M, transposed(grad_y, N), element(x, K));
        for (bool add : {false, true}) {
            if (add)
                for (std::int64_t i = 0; i < N * K; i++) gradient[i] += weight[i];
            check_product("weight's gradient", gradient, tally, [&, M = M, N = N, K = K](float* result, int threads) {
                std::memcpy(result, floats(given_weight), N * K * sizeof(float));
                weight_gradient({M, N, K, floats(given_grad), floats(given_x), result, add}, threads);
            });
        }
        constexpr double scale = 0.875, shift = 0.3125;
        Values hidden = product_alone;
        for (double& value : hidden) value = scale * relu(value) * relu(value) + shift;
        const Values through = multiplied(M, K, N, element(hidden, N), transposed(second, N));
        Tensor before(M * N, single, edge);
        for (Layout layout : {Layout::rows, Layout::panels})
            for (bool keep : {false, true}) {
                const bool rows = layout == Layout::rows;
                check_product(
                    "MLP", through, tally,
                    [&, M = M, N = N, K = K](float* result, int threads) {
                        mlp({M,
                             K,
                             K,
                             N,
                             floats(given_x),
                             {},
                             floats(rows ? given_weight : packed),
                             scale,
                             shift,
                             floats(rows ? given_second : packed2),
                             layout,
                             nullptr,
                             {},
                             keep ? floats(before) : nullptr,
                             result},
                            threads);
                    },
                    3);
            }
        tally.within_bound("kept before StarReLU", single, decoded(single, before.bytes()), product_alone);
    }
}

// Rows of x normalised, times weight (K).
Values normalised(const Values& x, const Values& weight, double eps) {
    const std::size_t K = weight.size();
    Values result;
    for (std::size_t row = 0; row < x.size(); row += K) {
        double mean = 0, square = 0;
        for (std::size_t k = 0; k < K; k++) mean += x[row + k] / K;
        for (std::size_t k = 0; k < K; k++) square += (x[row + k] - mean) * (x[row + k] - mean) / K;
        for (std::size_t k = 0; k < K; k++) result.push_back((x[row + k] - mean) / std::sqrt(square + eps) * weight[k]);
    }
    return result;
}

// What a block computes around its branches, done by their products.
void check_norms_and_residuals(const MatrixSizes& sizes, Tally& tally) {
    const auto [M, N, K] = sizes;
    constexpr float eps = 0.01f;
    Values uneven = normal(M * K, 1);  // or the means of what is normalised would be almost nothing
    for (std::int64_t i = 0; i < M * K; i++) uneven[i] += i % K % 3;
    const Values x = rounded(single, uneven), gamma = rounded(single, normal(K, 2)),
                 weight = rounded(single, normal(N * K, 3)), added = rounded(single, normal(M * N, 4)),
                 scale = rounded(single, normal(N, 5)), bias = rounded(single, normal(N, 6)),
                 second = rounded(single, normal(N * N, 7));
    const auto times = [](std::int64_t rows, std::int64_t columns, const Values& a, const Values& w) {
        const auto depth = static_cast<std::int64_t>(w.size()) / columns;
        return multiplied(
            rows, columns, depth, [&](std::int64_t m, std::int64_t k) { return a[m * depth + k]; },
            [&](std::int64_t k, std::int64_t n) { return w[n * depth + k]; });
    };
    for (Edge edge : {Edge::upper, Edge::lower})
        for (bool plain : {false, true}) {
            const Values ones(K, 1.0), rows = normalised(x, plain ? ones : gamma, eps);
            const Tensor given_x(x, single, edge), given_gamma(gamma, single, edge), given_weight(weight, single, edge),
                given_added(added, single, edge), given_scale(scale, single, edge), given_bias(bias, single, edge),
                given_second(second, single, edge);
            const Norm norm{true, plain ? nullptr : floats(given_gamma), eps};
            const Residual residual{floats(given_added), plain ? nullptr : floats(given_scale)};
            const auto with_residual = [&, N = N](Values y) {
                for (std::size_t i = 0; i < y.size(); i++) y[i] += bias[i % N] + (plain ? 1 : scale[i % N]) * added[i];
                return y;
            };
            Values hidden = times(M, N, rows, weight);
            check_product("with norm and residual", with_residual(hidden), tally,
                          [&, M = M, N = N, K = K](float* result, int threads) {
                              product({M, N, K, floats(given_x), norm, floats(given_weight), Layout::rows,
                                       floats(given_bias), residual, result},
                                      threads);
                          });
            for (double& value : hidden) value = relu(value) * relu(value);
            check_product(
                "MLP with norm and residual", with_residual(times(M, N, hidden, second)), tally,
                [&, M = M, N = N, K = K](float* result, int threads) {
                    mlp({M, N, K, N, floats(given_x), norm, floats(given_weight), 1, 0, floats(given_second),
                         Layout::rows, floats(given_bias), residual, nullptr, result},
                        threads);
                },
                3);
            const std::int64_t B = M % 2 ? 1 : 2, P = M / B;
            Values means(B * K, 0.0);
            for (std::int64_t i = 0; i < M * K; i++) means[i / (P * K) * K + i % K] += rows[i] / P;
            check_product("mean of what is normalised", means, tally, [&, K = K](float* result, int threads) {
                norm_mean({B, P, K, floats(given_x), norm, result}, threads);
            });
        }
}

// ---- what is checked

// Of products: single rows and columns, tiles and panels with one more and one less, sums in several steps, and enough
// of everything for several threads and chunks.
std::vector<MatrixSizes> matrix_sizes(bool quick) {
    std::vector<MatrixSizes> sizes = {{1, 1, 1}, {6, 64, 16}, {7, 65, 17}, {5, 15, 33}, {13, 31, 3}, {49, 80, 7}};
    if (!quick)
        sizes.insert(sizes.end(), {{100, 63, 64},
                                   {2, 200, 513},
                                   {3, 5, 1025},
                                   {257, 66, 5},
                                   {513, 20, 40},
                                   {40, 130, 520},
                                   {1000, 130, 40},
                                   {7, 1100, 90}});
    return sizes;
}

struct Shape {
    std::int64_t B, H, W, C, F;
};

// For emulators: every radix and every kind of butterfly without code of its own, every kind of channel block.
const std::vector<Shape> quick_shapes = {
    {2, 7, 7, 33, 4}, {1, 14, 8, 17, 4}, {2, 9, 15, 3, 5}, {1, 22, 26, 3, 2}, {1, 16, 3, 65, 1}, {3, 1, 1, 5, 4},
    {2, 2, 2, 3, 4},  {2, 1, 12, 3, 4},  {2, 13, 1, 1, 4}, {1, 2, 131, 3, 4}, {1, 101, 2, 3, 4},
};
const std::vector<Shape> shapes = {
    // the planes of the models' four stages; the last is large enough for threads to share one
    {2, 7, 7, 33, 4},
    {2, 14, 14, 17, 4},
    {3, 28, 28, 17, 4},
    {3, 56, 56, 17, 4},
    {1, 56, 56, 65, 4},
    // powers of two; with that many filters, more planes than slots
    {2, 16, 16, 65, 4},
    {1, 32, 32, 33, 4},
    {2, 64, 64, 17, 64},
    // odd and prime sides
    {2, 9, 15, 5, 4},
    {2, 13, 13, 17, 4},
    {1, 31, 31, 3, 4},
    // primes without a butterfly of their own beside other factors, or twice
    {2, 22, 26, 17, 4},
    {1, 121, 3, 17, 4},
    {1, 3, 143, 3, 4},
    // large primes, with a generator's powers (101) and a chirp (131), alone, beside another factor, and twice; long
    // sums along either side
    {1, 101, 5, 17, 4},
    {1, 4, 131, 17, 4},
    {1, 101, 131, 7, 4},
    {1, 202, 3, 17, 4},
    {1, 3, 262, 3, 4},
    {1, 10201, 1, 1, 4},
    {1, 2048, 1, 17, 4},
    {1, 1, 10201, 1, 4},
    // lines transformed part by part, from their second pass on or from a later one
    {1, 512, 3, 17, 4},
    {1, 3, 1024, 17, 4},
    {1, 4608, 1, 3, 4},
    // rectangles
    {2, 6, 10, 7, 4},
    {2, 12, 5, 17, 4},
    {1, 5, 12, 33, 4},
    {1, 30, 105, 3, 4},
    // one row or one column
    {2, 1, 12, 3, 4},
    {2, 1, 7, 17, 4},
    {2, 12, 1, 3, 4},
    {1, 7, 1, 65, 4},
    {1, 1, 101, 3, 4},
    {1, 101, 1, 3, 4},
    // the smallest planes
    {3, 1, 1, 5, 4},
    {2, 2, 2, 3, 4},
    {2, 1, 2, 3, 4},
    {2, 2, 1, 3, 4},
    // channels: one, one more than registers hold, and full blocks alone, in whole groups and not
    {2, 8, 8, 1, 4},
    {1, 4, 4, 65, 4},
    {1, 8, 8, 128, 4},
    {2, 6, 6, 80, 4},
    // filters
    {2, 8, 8, 3, 1},
    {2, 7, 7, 17, 1},
    {2, 8, 8, 3, 2},
    {2, 7, 8, 17, 5},
};
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

void check_shape(const Shape& shape, Tallies& tallies) {
    for (std::int64_t F : shape.F ? std::vector{shape.F, std::int64_t{0}} : std::vector{shape.F})
        for (bool star_relu : {false, true})
            for (int code = 0; code < num_dtypes; code++) {
                const auto dtype = static_cast<DType>(code);
                const FilterProblem p{shape.B, shape.H, shape.W, shape.C, F, dtype, star_relu, 0.875, 0.3125};
                Inputs inputs = make_inputs(p);
                Reference reference(p, inputs);
                inputs.grad_y = leaning(dtype, reference.results[y]);
                reference.backward(inputs.grad_y);
                with_each_isa(name_of(p), dtype, tallies,
                              [&](Tally& tally) { check_filter(p, inputs, reference.results, tally); });
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
    for (const MatrixSizes& sizes : matrix_sizes(quick))
        with_each_isa(
            "products of " + std::to_string(sizes.M) + ", " + std::to_string(sizes.N) + ", " + std::to_string(sizes.K),
            single, tallies, [&](Tally& tally) {
                check_products(sizes, tally);
                check_norms_and_residuals(sizes, tally);
            });
    for (const Shape& shape : quick ? quick_shapes : shapes) check_shape(shape, tallies);
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

// Threads take blocks of common sizes, and each must have its own to itself.
void use_blocks(int thread) {
    for (int i = 0; i < 200; i++) {
        const std::int64_t bytes = 4096 * (1 + (thread + i) % 6);
        void* const block = cpu::take_block(bytes);
        std::memset(block, thread, static_cast<std::size_t>(bytes));
        if (i % 50 == 0) cpu::free_kept_blocks();
        for (std::int64_t b = 0; b < bytes; b += 64)
            if (static_cast<char*>(block)[b] != thread) fail("a block that two threads have");
        cpu::give_block(block, bytes);
    }
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
    threads.clear();
    for (int t = 0; t < 8; t++) threads.emplace_back(use_blocks, t);
    for (std::thread& thread : threads) thread.join();
    cpu::free_kept_blocks();
    std::printf("%s: 8 threads, %d problems, %d plans kept\n", active_isa().c_str(), count, cpu::cached_plans());
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
