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
    using T = typename ScalarOf<Vec>::Type;

    static Vec forward_lane(Vec x, Vec scale, Vec bias) {
        const Vec r = relu(x);
        return scale * (r * r) + bias;
    }

    static void forward(const StarReLUTensors& tensors, std::int64_t first, std::int64_t last, double scale_,
                        double bias_) {
        const auto* x = static_cast<const Scalar*>(tensors.x);
        auto* y = static_cast<Scalar*>(tensors.y);
        const Vec scale = Vec{} + T(scale_), bias = Vec{} + T(bias_);
        for_each_register<L::count>(first, last, last, [&](std::int64_t i, auto count) UNROLLED_BODY {
            store<L>(y + i, forward_lane(load<L>(x + i, count), scale, bias), count);
        });
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
        void end(double* result) {
            flush();
            result[0] = lane_sum(scale.sum);
            result[1] = lane_sum(bias.sum);
        }
    };

    static Vec backward_lane(Vec grad_y, Vec x, Vec two_scale, Sums& sums) {
        const Vec r = relu(x);
        sums.add(grad_y * (r * r), grad_y);
        return x <= 0 ? Vec{} : two_scale * r * grad_y;  // selected: 0 * inf would be NaN for an infinite grad_y
    }

    static void backward(const StarReLUTensors& tensors, std::int64_t first, std::int64_t last, double scale_,
                         double* result) {
        const auto* grad_y = static_cast<const Scalar*>(tensors.grad_y);
        const auto* x = static_cast<const Scalar*>(tensors.x);
        auto* grad_x = static_cast<Scalar*>(tensors.grad_x);
        const Vec two_scale = Vec{} + T(2 * scale_);
        Sums sums;
        for_each_register<L::count>(first, last, last, [&](std::int64_t i, auto count) UNROLLED_BODY {
            const Vec g = backward_lane(load<L>(grad_y + i, count), load<L>(x + i, count), two_scale, sums);
            if (grad_x) store<L>(grad_x + i, g, count);
        });
        sums.end(result);
    }
};

template <class L>
constexpr StarReLUKernel star_relu_kernel = {StarReLU<L>::forward, StarReLU<L>::backward};

}  // namespace
