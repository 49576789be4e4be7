// Sums and gathers over the processes of one host that run a model together (tensor parallelism), through shared memory.
#pragma once
#include <cstdint>

namespace squawq {

// One process's handle; the caller's (src/squawq/backends/cpu/group.py), who shares `group_bytes` zero bytes among the processes.
struct Group {
    int64_t rank, size;
    int64_t capacity;  // floats of a slot
    uint8_t* shared;
    uint64_t exchanges;  // so far; the same in all processes between two calls
    const int64_t* children;  // [count] process ids that this process started and waits for; it sees when one ends
    int64_t count;
};

struct GroupEnded {};  // thrown: another process has ended, or `end_group` was called

int64_t group_bytes(int64_t size, int64_t capacity);

// x [n] becomes the sum over all processes, in the order of their ranks: the same bits in each.
void all_reduce(Group& group, float* x, int64_t n);

// x [rows][widths[rank]] of each process, side by side in rank 0's y [rows][sum of widths]; other processes give no y.
void gather(Group& group, const float* x, int64_t rows, const int64_t* widths, float* y);

// All processes that wait, or will wait, throw GroupEnded.
void end_group(const Group& group);

}  // namespace squawq
