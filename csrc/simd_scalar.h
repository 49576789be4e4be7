// Plain C++ for any machine; the reference for the others in the tests.
#pragma once

namespace squawq::scalar {

struct F {
    float v[LANES];
};
struct I {
    int32_t v[LANES];
};
constexpr int TILE = 4;
constexpr int BLOCKS = 1;
constexpr int QUERIES = 4;

#define EACH for (int i = 0; i < LANES; ++i)
SIMD void prefetch(const void* p) { (void)p; }
SIMD F set1(float x) { F r; EACH r.v[i] = x; return r; }
SIMD F load(const float* p) { F r; EACH r.v[i] = p[i]; return r; }
SIMD void store(float* p, F x) { EACH p[i] = x.v[i]; }
SIMD F add(F a, F b) { EACH a.v[i] += b.v[i]; return a; }
SIMD F sub(F a, F b) { EACH a.v[i] -= b.v[i]; return a; }
SIMD F mul(F a, F b) { EACH a.v[i] *= b.v[i]; return a; }
SIMD F div(F a, F b) { EACH a.v[i] /= b.v[i]; return a; }
SIMD F max(F a, F b) { EACH a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]; return a; }
SIMD F min(F a, F b) { EACH a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i]; return a; }
SIMD F fma(F a, F b, F c) { EACH c.v[i] += a.v[i] * b.v[i]; return c; }
SIMD float sum(F x) { float r = 0; EACH r += x.v[i]; return r; }
SIMD float largest(F x) { float r = x.v[0]; EACH r = x.v[i] > r ? x.v[i] : r; return r; }

SIMD float half_to_float(uint16_t h) {
    const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 0x3ff;
    if (exponent == 0) {  // zero and subnormals: mantissa * 2^-24
        const float f = float(mantissa) * 5.9604644775390625e-8f;
        return sign ? -f : f;
    }
    const uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

// Round to nearest even, as the hardware instructions do.
SIMD uint16_t float_to_half(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00);                             // NaN
    if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);                            // rounds to infinity
    if (magnitude < 0x38800000) {                                                           // subnormal
        float absolute;
        std::memcpy(&absolute, &magnitude, 4);
        return uint16_t(sign | uint32_t(std::nearbyint(absolute * 16777216.f)));            // 2^24
    }
    return uint16_t(sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13));
}

SIMD F load_f16(const uint16_t* p) { F r; EACH r.v[i] = half_to_float(p[i]); return r; }
SIMD F load_bf16(const uint16_t* p) {
    F r;
    EACH {
        const uint32_t bits = uint32_t(p[i]) << 16;
        std::memcpy(&r.v[i], &bits, 4);
    }
    return r;
}
SIMD void store_f16(uint16_t* p, F x) { EACH p[i] = float_to_half(x.v[i]); }
SIMD F zero_below(F x, F limit, F value) { EACH value.v[i] = x.v[i] >= limit.v[i] ? value.v[i] : 0.f; return value; }

SIMD I iset1(int32_t x) { I r; EACH r.v[i] = x; return r; }
SIMD I iload(const void* p) { I r; std::memcpy(&r, p, sizeof r); return r; }
SIMD I load_u8(const uint8_t* p) { I r; EACH r.v[i] = p[i]; return r; }
SIMD I iadd(I a, I b) { EACH a.v[i] += b.v[i]; return a; }
SIMD I isub(I a, I b) { EACH a.v[i] -= b.v[i]; return a; }
SIMD I imul(I a, I b) { EACH a.v[i] *= b.v[i]; return a; }
SIMD int32_t isum(I x) { int32_t r = 0; EACH r += x.v[i]; return r; }
SIMD F to_float(I x) { F r; EACH r.v[i] = float(x.v[i]); return r; }
SIMD I round(F x) { I r; EACH r.v[i] = int32_t(std::nearbyint(x.v[i])); return r; }
SIMD F power_of_two(I n) {
    F r;
    EACH {
        const int32_t bits = (n.v[i] + 127) << 23;
        std::memcpy(&r.v[i], &bits, 4);
    }
    return r;
}
SIMD void store_i8(int8_t* p, I x) { EACH p[i] = int8_t(x.v[i]); }
template <int SHIFT>
SIMD I nibble(I x) { EACH x.v[i] = x.v[i] >> SHIFT & 15; return x; }

SIMD int32_t dot4(int32_t a, int32_t b) {
    int32_t r = 0;
    for (int j = 0; j < 4; ++j) r += int32_t(int8_t(a >> 8 * j)) * int32_t(int8_t(b >> 8 * j));
    return r;
}
template <int T>
SIMD void dot_int4_block(const uint8_t* w, const int32_t* x, int64_t steps, I (&dot)[T]) {
    for (int64_t s = 0; s < steps; ++s, w += 64, x += 2 * T) {
        const I packed = iload(w);
        for (int m = 0; m < T; ++m)
            EACH dot[m].v[i] += dot4(packed.v[i] & 0x0f0f0f0f, x[m]) + dot4(packed.v[i] >> 4 & 0x0f0f0f0f, x[T + m]);
    }
}
template <int T>
SIMD void dot_int8(const int8_t* w, const int32_t* x, int64_t steps, const int32_t*, I (&dot)[T]) {
    for (int64_t s = 0; s < steps; ++s, w += 64, x += T) {
        const I packed = iload(w);
        for (int m = 0; m < T; ++m) EACH dot[m].v[i] += dot4(packed.v[i], x[m]);
    }
}
#undef EACH

}  // namespace squawq::scalar
