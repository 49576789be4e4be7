// The thread pool, and scratch memory that is kept between calls. Callers hold the library's lock (dispatch.cpp), so one
// operation runs at a time.
#pragma once
#include <cstddef>
#include <cstdint>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace squawq {

// Tells the processor that this thread spins.
inline void relax() {
#if defined(__x86_64__) || defined(_M_X64)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

using Unit = void (*)(void* context, int64_t index);

// Runs unit(context, i) for i in [0, units), each once, on the caller and the workers; returns when all are done.
void parallel(int64_t units, Unit unit, void* context);

template <class Function>
void parallel_for(int64_t units, Function function) {
    parallel(units, [](void* context, int64_t index) { (*static_cast<Function*>(context))(index); }, &function);
}

void set_threads(int threads);
// Runs units on so many threads of the OpenMP library that the process has loaded, until set_threads; false without one.
bool use_openmp(int threads);
int threads();

// Grow-only, aligned to 64 bytes; the contents are undefined. Throws std::bad_alloc.
constexpr int SLOTS = 5;
void* scratch(int slot, size_t bytes);

}  // namespace squawq
