// y = scale * relu(x)^2 + bias, and its gradients.

namespace {

// relu that propagates NaN, as torch's does.
template <class Vec>
inline Vec relu(Vec x) {
    return Vec{} > x ? Vec{} : x;
}

template <class L>
struct StarReLU {
    using Scalar = typename L::Scalar;
    using Vec = typename L::Vec;

    static Vec forward_lane(Vec x, Vec scale, Vec bias) {
        const Vec r = relu(x);
        return scale * (r * r) + bias;
    }

    static void forward(const void* x_, void* y_, std::int64_t n, double scale_, double bias_) {
        using Arithmetic = decltype(Vec{}[0] + Vec{}[0]);
        const auto* x = static_cast<const Scalar*>(x_);
        auto* y = static_cast<Scalar*>(y_);
        const Vec scale = Vec{} + static_cast<Arithmetic>(scale_), bias = Vec{} + static_cast<Arithmetic>(bias_);
        std::int64_t i = 0;
        for (; i + L::count <= n; i += L::count) L::store(y + i, forward_lane(L::load(x + i), scale, bias));
        if (const int rest = int(n - i))
            store_first<L>(y + i, forward_lane(load_first<L>(x + i, rest), scale, bias), rest);
    }

    // Adds `group` terms in the arithmetic type, then their sum in float64: few roundings, few conversions.
    struct Sums {
        static constexpr int group = 8;
        Accumulator<Vec> scale, bias;
        Vec group_scale{}, group_bias{};
        int in_group = 0;
        void add(Vec grad_scale, Vec grad_bias) {
            group_scale += grad_scale;
            group_bias += grad_bias;
            if (++in_group == group) flush();
        }
        void flush() {
            scale.add(group_scale);
            bias.add(group_bias);
            group_scale = group_bias = Vec{};
            in_group = 0;
        }
    };

    static Vec backward_lane(Vec grad_y, Vec x, Vec two_scale, Sums& sums) {
        const Vec r = relu(x);
        sums.add(grad_y * (r * r), grad_y);
        return x <= 0 ? Vec{} : two_scale * r * grad_y;  // selected: 0 * inf would be NaN for an infinite grad_y
    }

    static void backward(const void* grad_y_, const void* x_, void* grad_x_, std::int64_t n, double scale_,
                         double* result) {
        using Arithmetic = decltype(Vec{}[0] + Vec{}[0]);
        const auto* grad_y = static_cast<const Scalar*>(grad_y_);
        const auto* x = static_cast<const Scalar*>(x_);
        auto* grad_x = static_cast<Scalar*>(grad_x_);
        const Vec two_scale = Vec{} + static_cast<Arithmetic>(2 * scale_);
        Sums sums;
        std::int64_t i = 0;
        for (; i + L::count <= n; i += L::count) {
            const Vec g = backward_lane(L::load(grad_y + i), L::load(x + i), two_scale, sums);
            if (grad_x) L::store(grad_x + i, g);
        }
        if (const int rest = int(n - i)) {
            const Vec g = backward_lane(load_first<L>(grad_y + i, rest), load_first<L>(x + i, rest), two_scale, sums);
            if (grad_x) store_first<L>(grad_x + i, g, rest);
        }
        sums.flush();
        result[0] = lane_sum(sums.scale.sum);
        result[1] = lane_sum(sums.bias.sum);
    }
};

template <class L>
constexpr StarReLUKernel star_relu_kernel = {StarReLU<L>::forward, StarReLU<L>::backward};

}  // namespace
