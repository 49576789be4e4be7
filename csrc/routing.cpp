#include "routing.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>

#include "pool.h"

namespace squawq {
namespace {

constexpr float NONE = -INFINITY;
constexpr float LEAST_SUM = 1e-20f;  // as in DeepSeek-V3's reference code

// The scores of all experts, in place of their logits.
void score(float* row, const Routing& r) {
    if (r.scores == Scores::sigmoid) {
        for (int64_t e = 0; e < r.experts; ++e) row[e] = 1.f / (1.f + std::exp(-row[e]));
        return;
    }
    float most = row[0], sum = 0.f;
    for (int64_t e = 0; e < r.experts; ++e) most = std::max(most, row[e]);
    for (int64_t e = 0; e < r.experts; ++e) sum += row[e] = std::exp(row[e] - most);
    for (int64_t e = 0; e < r.experts; ++e) row[e] /= sum;
}

// The place of the largest key; of equal ones the first.
int64_t largest(const float* keys, int64_t count) {
    int64_t best = 0;
    for (int64_t i = 1; i < count; ++i)
        if (keys[i] > keys[best]) best = i;
    return best;
}

// Leaves the groups with the largest sums of two keys (DeepSeek-V3, arXiv 2412.19437).
void limit_groups(float* keys, float* sums, const Routing& r) {
    const int64_t size = r.experts / r.groups;
    for (int64_t g = 0; g < r.groups; ++g) {
        float first = NONE, second = NONE;
        for (int64_t e = g * size; e < (g + 1) * size; ++e) {
            second = std::max(second, std::min(first, keys[e]));
            first = std::max(first, keys[e]);
        }
        sums[g] = first + second;
    }
    for (int64_t g = 0; g < r.groups; ++g) {
        int64_t larger = 0;
        for (int64_t h = 0; h < r.groups; ++h) larger += sums[h] > sums[g] || (sums[h] == sums[g] && h < g);
        if (larger >= r.chosen_groups) std::fill(keys + g * size, keys + (g + 1) * size, NONE);
    }
}

// The chosen experts of a row and their shares. keys: room for 2 * experts floats.
void choose(float* row, const Routing& r, float* keys, int32_t* ids, float* shares) {
    score(row, r);
    for (int64_t e = 0; e < r.experts; ++e) {
        keys[e] = row[e] + (r.bias == nullptr ? 0.f : r.bias[e]);
        if (!(keys[e] >= -FLT_MAX)) keys[e] = -FLT_MAX;  // NaN: still no expert is chosen twice; its share stays NaN
    }
    if (r.groups > 1) limit_groups(keys, keys + r.experts, r);
    float sum = LEAST_SUM;
    for (int64_t k = 0; k < r.chosen; ++k) {
        const int64_t best = largest(keys, r.experts);
        ids[k] = int32_t(best), shares[k] = row[best];
        sum += row[best];
        keys[best] = NONE;
    }
    const float factor = r.renormalize ? r.scale / sum : r.scale;
    for (int64_t k = 0; k < r.chosen; ++k) shares[k] *= factor;
}

}  // namespace

Routed route(const float* logits, int64_t rows, int64_t stride, const Routing& r) {
    const int64_t pairs = rows * r.chosen;
    const size_t numbers = size_t(4 * pairs + 3 * r.experts + 2 * (r.experts + 1));
    int32_t* ids = static_cast<int32_t*>(scratch(4, 4 * numbers));
    int32_t *sorted = ids + pairs, *experts = sorted + pairs, *starts = experts + r.experts;
    int32_t* next = starts + r.experts + 1;
    float* given = reinterpret_cast<float*>(next + r.experts + 1);
    float *shares = given + pairs, *keys = shares + pairs;
    std::memset(next, 0, 4 * size_t(r.experts + 1));
    for (int64_t i = 0; i < rows; ++i) {
        float* row = const_cast<float*>(logits) + i * stride;
        choose(row, r, keys, ids + i * r.chosen, given + i * r.chosen);
        for (int64_t k = 0; k < r.chosen; ++k) ++next[ids[i * r.chosen + k] + 1];
    }
    int64_t used = 0;
    for (int64_t e = 0; e < r.experts; ++e) {
        if (next[e + 1] > 0) experts[used] = int32_t(e), starts[used++] = next[e];
        next[e + 1] += next[e];
    }
    starts[used] = int32_t(pairs);
    for (int64_t p = 0; p < pairs; ++p) {
        const int32_t place = next[ids[p]]++;
        sorted[place] = int32_t(p / r.chosen), shares[place] = given[p];
    }
    return {sorted, experts, starts, shares, pairs, used};
}

}  // namespace squawq
