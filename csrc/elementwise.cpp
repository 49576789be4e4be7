// Norms and activations, one row at a time; the operations do not depend on a row's place in the batch.
#include "pool.h"
#include "simd.h"

namespace squawq::SQUAWQ_ISA {
namespace {

// Distributes rows over the threads, unless the work costs less than waking one.
template <class Row>
void for_rows(int64_t m, int64_t n, Row row) {
    if (m * n <= 16384) {
        for (int64_t i = 0; i < m; ++i) row(i);
    } else {
        parallel_for(m, row);
    }
}

}  // namespace

// x += delta where given; y = x / sqrt(mean(x^2) + eps) * weight. n is a multiple of 16.
void rms_norm(float* x, const float* delta, const float* weight, float eps, int64_t m, int64_t n, float* y) {
    for_rows(m, n, [=](int64_t i) {
        float* row = x + i * n;
        F squares = set1(0.f);
        for (int64_t j = 0; j < n; j += LANES) {
            F value = load(row + j);
            if (delta != nullptr) {
                value = add(value, load(delta + i * n + j));
                store(row + j, value);
            }
            squares = fma(value, value, squares);
        }
        const F scale = set1(1.f / std::sqrt(sum(squares) / float(n) + eps));
        for (int64_t j = 0; j < n; j += LANES) store(y + i * n + j, mul(mul(load(row + j), scale), load(weight + j)));
    });
}

namespace {

template <Activation A>
void activate(const float* gate_up, int64_t m, int64_t n, float* y) {
    for_rows(m, n, [=](int64_t i) {
        const float* gate = gate_up + i * 2 * n;
        for (int64_t j = 0; j < n; j += LANES)
            store(y + i * n + j, mul(activated<A>(load(gate + j)), load(gate + n + j)));
    });
}

}  // namespace

// gate_up [m][2n]: y = activation(gate) * up. n is a multiple of 16.
void activation_mul(const float* gate_up, int64_t m, int64_t n, Activation activation, float* y) {
    if (activation == Activation::silu) return activate<Activation::silu>(gate_up, m, n, y);
    activate<Activation::gelu_tanh>(gate_up, m, n, y);
}

// x [n] = cap * tanh(x / cap).
void soft_cap(float* x, int64_t n, float cap) {
    constexpr int64_t PIECE = 4096;
    parallel_for(ceil_div(n, PIECE), [=](int64_t u) {
        float* from = x + u * PIECE;
        const int64_t count = n - u * PIECE < PIECE ? n - u * PIECE : PIECE;
        const F twice = set1(2.f / cap), most = set1(cap);
        int64_t i = 0;
        for (; i + LANES <= count; i += LANES) store(from + i, capped(load(from + i), twice, most));
        if (i < count) {
            alignas(64) float rest[LANES] = {};
            std::memcpy(rest, from + i, sizeof(float) * size_t(count - i));
            store_part(from + i, capped(load(rest), twice, most), count - i);
        }
    });
}

}  // namespace squawq::SQUAWQ_ISA
