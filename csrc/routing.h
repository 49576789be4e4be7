// Mixture of experts: which experts each row takes, and which rows each expert is given.
#pragma once
#include <cstddef>
#include <cstdint>

namespace squawq {

enum class Scores : int64_t { softmax = 0, sigmoid = 1 };

// `Routing` of src/squawq/backends/layer_ops.py. bias: [experts] or null, added to the scores that experts are chosen by.
struct Routing {
    int64_t experts, chosen, renormalize, groups, chosen_groups;
    Scores scores;
    float scale;
    const float* bias;
};

// (row, expert) pairs in the order of the experts, each with its share; within an expert in the order of the rows.
struct Routed {
    const int32_t *rows, *experts;  // [pairs]; [used]: experts that are given a row
    const int32_t* starts;          // [used + 1]: the first pair of each
    const float* shares;            // [pairs]
    int64_t pairs, used;
};

// logits [rows][stride], of which the first `experts` are the router's. Valid until the next call.
Routed route(const float* logits, int64_t rows, int64_t stride, const Routing& routing);

}  // namespace squawq
