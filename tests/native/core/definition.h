// The filter step and its gradients by their definition, in float64.
#pragma once

#include <array>
#include <complex>
#include <map>

#include "tensors.h"

namespace {

using Complex = std::complex<double>;
using Spectrum = std::vector<Complex>;  // (H,K)

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
    return output == grad_filters ? p.H * (p.W / 2 + 1) * (p.F ? p.F : p.weight_per_sample ? p.B * p.C : p.C) * 2 : 2;
}

// Where x, y and their gradients have pixel i of a plane.
std::int64_t position(const FilterProblem& p, std::int64_t b, std::int64_t i, std::int64_t c) {
    return p.channels_first ? (b * p.C + c) * p.H * p.W + i : (b * p.H * p.W + i) * p.C + c;
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
            p_.F ? add_basis_gradients(P, b, c) : add_weight_gradient(P, b, c);
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
        for (std::int64_t i = 0; i < p_.H * p_.W; i++) values[i] = tensor[position(p_, b, i, c)];
        return values;
    }
    void scatter(const Values& values, Values& tensor, std::int64_t b, std::int64_t c) const {
        for (std::int64_t i = 0; i < p_.H * p_.W; i++) tensor[position(p_, b, i, c)] = values[i];
    }

    // routing = softmax(logits) over F, or the logits themselves
    void mix() {
        routing_ = in_.logits;
        if (!p_.softmax) return;
        for_each_plane([&](std::int64_t b, std::int64_t c) {
            double sum = 0;
            for (int f = 0; f < p_.F; f++) sum += std::exp(in_.logits[at(b, f, c)]);
            for (int f = 0; f < p_.F; f++) routing_[at(b, f, c)] = std::exp(in_.logits[at(b, f, c)]) / sum;
        });
    }
    std::int64_t at(std::int64_t b, int f, std::int64_t c) const { return (b * p_.F + f) * p_.C + c; }
    std::int64_t weight_at(std::int64_t b, std::size_t bin, std::int64_t c) const {
        return 2 * (((p_.weight_per_sample ? b * plane_.H * plane_.K : 0) + std::int64_t(bin)) * p_.C + c);
    }
    Complex basis(std::size_t bin, int f) const {
        const double* pair = &in_.filters[2 * (bin * p_.F + f)];
        return {pair[0], pair[1]};
    }
    Spectrum mixed(std::int64_t b, std::int64_t c) const {
        Spectrum M(std::size_t(plane_.H) * plane_.K);
        for (std::size_t bin = 0; bin < M.size(); bin++) {
            if (p_.F == 0) M[bin] = {in_.filters[weight_at(b, bin, c)], in_.filters[weight_at(b, bin, c) + 1]};
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
    void add_weight_gradient(const Spectrum& P, std::int64_t b, std::int64_t c) {
        for (std::size_t bin = 0; bin < P.size(); bin++) add(P[bin], &results[grad_filters][weight_at(b, bin, c)]);
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
            results[grad_logits][at(b, f, c)] =
                p_.softmax ? routing_[at(b, f, c)] * (grad_routing[f] - mean) : grad_routing[f];
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

}  // namespace
