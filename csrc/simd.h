// Sixteen lanes of float32 (F) and int32 (I) for the instruction set of this translation unit, in its namespace.
// simd_<isa>.h has what differs between instruction sets; this file builds on it.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "ops.h"

#define SIMD static inline __attribute__((always_inline))

#if defined(SQUAWQ_AVX512)
#define SQUAWQ_ISA avx512
#include "simd_avx512.h"
#elif defined(SQUAWQ_AVX2)
#define SQUAWQ_ISA avx2
#include "simd_avx2.h"
#elif defined(SQUAWQ_NEON)
#define SQUAWQ_ISA neon
#include "simd_neon.h"
#else
#define SQUAWQ_ISA scalar
#include "simd_scalar.h"
#endif

namespace squawq::SQUAWQ_ISA {

SIMD F abs(F x) { return max(x, sub(set1(0.f), x)); }

// exp, to 2 units in the last place, exactly 1 at 0; below -87 it is 0. 2^n * p(r), r = x - n ln 2 in two parts
// (Cody and Waite), p by Cephes' expf coefficients.
SIMD F exp(F x) {
    const F low = set1(-87.3f);
    F clipped = min(max(x, low), set1(88.f));
    const I n = round(mul(clipped, set1(1.44269504f)));
    const F nf = to_float(n);
    F r = fma(nf, set1(-0.693359375f), clipped);
    r = fma(nf, set1(2.12194440e-4f), r);
    F p = set1(1.9875691500e-4f);
    p = fma(p, r, set1(1.3981999507e-3f));
    p = fma(p, r, set1(8.3334519073e-3f));
    p = fma(p, r, set1(4.1665795894e-2f));
    p = fma(p, r, set1(1.6666665459e-1f));
    p = fma(p, r, set1(5.0000001201e-1f));
    p = fma(p, mul(r, r), add(r, set1(1.f)));
    return zero_below(x, low, mul(p, power_of_two(n)));
}

// cap * tanh(x / cap), x times `twice` = 2 / cap; NaN stays. tanh(u) = 1 - 2 / (exp(2u) + 1).
SIMD F capped(F x, F twice, F cap) {
    const F one = set1(1.f);
    const F y = sub(one, div(set1(2.f), add(exp(mul(x, twice)), one)));
    const F finite = max(set1(-3e38f), min(set1(3e38f), x));  // or NaN, since both return the second operand then
    return fma(y, cap, mul(finite, set1(0.f)));
}

template <Activation A>
SIMD F activated(F x) {
    const F one = set1(1.f);
    if constexpr (A == Activation::silu) {
        return div(x, add(one, exp(sub(set1(0.f), x))));
    } else {  // 0.5 x (1 + tanh(u)) is x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
        const F u = mul(x, fma(mul(x, x), set1(0.044715f), one));
        return div(x, add(one, exp(mul(u, set1(-1.5957691216f)))));
    }
}

// x, with `other` in the lanes outside [from, to).
SIMD F keep(F x, F other, int64_t from, int64_t to) {
    if (from <= 0 && to >= LANES) return x;
    alignas(64) float a[LANES], b[LANES];
    store(a, x);
    store(b, other);
    for (int64_t i = 0; i < LANES; ++i)
        if (i < from || i >= to) a[i] = b[i];
    return load(a);
}

#ifndef SQUAWQ_AVX512
template <int B, int T>
SIMD void dot_int4(const uint8_t* w, int64_t stride, const int32_t* x, int64_t steps, I (&dot)[B][T]) {
    for (int b = 0; b < B; ++b) dot_int4_block<T>(w + b * stride, x, steps, dot[b]);
}
#endif

SIMD void store_part(float* p, F x, int64_t count) {
    if (count >= LANES) return store(p, x);
    alignas(64) float a[LANES];
    store(a, x);
    std::memcpy(p, a, sizeof(float) * size_t(count));
}

}  // namespace squawq::SQUAWQ_ISA
