// Matrix products of activations with 4-bit, 8-bit and 16-bit weights. A thread's unit of work is a few blocks of output
// rows; a block is unpacked once for each tile of tokens. Integer dot products are exact, and floats are added group by
// group in order, so a result does not depend on the number of tokens, the tile or the thread.
#include "tiles.h"

namespace squawq::SQUAWQ_ISA {
namespace {

constexpr int64_t UNIT_BLOCKS = 4;  // blocks per unit: a tile of tokens is read once for all of them

Quantized quantize(const float* x, int64_t m, int64_t k, int64_t group) {
    const Quantized q = quantized_at(scratch(0, quantized_bytes(m, k, group)), m, k, group);
    on_tiles(m, k, [&](int64_t t, auto tile) {
        quantize_tile<decltype(tile)::value>(x + t * k, k, group, q.from(t, k, group));
    });
    return q;
}

SIMD void finish(float* y, const float* bias, int64_t n, int64_t block, F value) {
    const int64_t row = block * LANES, count = n - row;
    if (bias != nullptr) {
        alignas(64) float part[LANES] = {};
        std::memcpy(part, bias + row, sizeof(float) * size_t(count < LANES ? count : LANES));
        value = add(value, load(part));
    }
    store_part(y + row, value, count);
}

template <class Block>
void for_blocks(int64_t m, int64_t n, int64_t block_bytes, Block block) {
    const int64_t blocks = ceil_div(n, LANES);
    const int64_t share = ceil_div(blocks, UNITS_A_THREAD * threads()), most = ceil_div(UNIT_BYTES, block_bytes);
    const int64_t unit = m >= TILE ? UNIT_BLOCKS : (share < most ? share : most);
    parallel_for(ceil_div(blocks, unit), [&](int64_t u) {
        const int64_t from = u * unit;
        block(from, from + unit < blocks ? from + unit : blocks);
    });
}

// The products of B neighbouring blocks with a tile of tokens, written to the tokens' rows of y.
template <int B, int T>
SIMD void write_blocks(Quantized x, const Int4& w, int64_t block, int64_t first, float* y) {
    F total[B][T];
    int4_blocks<B, T>(x, w, block, 1, total);
    for (int b = 0; b < B; ++b)
        for (int t = 0; t < T; ++t) finish(y + (first + t) * w.out, w.bias, w.out, block + b, total[b][t]);
}

}  // namespace

void int4_matmul(const float* x, int64_t m, const Int4& w, float* y) {
    const Quantized q = quantize(x, m, w.in, w.group);
    for_blocks(m, w.out, w.in * LANES / 2, [&](int64_t from, int64_t to) {
        for_tiles(m, [&](int64_t first, auto tile) {
            constexpr int T = decltype(tile)::value, B = T >= 4 ? BLOCKS : 1;
            const Quantized tokens = q.from(first, w.in, w.group);
            int64_t block = from;
            for (; block + B <= to; block += B) write_blocks<B, T>(tokens, w, block, first, y);
            for (; block < to; ++block) write_blocks<1, T>(tokens, w, block, first, y);
        });
    });
}

void int8_matmul(const float* x, int64_t m, const Int8& w, float* y) {
    const int64_t groups = w.in / w.group;
    const Quantized q = quantize(x, m, w.in, w.group);
    for_blocks(m, w.out, w.in * LANES, [&](int64_t from, int64_t to) {
        for_tiles(m, [&](int64_t first, auto tile) {
            constexpr int T = decltype(tile)::value;
            for (int64_t b = from; b < to; ++b) {
                const int8_t* weight = w.weight + b * w.in * LANES;
                const int32_t* words = q.words + first * w.in / 4;
                const float* xs = q.scales + first * groups;
                const int32_t* sums = q.sums + first * groups;
                F total[T];
                for (int t = 0; t < T; ++t) total[t] = set1(0.f);
                for (int64_t g = 0; g < groups; ++g) {
                    I dot[T];
                    for (int t = 0; t < T; ++t) dot[t] = iset1(0);
                    dot_int8<T>(weight, words, w.group / 4, sums, dot);
                    for (int t = 0; t < T; ++t) total[t] = fma(to_float(dot[t]), set1(xs[t]), total[t]);
                    weight += w.group * LANES;
                    words += w.group / 4 * T;
                    xs += T, sums += T;
                }
                const F scale = load(w.scales + b * LANES);
                for (int t = 0; t < T; ++t) finish(y + (first + t) * w.out, w.bias, w.out, b, mul(total[t], scale));
            }
        });
    });
}

// With float32 activations, the tokens of a tile are interleaved, [in][T], and the weights are unpacked to floats.
namespace {

const float* side_by_side(const float* x, int64_t m, int64_t k) {
    if (m == 1) return x;
    float* out = static_cast<float*>(scratch(0, sizeof(float) * size_t(m * k)));
    on_tiles(m, k, [&](int64_t first, auto tile) {
        constexpr int T = decltype(tile)::value;
        const float* source = x + first * k;
        float* target = out + first * k;
        for (int64_t i = 0; i < k; ++i)
            for (int t = 0; t < T; ++t) target[i * T + t] = source[t * k + i];
    });
    return out;
}

// load_row(i) gives the 16 weights of input i.
template <class Load>
void dense_rows(const float* x, int64_t m, int64_t n, int64_t k, const float* bias, float* y, Load load_row) {
    const float* tiles = side_by_side(x, m, k);
    for_blocks(m, n, k * LANES * int64_t(sizeof(uint16_t)), [&](int64_t from, int64_t to) {
        for_tiles(m, [&](int64_t first, auto tile) {
            constexpr int T = decltype(tile)::value;
            for (int64_t b = from; b < to; ++b) {
                const float* row = tiles + first * k;
                F total[T];
                for (int t = 0; t < T; ++t) total[t] = set1(0.f);
                for (int64_t i = 0; i < k; ++i, row += T) {
                    const F weight = load_row(b * k + i);
                    for (int t = 0; t < T; ++t) total[t] = fma(set1(row[t]), weight, total[t]);
                }
                for (int t = 0; t < T; ++t) finish(y + (first + t) * n, bias, n, b, total[t]);
            }
        });
    });
}

template <int J, int T>
SIMD void exact_step(I packed, I zero, const float* x, F (&part)[T]) {
    const F low = to_float(isub(nibble<8 * J>(packed), zero));
    const F high = to_float(isub(nibble<8 * J + 4>(packed), zero));
    for (int t = 0; t < T; ++t) part[t] = fma(set1(x[J * T + t]), low, part[t]);
    for (int t = 0; t < T; ++t) part[t] = fma(set1(x[(4 + J) * T + t]), high, part[t]);
}

}  // namespace

void dense_matmul(const float* x, int64_t m, const DenseWeight& w, float* y) {
    const uint16_t* half = static_cast<const uint16_t*>(w.weight);
    const float* full = static_cast<const float*>(w.weight);
    if (w.type == Dense::f16) dense_rows(x, m, w.out, w.in, w.bias, y, [=](int64_t i) { return load_f16(half + i * LANES); });
    if (w.type == Dense::bf16) dense_rows(x, m, w.out, w.in, w.bias, y, [=](int64_t i) { return load_bf16(half + i * LANES); });
    if (w.type == Dense::f32) dense_rows(x, m, w.out, w.in, w.bias, y, [=](int64_t i) { return load(full + i * LANES); });
}

void int4_matmul_exact(const float* x, int64_t m, const Int4& w, float* y) {
    const int64_t groups = w.in / w.group;
    const float* tiles = side_by_side(x, m, w.in);
    for_blocks(m, w.out, w.in * LANES / 2, [&](int64_t from, int64_t to) {
        for_tiles(m, [&](int64_t first, auto tile) {
            constexpr int T = decltype(tile)::value;
            for (int64_t b = from; b < to; ++b) {
                const uint8_t* weight = w.weight + b * w.in * (LANES / 2);
                const float* row = tiles + first * w.in;
                F total[T];
                for (int t = 0; t < T; ++t) total[t] = set1(0.f);
                for (int64_t g = 0; g < groups; ++g) {
                    const I zero = load_u8(w.zeros + (b * groups + g) * LANES);
                    F part[T];
                    for (int t = 0; t < T; ++t) part[t] = set1(0.f);
                    for (int64_t s = 0; s < w.group / 8; ++s, weight += 64, row += 8 * T) {
                        const I packed = iload(weight);
                        exact_step<0, T>(packed, zero, row, part);
                        exact_step<1, T>(packed, zero, row, part);
                        exact_step<2, T>(packed, zero, row, part);
                        exact_step<3, T>(packed, zero, row, part);
                    }
                    const F scale = load_f16(w.scales + (b * groups + g) * LANES);
                    for (int t = 0; t < T; ++t) total[t] = fma(part[t], scale, total[t]);
                }
                for (int t = 0; t < T; ++t) finish(y + (first + t) * w.out, w.bias, w.out, b, total[t]);
            }
        });
    });
}

}  // namespace squawq::SQUAWQ_ISA
