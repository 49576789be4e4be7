// The gated delta rule (Yang et al., arXiv 2412.06464) with its causal convolution, norms and gates: what
// src/squawq/backends/delta_rule.py computes. A unit is a key head of a sequence with the value heads that share it. It goes
// token by token, so a row's result does not depend on the chunk, the batch or the thread.
#include "pool.h"
#include "simd.h"

namespace squawq::SQUAWQ_ISA {
namespace {

constexpr int64_t MOST_DIM = MOST_DELTA_DIM, MOST_KERNEL = MOST_DELTA_KERNEL;
constexpr float L2_EPS = 1e-6f;

SIMD F silu(F x) { return div(x, add(set1(1.f), exp(sub(set1(0.f), x)))); }

// The convolution of `dim` channels in place, from the last token to the first, whose inputs are not overwritten yet.
// inputs: the rows before the first token, which then become the last rows of x.
void convolve(float* x, int64_t rows, int64_t stride, const float* weight, float* inputs, int64_t channels, int64_t kernel,
              int64_t dim) {
    alignas(64) float before[MOST_KERNEL - 1][MOST_DIM];
    const int64_t kept = kernel - 1, bytes = int64_t(sizeof(float)) * dim;
    for (int64_t i = 0; i < kept; ++i) std::memcpy(before[i], inputs + i * channels, size_t(bytes));
    for (int64_t i = 0; i < kept; ++i) {
        const int64_t row = rows - kept + i;
        std::memcpy(inputs + i * channels, row < 0 ? before[kept + row] : x + row * stride, size_t(bytes));
    }
    for (int64_t t = rows - 1; t >= 0; --t) {
        for (int64_t c = 0; c < dim; c += LANES) {
            F total = set1(0.f);
            for (int64_t i = 0; i < kernel; ++i) {
                const int64_t row = t - kept + i;
                const float* from = row < 0 ? before[kept + row] : x + row * stride;
                total = fma(load(weight + i * channels + c), load(from + c), total);
            }
            store(x + t * stride + c, silu(total));
        }
    }
}

// L2 norm of one head, times `scale`, in place.
SIMD void normalize(float* x, int64_t dim, float scale) {
    F squares = set1(0.f);
    for (int64_t d = 0; d < dim; d += LANES) squares = fma(load(x + d), load(x + d), squares);
    const F factor = set1(scale / std::sqrt(sum(squares) + L2_EPS));
    for (int64_t d = 0; d < dim; d += LANES) store(x + d, mul(load(x + d), factor));
}

// RMS norm of one head's output times silu(z).
SIMD void norm_gated(float* y, const float* z, const float* weight, float eps, int64_t dim) {
    F squares = set1(0.f);
    for (int64_t d = 0; d < dim; d += LANES) squares = fma(load(y + d), load(y + d), squares);
    const F scale = set1(1.f / std::sqrt(sum(squares) / float(dim) + eps));
    for (int64_t d = 0; d < dim; d += LANES) store(y + d, mul(mul(mul(load(y + d), scale), load(weight + d)), silu(load(z + d))));
}

// What the gates of a token say: how much of its value is learned, and how much of the memory is kept.
SIMD void open_gates(float* beta, float* kept, float rate, float bias) {
    const float raw = *kept + bias;
    *beta = 1.f / (1.f + std::exp(-*beta));
    *kept = std::exp(rate * (raw > 20.f ? raw : std::log1p(std::exp(raw))));
}

struct Head {
    const float *q, *k, *v, *beta, *kept;  // of the first token
    int64_t rows, stride, gate_stride;     // from one token to the next: of q, k and v; of beta and kept
    int64_t key_dim, value_dim;
    float* memory;           // [key_dim][value_dim]
    float* y;
    int64_t y_stride;
};

// B vectors of values from column d on, with their part of the memory at hand in `part` [key_dim][B * 16]. Even and odd keys
// have separate sums, so that twice as many additions are in flight.
template <int B>
SIMD void recur(const Head& h, int64_t d, float* part) {
    constexpr int64_t WIDTH = B * LANES;
    for (int64_t i = 0; i < h.key_dim; ++i) std::memcpy(part + i * WIDTH, h.memory + i * h.value_dim + d, sizeof(float) * WIDTH);
    for (int64_t t = 0; t < h.rows; ++t) {
        const float *q = h.q + t * h.stride, *k = h.k + t * h.stride;
        const F beta = set1(h.beta[t * h.gate_stride]), kept = set1(h.kept[t * h.gate_stride]);
        F sums[2][B], change[B];
        for (int b = 0; b < B; ++b) sums[0][b] = sums[1][b] = set1(0.f);
        for (int64_t i = 0; i < h.key_dim; i += 2)
            for (int odd = 0; odd < 2; ++odd)
                for (int b = 0; b < B; ++b)
                    sums[odd][b] = fma(set1(k[i + odd]), load(part + (i + odd) * WIDTH + b * LANES), sums[odd][b]);
        for (int b = 0; b < B; ++b) {
            const F found = mul(kept, add(sums[0][b], sums[1][b]));
            change[b] = mul(beta, sub(load(h.v + t * h.stride + d + b * LANES), found));
            sums[0][b] = sums[1][b] = set1(0.f);
        }
        for (int64_t i = 0; i < h.key_dim; i += 2)
            for (int odd = 0; odd < 2; ++odd)
                for (int b = 0; b < B; ++b) {
                    float* at = part + (i + odd) * WIDTH + b * LANES;
                    const F value = fma(set1(k[i + odd]), change[b], mul(kept, load(at)));
                    store(at, value);
                    sums[odd][b] = fma(set1(q[i + odd]), value, sums[odd][b]);
                }
        for (int b = 0; b < B; ++b) store(h.y + t * h.y_stride + d + b * LANES, add(sums[0][b], sums[1][b]));
    }
    for (int64_t i = 0; i < h.key_dim; ++i) std::memcpy(h.memory + i * h.value_dim + d, part + i * WIDTH, sizeof(float) * WIDTH);
}

void run_head(const Head& head) {
    alignas(64) float part[MOST_DIM * 2 * LANES];
    int64_t d = 0;
    for (; d + 2 * LANES <= head.value_dim; d += 2 * LANES) recur<2>(head, d, part);
    for (; d < head.value_dim; d += LANES) recur<1>(head, d, part);
}

}  // namespace

void gated_delta_rule(float* wide, float* gates, const DeltaRule& rule, const Sequence* sequences, const int64_t* places,
                      int64_t count, float eps, float* y) {
    const int64_t key = rule.key_dim, value = rule.value_dim, share = rule.value_heads / rule.key_heads;
    const int64_t keys = rule.key_heads * key, values = rule.value_heads * value, channels = 2 * keys + values;
    const int64_t width = channels + values, kept = (rule.kernel - 1) * channels;
    parallel_for(count * rule.key_heads, [=](int64_t u) {
        const Sequence& sequence = sequences[u / rule.key_heads];
        const int64_t head = u % rule.key_heads, place = places[u / rule.key_heads], rows = sequence.rows;
        float* x = wide + sequence.first_row * width;
        float* inputs = rule.inputs + place * kept;
        const auto convolved = [&](int64_t channel, int64_t dim) {
            if (sequence.start == 0)
                for (int64_t i = 0; i < rule.kernel - 1; ++i) std::memset(inputs + i * channels + channel, 0, sizeof(float) * size_t(dim));
            convolve(x + channel, rows, width, rule.convolution + channel, inputs + channel, channels, rule.kernel, dim);
            return x + channel;
        };
        float *q = convolved(head * key, key), *k = convolved(keys + head * key, key);
        for (int64_t t = 0; t < rows; ++t) {
            normalize(q + t * width, key, 1.f / std::sqrt(float(key)));
            normalize(k + t * width, key, 1.f);
        }
        for (int64_t h = head * share; h < (head + 1) * share; ++h) {
            float* memory = rule.memory + (place * rule.value_heads + h) * key * value;
            if (sequence.start == 0) std::memset(memory, 0, sizeof(float) * size_t(key * value));
            const float* v = convolved(2 * keys + h * value, value);
            float *out = y + sequence.first_row * values + h * value, *beta = gates + sequence.first_row * 2 * rule.value_heads + h;
            float* keeping = beta + rule.value_heads;
            for (int64_t t = 0; t < rows; ++t)
                open_gates(beta + t * 2 * rule.value_heads, keeping + t * 2 * rule.value_heads, rule.rate[h], rule.bias[h]);
            run_head({q, k, v, beta, keeping, rows, width, 2 * rule.value_heads, key, value, memory, out, values});
            for (int64_t t = 0; t < rows; ++t)
                norm_gated(out + t * values, x + t * width + channels + h * value, rule.norm, eps, value);
        }
    });
}

}  // namespace squawq::SQUAWQ_ISA
