// Matrix products of activations with 4-bit, 8-bit and 16-bit weights. A thread's unit of work is a few blocks of output
// rows; a block is unpacked once for each tile of tokens. Integer dot products are exact, and floats are added group by
// group in order, so a result does not depend on the number of tokens, the tile or the thread.
#include "pool.h"
#include "simd.h"

namespace squawq::SQUAWQ_ISA {
namespace {

constexpr int64_t UNIT_BLOCKS = 4;        // blocks per unit: a tile of tokens is read once for all of them
constexpr int64_t UNIT_BYTES = 1 << 19;   // maximum weight bytes per unit with few tokens: longer sequential
constexpr int64_t UNITS_A_THREAD = 4;     // reads are faster, but the threads should finish together

// Calls function(first token, tile) with tile a compile-time constant.
template <class Function>
SIMD void for_tiles(int64_t m, Function function) {
    int64_t first = 0;
    for (; first + TILE <= m; first += TILE) function(first, std::integral_constant<int, TILE>());
    if (m - first >= 8) function(first, std::integral_constant<int, 8>()), first += 8;
    if (m - first >= 4) function(first, std::integral_constant<int, 4>()), first += 4;
    if (m - first >= 2) function(first, std::integral_constant<int, 2>()), first += 2;
    if (m - first >= 1) function(first, std::integral_constant<int, 1>());
}

// The same on all threads, unless the work costs less than waking one. A unit is a whole tile, so the tiling is the same.
template <class Function>
void on_tiles(int64_t m, int64_t k, Function function) {
    if (m * k <= 32768) return for_tiles(m, function);
    parallel_for(ceil_div(m, TILE), [&](int64_t u) {
        for_tiles(m - u * TILE < TILE ? m - u * TILE : TILE, [&](int64_t first, auto tile) { function(u * TILE + first, tile); });
    });
}

// int8 activations in tiles: words [tile][in/4][T], scales and sums [tile][groups][T].
struct Quantized {
    int32_t* words;
    float* scales;
    int32_t* sums;
};

// Symmetric quantization, nearest even, one scale per token and `group` inputs: x = word * scale.
template <int T>
SIMD void quantize_tile(const float* x, int64_t k, int64_t group, int32_t* words, float* scales, int32_t* sums) {
    alignas(64) int8_t bytes[LANES];
    for (int m = 0; m < T; ++m, x += k) {
        for (int64_t g = 0; g < k / group; ++g) {
            const float* from = x + g * group;
            F peak = set1(0.f), poison = set1(0.f);  // max drops NaN; 0 * NaN and 0 * infinity keep it
            for (int64_t i = 0; i < group; i += LANES) {
                const F value = load(from + i);
                peak = max(peak, abs(value));
                poison = fma(value, set1(0.f), poison);
            }
            const float most = largest(peak);
            const F inverse = set1(most > 0.f ? 127.f / most : 0.f);
            I total = iset1(0);
            int32_t* to = words + g * group / 4 * T + m;
            for (int64_t i = 0; i < group; i += LANES) {
                const I q = round(mul(load(from + i), inverse));
                total = iadd(total, q);
                store_i8(bytes, q);
                for (int64_t j = 0; j < 4; ++j) std::memcpy(to + (i / 4 + j) * T, bytes + 4 * j, 4);
            }
            scales[g * T + m] = most / 127.f + sum(poison);
            sums[g * T + m] = isum(total);
        }
    }
}

Quantized quantize(const float* x, int64_t m, int64_t k, int64_t group) {
    const int64_t groups = k / group;
    char* memory = static_cast<char*>(scratch(0, size_t(m * k + m * groups * 8)));
    const Quantized q{reinterpret_cast<int32_t*>(memory), reinterpret_cast<float*>(memory + m * k),
                      reinterpret_cast<int32_t*>(memory + m * k + m * groups * 4)};
    on_tiles(m, k, [&](int64_t t, auto tile) {
        quantize_tile<decltype(tile)::value>(x + t * k, k, group, q.words + t * k / 4, q.scales + t * groups,
                                             q.sums + t * groups);
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

// B blocks of rows from `block` on, for a tile of T tokens from `first` on.
template <int B, int T>
SIMD void int4_blocks(const Quantized& q, const Int4& w, int64_t block, int64_t first, float* y) {
    const int64_t groups = w.in / w.group, weight_stride = w.in * (LANES / 2), scale_stride = groups * LANES;
    const uint8_t* weight = w.weight + block * weight_stride;
    const uint16_t* scales = w.scales + block * scale_stride;
    const uint8_t* zeros = w.zeros + block * scale_stride;
    const int32_t* words = q.words + first * w.in / 4;
    const float* xs = q.scales + first * groups;
    const int32_t* sums = q.sums + first * groups;
    F total[B][T];
    for (int b = 0; b < B; ++b)
        for (int t = 0; t < T; ++t) total[b][t] = set1(0.f);
    for (int64_t g = 0; g < groups; ++g) {
        I dot[B][T];
        for (int b = 0; b < B; ++b)
            for (int t = 0; t < T; ++t) dot[b][t] = iset1(0);
        dot_int4<B, T>(weight, weight_stride, words, w.group / 8, dot);
        for (int b = 0; b < B; ++b) {
            const F scale = load_f16(scales + b * scale_stride);
            const I zero = load_u8(zeros + b * scale_stride);
            for (int t = 0; t < T; ++t) {
                const F product = to_float(isub(dot[b][t], imul(zero, iset1(sums[t]))));
                total[b][t] = fma(product, mul(scale, set1(xs[t])), total[b][t]);
            }
        }
        weight += w.group * (LANES / 2);
        words += w.group / 4 * T;
        scales += LANES, zeros += LANES, xs += T, sums += T;
    }
    for (int b = 0; b < B; ++b)
        for (int t = 0; t < T; ++t) finish(y + (first + t) * w.out, w.bias, w.out, block + b, total[b][t]);
}

}  // namespace

void int4_matmul(const float* x, int64_t m, const Int4& w, float* y) {
    const Quantized q = quantize(x, m, w.in, w.group);
    for_blocks(m, w.out, w.in * LANES / 2, [&](int64_t from, int64_t to) {
        for_tiles(m, [&](int64_t first, auto tile) {
            constexpr int T = decltype(tile)::value, B = T >= 4 ? BLOCKS : 1;
            int64_t block = from;
            for (; block + B <= to; block += B) int4_blocks<B, T>(q, w, block, first, y);
            for (; block < to; ++block) int4_blocks<1, T>(q, w, block, first, y);
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
