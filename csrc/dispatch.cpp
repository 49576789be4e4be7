// The C ABI: chooses the instruction set, holds the lock, passes on. Pointers and sizes are the caller's care
// (src/squawq/backends/cpu/ checks them); every function returns 0, or a negative number for what it could not do.
#include <pthread.h>

#include <cmath>
#include <cstring>
#include <mutex>
#include <new>

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
    decltype(&scalar::rms_norm) rms_norm;
    decltype(&scalar::silu_mul) silu_mul;
    decltype(&scalar::rotate_and_store) rotate_and_store;
    decltype(&scalar::attention) attention;
    decltype(&scalar::round_columns) round_columns;
};

#define TABLE(ISA)                                                                                              \
    {#ISA, ISA::int4_matmul, ISA::int4_matmul_exact, ISA::int8_matmul, ISA::dense_matmul, ISA::rms_norm,         \
     ISA::silu_mul, ISA::rotate_and_store, ISA::attention, ISA::round_columns}

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

// hidden [rows][hidden] goes through the layers in place; the same operations as Layer and Decoder in nn/decoder.py.
void run_layers(const Ops& ops, const Layer* layers, int64_t number, const Step& step, float* hidden) {
    const Heads heads = step.heads;
    const int64_t rows = step.rows, qkv = (heads.query + 2 * heads.kv) * heads.dim, attended = heads.query * heads.dim;
    const int64_t wide_floats = rows * (qkv > 2 * step.inner ? qkv : 2 * step.inner);
    const int64_t narrow_floats = rows * (attended > step.inner ? attended : step.inner);
    float* x = static_cast<float*>(scratch(3, sizeof(float) * size_t(2 * rows * step.hidden + wide_floats + narrow_floats)));
    float* delta = x + rows * step.hidden;
    float* wide = delta + rows * step.hidden;  // queries, keys and values, and when they are done with gate and up
    float* narrow = wide + wide_floats;        // attention's output or the MLP's inner part
    const float* pending = nullptr;
    for (const Layer* layer = layers; layer != layers + number; ++layer) {
        ops.rms_norm(hidden, pending, layer->input_norm, step.eps, rows, step.hidden, x);
        matmul(ops, x, rows, layer->qkv, wide);
        ops.rotate_and_store(wide, rows, heads, step.cos, step.sin, layer->q_norm, layer->k_norm, step.eps, step.slots,
                             layer->keys, layer->values);
        ops.attention(wide, heads, step.sequences, step.count, layer->window, layer->keys, layer->values, narrow);
        matmul(ops, narrow, rows, layer->out, delta);
        ops.rms_norm(hidden, delta, layer->post_norm, step.eps, rows, step.hidden, x);
        matmul(ops, x, rows, layer->gate_up, wide);
        ops.silu_mul(wide, rows, step.inner, narrow);
        matmul(ops, narrow, rows, layer->down, delta);
        pending = delta;
    }
    if (pending != nullptr)
        for (int64_t i = 0; i < rows * step.hidden; ++i) hidden[i] += pending[i];
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
    }
}

}  // namespace
}  // namespace squawq

using namespace squawq;

EXPORT int squawq_abi() { return 4; }
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

EXPORT int squawq_int4_matmul(const float* x, int64_t m, const Int4* w, int exact, float* y) {
    return locked([=] { (exact ? current->int4_matmul_exact : current->int4_matmul)(x, m, *w, y); });
}

EXPORT int squawq_int8_matmul(const float* x, int64_t m, const Int8* w, float* y) {
    return locked([=] { current->int8_matmul(x, m, *w, y); });
}

EXPORT int squawq_dense_matmul(const float* x, int64_t m, const DenseWeight* w, float* y) {
    return locked([=] { current->dense_matmul(x, m, *w, y); });
}

EXPORT int squawq_rms_norm(float* x, const float* delta, const float* weight, float eps, int64_t m, int64_t n, float* y) {
    return locked([=] { current->rms_norm(x, delta, weight, eps, m, n, y); });
}

EXPORT int squawq_silu_mul(const float* gate_up, int64_t m, int64_t n, float* y) {
    return locked([=] { current->silu_mul(gate_up, m, n, y); });
}

// cos and sin [m][half] of position * frequency; the angle is rounded to float32, as transformers does.
EXPORT int squawq_rotary(const int64_t* positions, int64_t m, const float* frequencies, int64_t half, float* cos, float* sin) {
    for (int64_t i = 0; i < m; ++i) {
        for (int64_t d = 0; d < half; ++d) {
            const float angle = float(positions[i]) * frequencies[d];
            cos[i * half + d] = float(std::cos(double(angle)));
            sin[i * half + d] = float(std::sin(double(angle)));
        }
    }
    return 0;
}

EXPORT int squawq_rotate_and_store(float* qkv, int64_t m, int64_t query_heads, int64_t kv_heads, int64_t dim, const float* cos,
                                   const float* sin, const float* q_norm, const float* k_norm, float eps,
                                   const int64_t* slots, uint16_t* keys, uint16_t* values) {
    return locked([=] {
        current->rotate_and_store(qkv, m, {query_heads, kv_heads, dim}, cos, sin, q_norm, k_norm, eps, slots, keys, values);
    });
}

EXPORT int squawq_attention(const float* qkv, int64_t query_heads, int64_t kv_heads, int64_t dim, const int64_t* sequences,
                            int64_t count, const int32_t* pages, int64_t window, const uint16_t* keys,
                            const uint16_t* values, float* y) {
    return locked([=] {
        const Sequence* list = sequence_list(sequences, count, pages);
        current->attention(qkv, {query_heads, kv_heads, dim}, list, count, window, keys, values, y);
    });
}

EXPORT int squawq_layers(const Layer* layers, int64_t number, float* hidden, int64_t rows, int64_t hidden_size, int64_t inner,
                         int64_t query_heads, int64_t kv_heads, int64_t dim, float eps, const float* cos, const float* sin,
                         const int64_t* slots, const int64_t* sequences, int64_t count, const int32_t* pages) {
    return locked([=] {
        const Sequence* list = sequence_list(sequences, count, pages);
        const Step step{rows, hidden_size, inner, {query_heads, kv_heads, dim}, eps, cos, sin, slots, list, count};
        run_layers(*current, layers, number, step, hidden);
    });
}

EXPORT int squawq_round_columns(const float* wanted, const float* base, const float* feedback, const float* scales,
                                const float* zeros, const int64_t* groups, int64_t columns, int64_t out, float highest,
                                float* levels, float* errors) {
    const Columns block{wanted, base, feedback, scales, zeros, groups, columns, out, highest};
    return locked([=] { current->round_columns(block, levels, errors); });
}
