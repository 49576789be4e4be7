// The operations, declared once for every instruction set. Each ISA's translation units define them in a namespace
// of its own (avx512, avx2, neon, scalar); dispatch.cpp picks one namespace at run time.
//
// Layouts. Lanes are output channels: a weight is cut into blocks of 16 output channels ("rows").
//   int4   [blocks][in/8][16][4] bytes: byte j of row r, step s: input 8s + j in the low nibble, 8s + 4 + j in the high one
//   int8   [blocks][in/4][16][4] bytes, signed
//   dense  [blocks][in][16] values of 16 or 32 bits
//   scales [blocks][groups][16] float16, zeros [blocks][groups][16] bytes; int8 weights have one float32 scale a row
// The KV cache has pages of 16 tokens: keys [page][kv_head][head_dim][16], values [page][kv_head][16][head_dim],
// float16. Rows beyond the last one are zero.
//
// Batch invariance: every output row is computed by the same operations in the same order whatever else is in the batch.
#pragma once
#include <cstddef>
#include <cstdint>

#include "routing.h"

namespace squawq {

constexpr int LANES = 16;  // rows of a block, tokens of a page

enum class Dense : int { f32 = 0, f16 = 1, bf16 = 2 };

struct Int4 {
    const uint8_t* weight;
    const uint16_t* scales;
    const uint8_t* zeros;
    const float* bias;  // [out] or null
    int64_t out, in, group;
};

struct Int8 {
    const int8_t* weight;
    const float* scales;  // [blocks][16]
    const float* bias;
    int64_t out, in, group;  // group: inputs that share an activation scale
};

struct DenseWeight {
    const void* weight;
    const float* bias;
    int64_t out, in;
    Dense type;
};

// One sequence's rows in a step: batch rows first_row .. first_row + rows are its tokens at positions start ...
struct Sequence {
    int64_t first_row, rows, start;
    const int32_t* pages;
};

enum class Activation : int64_t { silu = 0, gelu_tanh = 1 };

// All experts of a layer, one after another along the outputs: gate_up [experts * 2 * inner][hidden], an expert's gate before
// its up; down [experts * hidden][inner]. Without biases.
struct ExpertWeights {
    const Int4 *gate_up, *down;
    int64_t inner;  // multiple of 16
    Activation activation;
};

struct Heads {
    int64_t query, kv, dim;
};

// cos and sin of a step's rows, `stride` floats a row; those of a layer's rotated pairs begin at a row's first.
struct Rotary {
    const float *cos, *sin;
    int64_t stride;
};

// What happens to queries and keys before attention (RotateAndStore in backends/layer_ops.py).
struct Rotation {
    int64_t first, pairs;  // this layer's columns of Rotary; pairs -1: all from the first on
    int64_t interleaved;   // a pair are neighbours; else it is half of the rotated part apart
    int64_t whole;         // the norms are of all heads together
    int64_t rope_first;    // the norms come after the rotation
    const float *q_norm, *k_norm;
};

// How scores become weights (Attention in backends/layer_ops.py).
struct Scoring {
    int64_t window;  // 0: all tokens
    float scale, cap, beta;
    int64_t original;
};

constexpr int MOST_COLUMNS = 128;

// A block of weights to round, [columns][out], the last column first (GPTQ error feedback). wanted: the weights before
// feedback within the block; column c then adds feedback[c][other] times the error of each later column. base: the
// weights that errors are measured against. scales, zeros [groups][out].
struct Columns {
    const float *wanted, *base, *feedback, *scales, *zeros;
    const int64_t* groups;  // [columns]: the group of each
    int64_t columns, out;
    float highest;          // integers are 0 .. highest
};

#define SQUAWQ_OPS(ISA)                                                                                                \
    namespace ISA {                                                                                                    \
    void int4_matmul(const float* x, int64_t m, const Int4& w, float* y);                                              \
    void int4_matmul_exact(const float* x, int64_t m, const Int4& w, float* y);                                        \
    void int8_matmul(const float* x, int64_t m, const Int8& w, float* y);                                              \
    void dense_matmul(const float* x, int64_t m, const DenseWeight& w, float* y);                                      \
    void int4_experts(const float* x, int64_t rows, const Routed& routed, const ExpertWeights& w, float* y);           \
    void rms_norm(float* x, const float* delta, const float* weight, float eps, int64_t m, int64_t n, float* y);       \
    void activation_mul(const float* gate_up, int64_t m, int64_t n, Activation activation, float* y);                  \
    void soft_cap(float* x, int64_t n, float cap);                                                                     \
    void rotate_and_store(float* qkv, int64_t m, Heads heads, const Rotary& rotary, const Rotation& rotation,          \
                          float eps, const int64_t* slots, uint16_t* keys, uint16_t* values);                          \
    void attention(const float* qkv, Heads heads, const Sequence* sequences, int64_t count, const Scoring& scoring,    \
                   const uint16_t* keys, const uint16_t* values, float* y);                                            \
    void round_columns(const Columns& c, float* levels, float* errors);                                                \
    }

SQUAWQ_OPS(avx512)
SQUAWQ_OPS(avx2)
SQUAWQ_OPS(neon)
SQUAWQ_OPS(scalar)

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace squawq
