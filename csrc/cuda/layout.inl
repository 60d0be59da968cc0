// How a problem is laid out on a CTA's threads and in its shared memory.

enum Rows { ROW_PAIRS = 0, HALF_ROWS = 1 };
enum Columns { COLUMNS_IN_REGISTERS = 0, COLUMNS_UNROLLED = 1, COLUMNS_ROLLED = 2 };

// How threads and shared memory are laid out for one problem. A CTA's work item is c = `channels_per_cta` neighbouring
// channels of one sample. A thread works on `width` of them: `across` = c / width threads lie side by side, thread t
// works on channel width (t % across) of the c and the next, and takes every (threads / across)-th row or column.
//
// Shared memory: `spectra` half spectra, complex [H][row_stride] with [K][c] in a row; then, backward only, floats:
// [c][F] routing weights and [sums][threads][width] partial sums. Backward has two spectra, or where those do not fit,
// X and G one after the other in the same place: X waits in the CTA's own device memory, complex [H][K][c] =
// [kept_size].
//
//   row_stride   = K c          c >= 16
//                  (K | 1) c    half rows: an odd number of c's banks from one row to the next
//                  K c + c/2    row pairs: the same from one pair to the next
//   shared_bytes = 8 spectra H row_stride + 4 (F c + sums threads width)
//   spectra      = 1 forward, 2 or 1 backward;   sums = 0 forward, max(F, 2 if StarReLU) backward
//
// so that the 16 / c rows that half a warp touches at once lie in different banks.
//
// Along a column slot s = j + N2 i (j < N2, i < N1) holds row(s), and after N1-point transforms over i and N2-point
// transforms over j frequency(i, j).
template <int H_, int W_, int C_, int F_, int channels_, int threads_, int rows_, int columns_, bool star_relu_,
          bool backward_, int spectra_, int width_, int second_factor_, int slots_>
struct Layout {
    static constexpr int H = H_, W = W_, C = C_, F = F_, K = W / 2 + 1, channels_per_cta = channels_,
                         threads = threads_;
    static constexpr int rows = rows_, width = width_;
    using Number = typename Numbers<width>::Type;
    static constexpr int filters = F ? F : 1;  // at one frequency of one channel
    static constexpr bool star_relu = star_relu_, per_channel = F == 0, rolled = columns_ == COLUMNS_ROLLED;
    static_assert(rows == ROW_PAIRS || (rows == HALF_ROWS && W % 2 == 0), "half rows are halves of even rows");
    static_assert(channels_per_cta >= 2 && channels_per_cta <= 32 && (channels_per_cta & (channels_per_cta - 1)) == 0,
                  "a CTA has 2, 4, 8, 16 or 32 channels");
    static_assert(width == 1 || (width == 2 && C % 2 == 0 && channels_per_cta >= 4), "two channels are read at once");
    static_assert(threads % (channels_per_cta / width) == 0 && threads <= 1024, "every channel has as many threads");
    static_assert((long long)H * W * C < (1LL << 31) && F <= 16, "offsets within a sample are ints");

    static constexpr int items_per_sample = (C + channels_per_cta - 1) / channels_per_cta;
    static constexpr int across = channels_per_cta / width, workers = threads / across;
    static constexpr int row_items = rows == ROW_PAIRS ? (H + 1) / 2 : H;

    static constexpr int row_stride = channels_per_cta >= 16 ? K * channels_per_cta
                                      : rows == HALF_ROWS    ? (K | 1) * channels_per_cta
                                                             : K * channels_per_cta + channels_per_cta / 2;
    static constexpr int spectrum = H * row_stride;
    static constexpr int sums = backward_ ? (star_relu && F < 2 ? 2 : F) : 0;
    static constexpr bool one_spectrum = backward_ && spectra_ == 1;
    static_assert(spectra_ == (backward_ && !one_spectrum ? 2 : 1),
                  "forward has one half spectrum, backward one or two");
    static constexpr int gradient_spectrum = one_spectrum ? 0 : spectrum,
                         kept_size = H * K * channels_per_cta;  // where G begins
    static constexpr int weights_at = 2 * spectra_ * spectrum;
    static constexpr int sums_at = weights_at + (backward_ ? F * channels_per_cta : 0);
    static constexpr int shared_bytes = 4 * (sums_at + sums * threads * width);

    // Threads that share the sum over channels at one frequency where those are few; each has a slot of its own.
    static constexpr int slots = slots_;

    static constexpr int N2 = second_factor_, N1 = H / N2;
    static_assert(N1 * N2 == H && (columns_ != COLUMNS_IN_REGISTERS || N1 == 1), "a column is N1 times N2 points");
    static constexpr bool coprime = greatest_common_divisor(N1, N2) == 1;
    static constexpr int from_i = N2 * inverse_modulo(N2, N1) % H, from_j = N1 * inverse_modulo(N1, N2) % H;

    static constexpr FFT_INLINE int row(int slot) { return coprime ? (N2 * (slot / N2) + N1 * (slot % N2)) % H : slot; }
    static constexpr FFT_INLINE int frequency(int i, int j) {
        if (!coprime) return i + N1 * j;
        const int h = i * from_i % H + j * from_j % H;
        return h < H ? h : h - H;
    }

    // The transforms' 1 / HW, and 1/2 for the factor 2 that rows are left with by taking them apart.
    static constexpr float normalisation = float(0.5 / (double(H) * W));
};

// One channel of one sample, or the first of two: what a thread works on.
template <class L>
struct Channel {
    long long sample;
    int offset, index;  // among the CTA's channels, and of all

    FFT_INLINE Channel(long long sample, int group, int offset)
        : sample(sample), offset(offset), index(group * L::channels_per_cta + offset) {}

    // The last group's channels may reach beyond C.
    FFT_INLINE bool exists() const { return L::C % L::channels_per_cta == 0 || index < L::C; }

    // Its pixel [h][0]; pixel [h][w] lies w C further, an offset that fits an instruction.
    template <class T>
    FFT_INLINE T* in_row(T* tensor, int h) const {
        return tensor + (sample * (L::H * L::W * L::C) + (h * (L::W * L::C) + index));
    }
    template <class T>
    FFT_INLINE T* in_logits(T* tensor) const {
        return tensor + sample * (L::F * L::C) + index;
    }
};
