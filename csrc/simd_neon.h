// NEON with the dot product instructions (ARMv8.2); sixteen lanes are four registers.
#pragma once
#include <arm_neon.h>

namespace squawq::neon {

struct F {
    float32x4_t v[4];
};
struct I {
    int32x4_t v[4];
};
constexpr int TILE = 4;
constexpr int BLOCKS = 1;
constexpr int QUERIES = 4;
constexpr int PREFETCH = 2048;

#define EACH for (int i = 0; i < 4; ++i)
SIMD void prefetch(const void* p) { __builtin_prefetch(p); }
SIMD F set1(float x) { F r; EACH r.v[i] = vdupq_n_f32(x); return r; }
SIMD F load(const float* p) { F r; EACH r.v[i] = vld1q_f32(p + 4 * i); return r; }
SIMD void store(float* p, F x) { EACH vst1q_f32(p + 4 * i, x.v[i]); }
SIMD F add(F a, F b) { EACH a.v[i] = vaddq_f32(a.v[i], b.v[i]); return a; }
SIMD F sub(F a, F b) { EACH a.v[i] = vsubq_f32(a.v[i], b.v[i]); return a; }
SIMD F mul(F a, F b) { EACH a.v[i] = vmulq_f32(a.v[i], b.v[i]); return a; }
SIMD F div(F a, F b) { EACH a.v[i] = vdivq_f32(a.v[i], b.v[i]); return a; }
SIMD F max(F a, F b) { EACH a.v[i] = vmaxq_f32(a.v[i], b.v[i]); return a; }
SIMD F min(F a, F b) { EACH a.v[i] = vminq_f32(a.v[i], b.v[i]); return a; }
SIMD F fma(F a, F b, F c) { EACH c.v[i] = vfmaq_f32(c.v[i], a.v[i], b.v[i]); return c; }
SIMD float sum(F x) { return vaddvq_f32(vaddq_f32(vaddq_f32(x.v[0], x.v[1]), vaddq_f32(x.v[2], x.v[3]))); }
SIMD float largest(F x) { return vmaxvq_f32(vmaxq_f32(vmaxq_f32(x.v[0], x.v[1]), vmaxq_f32(x.v[2], x.v[3]))); }
SIMD F load_f16(const uint16_t* p) {
    F r;
    EACH r.v[i] = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i)));
    return r;
}
SIMD F load_bf16(const uint16_t* p) {
    F r;
    EACH r.v[i] = vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16));
    return r;
}
SIMD void store_f16(uint16_t* p, F x) { EACH vst1_u16(p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(x.v[i]))); }
SIMD F zero_below(F x, F limit, F value) {
    EACH value.v[i] = vreinterpretq_f32_u32(vandq_u32(vcgeq_f32(x.v[i], limit.v[i]), vreinterpretq_u32_f32(value.v[i])));
    return value;
}

SIMD I iset1(int32_t x) { I r; EACH r.v[i] = vdupq_n_s32(x); return r; }
SIMD I iload(const void* p) { I r; EACH r.v[i] = vreinterpretq_s32_s8(vld1q_s8((const int8_t*)p + 16 * i)); return r; }
SIMD I load_u8(const uint8_t* p) {
    const uint8x16_t x = vld1q_u8(p);
    const uint16x8_t low = vmovl_u8(vget_low_u8(x)), high = vmovl_u8(vget_high_u8(x));
    return {{vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(low))), vreinterpretq_s32_u32(vmovl_u16(vget_high_u16(low))),
             vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(high))), vreinterpretq_s32_u32(vmovl_u16(vget_high_u16(high)))}};
}
SIMD I iadd(I a, I b) { EACH a.v[i] = vaddq_s32(a.v[i], b.v[i]); return a; }
SIMD I isub(I a, I b) { EACH a.v[i] = vsubq_s32(a.v[i], b.v[i]); return a; }
SIMD I imul(I a, I b) { EACH a.v[i] = vmulq_s32(a.v[i], b.v[i]); return a; }
SIMD int32_t isum(I x) { return vaddvq_s32(vaddq_s32(vaddq_s32(x.v[0], x.v[1]), vaddq_s32(x.v[2], x.v[3]))); }
SIMD F to_float(I x) { F r; EACH r.v[i] = vcvtq_f32_s32(x.v[i]); return r; }
SIMD I round(F x) { I r; EACH r.v[i] = vcvtnq_s32_f32(x.v[i]); return r; }
SIMD F power_of_two(I n) {
    F r;
    EACH r.v[i] = vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n.v[i], vdupq_n_s32(127)), 23));
    return r;
}
SIMD void store_i8(int8_t* p, I x) {
    const int16x8_t low = vcombine_s16(vqmovn_s32(x.v[0]), vqmovn_s32(x.v[1]));
    const int16x8_t high = vcombine_s16(vqmovn_s32(x.v[2]), vqmovn_s32(x.v[3]));
    vst1q_s8(p, vcombine_s8(vqmovn_s16(low), vqmovn_s16(high)));
}
template <int SHIFT>
SIMD I nibble(I x) {
    EACH x.v[i] = vandq_s32(vshlq_s32(x.v[i], vdupq_n_s32(-SHIFT)), vdupq_n_s32(15));
    return x;
}

template <int T>
SIMD void dot_int4_block(const uint8_t* w, const int32_t* x, int64_t steps, I (&dot)[T]) {
    const uint8x16_t mask = vdupq_n_u8(15);
    for (int64_t s = 0; s < steps; ++s, w += 64, x += 2 * T) {
        prefetch(w + PREFETCH);
        EACH {
            const uint8x16_t packed = vld1q_u8(w + 16 * i);
            const int8x16_t low = vreinterpretq_s8_u8(vandq_u8(packed, mask));
            const int8x16_t high = vreinterpretq_s8_u8(vshrq_n_u8(packed, 4));
            for (int m = 0; m < T; ++m) {
                dot[m].v[i] = vdotq_s32(dot[m].v[i], low, vreinterpretq_s8_s32(vdupq_n_s32(x[m])));
                dot[m].v[i] = vdotq_s32(dot[m].v[i], high, vreinterpretq_s8_s32(vdupq_n_s32(x[T + m])));
            }
        }
    }
}
template <int T>
SIMD void dot_int8(const int8_t* w, const int32_t* x, int64_t steps, const int32_t*, I (&dot)[T]) {
    for (int64_t s = 0; s < steps; ++s, w += 64, x += T) {
        prefetch(w + PREFETCH);
        EACH {
            const int8x16_t wi = vld1q_s8(w + 16 * i);
            for (int m = 0; m < T; ++m)
                dot[m].v[i] = vdotq_s32(dot[m].v[i], wi, vreinterpretq_s8_s32(vdupq_n_s32(x[m])));
        }
    }
}
#undef EACH

}  // namespace squawq::neon
