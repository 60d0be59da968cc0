// Plans and their cache. Constants are computed in float64 and rounded once.
#include "plan.h"

#include <pthread.h>

#include <algorithm>
#include <cmath>
#include <complex>
#include <deque>
#include <list>
#include <map>
#include <mutex>
#include <numeric>
#include <vector>

namespace dfformer::cpu {
namespace {

using Complex64 = std::complex<double>;

// exp(-2 pi i k / n), from an angle of at most pi/4.
Complex64 root(std::int64_t k, std::int64_t n) {
    k %= n;
    const std::int64_t octant = 8 * k / n, numerator = 8 * k - octant * n;  // angle = (octant + numerator / n) pi/4
    const double rest = (octant % 2 ? n - numerator : numerator) * (M_PI / 4) / n;
    const double c = std::cos(rest), s = std::sin(rest);
    const Complex64 turns[8] = {{c, s}, {s, c}, {-s, c}, {-c, s}, {-c, -s}, {-s, -c}, {s, -c}, {c, -s}};
    return std::conj(turns[octant]);
}

// Costs are measured nanoseconds (AVX-512, data in L1); only their ratios matter. These are the radices with an
// unrolled butterfly.
const std::map<int, double> unrolled_cost = {{2, 1.1}, {3, 1.9}, {4, 2.2}, {5, 3.5}, {7, 5.4}, {8, 6.0}};
constexpr double twiddle_cost = 0.17;

int smallest_factor(int n) {
    for (int p = 2; p * p <= n; p++)
        if (n % p == 0) return p;
    return n;
}

bool is_smooth(int n) {
    for (int p : {2, 3, 5, 7})
        while (n % p == 0) n /= p;
    return n == 1;
}

struct Factors {
    double cost = 0;
    std::vector<int> radices;
};

using KnownFactors = std::map<int, Factors>;
Factors cheapest_factors(int n, KnownFactors& known);

// How a prime without an unrolled butterfly is transformed.
struct PrimeMethod {
    enum { definition, rader, bluestein } kind = definition;
    int convolution = 0;  // points
    double cost = 0;
};

PrimeMethod cheapest_method(int prime, KnownFactors& known) {
    PrimeMethod best{PrimeMethod::definition, 0, 0.13 * prime * prime + 3.8 * prime};
    const auto consider = [&](PrimeMethod candidate) {
        const int n = candidate.convolution;
        if (!is_smooth(n)) return;
        candidate.cost = 2 * cheapest_factors(n, known).cost + 5.0 * n + 60;
        if (candidate.cost < best.cost) best = candidate;
    };
    consider({PrimeMethod::rader, prime - 1});
    for (int n = 2 * prime - 1; n < 3 * prime; n++) consider({PrimeMethod::bluestein, n});
    return best;
}

double butterfly_cost(int radix, KnownFactors& known) {
    const auto found = unrolled_cost.find(radix);
    return found != unrolled_cost.end() ? found->second : cheapest_method(radix, known).cost;
}

// The cheapest sequence of radices for a line of n points.
Factors cheapest_factors(int n, KnownFactors& known) {
    if (n == 1) return {};
    if (const auto found = known.find(n); found != known.end()) return found->second;
    Factors best;
    const auto consider = [&](int radix) {
        const int rest = n / radix;
        Factors candidate = cheapest_factors(rest, known);
        const double twiddles = std::gcd(radix, rest) == 1 ? 0 : twiddle_cost * (radix - 1);
        candidate.cost = rest * (butterfly_cost(radix, known) + twiddles) + radix * candidate.cost;
        candidate.radices.insert(candidate.radices.begin(), radix);
        if (best.radices.empty() || candidate.cost < best.cost) best = candidate;
    };
    for (const auto& [radix, cost] : unrolled_cost)
        if (n % radix == 0) consider(radix);
    for (int rest = n; rest > 1;) {
        const int prime = smallest_factor(rest);
        if (!unrolled_cost.contains(prime)) consider(prime);
        while (rest % prime == 0) rest /= prime;
    }
    return known[n] = best;
}

// Outermost first. An even radix, if any, is moved to the front: its butterflies take whole pairs of rows.
std::vector<int> radices_of(int n) {
    if (n == 1) return {1};
    KnownFactors known;
    std::vector<int> radices = cheapest_factors(n, known).radices;
    const auto even = std::find_if(radices.begin(), radices.end(), [](int radix) { return radix % 2 == 0; });
    if (even != radices.end()) std::rotate(radices.begin(), even, even + 1);
    return radices;
}

// Recursive float64 transform, for tables only.
std::vector<Complex64> transformed(const std::vector<Complex64>& a) {
    const int n = static_cast<int>(a.size()), radix = smallest_factor(n), rest = n / radix;
    if (n == 1) return a;
    std::vector<Complex64> result(n), part(rest);
    for (int r = 0; r < radix; r++) {
        for (int m = 0; m < rest; m++) part[m] = a[m * radix + r];
        const std::vector<Complex64> spectrum = transformed(part);
        for (int k = 0; k < n; k++) result[k] += spectrum[k % rest] * root(static_cast<std::int64_t>(k) * r, n);
    }
    return result;
}

// A plan and everything its pointers point into.
template <class T>
struct OwnedPlan {
    LinePlan<T> plan{};
    std::vector<Pass<T>> passes;
    std::deque<std::vector<T>> tables;  // deques, because plan and passes point to their elements
    std::deque<std::vector<int>> indices;
    std::vector<std::shared_ptr<const LinePlan<T>>> convolutions;

    const T* table(const std::vector<Complex64>& values) {
        std::vector<T>& rounded = tables.emplace_back();
        for (const Complex64& value : values) {
            rounded.push_back(static_cast<T>(value.real()));
            rounded.push_back(static_cast<T>(value.imag()));
        }
        return rounded.data();
    }
};

template <class T>
std::shared_ptr<const LinePlan<T>> build(int size);

// Sets pass.spectrum: the transform of the convolution's kernel, scaled by 1/n, in the order of pass.convolution.
template <class T>
void add_spectrum(OwnedPlan<T>& owned, Pass<T>& pass, std::vector<Complex64> kernel) {
    const int n = static_cast<int>(kernel.size());
    for (Complex64& value : kernel) value /= n;
    const std::vector<Complex64> spectrum = transformed(kernel);
    std::vector<Complex64> ordered(n);
    for (int p = 0; p < n; p++) ordered[p] = spectrum[pass.convolution->frequency[p]];
    pass.spectrum = owned.table(ordered);
}

// The smallest generator of the multiplicative group modulo `prime`.
int generator(int prime) {
    for (int g = 2;; g++) {
        int order = 1;
        for (std::int64_t power = g; power != 1; power = power * g % prime) order++;
        if (order == prime - 1) return g;
    }
}

template <class T>
void add_rader(OwnedPlan<T>& owned, Pass<T>& pass) {
    const int prime = pass.radix, n = prime - 1, g = generator(prime);
    std::vector<int> powers{1};
    for (int q = 1; q < n; q++) powers.push_back(static_cast<int>(std::int64_t{powers.back()} * g % prime));
    auto& inputs = owned.indices.emplace_back(n);
    auto& outputs = owned.indices.emplace_back(n);
    std::vector<Complex64> kernel(n);
    for (int q = 0; q < n; q++) {
        const int inverse = powers[(n - q) % n], position = pass.convolution->position[q];
        inputs[position] = powers[q];
        outputs[position] = inverse;
        kernel[q] = root(inverse, prime);
    }
    pass.inputs = inputs.data();
    pass.outputs = outputs.data();
    add_spectrum(owned, pass, kernel);
}

template <class T>
void add_bluestein(OwnedPlan<T>& owned, Pass<T>& pass) {
    const int prime = pass.radix, n = pass.convolution->size;
    std::vector<Complex64> chirp(prime), kernel(n);
    for (std::int64_t j = 0; j < prime; j++) {
        chirp[j] = root(j * j % (2 * prime), 2 * prime);
        kernel[j] = kernel[(n - j) % n] = std::conj(chirp[j]);
    }
    pass.chirp = owned.table(chirp);
    add_spectrum(owned, pass, kernel);
}

template <class T>
void add_prime(OwnedPlan<T>& owned, Pass<T>& pass) {
    const int prime = pass.radix;
    KnownFactors known;
    const PrimeMethod method = cheapest_method(prime, known);
    if (method.kind == PrimeMethod::definition) {
        std::vector<Complex64> roots(prime);
        for (int j = 0; j < prime; j++) roots[j] = root(j, prime);
        pass.roots = owned.table(roots);
    } else {
        pass.convolution = owned.convolutions.emplace_back(build<T>(method.convolution)).get();
        method.kind == PrimeMethod::rader ? add_rader(owned, pass) : add_bluestein(owned, pass);
    }
    owned.plan.scratch = std::max<std::int64_t>(owned.plan.scratch, prime + std::max(prime, method.convolution));
}

// The first pass, of radix R, turns a line of N = R M points into R lines of M. Sample n = M r + m (coprime factors:
// M r + R m) is input r of butterfly m. Frequency k = r + R km (coprime: the k with remainders r modulo R and km modulo
// M) is frequency km of line r.
template <class T>
std::shared_ptr<const LinePlan<T>> build(int size) {
    auto owned = std::make_shared<OwnedPlan<T>>();
    std::vector<int> sample{0},
        frequency{0};  // by position, of the line built so far, from the innermost pass outwards
    const std::vector<int> radices = radices_of(size);
    for (auto radix = radices.rbegin(); radix != radices.rend(); ++radix) {
        const int R = *radix, M = static_cast<int>(sample.size()), N = R * M;
        const bool coprime = std::gcd(R, M) == 1;
        Pass<T> pass{R, size / N, M};
        if (!coprime) {
            std::vector<Complex64> twiddles;
            for (int m = 0; m < M; m++)
                for (int r = 1; r < R; r++) twiddles.push_back(root(static_cast<std::int64_t>(sample[m]) * r, N));
            pass.twiddles = owned->table(twiddles);
        }
        if (R > 1 && !unrolled_cost.contains(R)) add_prime(*owned, pass);
        owned->passes.insert(owned->passes.begin(), pass);

        std::vector<int> longer_sample(N), longer_frequency(N);
        for (int r = 0; r < R; r++)
            for (int m = 0; m < M; m++) {
                const std::int64_t n = static_cast<std::int64_t>(M) * r + (coprime ? R : 1) * std::int64_t{sample[m]};
                longer_sample[r * M + m] = static_cast<int>(n % N);
                int k = r + R * frequency[m];
                if (coprime)
                    for (k = frequency[m]; k % R != r; k += M) {
                    }
                longer_frequency[r * M + m] = k;
            }
        sample = longer_sample;
        frequency = longer_frequency;
    }

    std::vector<int> position(size), frequency_at(size), columns, pairs;
    for (int p = 0; p < size; p++) {
        position[sample[p]] = p;
        frequency_at[frequency[p]] = p;
        if (frequency[p] <= size / 2) columns.push_back(frequency[p]);
    }
    const int R = radices.front(), M = size / R;
    for (int r = 0; r < R; r += 2)
        for (int m = 0; m < M; m++) {
            pairs.push_back(sample[r * M + m]);
            pairs.push_back(r + 1 < R ? sample[(r + 1) * M + m] : -1);
        }
    const auto kept = [&](const std::vector<int>& table) { return owned->indices.emplace_back(table).data(); };
    owned->plan = {
        {size, static_cast<int>(radices.size()), static_cast<int>(pairs.size() / 2), kept(sample), kept(position),
         kept(frequency), kept(frequency_at), kept(columns), kept(pairs), owned->plan.scratch},
        owned->passes.data()};
    return {owned, &owned->plan};
}

std::mutex cache_mutex;
// A child forked while another thread holds the mutex would deadlock.
[[maybe_unused]] const int at_fork =
    pthread_atfork([] { cache_mutex.lock(); }, [] { cache_mutex.unlock(); }, [] { cache_mutex.unlock(); });

}  // namespace

std::shared_ptr<const LineOrder> plan_for(int size, bool float64) {
    const std::lock_guard lock(cache_mutex);
    static std::list<std::shared_ptr<const LineOrder>> caches[2];  // most recently used first
    auto& plans = caches[float64];
    const auto found = std::find_if(plans.begin(), plans.end(), [&](const auto& plan) { return plan->size == size; });
    if (found != plans.end()) {
        plans.splice(plans.begin(), plans, found);
    } else {
        float64 ? plans.emplace_front(build<double>(size)) : plans.emplace_front(build<float>(size));
        if (plans.size() > plan_cache_limit) plans.pop_back();
    }
    return plans.front();
}

}  // namespace dfformer::cpu
