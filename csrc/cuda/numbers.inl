// What tensors store, and what a thread computes with.

struct BFloat16 {
    unsigned short bits;
};
struct Float16 {
    unsigned short bits;
};

// Numbers of two neighbouring channels, which a thread computes side by side: half the accesses and addresses.
struct Pair {
    float first, second;
};
FFT_INLINE Pair operator+(Pair a, Pair b) { return {a.first + b.first, a.second + b.second}; }
FFT_INLINE Pair operator-(Pair a, Pair b) { return {a.first - b.first, a.second - b.second}; }
FFT_INLINE Pair operator-(Pair a) { return {-a.first, -a.second}; }
FFT_INLINE Pair operator*(Pair a, Pair b) { return {a.first * b.first, a.second * b.second}; }
FFT_INLINE Pair operator*(Pair a, float b) { return {a.first * b, a.second * b}; }
FFT_INLINE void operator+=(Pair& a, Pair b) { a = a + b; }
template <>
struct ScalarOf<Pair> {
    using Type = float;
    static constexpr bool immediate = true;
};

template <int width>
struct Numbers {
    using Type = float;
};
template <>
struct Numbers<2> {
    using Type = Pair;
};

template <int channel>
FFT_INLINE float of_channel(float a, Index<channel>) {
    return a;
}
template <int channel>
FFT_INLINE float of_channel(Pair a, Index<channel>) {
    return channel ? a.second : a.first;
}

FFT_INLINE float sum_of(float a) { return a; }
FFT_INLINE float sum_of(Pair a) { return a.first + a.second; }

// fn(a, ...) of each channel's numbers.
template <class Fn, class... Others>
FFT_INLINE float each(Fn&& fn, float a, Others... others) {
    return fn(a, others...);
}
template <class Fn, class... Others>
FFT_INLINE Pair each(Fn&& fn, Pair a, Others... others) {
    return {fn(a.first, others.first...), fn(a.second, others.second...)};
}
