// Packs checkpoint tensors into the kernels' layouts (ops.h). Plain C++, because loading is bound by reading the file.
#pragma once
#include <cstdint>

#include "ops.h"

namespace squawq {

// One AWQ GEMM linear (qweight int32 [in][out/8], qzeros int32 [groups][out/8] or null for zeros of 8, scales float16
// [groups][out]) into rows first_row ... of a packed weight; first_row and out are multiples of 8. `repeat` splits
// every group into that many kernel groups.
void pack_gemm(const int32_t* qweight, const int32_t* qzeros, const uint16_t* scales, int64_t out, int64_t in,
               int64_t groups, int64_t repeat, int64_t first_row, uint8_t* weight, uint16_t* packed_scales, uint8_t* zeros);

// Rows [out][in] of 2 or 4 bytes each into rows first_row ... of a packed dense weight.
void pack_dense(const void* source, int64_t out, int64_t in, int64_t first_row, int64_t item, void* target);

// Rows [out][in] to int8 with one scale a row (largest magnitude / 127, nearest even).
void pack_int8(const void* source, Dense type, int64_t out, int64_t in, int8_t* target, float* scales);

}  // namespace squawq
