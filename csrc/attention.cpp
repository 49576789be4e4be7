// Rotary embedding, writing to the paged KV cache, and attention over it. A query processes its context (or window) in
// blocks of 64 tokens from the start, in the same order whatever the chunk or batch.
#include "pool.h"
#include "simd.h"

namespace squawq::SQUAWQ_ISA {
namespace {

constexpr int64_t BLOCK = 64;    // tokens per softmax update; a multiple of a page
constexpr int64_t ROWS = 16;     // queries of a unit
constexpr float LOWEST = -1e30f;

SIMD int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// RMS norm of one head in place.
SIMD void norm_head(float* x, const float* weight, float eps, int64_t dim) {
    F squares = set1(0.f);
    for (int64_t d = 0; d < dim; d += LANES) squares = fma(load(x + d), load(x + d), squares);
    const F scale = set1(1.f / std::sqrt(sum(squares) / float(dim) + eps));
    for (int64_t d = 0; d < dim; d += LANES) store(x + d, mul(mul(load(x + d), scale), load(weight + d)));
}

// The first 2 * pairs coordinates of a head turn (partial rotary leaves the others): one half with the other, or neighbours.
SIMD void rotate_head(float* x, const float* cos, const float* sin, int64_t pairs, bool interleaved) {
    if (interleaved) {
        for (int64_t d = 0; d < pairs; ++d) {
            const float first = x[2 * d], second = x[2 * d + 1];
            x[2 * d] = first * cos[d] - second * sin[d];
            x[2 * d + 1] = second * cos[d] + first * sin[d];
        }
        return;
    }
    for (int64_t d = 0; d < pairs; ++d) {
        const float first = x[d], second = x[pairs + d];
        x[d] = first * cos[d] - second * sin[d];
        x[pairs + d] = second * cos[d] + first * sin[d];
    }
}

// Infinities become the largest float16. NaN stays (min and max return the second operand), so a broken row is visible.
SIMD F to_finite_half(F x) { return max(set1(-65504.f), min(set1(65504.f), x)); }

// Norms of a row's queries and keys, if there are any.
SIMD void norm_heads(float* row, Heads heads, const Rotation& rotation, float eps) {
    const auto apply = [=](float* from, int64_t count, const float* weight) {
        if (weight == nullptr) return;
        if (rotation.whole) return norm_head(from, weight, eps, count * heads.dim);
        for (int64_t h = 0; h < count; ++h) norm_head(from + h * heads.dim, weight, eps, heads.dim);
    };
    apply(row, heads.query, rotation.q_norm);
    apply(row + heads.query * heads.dim, heads.kv, rotation.k_norm);
}

struct Job {
    const float* q;  // first query row's q of this kv head's first query head
    int64_t stride;  // floats between tokens
    Heads heads;
    int64_t tokens, start;
    Scoring scoring;
    const int32_t* pages;
    int64_t page_size, head_offset;  // halves of a page, offset of the kv head in it
    const uint16_t *keys, *values;
    float* y;
    int64_t y_stride;
};

// Prefetches a page that will be read soon: pages are scattered, so the hardware prefetcher does not predict them.
SIMD void fetch(const uint16_t* page, int64_t dim) {
    for (int64_t i = 0; i < dim * LANES; i += 32) prefetch(page + i);
}

// Scores of G queries against one page, [16] each. Even and odd coordinates have separate sums, so that twice as many
// additions are in flight.
template <int G>
SIMD void score_page(const float* const* q, const uint16_t* keys, int64_t dim, const float* scale, float* const* scores) {
    F even[G], odd[G];
    for (int r = 0; r < G; ++r) even[r] = odd[r] = set1(0.f);
    for (int64_t d = 0; d < dim; d += 2) {
        const F first = load_f16(keys + d * LANES), second = load_f16(keys + (d + 1) * LANES);
        for (int r = 0; r < G; ++r) even[r] = fma(set1(q[r][d]), first, even[r]);
        for (int r = 0; r < G; ++r) odd[r] = fma(set1(q[r][d + 1]), second, odd[r]);
    }
    for (int r = 0; r < G; ++r) store(scores[r], mul(add(even[r], odd[r]), set1(scale[r])));
}

// y += sum over a page of weight * value, for 16 * B coordinates from d on.
template <int G, int B>
SIMD void add_values(float* const* y, const uint16_t* values, int64_t dim, int64_t d, const float* const* weights) {
    F total[G][B];
    for (int r = 0; r < G; ++r)
        for (int b = 0; b < B; ++b) total[r][b] = load(y[r] + d + b * LANES);
    for (int t = 0; t < LANES; ++t) {
        F value[B];
        for (int b = 0; b < B; ++b) value[b] = load_f16(values + t * dim + d + b * LANES);
        for (int r = 0; r < G; ++r)
            for (int b = 0; b < B; ++b) total[r][b] = fma(set1(weights[r][t]), value[b], total[r][b]);
    }
    for (int r = 0; r < G; ++r)
        for (int b = 0; b < B; ++b) store(y[r] + d + b * LANES, total[r][b]);
}

template <int G>
SIMD void add_page(float* const* y, const uint16_t* values, int64_t dim, const float* const* weights) {
    int64_t d = 0;
    for (; d + 2 * LANES <= dim; d += 2 * LANES) add_values<G, 2>(y, values, dim, d, weights);
    for (; d < dim; d += LANES) add_values<G, 1>(y, values, dim, d, weights);
}

template <class Function>
SIMD void in_groups(int64_t rows, Function function) {
    int64_t r = 0;
    for (; r + QUERIES <= rows; r += QUERIES) function(r, std::integral_constant<int, QUERIES>());
    if constexpr (QUERIES > 4) {
        for (; r + 4 <= rows; r += 4) function(r, std::integral_constant<int, 4>());
    }
    for (; r < rows; ++r) function(r, std::integral_constant<int, 1>());
}

void attend(const Job& job) {
    const int64_t dim = job.heads.dim, share = job.heads.query / job.heads.kv, rows = job.tokens * share;
    const Scoring& scoring = job.scoring;
    float scale[ROWS];
    alignas(64) float scores[ROWS][BLOCK];
    float most[ROWS];
    F weight_sum[ROWS];
    const float* q[ROWS];
    float* y[ROWS];
    int64_t position[ROWS], from[ROWS];
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t token = r / share, head = r % share;
        q[r] = job.q + token * job.stride + head * dim;
        y[r] = job.y + token * job.y_stride + head * dim;
        position[r] = job.start + token;
        from[r] = scoring.window > 0 && position[r] >= scoring.window ? position[r] - scoring.window + 1 : 0;
        scale[r] = scoring.scale;
        if (scoring.beta != 0.f) scale[r] *= 1.f + scoring.beta * std::log1p(float(position[r] / scoring.original));
        most[r] = LOWEST;
        weight_sum[r] = set1(0.f);
        for (int64_t d = 0; d < dim; d += LANES) store(y[r] + d, set1(0.f));
    }
    const int64_t last = position[rows - 1];
    for (int64_t block = from[0] / BLOCK * BLOCK; block <= last; block += BLOCK) {
        const int64_t pages = least(BLOCK, last + 1 - block + LANES - 1) / LANES;
        for (int64_t p = 0; p < pages; ++p) {
            const int64_t here = job.pages[block / LANES + p] * job.page_size + job.head_offset;
            const uint16_t* keys = job.keys + here;
            fetch(job.values + here, dim);
            if (block + (p + 1) * LANES <= last) {
                fetch(job.keys + job.pages[block / LANES + p + 1] * job.page_size + job.head_offset, dim);
            }
            in_groups(rows, [&](int64_t r, auto group) {
                constexpr int G = decltype(group)::value;
                float* out[G];
                for (int i = 0; i < G; ++i) out[i] = scores[r + i] + p * LANES;
                score_page<G>(q + r, keys, dim, scale + r, out);
            });
        }
        for (int64_t r = 0; r < rows; ++r) {
            const F lowest = set1(LOWEST);
            F peak = lowest;
            for (int64_t p = 0; p < pages; ++p) {
                const int64_t at = block + p * LANES;
                F s = load(scores[r] + p * LANES);
                if (scoring.cap > 0.f) s = capped(s, set1(2.f / scoring.cap), set1(scoring.cap));
                s = keep(s, lowest, from[r] - at, position[r] + 1 - at);
                store(scores[r] + p * LANES, s);
                peak = max(peak, s);
            }
            const float found = largest(peak), next = found > most[r] ? found : most[r];
            const F change = exp(set1(most[r] - next));
            most[r] = next;
            weight_sum[r] = mul(weight_sum[r], change);
            for (int64_t p = 0; p < pages; ++p) {
                const int64_t at = block + p * LANES;
                const F s = load(scores[r] + p * LANES);
                const F weight = keep(exp(sub(s, set1(next))), set1(0.f), from[r] - at, position[r] + 1 - at);
                store(scores[r] + p * LANES, weight);
                weight_sum[r] = add(weight_sum[r], weight);
            }
            for (int64_t d = 0; d < dim; d += LANES) store(y[r] + d, mul(load(y[r] + d), change));
        }
        for (int64_t p = 0; p < pages; ++p) {
            const uint16_t* values = job.values + job.pages[block / LANES + p] * job.page_size + job.head_offset;
            in_groups(rows, [&](int64_t r, auto group) {
                constexpr int G = decltype(group)::value;
                const float* weights[G];
                for (int i = 0; i < G; ++i) weights[i] = scores[r + i] + p * LANES;
                add_page<G>(y + r, values, dim, weights);
            });
        }
    }
    for (int64_t r = 0; r < rows; ++r) {
        const F inverse = set1(1.f / sum(weight_sum[r]));
        for (int64_t d = 0; d < dim; d += LANES) store(y[r] + d, mul(load(y[r] + d), inverse));
    }
}

}  // namespace

void rotate_and_store(float* qkv, int64_t m, Heads heads, const Rotary& rotary, const Rotation& rotation, float eps,
                      const int64_t* slots, uint16_t* keys, uint16_t* values) {
    const int64_t dim = heads.dim, width = (heads.query + 2 * heads.kv) * dim;
    const int64_t pairs = rotation.pairs < 0 ? rotary.stride - rotation.first : rotation.pairs;
    // A page's new holder begins at its first place. Masked places count as 0 * value, so what its last holder left must
    // not be NaN.
    for (int64_t i = 0; i < m; ++i) {
        if (slots[i] % LANES == 0) {
            const int64_t size = heads.kv * dim * LANES;
            std::memset(keys + slots[i] / LANES * size, 0, size_t(size) * 2);
            std::memset(values + slots[i] / LANES * size, 0, size_t(size) * 2);
        }
    }
    const auto token = [=](int64_t i) {
        float* row = qkv + i * width;
        if (!rotation.rope_first) norm_heads(row, heads, rotation, eps);
        const float *cos = rotary.cos + i * rotary.stride + rotation.first, *sin = rotary.sin + i * rotary.stride + rotation.first;
        for (int64_t h = 0; h < heads.query + heads.kv; ++h)
            rotate_head(row + h * dim, cos, sin, pairs, rotation.interleaved != 0);
        if (rotation.rope_first) norm_heads(row, heads, rotation, eps);
        const int64_t page = slots[i] / LANES, place = slots[i] % LANES;
        alignas(64) uint16_t halves[LANES];
        for (int64_t h = 0; h < heads.kv; ++h) {
            const float* k = row + (heads.query + h) * dim;
            const float* v = k + heads.kv * dim;
            uint16_t* key = keys + (page * heads.kv + h) * dim * LANES + place;
            uint16_t* value = values + ((page * heads.kv + h) * LANES + place) * dim;
            for (int64_t d = 0; d < dim; d += LANES) {
                store_f16(halves, to_finite_half(load(k + d)));
                for (int64_t j = 0; j < LANES; ++j) key[(d + j) * LANES] = halves[j];
                store_f16(value + d, to_finite_half(load(v + d)));
            }
        }
    };
    if (m * width <= 16384) {
        for (int64_t i = 0; i < m; ++i) token(i);
    } else {
        parallel_for(m, token);
    }
}

void attention(const float* qkv, Heads heads, const Sequence* sequences, int64_t count, const Scoring& scoring,
               const uint16_t* keys, const uint16_t* values, float* y) {
    const int64_t share = heads.query / heads.kv, dim = heads.dim;
    const int64_t tile = share < ROWS ? ROWS / share : 1;
    int64_t units = 0;
    int64_t* first = static_cast<int64_t*>(scratch(1, sizeof(int64_t) * size_t(count + 1)));
    for (int64_t s = 0; s < count; ++s) {
        first[s] = units;
        units += ceil_div(sequences[s].rows, tile) * heads.kv;
    }
    first[count] = units;
    parallel_for(units, [=](int64_t u) {
        int64_t s = 0;
        for (int64_t high = count; high - s > 1;) {
            const int64_t middle = (s + high) / 2;
            (first[middle] <= u ? s : high) = middle;
        }
        const Sequence& sequence = sequences[s];
        // Later tiles have more context: they go first, so that the threads finish together.
        const int64_t tiles = ceil_div(sequence.rows, tile), local = u - first[s];
        const int64_t kv = local % heads.kv, token = (tiles - 1 - local / heads.kv) * tile;
        const int64_t stride = (heads.query + 2 * heads.kv) * dim;
        const int64_t row = sequence.first_row + token;
        attend({qkv + row * stride + kv * share * dim, stride, heads, least(tile, sequence.rows - token),
                sequence.start + token, scoring, sequence.pages, heads.kv * dim * LANES, kv * dim * LANES, keys, values,
                y + row * heads.query * dim + kv * share * dim, heads.query * dim});
    });
}

}  // namespace squawq::SQUAWQ_ISA
