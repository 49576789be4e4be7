// Rounding with error feedback: the columns of a block of weights, the last one first.
#include "pool.h"
#include "simd.h"

namespace squawq::SQUAWQ_ISA {
namespace {

constexpr int WIDE = 4;  // vectors of output channels processed together
constexpr int64_t STRIP = WIDE * LANES;

// Loads a strip of a row of n floats, with zeros beyond its end.
SIMD void load_strip(const float* row, int64_t count, F (&to)[WIDE]) {
    if (count >= STRIP) {
        for (int v = 0; v < WIDE; ++v) to[v] = load(row + v * LANES);
        return;
    }
    alignas(64) float part[STRIP] = {};
    std::memcpy(part, row, sizeof(float) * size_t(count));
    for (int v = 0; v < WIDE; ++v) to[v] = load(part + v * LANES);
}

SIMD void store_strip(float* row, int64_t count, const F (&from)[WIDE]) {
    for (int v = 0; v < WIDE && v * LANES < count; ++v) store_part(row + v * LANES, from[v], count - v * LANES);
}

}  // namespace

void round_columns(const Columns& c, float* levels, float* errors) {
    parallel_for(ceil_div(c.out, STRIP), [=](int64_t unit) {
        alignas(64) float fed[MOST_COLUMNS][STRIP];
        const int64_t first = unit * STRIP, count = c.out - first;
        for (int64_t own = c.columns - 1; own >= 0; --own) {
            const int64_t place = own * c.out + first, in_grid = c.groups[own] * c.out + first;
            F wanted[WIDE], base[WIDE], scale[WIDE], zero[WIDE], level[WIDE];
            load_strip(c.wanted + place, count, wanted);
            const float* feedback = c.feedback + own * c.columns;
            for (int64_t other = own + 1; other < c.columns; ++other) {
                const F share = set1(feedback[other]);
                for (int v = 0; v < WIDE; ++v) wanted[v] = fma(share, load(fed[other] + v * LANES), wanted[v]);
            }
            load_strip(c.base + place, count, base);
            load_strip(c.scales + in_grid, count, scale);
            load_strip(c.zeros + in_grid, count, zero);
            for (int v = 0; v < WIDE; ++v) {
                const F lowest = sub(set1(0.f), zero[v]), highest = sub(set1(c.highest), zero[v]);
                const F steps = to_float(round(min(max(div(wanted[v], scale[v]), lowest), highest)));
                level[v] = add(steps, zero[v]);
                base[v] = sub(base[v], mul(steps, scale[v]));
                store(fed[own] + v * LANES, base[v]);
            }
            store_strip(levels + place, count, level);
            store_strip(errors + place, count, base);
        }
    });
}

}  // namespace squawq::SQUAWQ_ISA
