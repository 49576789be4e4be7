#include "pack.h"

#include <cmath>
#include <cstring>

#define SIMD static inline  // the scalar conversions only
#include "simd_scalar.h"

#include "pool.h"

namespace squawq {
namespace {

constexpr int SHIFT[8] = {0, 16, 4, 20, 8, 24, 12, 28};  // bit of channel 8c + i in word c of AWQ GEMM

float value(const void* source, Dense type, int64_t i) {
    const uint16_t* half = static_cast<const uint16_t*>(source);
    if (type == Dense::f16) return scalar::half_to_float(half[i]);
    if (type == Dense::f32) return static_cast<const float*>(source)[i];
    const uint32_t bits = uint32_t(half[i]) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

}  // namespace

void pack_gemm(const int32_t* qweight, const int32_t* qzeros, const uint16_t* scales, int64_t out, int64_t in,
               int64_t groups, int64_t repeat, int64_t first_row, uint8_t* weight, uint16_t* packed_scales, uint8_t* zeros) {
    const int64_t words = out / 8, all = groups * repeat, steps = in / 8;
    parallel_for(ceil_div(words, 8), [=](int64_t u) {  // eight adjacent words: half a cache line of the source
        const int64_t to = (u + 1) * 8 < words ? (u + 1) * 8 : words;
        for (int64_t s = 0; s < steps; ++s) {
            for (int64_t c = u * 8; c < to; ++c) {
                const int64_t row = first_row + 8 * c;
                uint8_t* target = weight + ((row / LANES * steps + s) * LANES + row % LANES) * 4;
                for (int64_t j = 0; j < 4; ++j) {
                    const uint32_t low = uint32_t(qweight[(8 * s + j) * words + c]);
                    const uint32_t high = uint32_t(qweight[(8 * s + 4 + j) * words + c]);
                    for (int i = 0; i < 8; ++i)
                        target[4 * i + j] = uint8_t((low >> SHIFT[i] & 15) | (high >> SHIFT[i] & 15) << 4);
                }
            }
        }
        for (int64_t g = 0; g < all; ++g) {
            for (int64_t c = u * 8; c < to; ++c) {
                const int64_t row = first_row + 8 * c, place = (row / LANES * all + g) * LANES + row % LANES;
                const uint32_t word = qzeros == nullptr ? 0x88888888u : uint32_t(qzeros[g / repeat * words + c]);
                for (int i = 0; i < 8; ++i) zeros[place + i] = uint8_t(word >> SHIFT[i] & 15);
                std::memcpy(packed_scales + place, scales + g / repeat * out + 8 * c, 16);
            }
        }
    });
}

void pack_dense(const void* source, int64_t out, int64_t in, int64_t first_row, int64_t item, void* target) {
    parallel_for(ceil_div(out, LANES), [=](int64_t u) {
        const int64_t to = (u + 1) * LANES < out ? (u + 1) * LANES : out;
        for (int64_t i = 0; i < in; ++i) {
            for (int64_t r = u * LANES; r < to; ++r) {
                const int64_t row = first_row + r, place = (row / LANES * in + i) * LANES + row % LANES;
                std::memcpy(static_cast<char*>(target) + place * item, static_cast<const char*>(source) + (r * in + i) * item,
                            size_t(item));
            }
        }
    });
}

void pack_int8(const void* source, Dense type, int64_t out, int64_t in, int8_t* target, float* scales) {
    parallel_for(ceil_div(out, LANES), [=](int64_t u) {
        const int64_t to = (u + 1) * LANES < out ? (u + 1) * LANES : out;
        for (int64_t r = u * LANES; r < to; ++r) {
            float most = 0.f, poison = 0.f;  // NaN if the row has NaN or infinity, which makes its results NaN
            for (int64_t i = 0; i < in; ++i) {
                const float v = value(source, type, r * in + i);
                most = std::fabs(v) > most ? std::fabs(v) : most;
                poison += v * 0.f;
            }
            const float inverse = most > 0.f && poison == 0.f ? 127.f / most : 0.f;
            scales[r] = most / 127.f + poison;
            int8_t* block = target + u * in * LANES + r % LANES * 4;
            for (int64_t i = 0; i < in; ++i) {
                const float v = inverse > 0.f ? value(source, type, r * in + i) * inverse : 0.f;
                block[i / 4 * 4 * LANES + i % 4] = int8_t(std::nearbyint(v));
            }
        }
    });
}

}  // namespace squawq
