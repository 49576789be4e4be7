// Decoder layers as a list of operations that runs in one call (src/squawq/backends/layer_ops.py has the same list). Between
// two operations nothing goes back to the caller, whose interpreter would leave the memory idle for some microseconds.
#pragma once
#include <cstdint>

#include "ops.h"

namespace squawq {

enum class Kind : int64_t { int4 = 0, int4_exact = 1, int8 = 2, dense = 3 };

struct Matrix {
    Kind kind;
    const void* weight;  // Int4, Int8 or DenseWeight
};

enum class Code : int64_t { norm, matmul, rotate_and_store, attention, activation_mul, experts, add_residual, all_reduce };
enum Buffer : int64_t { HIDDEN = 0, NORMED = 1, DELTA = 2, WIDE = 3, NARROW = 4, BUFFERS = 5 };

// What DELTA holds before: nothing, the shared expert's output, or that, to be multiplied by sigmoid of the router's last
// logit.
enum class Shared : int64_t { none = 0, added = 1, gated = 2 };

// The weights hold all experts, one after another along the outputs, as in ExpertWeights.
struct Experts {
    Routing routing;
    int64_t inner;
    Activation activation;
    Shared shared;
    Matrix router, gate_up, down;
};

struct Operation {
    Code code;
    Buffer source, target;       // norm, matmul; all_reduce: source
    int64_t option;              // norm: add DELTA first; matmul: Kind; activation_mul: Activation
    int64_t width;               // norm, activation_mul, all_reduce
    const void* weight;          // norm, matmul; experts: Experts; rotate_and_store: Rotation; attention: Scoring;
                                 // all_reduce: Group
    uint16_t *keys, *values;
};

struct Step {
    int64_t rows;
    const int64_t* widths;  // [BUFFERS]: floats of a row; multiples of 16
    Heads heads;
    float eps;
    Rotary rotary;
    const int64_t* slots;
    const Sequence* sequences;
    int64_t count;
};

}  // namespace squawq
