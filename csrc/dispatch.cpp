// The C ABI: chooses the instruction set, holds the lock, passes on. Pointers and sizes are the caller's care
// (src/squawq/backends/cpu/ checks them); every function returns 0, or a negative number for what it could not do.
#include <pthread.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <mutex>
#include <new>

#include "group.h"
#include "layers.h"
#include "ops.h"
#include "pack.h"
#include "pool.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace squawq {
namespace {

struct Ops {
    const char* name;
    decltype(&scalar::int4_matmul) int4_matmul, int4_matmul_exact;
    decltype(&scalar::int8_matmul) int8_matmul;
    decltype(&scalar::dense_matmul) dense_matmul;
    decltype(&scalar::int4_experts) int4_experts;
    decltype(&scalar::rms_norm) rms_norm;
    decltype(&scalar::activation_mul) activation_mul;
    decltype(&scalar::soft_cap) soft_cap;
    decltype(&scalar::rotate_and_store) rotate_and_store;
    decltype(&scalar::attention) attention;
    decltype(&scalar::round_columns) round_columns;
};

#define TABLE(ISA)                                                                                              \
    {#ISA, ISA::int4_matmul, ISA::int4_matmul_exact, ISA::int8_matmul, ISA::dense_matmul, ISA::int4_experts,     \
     ISA::rms_norm, ISA::activation_mul, ISA::soft_cap, ISA::rotate_and_store, ISA::attention, ISA::round_columns}

// Best first.
const Ops TABLES[] = {
#ifdef SQUAWQ_HAVE_AVX512
    TABLE(avx512),
#endif
#ifdef SQUAWQ_HAVE_AVX2
    TABLE(avx2),
#endif
#ifdef SQUAWQ_HAVE_NEON
    TABLE(neon),
#endif
    TABLE(scalar),
};

bool runs_here(const char* name) {
#if defined(__x86_64__)
    if (std::strcmp(name, "avx512") == 0)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
    if (std::strcmp(name, "avx2") == 0)
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
#if defined(__aarch64__) && defined(__linux__)
    if (std::strcmp(name, "neon") == 0) return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#elif defined(__aarch64__)
    if (std::strcmp(name, "neon") == 0) return true;  // Apple's all have the dot product
#endif
    return std::strcmp(name, "scalar") == 0;
}

const Ops* find(const char* name) {
    for (const Ops& ops : TABLES)
        if ((name == nullptr || std::strcmp(ops.name, name) == 0) && runs_here(ops.name)) return &ops;
    return nullptr;
}

const Ops* current = find(nullptr);
std::mutex lock;
// A child of fork() must not find the lock held by a thread that it does not have.
const int at_fork = pthread_atfork([] { lock.lock(); }, [] { lock.unlock(); }, [] { lock.unlock(); });

void matmul(const Ops& ops, const float* x, int64_t m, const Matrix& matrix, float* y) {
    switch (matrix.kind) {
        case Kind::int4: return ops.int4_matmul(x, m, *static_cast<const Int4*>(matrix.weight), y);
        case Kind::int4_exact: return ops.int4_matmul_exact(x, m, *static_cast<const Int4*>(matrix.weight), y);
        case Kind::int8: return ops.int8_matmul(x, m, *static_cast<const Int8*>(matrix.weight), y);
        case Kind::dense: return ops.dense_matmul(x, m, *static_cast<const DenseWeight*>(matrix.weight), y);
    }
}

// Outputs [first, first + out) of a weight; first is a multiple of 16.
struct Part {
    Int4 int4;
    DenseWeight dense;

    Matrix of(const Matrix& whole, int64_t first, int64_t out) {
        const int64_t block = first / LANES;
        if (whole.kind == Kind::dense) {
            dense = *static_cast<const DenseWeight*>(whole.weight);
            const int64_t item = dense.type == Dense::f32 ? 4 : 2;
            dense.weight = static_cast<const char*>(dense.weight) + block * dense.in * LANES * item;
            dense.out = out;
            return {whole.kind, &dense};
        }
        int4 = *static_cast<const Int4*>(whole.weight);
        const int64_t scales = block * (int4.in / int4.group) * LANES;
        int4.weight += block * int4.in * (LANES / 2);
        int4.scales += scales, int4.zeros += scales;
        int4.out = out;
        return {whole.kind, &int4};
    }
};

// Experts of other kinds than int4, one after another.
void run_each_expert(const Ops& ops, const Experts& experts, const Routed& routed, int64_t rows, int64_t hidden, const float* x,
                     float* room, float* y) {
    float *taken = room, *found = taken + rows * hidden, *wide = found + rows * hidden, *narrow = wide + 2 * rows * experts.inner;
    Part gate_up, down;
    for (int64_t u = 0; u < routed.used; ++u) {
        const int64_t start = routed.starts[u], count = routed.starts[u + 1] - start, e = routed.experts[u];
        for (int64_t i = 0; i < count; ++i)
            std::memcpy(taken + i * hidden, x + routed.rows[start + i] * hidden, sizeof(float) * size_t(hidden));
        matmul(ops, taken, count, gate_up.of(experts.gate_up, e * 2 * experts.inner, 2 * experts.inner), wide);
        ops.activation_mul(wide, count, experts.inner, experts.activation, narrow);
        matmul(ops, narrow, count, down.of(experts.down, e * hidden, hidden), found);
        for (int64_t i = 0; i < count; ++i) {
            float* to = y + routed.rows[start + i] * hidden;
            for (int64_t j = 0; j < hidden; ++j) to[j] += routed.shares[start + i] * found[i * hidden + j];
        }
    }
}

// Floats that run_experts needs.
int64_t experts_room(const Experts& experts, int64_t rows, int64_t hidden) {
    return rows * (experts.routing.experts + 1 + 2 * hidden + 3 * experts.inner);
}

// x [rows][hidden] through each row's experts: y = sum of share * down(activation(gate) * up), and the shared expert's output
// where y has it.
void run_experts(const Ops& ops, const Experts& experts, int64_t rows, int64_t hidden, const float* x, float* room, float* y) {
    const int64_t count = experts.routing.experts, outputs = count + (experts.shared == Shared::gated);
    matmul(ops, x, rows, experts.router, room);
    if (experts.shared == Shared::none) std::memset(y, 0, sizeof(float) * size_t(rows * hidden));
    for (int64_t i = 0; experts.shared == Shared::gated && i < rows; ++i) {
        const float gate = 1.f / (1.f + std::exp(-room[i * outputs + count]));
        for (int64_t j = 0; j < hidden; ++j) y[i * hidden + j] *= gate;
    }
    const Routed routed = route(room, rows, outputs, experts.routing);
    if (experts.gate_up.kind == Kind::int4 && experts.down.kind == Kind::int4) {
        const auto weight = [](const Matrix& matrix) { return static_cast<const Int4*>(matrix.weight); };
        const ExpertWeights weights{weight(experts.gate_up), weight(experts.down), experts.inner, experts.activation};
        ops.int4_experts(x, rows, routed, weights, y);
    } else {
        run_each_expert(ops, experts, routed, rows, hidden, x, room + rows * outputs, y);
    }
}

// hidden [rows][widths[HIDDEN]] goes through the operations in place; the same as Backend.prepare in backends/base.py.
void run_layers(const Ops& ops, const Operation* list, int64_t number, const Step& step, float* hidden) {
    const int64_t rows = step.rows, width = step.widths[HIDDEN];
    int64_t floats = 0, room = 0;
    for (int64_t b = NORMED; b < BUFFERS; ++b) floats += rows * step.widths[b];
    for (const Operation* o = list; o != list + number; ++o)
        if (o->code == Code::experts) room = std::max(room, experts_room(*static_cast<const Experts*>(o->weight), rows, width));
    float* buffers[BUFFERS + 1] = {hidden, static_cast<float*>(scratch(3, sizeof(float) * size_t(floats + room)))};
    for (int64_t b = NORMED; b < BUFFERS; ++b) buffers[b + 1] = buffers[b] + rows * step.widths[b];
    for (const Operation* o = list; o != list + number; ++o) {
        const float* weight = static_cast<const float*>(o->weight);
        switch (o->code) {
            case Code::norm:
                ops.rms_norm(buffers[o->source], o->option ? buffers[DELTA] : nullptr, weight, step.eps, rows, o->width,
                             buffers[o->target]);
                break;
            case Code::matmul:
                matmul(ops, buffers[o->source], rows, {Kind(o->option), o->weight}, buffers[o->target]);
                break;
            case Code::rotate_and_store:
                ops.rotate_and_store(buffers[WIDE], rows, step.heads, step.rotary, *static_cast<const Rotation*>(o->weight),
                                     step.eps, step.slots, o->keys, o->values);
                break;
            case Code::attention:
                ops.attention(buffers[WIDE], step.heads, step.sequences, step.count, *static_cast<const Scoring*>(o->weight),
                              o->keys, o->values, buffers[NARROW]);
                break;
            case Code::activation_mul:
                ops.activation_mul(buffers[WIDE], rows, o->width, Activation(o->option), buffers[NARROW]);
                break;
            case Code::experts:
                run_experts(ops, *static_cast<const Experts*>(o->weight), rows, width, buffers[NORMED], buffers[BUFFERS],
                            buffers[DELTA]);
                break;
            case Code::add_residual:
                for (int64_t i = 0; i < rows * width; ++i) hidden[i] += buffers[DELTA][i];
                break;
            case Code::all_reduce:
                all_reduce(*static_cast<Group*>(const_cast<void*>(o->weight)), buffers[o->source], rows * o->width);
        }
    }
}

// sequences: [count] of {first row, rows, start, place of the page table in `pages`}. Until the next call.
const Sequence* sequence_list(const int64_t* sequences, int64_t count, const int32_t* pages) {
    Sequence* list = static_cast<Sequence*>(scratch(2, sizeof(Sequence) * size_t(count)));
    for (int64_t s = 0; s < count; ++s) {
        const int64_t* from = sequences + 4 * s;
        list[s] = {from[0], from[1], from[2], pages + from[3]};
    }
    return list;
}

template <class Function>
int locked(Function function) {
    const std::lock_guard<std::mutex> guard(lock);
    try {
        function();
        return 0;
    } catch (const std::bad_alloc&) {
        return -1;
    } catch (const GroupEnded&) {
        return -2;
    }
}

}  // namespace
}  // namespace squawq

using namespace squawq;

EXPORT int squawq_abi() { return 8; }
EXPORT const char* squawq_isa() { return current->name; }

// -1: not built in or not on this machine.
EXPORT int squawq_set_isa(const char* name) {
    const Ops* found = find(name);
    if (found == nullptr) return -1;
    return locked([=] { current = found; });
}

EXPORT int squawq_set_threads(int count) {
    return locked([=] { set_threads(count); });
}
// 1 without an OpenMP library in this process.
EXPORT int squawq_use_openmp(int count) {
    bool found = false;
    const int result = locked([&] { found = use_openmp(count); });
    return result != 0 ? result : !found;
}
EXPORT int squawq_threads() { return threads(); }

EXPORT int squawq_pack_gemm(const int32_t* qweight, const int32_t* qzeros, const uint16_t* scales, int64_t out, int64_t in,
                            int64_t groups, int64_t repeat, int64_t first_row, uint8_t* weight, uint16_t* packed_scales,
                            uint8_t* zeros) {
    return locked([=] {
        pack_gemm(qweight, qzeros, scales, out, in, groups, repeat, first_row, weight, packed_scales, zeros);
    });
}

EXPORT int squawq_pack_dense(const void* source, int64_t out, int64_t in, int64_t first_row, int64_t item, void* target) {
    return locked([=] { pack_dense(source, out, in, first_row, item, target); });
}

EXPORT int squawq_pack_int8(const void* source, int type, int64_t out, int64_t in, int8_t* target, float* scales) {
    return locked([=] { pack_int8(source, Dense(type), out, in, target, scales); });
}

// x [m][in] times a weight of a Kind -> y [m][out].
EXPORT int squawq_matmul(const float* x, int64_t m, int64_t kind, const void* weight, float* y) {
    return locked([=] { matmul(*current, x, m, {Kind(kind), weight}, y); });
}

EXPORT int squawq_rms_norm(float* x, const float* delta, const float* weight, float eps, int64_t m, int64_t n, float* y) {
    return locked([=] { current->rms_norm(x, delta, weight, eps, m, n, y); });
}

// x, y [rows][hidden]; y may have the shared expert's output.
EXPORT int squawq_experts(const Experts* experts, const float* x, int64_t rows, int64_t hidden, float* y) {
    return locked([=] {
        float* room = static_cast<float*>(scratch(3, sizeof(float) * size_t(experts_room(*experts, rows, hidden))));
        run_experts(*current, *experts, rows, hidden, x, room, y);
    });
}

EXPORT int squawq_activation_mul(const float* gate_up, int64_t m, int64_t n, int64_t activation, float* y) {
    return locked([=] { current->activation_mul(gate_up, m, n, Activation(activation), y); });
}

// x = cap * tanh(x / cap).
EXPORT int squawq_soft_cap(float* x, int64_t n, float cap) {
    return locked([=] { current->soft_cap(x, n, cap); });
}

// cos and sin [m][columns] of position * frequency, times a magnitude, frequencies and magnitudes [2][columns]; the angle is
// rounded to float32, as transformers does.
EXPORT int squawq_rotary(const int64_t* positions, int64_t m, const float* frequencies, int64_t columns, float* cos, float* sin) {
    for (int64_t i = 0; i < m; ++i) {
        for (int64_t d = 0; d < columns; ++d) {
            const float angle = float(positions[i]) * frequencies[d], magnitude = frequencies[columns + d];
            cos[i * columns + d] = float(std::cos(double(angle))) * magnitude;
            sin[i * columns + d] = float(std::sin(double(angle))) * magnitude;
        }
    }
    return 0;
}

EXPORT int squawq_rotate_and_store(float* qkv, int64_t m, int64_t query_heads, int64_t kv_heads, int64_t dim, const float* cos,
                                   const float* sin, int64_t columns, const Rotation* rotation, float eps,
                                   const int64_t* slots, uint16_t* keys, uint16_t* values) {
    return locked([=] {
        const Heads heads{query_heads, kv_heads, dim};
        current->rotate_and_store(qkv, m, heads, {cos, sin, columns}, *rotation, eps, slots, keys, values);
    });
}

EXPORT int squawq_attention(const float* qkv, int64_t query_heads, int64_t kv_heads, int64_t dim, const int64_t* sequences,
                            int64_t count, const int32_t* pages, const Scoring* scoring, const uint16_t* keys,
                            const uint16_t* values, float* y) {
    return locked([=] {
        const Sequence* list = sequence_list(sequences, count, pages);
        current->attention(qkv, {query_heads, kv_heads, dim}, list, count, *scoring, keys, values, y);
    });
}

EXPORT int squawq_layers(const Operation* list, int64_t number, float* hidden, int64_t rows, const int64_t* widths,
                         int64_t query_heads, int64_t kv_heads, int64_t dim, int64_t columns, float eps, const float* cos,
                         const float* sin, const int64_t* slots, const int64_t* sequences, int64_t count, const int32_t* pages) {
    return locked([=] {
        const Sequence* sequence = sequence_list(sequences, count, pages);
        const Heads heads{query_heads, kv_heads, dim};
        const Step step{rows, widths, heads, eps, {cos, sin, columns}, slots, sequence, count};
        run_layers(*current, list, number, step, hidden);
    });
}

EXPORT int64_t squawq_group_bytes(int64_t size, int64_t capacity) { return group_bytes(size, capacity); }

// -2, here and in squawq_layers: another process has ended.
EXPORT int squawq_all_reduce(Group* group, float* x, int64_t n) {
    return locked([=] { all_reduce(*group, x, n); });
}

EXPORT int squawq_gather(Group* group, const float* x, int64_t rows, const int64_t* widths, float* y) {
    return locked([=] { gather(*group, x, rows, widths, y); });
}

// Without the lock, which a thread that waits for the others holds.
EXPORT int squawq_end_group(const Group* group) {
    end_group(*group);
    return 0;
}

EXPORT int squawq_round_columns(const float* wanted, const float* base, const float* feedback, const float* scales,
                                const float* zeros, const int64_t* groups, int64_t columns, int64_t out, float highest,
                                float* levels, float* errors) {
    const Columns block{wanted, base, feedback, scales, zeros, groups, columns, out, highest};
    return locked([=] { current->round_columns(block, levels, errors); });
}
