// AVX-512 (F, BW, DQ, VL) with VNNI.
#pragma once
#include <immintrin.h>

namespace squawq::avx512 {

using F = __m512;
using I = __m512i;
constexpr int TILE = 8;         // tokens that share an unpacked weight
constexpr int BLOCKS = 2;      // blocks of rows that share a token's broadcast word
constexpr int QUERIES = 8;     // queries that share a loaded key or value
constexpr int PREFETCH = 1024;  // bytes ahead

SIMD void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }
SIMD F set1(float x) { return _mm512_set1_ps(x); }
SIMD F load(const float* p) { return _mm512_loadu_ps(p); }
SIMD void store(float* p, F x) { _mm512_storeu_ps(p, x); }
SIMD F add(F a, F b) { return _mm512_add_ps(a, b); }
SIMD F sub(F a, F b) { return _mm512_sub_ps(a, b); }
SIMD F mul(F a, F b) { return _mm512_mul_ps(a, b); }
SIMD F div(F a, F b) { return _mm512_div_ps(a, b); }
SIMD F max(F a, F b) { return _mm512_max_ps(a, b); }
SIMD F min(F a, F b) { return _mm512_min_ps(a, b); }
SIMD F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
SIMD float sum(F x) { return _mm512_reduce_add_ps(x); }
SIMD float largest(F x) { return _mm512_reduce_max_ps(x); }
SIMD F load_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
SIMD F load_bf16(const uint16_t* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
SIMD void store_f16(uint16_t* p, F x) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x, 0)); }
SIMD F zero_below(F x, F limit, F value) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, limit, _CMP_GE_OQ), value);
}

SIMD I iset1(int32_t x) { return _mm512_set1_epi32(x); }
SIMD I iload(const void* p) { return _mm512_loadu_si512(p); }
SIMD I load_u8(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
SIMD I iadd(I a, I b) { return _mm512_add_epi32(a, b); }
SIMD I isub(I a, I b) { return _mm512_sub_epi32(a, b); }
SIMD I imul(I a, I b) { return _mm512_mullo_epi32(a, b); }
SIMD int32_t isum(I x) { return _mm512_reduce_add_epi32(x); }
SIMD F to_float(I x) { return _mm512_cvtepi32_ps(x); }
SIMD I round(F x) { return _mm512_cvtps_epi32(x); }
SIMD F power_of_two(I n) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(127)), 23)); }
SIMD void store_i8(int8_t* p, I x) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(x)); }
template <int SHIFT>
SIMD I nibble(I x) {
    return _mm512_and_si512(_mm512_srli_epi32(x, SHIFT), _mm512_set1_epi32(15));
}

// dot[b][m] += 8 * steps products of each row of block b with token m; x is [2 * steps][T] words of four int8.
template <int B, int T>
SIMD void dot_int4(const uint8_t* w, int64_t stride, const int32_t* x, int64_t steps, I (&dot)[B][T]) {
    const __m512i mask = _mm512_set1_epi8(15);
    for (int64_t s = 0; s < steps; ++s, w += 64, x += 2 * T) {
        __m512i low[B], high[B];
        for (int b = 0; b < B; ++b) {
            prefetch(w + b * stride + PREFETCH);
            const __m512i packed = _mm512_loadu_si512(w + b * stride);
            low[b] = _mm512_and_si512(packed, mask);
            high[b] = _mm512_and_si512(_mm512_srli_epi16(packed, 4), mask);
        }
        for (int m = 0; m < T; ++m) {
            const __m512i first = _mm512_set1_epi32(x[m]);
            for (int b = 0; b < B; ++b) dot[b][m] = _mm512_dpbusd_epi32(dot[b][m], low[b], first);
        }
        for (int m = 0; m < T; ++m) {
            const __m512i second = _mm512_set1_epi32(x[T + m]);
            for (int b = 0; b < B; ++b) dot[b][m] = _mm512_dpbusd_epi32(dot[b][m], high[b], second);
        }
    }
}

// The same for int8 weights, 4 * steps products. VNNI multiplies unsigned by signed: weights are shifted up by 128, and
// 128 * sum(x) is subtracted again.
template <int T>
SIMD void dot_int8(const int8_t* w, const int32_t* x, int64_t steps, const int32_t* sums, I (&dot)[T]) {
    const __m512i flip = _mm512_set1_epi8(-128);
    for (int64_t s = 0; s < steps; ++s, w += 64, x += T) {
        prefetch(w + PREFETCH);
        const __m512i up = _mm512_xor_si512(_mm512_loadu_si512(w), flip);
        for (int m = 0; m < T; ++m) dot[m] = _mm512_dpbusd_epi32(dot[m], up, _mm512_set1_epi32(x[m]));
    }
    for (int m = 0; m < T; ++m) dot[m] = _mm512_sub_epi32(dot[m], _mm512_set1_epi32(128 * sums[m]));
}

}  // namespace squawq::avx512
