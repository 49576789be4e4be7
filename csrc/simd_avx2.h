// AVX2 with FMA and F16C; sixteen lanes are two registers.
#pragma once
#include <immintrin.h>

namespace squawq::avx2 {

struct F {
    __m256 a, b;
};
struct I {
    __m256i a, b;
};
constexpr int TILE = 4;
constexpr int BLOCKS = 1;
constexpr int QUERIES = 2;
constexpr int PREFETCH = 2048;

SIMD void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }
SIMD F set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
SIMD F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
SIMD void store(float* p, F x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
SIMD F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
SIMD F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
SIMD F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
SIMD F div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
SIMD F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
SIMD F min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
SIMD F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
SIMD float sum(F x) {
    const __m256 s = _mm256_add_ps(x.a, x.b);
    __m128 h = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    h = _mm_add_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_add_ss(h, _mm_shuffle_ps(h, h, 1)));
}
SIMD float largest(F x) {
    const __m256 s = _mm256_max_ps(x.a, x.b);
    __m128 h = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    h = _mm_max_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_max_ss(h, _mm_shuffle_ps(h, h, 1)));
}
SIMD F load_f16(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
SIMD __m256 bf16_half(const uint16_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
SIMD F load_bf16(const uint16_t* p) { return {bf16_half(p), bf16_half(p + 8)}; }
SIMD void store_f16(uint16_t* p, F x) {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x.a, 0));
    _mm_storeu_si128((__m128i*)(p + 8), _mm256_cvtps_ph(x.b, 0));
}
SIMD F zero_below(F x, F limit, F value) {
    return {_mm256_and_ps(_mm256_cmp_ps(x.a, limit.a, _CMP_GE_OQ), value.a),
            _mm256_and_ps(_mm256_cmp_ps(x.b, limit.b, _CMP_GE_OQ), value.b)};
}

SIMD I iset1(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
SIMD I iload(const void* p) {
    return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)};
}
SIMD I load_u8(const uint8_t* p) {
    const __m128i x = _mm_loadu_si128((const __m128i*)p);
    return {_mm256_cvtepu8_epi32(x), _mm256_cvtepu8_epi32(_mm_srli_si128(x, 8))};
}
SIMD I iadd(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
SIMD I isub(I x, I y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
SIMD I imul(I x, I y) { return {_mm256_mullo_epi32(x.a, y.a), _mm256_mullo_epi32(x.b, y.b)}; }
SIMD int32_t isum(I x) {
    const __m256i s = _mm256_add_epi32(x.a, x.b);
    __m128i h = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
    h = _mm_add_epi32(h, _mm_shuffle_epi32(h, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(h, _mm_shuffle_epi32(h, 0xb1)));
}
SIMD F to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
SIMD I round(F x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
SIMD __m256 power_half(__m256i n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}
SIMD F power_of_two(I n) { return {power_half(n.a), power_half(n.b)}; }
SIMD void store_i8(int8_t* p, I x) {
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8);
    _mm_storeu_si128((__m128i*)p, _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
template <int SHIFT>
SIMD I nibble(I x) {
    const __m256i mask = _mm256_set1_epi32(15);
    return {_mm256_and_si256(_mm256_srli_epi32(x.a, SHIFT), mask), _mm256_and_si256(_mm256_srli_epi32(x.b, SHIFT), mask)};
}

// Eight rows at a time. Products of unsigned 4-bit and signed 8-bit numbers are summed in 16 bits: eight pairs are
// at most 8 * 2 * 15 * 127 = 30480, below 32768.
template <int T>
SIMD void dot_int4_half(const uint8_t* w, const int32_t* x, int64_t steps, __m256i (&sums)[T]) {
    const __m256i mask = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    for (int m = 0; m < T; ++m) sums[m] = _mm256_setzero_si256();
    for (int64_t s = 0; s < steps;) {
        __m256i part[T];
        for (int m = 0; m < T; ++m) part[m] = _mm256_setzero_si256();
        for (const int64_t end = s + 4 < steps ? s + 4 : steps; s < end; ++s, w += 64, x += 2 * T) {
            prefetch(w + PREFETCH);
            const __m256i packed = _mm256_loadu_si256((const __m256i*)w);
            const __m256i low = _mm256_and_si256(packed, mask);
            const __m256i high = _mm256_and_si256(_mm256_srli_epi16(packed, 4), mask);
            for (int m = 0; m < T; ++m) {
                part[m] = _mm256_add_epi16(part[m], _mm256_maddubs_epi16(low, _mm256_set1_epi32(x[m])));
                part[m] = _mm256_add_epi16(part[m], _mm256_maddubs_epi16(high, _mm256_set1_epi32(x[T + m])));
            }
        }
        for (int m = 0; m < T; ++m) sums[m] = _mm256_add_epi32(sums[m], _mm256_madd_epi16(part[m], ones));
    }
}

template <int T>
SIMD void dot_int4_block(const uint8_t* w, const int32_t* x, int64_t steps, I (&dot)[T]) {
    __m256i sums[T];
    dot_int4_half<T>(w, x, steps, sums);
    for (int m = 0; m < T; ++m) dot[m].a = _mm256_add_epi32(dot[m].a, sums[m]);
    dot_int4_half<T>(w + 32, x, steps, sums);
    for (int m = 0; m < T; ++m) dot[m].b = _mm256_add_epi32(dot[m].b, sums[m]);
}

// |w| * (x with w's sign): pairs are at most 2 * 127 * 127, so 16 bits hold them.
template <int T>
SIMD void dot_int8(const int8_t* w, const int32_t* x, int64_t steps, const int32_t*, I (&dot)[T]) {
    const __m256i ones = _mm256_set1_epi16(1);
    for (int64_t s = 0; s < steps; ++s, w += 64, x += T) {
        prefetch(w + PREFETCH);
        const __m256i wa = _mm256_loadu_si256((const __m256i*)w), wb = _mm256_loadu_si256((const __m256i*)w + 1);
        const __m256i la = _mm256_abs_epi8(wa), lb = _mm256_abs_epi8(wb);
        for (int m = 0; m < T; ++m) {
            const __m256i xm = _mm256_set1_epi32(x[m]);
            const __m256i pa = _mm256_maddubs_epi16(la, _mm256_sign_epi8(xm, wa));
            const __m256i pb = _mm256_maddubs_epi16(lb, _mm256_sign_epi8(xm, wb));
            dot[m].a = _mm256_add_epi32(dot[m].a, _mm256_madd_epi16(pa, ones));
            dot[m].b = _mm256_add_epi32(dot[m].b, _mm256_madd_epi16(pb, ones));
        }
    }
}

}  // namespace squawq::avx2
