// Runs several decoder layers in one call. Returning to the caller's interpreter between operations would leave memory
// bandwidth unused for some microseconds each time.
#pragma once
#include <cstdint>

#include "ops.h"

namespace squawq {

enum class Kind : int64_t { int4 = 0, int4_exact = 1, int8 = 2, dense = 3 };

struct Matrix {
    Kind kind;
    const void* weight;  // Int4, Int8 or DenseWeight
};

struct Layer {
    const float *input_norm, *post_norm, *q_norm, *k_norm;  // the last two may be null
    Matrix qkv, out, gate_up, down;
    uint16_t *keys, *values;
    int64_t window;  // 0: none
};

struct Step {
    int64_t rows, hidden, inner;
    Heads heads;
    float eps;
    const float *cos, *sin;
    const int64_t* slots;
    const Sequence* sequences;
    int64_t count;
};

}  // namespace squawq
