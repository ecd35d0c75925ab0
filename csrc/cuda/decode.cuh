// From packed codes to values on a card, bit-equal to the CPU kernels.
#pragma once

#include "../rows.h"
#include "warp.cuh"

namespace qrosa {

static __constant__ float kNf4Table[16] = QROSA_NF4_TABLE;

// The code values in shared memory: 16 neighbouring words, so any mix of codes in a warp meets no bank twice.
__device__ __forceinline__ void load_table(float* table) {
  if (threadIdx.x < 16) table[threadIdx.x] = kNf4Table[threadIdx.x];
}

__device__ __forceinline__ float nf4_element(const Nf4View& nf4, const float* table, int64_t element) {
  return rounded_product(table[nibble(nf4.codes, element)], block_absmax(nf4, element >> nf4.block_shift));
}

}  // namespace qrosa
