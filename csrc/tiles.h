// Tiles of tokens, int8 activations in tiles, and the product of both with blocks of int4 weights: what products with one
// weight (linear.cpp) and with many experts (experts.cpp) share.
#pragma once
#include <type_traits>

#include "pool.h"
#include "simd.h"

namespace squawq::SQUAWQ_ISA {

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

    // From token `first` on, where a tile begins, of tokens of `in` values in groups of `group`.
    Quantized from(int64_t first, int64_t in, int64_t group) const {
        return {words + first * in / 4, scales + first * (in / group), sums + first * (in / group)};
    }
};

// Bytes of m tokens of k values.
inline size_t quantized_bytes(int64_t m, int64_t k, int64_t group) { return size_t(m * k + m * (k / group) * 8); }

inline Quantized quantized_at(void* memory, int64_t m, int64_t k, int64_t group) {
    char* bytes = static_cast<char*>(memory);
    return {reinterpret_cast<int32_t*>(bytes), reinterpret_cast<float*>(bytes + m * k),
            reinterpret_cast<int32_t*>(bytes + m * k + m * (k / group) * 4)};
}

// Symmetric quantization, nearest even, one scale per token and `group` inputs: x = word * scale.
template <int T>
SIMD void quantize_tile(const float* x, int64_t k, int64_t group, Quantized to) {
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
            int32_t* word = to.words + g * group / 4 * T + m;
            for (int64_t i = 0; i < group; i += LANES) {
                const I q = round(mul(load(from + i), inverse));
                total = iadd(total, q);
                store_i8(bytes, q);
                for (int64_t j = 0; j < 4; ++j) std::memcpy(word + (i / 4 + j) * T, bytes + 4 * j, 4);
            }
            to.scales[g * T + m] = most / 127.f + sum(poison);
            to.sums[g * T + m] = isum(total);
        }
    }
}

// The products of B blocks of rows, `block` and each `stride` blocks on, with a tile of T tokens.
template <int B, int T>
SIMD void int4_blocks(Quantized x, const Int4& w, int64_t block, int64_t stride, F (&total)[B][T]) {
    const int64_t groups = w.in / w.group, block_bytes = w.in * (LANES / 2), block_scales = groups * LANES;
    const uint8_t* weight = w.weight + block * block_bytes;
    const uint16_t* scales = w.scales + block * block_scales;
    const uint8_t* zeros = w.zeros + block * block_scales;
    for (int b = 0; b < B; ++b)
        for (int t = 0; t < T; ++t) total[b][t] = set1(0.f);
    for (int64_t g = 0; g < groups; ++g) {
        I dot[B][T];
        for (int b = 0; b < B; ++b)
            for (int t = 0; t < T; ++t) dot[b][t] = iset1(0);
        dot_int4<B, T>(weight, stride * block_bytes, x.words, w.group / 8, dot);
        for (int b = 0; b < B; ++b) {
            const F scale = load_f16(scales + b * stride * block_scales);
            const I zero = load_u8(zeros + b * stride * block_scales);
            for (int t = 0; t < T; ++t) {
                const F product = to_float(isub(dot[b][t], imul(zero, iset1(x.sums[t]))));
                total[b][t] = fma(product, mul(scale, set1(x.scales[t])), total[b][t]);
            }
        }
        weight += w.group * (LANES / 2);
        x.words += w.group / 4 * T;
        scales += LANES, zeros += LANES, x.scales += T, x.sums += T;
    }
}

}  // namespace squawq::SQUAWQ_ISA
