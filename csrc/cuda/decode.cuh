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

// A block's absmax on its way: asked for in one go, put together when it is needed.
struct AskedAbsmax {
  uint32_t q;   // of a nested absmax
  float scale;  // of it, or the plain absmax
};

__device__ __forceinline__ AskedAbsmax ask_absmax(const Nf4View& nf4, int64_t block) {
  if (nf4.absmax != nullptr) return {0, load_now(nf4.absmax + block)};
  return {load_now(nf4.absmax_q + block), load_now(nf4.absmax_scale + (block >> kNestedShift))};
}

// As block_absmax (nf4.h), to the bit.
__device__ __forceinline__ float absmax_of(const Nf4View& nf4, const AskedAbsmax& asked) {
  if (nf4.absmax != nullptr) return asked.scale;
  return rounded_sum(rounded_product(nf4.absmax_code[asked.q], asked.scale), *nf4.absmax_offset);
}

}  // namespace qrosa
