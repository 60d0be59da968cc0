// Runs the phases of the CUDA kernels thread by thread and watches every access:
//
//   races        words of shared memory or of a tensor that two threads touch in one phase, one of them writing
//   outside      accesses beyond shared memory or the tensor
//   unwritten    words of shared memory read before anybody wrote them
//   wavefronts   of a warp's accesses to shared memory, by the rule of 32 banks of 4 bytes; and the least possible
//   sectors      of 32 bytes, of a warp's requests for pixels; and the requests
//   loaded       bytes read from, and stored to, the tensors of pixels
//   asked        sectors that the L2 cache is asked for in advance, and how many different ones
//   kept         bytes read from and written to a CTA's own device memory
//
//   emulate_cuda SPECIALISATION B GRID WANTED MISSING_BARRIER INPUTS OUTPUTS
//
// MISSING_BARRIER counts a CTA's barriers; -1: none is missing. SPECIALISATIONS, a macro, lists
// RUN(name, storage type, Forward or Backward, layout's arguments...).
#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "butterflies.inl"
#include "dynamic_filter.inl"
#include "cuda_tensors.h"

namespace {

struct Report {
    long long races = 0, outside = 0, unwritten = 0, wavefronts = 0, least_wavefronts = 0, sectors = 0, requests = 0,
              loaded = 0, stored = 0, kept = 0, asked = 0;
    std::set<long long> different;
};

// Memory whose words remember who touched them since the last barrier.
struct Region {
    const char* begin;
    long long bytes;
    bool pixels = false;   // counted as what moves between tensors and the kernel
    bool scratch = false;  // holds nothing at the start

    static constexpr int granule = 2, nobody = -1, several = -2;
    struct Word {
        int phase = -1, writer = nobody, reader = nobody;
        bool written = false;
    };
    std::vector<Word> words = std::vector<Word>(bytes / granule);
};

struct Access {
    const Region* region;
    long long at;
    int bytes;
};

struct Cta {
    Report& report;
    Region shared, kept;
    std::vector<Region>& tensors;
    std::vector<std::vector<Access>> accesses;  // of each thread in this phase
    int phase = 0, barriers = 0, missing_barrier;

    Cta(Report& report, std::vector<char>& memory, std::vector<char>& kept, std::vector<Region>& tensors, int threads,
        int missing_barrier)
        : report(report),
          shared{memory.data(), (long long)memory.size(), false, true},
          kept{kept.data(), (long long)kept.size(), false, true},
          tensors(tensors),
          accesses(threads),
          missing_barrier(missing_barrier) {}

    void barrier() {
        if (barriers++ != missing_barrier) phase++;
        count_wavefronts();
        for (auto& of_thread : accesses) of_thread.clear();
    }

    // Whether the memory is there.
    bool touch(Region& region, int thread, const void* p, int bytes, bool write) {
        const long long at = (const char*)p - region.begin;
        if (at < 0 || at + bytes > region.bytes || at % bytes) {
            report.outside++;
            return false;
        }
        accesses[thread].push_back({&region, at, bytes});
        if (&region == &kept) report.kept += bytes;
        if (region.pixels) (write ? report.stored : report.loaded) += bytes;
        bool race = false;
        for (long long w = at / Region::granule; w < (at + bytes) / Region::granule; w++) {
            Region::Word& word = region.words[w];
            if (word.phase != phase) word = {phase, Region::nobody, Region::nobody, word.written};
            race |= word.writer != Region::nobody && word.writer != thread;
            if (write) {
                race |= word.reader != Region::nobody && word.reader != thread;
                word.writer = thread;
                word.written = true;
            } else {
                word.reader = word.reader == Region::nobody || word.reader == thread ? thread : Region::several;
                report.unwritten += region.scratch && !word.written;
            }
        }
        report.races += race;
        return true;
    }

    bool touch_tensor(int thread, const void* p, int bytes, bool write) {
        for (Region& region : tensors)
            if (p >= region.begin && p < region.begin + region.bytes) return touch(region, thread, p, bytes, write);
        report.outside++;
        return false;
    }

    // A warp's n-th accesses are one instruction, which takes half a warp at a time for 64 bits, a quarter for 128.
    void count_wavefronts() {
        const int threads = int(accesses.size());
        for (int first = 0; first < threads; first += 32) {
            std::size_t longest = 0;
            const int last = std::min(first + 32, threads);
            for (int t = first; t < last; t++) longest = std::max(longest, accesses[t].size());
            for (std::size_t n = 0; n < longest; n++) {
                std::vector<long long> sectors;
                std::array<std::vector<long long>, 4> words;
                for (int t = first; t < last; t++) {
                    if (n >= accesses[t].size()) continue;
                    const Access& access = accesses[t][n];
                    if (access.region == &shared)
                        for (int word = 0; word < access.bytes / 4; word++)
                            words[(t - first) * access.bytes / 128 % 4].push_back(access.at / 4 + word);
                    else if (access.region->pixels)
                        sectors.push_back(((long long)access.region->begin + access.at) / 32);
                }
                for (auto& part : words) count_banks(part);
                distinct(sectors);
                report.sectors += (long long)sectors.size();
                report.requests += !sectors.empty();
            }
        }
    }
    void count_banks(std::vector<long long>& words) {
        distinct(words);
        if (words.empty()) return;
        std::array<int, 32> banks{};
        for (long long word : words) banks[word % 32]++;
        report.wavefronts += *std::max_element(banks.begin(), banks.end());
        report.least_wavefronts += (long long)(words.size() + 31) / 32;
    }
    static void distinct(std::vector<long long>& values) {
        std::sort(values.begin(), values.end());
        values.erase(std::unique(values.begin(), values.end()), values.end());
    }
};

template <class T>
Complex<T> complex_at(const float* p) {
    if constexpr (sizeof(T) == 4)
        return {p[0], p[1]};
    else
        return {{p[0], p[2]}, {p[1], p[3]}};
}

// The environment of one thread.
struct Environment {
    Cta& cta;
    int thread;

    template <class T, class Storage>
    T load(const Storage* p) const {
        if (!cta.touch_tensor(thread, p, sizeof(T) / 4 * sizeof *p, false)) return {};
        if constexpr (sizeof(T) == 4)
            return float_of(*p);
        else
            return {float_of(p[0]), float_of(p[1])};
    }
    template <class T>
    Complex<T> complex(const float* p) const {
        return cta.touch_tensor(thread, p, sizeof(Complex<T>), false) ? complex_at<T>(p) : Complex<T>{};
    }
    template <int count>
    void load(const float* p, float* values) const {
        if (cta.touch_tensor(thread, p, count * 4, false)) std::copy_n(p, count, values);
    }
    template <class Storage, class T>
    void store(Storage* p, T value) const {
        if (!cta.touch_tensor(thread, p, sizeof(T) / 4 * sizeof *p, true)) return;
        unrolled<0, sizeof(T) / 4>([&](auto own) { p[own] = number_of<Storage>(of_channel(value, own)); });
    }
    void prefetch(const void* p) const {
        for (const Region& region : cta.tensors)
            if (p >= region.begin && p < region.begin + region.bytes) {
                cta.report.asked++;
                cta.report.different.insert((long long)p / 32);
                return;
            }
        cta.report.outside++;
    }
    int opaque(int i) const { return i; }
    template <int count>
    void accumulate(float* p, const float* values, bool first) const {
        if (!cta.touch_tensor(thread, p, count * 4, true)) return;
        for (int i = 0; i < count; i++) p[i] = first ? values[i] : p[i] + values[i];
    }

    template <class T>
    Complex<T> complex(Region& region, int i) const {
        const float* p = (const float*)region.begin + 2 * i;
        return cta.touch(region, thread, p, sizeof(Complex<T>), false) ? complex_at<T>(p) : Complex<T>{};
    }
    template <class T>
    void set_complex(Region& region, int i, Complex<T> value) const {
        float* p = (float*)region.begin + 2 * i;
        if (!cta.touch(region, thread, p, sizeof value, true)) return;
        unrolled<0, sizeof(T) / 4>([&](auto own) {
            p[2 * own] = of_channel(value.re, own);
            p[2 * own + 1] = of_channel(value.im, own);
        });
    }
    template <class T>
    Complex<T> spectrum(int i) const {
        return complex<T>(cta.shared, i);
    }
    template <class T>
    void set_spectrum(int i, Complex<T> value) const {
        set_complex(cta.shared, i, value);
    }
    template <class T>
    Complex<T> kept(int i) const {
        return complex<T>(cta.kept, i);
    }
    template <class T>
    void set_kept(int i, Complex<T> value) const {
        set_complex(cta.kept, i, value);
    }
    float* shared(int i) const { return (float*)cta.shared.begin + i; }
    float scratch(int i) const { return cta.touch(cta.shared, thread, shared(i), 4, false) ? *shared(i) : 0; }
    template <int count>
    void scratch(int i, float* values) const {
        if (cta.touch(cta.shared, thread, shared(i), 4 * count, false)) std::copy_n(shared(i), count, values);
    }
    template <class T>
    void set_scratch(int i, T value) const {
        if (!cta.touch(cta.shared, thread, shared(i), sizeof value, true)) return;
        unrolled<0, sizeof(T) / 4>([&](auto own) { shared(i)[own] = of_channel(value, own); });
    }
};

template <class T>
void add_region(std::vector<Region>& regions, const Tensor<T>& tensor, bool pixels = false) {
    if (tensor.count) regions.push_back({(const char*)tensor.data(), tensor.bytes(), pixels});
}

template <int phase, class Step>
void run_phase(Cta& cta, std::vector<Step>& threads) {
    for (Step& step : threads) {
        Environment env{cta, step.thread};
        step.template run<phase>(env);
    }
    cta.barrier();
}

template <class L, class Storage, class T>
void run_forward(const T& t, Cta& cta, long long index) {
    std::vector<Forward<L, Storage>> threads;
    for (int thread = 0; thread < L::threads; thread++)
        threads.push_back({t.x.data(),
                           t.y.data(),
                           t.logits.data(),
                           t.filters.data(),
                           {t.scale.data(), t.bias.data()},
                           thread,
                           (unsigned)index,
                           (unsigned)index + L::items_per_sample,
                           (unsigned)t.grid});
    unrolled<0, Forward<L, Storage>::phases>([&](auto phase) { run_phase<phase.value>(cta, threads); });
}

// The slot's part of a tensor that may be unwanted.
float* part(const Tensor<float>& slots, long long slot, long long count) {
    return slots.count ? slots.data() + slot * (slots.count / count) : nullptr;
}

template <class L, class Storage, class T>
void run_backward(const T& t, Cta& cta, long long index) {
    const long long slot = L::per_channel ? index / L::items_per_sample : index;
    std::vector<Backward<L, Storage>> threads;
    for (int thread = 0; thread < L::threads; thread++)
        threads.push_back({t.grad_y.data(),
                           t.x.data(),
                           t.logits.data(),
                           t.filters.data(),
                           {t.scale.data(), t.bias.data()},
                           t.y.data(),
                           t.grad_logits.data(),
                           part(t.filter_slots, slot, t.slots / L::slots),
                           part(t.star_relu_slots, index, t.grid),
                           thread});
    for (long long item = index; item < t.B * L::items_per_sample; item += t.grid) {
        const long long next = item + t.grid;
        for (auto& step : threads) step.begin(item, item == index, next < t.B * L::items_per_sample ? next : -1);
        unrolled<0, Backward<L, Storage>::phases>([&](auto phase) { run_phase<phase.value>(cta, threads); });
    }
    unrolled<0, Backward<L, Storage>::end_phases>([&](auto phase) {
        for (auto& step : threads) {
            Environment env{cta, step.thread};
            step.template end<phase.value>(env);
        }
        cta.barrier();
    });
}

template <class L, class Storage, bool backward>
Report run(long long B, long long grid, int wanted, int missing_barrier, const char* inputs, const char* outputs) {
    const Tensors<L, Storage, backward> t(B, grid, wanted, inputs);
    std::vector<Region> regions;
    add_region(regions, t.x, true), add_region(regions, t.grad_y, true), add_region(regions, t.y, true);
    add_region(regions, t.logits), add_region(regions, t.filters);
    add_region(regions, t.scale), add_region(regions, t.bias);
    add_region(regions, t.grad_logits), add_region(regions, t.filter_slots), add_region(regions, t.star_relu_slots);
    Report report;
    for (long long index = 0; index < grid; index++) {
        std::vector<char> memory(L::shared_bytes, char(0xff));
        std::vector<char> kept(L::one_spectrum ? 8 * L::kept_size : 0, char(0xff));
        Cta cta(report, memory, kept, regions, L::threads, missing_barrier);
        for (Region& region : regions) region.words.assign(region.words.size(), {});
        if constexpr (backward)
            run_backward<L, Storage>(t, cta, index);
        else
            run_forward<L, Storage>(t, cta, index);
    }
    t.write(outputs);
    return report;
}

enum Direction { forward = 0, backward = 1 };
using Run = Report (*)(long long, long long, int, int, const char*, const char*);
const std::map<std::string, Run> specialisations = {
#define RUN(name, storage, direction, ...) {#name, run<Layout<__VA_ARGS__>, storage, direction>},
    SPECIALISATIONS};

}  // namespace

int main(int, char** arguments) {
    const Report r =
        specialisations.at(arguments[1])(std::atoll(arguments[2]), std::atoll(arguments[3]), std::atoi(arguments[4]),
                                         std::atoi(arguments[5]), arguments[6], arguments[7]);
    std::printf(
        "races %lld outside %lld unwritten %lld wavefronts %lld least_wavefronts %lld sectors %lld requests %lld "
        "loaded %lld stored %lld kept %lld asked %lld different %lld\n",
        r.races, r.outside, r.unwritten, r.wavefronts, r.least_wavefronts, r.sectors, r.requests, r.loaded, r.stored,
        r.kept, r.asked, (long long)r.different.size());
}
