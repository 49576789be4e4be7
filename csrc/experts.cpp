// A mixture-of-experts MLP with int4 weights in two parallel regions: gate, up and activation of all chosen experts, then
// their down products. Each row is rounded to int8 once; each chosen expert's weights are read once, whatever the number of
// its rows. A row's sum runs in the order of the experts, so that it does not depend on the other rows.
#include "tiles.h"

namespace squawq::SQUAWQ_ISA {
namespace {

constexpr int64_t CHUNK = 128;  // inner features of a unit: whole groups, which are then rounded to int8

// Each row as one tile.
void quantize_rows(const float* x, int64_t rows, int64_t k, int64_t group, Quantized to) {
    const auto row = [=](int64_t i) { quantize_tile<1>(x + i * k, k, group, to.from(i, k, group)); };
    if (rows * k > 32768) return parallel_for(rows, row);
    for (int64_t i = 0; i < rows; ++i) row(i);
}

template <int T, class Value>
SIMD void interleave(const Value* from, const int32_t* rows, int64_t n, Value* to) {
    for (int t = 0; t < T; ++t)
        for (int64_t i = 0; i < n; ++i) to[i * T + t] = from[rows[t] * n + i];
}

// The rows of each expert in tiles, pair after pair.
void gather_rows(Quantized from, const Routed& routed, int64_t k, int64_t group, Quantized to) {
    const auto expert = [&](int64_t u) {
        for_tiles(routed.starts[u + 1] - routed.starts[u], [&](int64_t first, auto tile) {
            constexpr int T = decltype(tile)::value;
            const int64_t pair = routed.starts[u] + first;
            const Quantized target = to.from(pair, k, group);
            interleave<T>(from.words, routed.rows + pair, k / 4, target.words);
            interleave<T>(from.scales, routed.rows + pair, k / group, target.scales);
            interleave<T>(from.sums, routed.rows + pair, k / group, target.sums);
        });
    };
    if (routed.pairs * k > 32768) return parallel_for(routed.used, expert);
    for (int64_t u = 0; u < routed.used; ++u) expert(u);
}

// inner = activation(gate) * up, rounded. shared: x has one row, which all pairs read.
template <Activation A>
void gate_up(Quantized x, bool shared, const Routed& routed, const ExpertWeights& w, Quantized inner) {
    const int64_t group = w.down->group, chunks = ceil_div(w.inner, CHUNK), blocks = w.inner / LANES;
    parallel_for(routed.used * chunks, [&](int64_t unit) {
        const int64_t u = unit / chunks, begin = unit % chunks * CHUNK, start = routed.starts[u];
        const int64_t width = w.inner - begin < CHUNK ? w.inner - begin : CHUNK;
        const int64_t block = routed.experts[u] * 2 * blocks + begin / LANES;
        for_tiles(routed.starts[u + 1] - start, [&](int64_t first, auto tile) {
            constexpr int T = decltype(tile)::value;
            const Quantized tokens = shared ? x : x.from(start + first, w.gate_up->in, w.gate_up->group);
            alignas(64) float found[T * CHUNK];  // [T][width]
            for (int64_t b = 0; b < width / LANES; ++b) {
                F total[2][T];
                int4_blocks<2, T>(tokens, *w.gate_up, block + b, blocks, total);
                for (int t = 0; t < T; ++t) store(found + t * width + b * LANES, mul(activated<A>(total[0][t]), total[1][t]));
            }
            const Quantized to = inner.from(start + first, w.inner, group);
            const int64_t groups = begin / group * T;
            quantize_tile<T>(found, width, group, {to.words + begin / 4 * T, to.scales + groups, to.sums + groups});
        });
    });
}

// y[row] += share * down(inner), for B neighbouring blocks of the outputs of an expert's tile.
template <int B, int T>
SIMD void add_blocks(Quantized inner, const Int4& w, int64_t expert_block, int64_t block, const int32_t* rows,
                     const float* shares, int64_t hidden, float* y) {
    F total[B][T];
    int4_blocks<B, T>(inner, w, expert_block + block, 1, total);
    for (int b = 0; b < B; ++b) {
        for (int t = 0; t < T; ++t) {
            float* to = y + rows[t] * hidden + (block + b) * LANES;
            store(to, add(load(to), mul(set1(shares[t]), total[b][t])));
        }
    }
}

void down(Quantized inner, const Routed& routed, const ExpertWeights& w, float* y) {
    const int64_t hidden = w.gate_up->in, blocks = hidden / LANES, bytes = w.inner * (LANES / 2);
    const int64_t share = ceil_div(blocks, UNITS_A_THREAD * threads()), most = ceil_div(UNIT_BYTES, bytes);
    const int64_t size = share < most ? share : most;
    parallel_for(ceil_div(blocks, size), [&](int64_t unit) {
        const int64_t from = unit * size, to = from + size < blocks ? from + size : blocks;
        for (int64_t u = 0; u < routed.used; ++u) {
            for_tiles(routed.starts[u + 1] - routed.starts[u], [&](int64_t first, auto tile) {
                constexpr int T = decltype(tile)::value, B = T >= 4 ? BLOCKS : 1;
                const int64_t pair = routed.starts[u] + first, expert = routed.experts[u] * blocks;
                const Quantized tokens = inner.from(pair, w.inner, w.down->group);
                const auto add = [&](int64_t block, auto count) {
                    add_blocks<decltype(count)::value, T>(tokens, *w.down, expert, block, routed.rows + pair,
                                                          routed.shares + pair, hidden, y);
                };
                int64_t block = from;
                for (; block + B <= to; block += B) add(block, std::integral_constant<int, B>());
                for (; block < to; ++block) add(block, std::integral_constant<int, 1>());
            });
        }
    });
}

}  // namespace

void int4_experts(const float* x, int64_t rows, const Routed& routed, const ExpertWeights& w, float* y) {
    const int64_t hidden = w.gate_up->in, group = w.gate_up->group, pairs = routed.pairs;
    const size_t of_rows = quantized_bytes(rows, hidden, group), of_pairs = rows > 1 ? quantized_bytes(pairs, hidden, group) : 0;
    char* memory = static_cast<char*>(scratch(0, of_rows + of_pairs + quantized_bytes(pairs, w.inner, w.down->group)));
    const Quantized tokens = quantized_at(memory, rows, hidden, group);
    const Quantized gathered = rows > 1 ? quantized_at(memory + of_rows, pairs, hidden, group) : tokens;
    const Quantized inner = quantized_at(memory + of_rows + of_pairs, pairs, w.inner, w.down->group);
    quantize_rows(x, rows, hidden, group, tokens);
    if (rows > 1) gather_rows(tokens, routed, hidden, group, gathered);
    if (w.activation == Activation::silu) gate_up<Activation::silu>(gathered, rows == 1, routed, w, inner);
    if (w.activation == Activation::gelu_tanh) gate_up<Activation::gelu_tanh>(gathered, rows == 1, routed, w, inner);
    down(inner, routed, w, y);
}

}  // namespace squawq::SQUAWQ_ISA
