// The NF4 layout, shared by the CPU and CUDA kernels: 16 code values, packed nibbles, plain or nested absmax.
//
// Element 2i of the flat [N * K] array is the high nibble of byte i. Blocks of 2^block_shift elements run over the flat
// array and may cross rows. A nested absmax is decoded as code[q] * scale[b / 256] + offset with two roundings, as
// bitsandbytes does it: build with -ffp-contract=off (CPU) or the _rn intrinsics (CUDA).
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define QROSA_HD __host__ __device__ __forceinline__
#else
#define QROSA_HD static inline
#endif

namespace qrosa {

// QLoRA (arXiv 2305.14314), appendix E. qrosa/ops/operands.py holds the same values; a test compares the two.
#define QROSA_NF4_TABLE   \
  {-1.0f,                 \
   -0.6961928009986877f,  \
   -0.5250730514526367f,  \
   -0.39491748809814453f, \
   -0.28444138169288635f, \
   -0.18477343022823334f, \
   -0.09105003625154495f, \
   0.0f,                  \
   0.07958029955625534f,  \
   0.16093020141124725f,  \
   0.24611230194568634f,  \
   0.33791524171829224f,  \
   0.44070982933044434f,  \
   0.5626170039176941f,   \
   0.7229568362236023f,   \
   1.0f}

constexpr int kNestedShift = 8;  // blocks that share one absmax_scale: 256

struct Nf4View {
  const uint8_t* codes;        // [ceil(N * K / 2)]
  const float* absmax;         // [blocks], null when nested
  const uint8_t* absmax_q;     // [blocks], null when plain
  const float* absmax_code;    // [256], null when plain
  const float* absmax_scale;   // [ceil(blocks / 256)], null when plain
  const float* absmax_offset;  // [1], null when plain; stays on the device, so that no launch waits for it
  int block_shift;             // log2 of the block size
};

// The absmax of one block, bit-equal to bitsandbytes.
QROSA_HD float block_absmax(const Nf4View& nf4, int64_t block) {
  if (nf4.absmax != nullptr) return nf4.absmax[block];
  const float code = nf4.absmax_code[nf4.absmax_q[block]];
  const float scale = nf4.absmax_scale[block >> kNestedShift];
#if defined(__CUDA_ARCH__)
  return __fadd_rn(__fmul_rn(code, scale), *nf4.absmax_offset);
#else
  const float product = code * scale;
  return product + *nf4.absmax_offset;
#endif
}

// The 4-bit code of one element of the flat array.
QROSA_HD int nibble(const uint8_t* codes, int64_t element) {
  const int byte = codes[element >> 1];
  return (element & 1) != 0 ? byte & 15 : byte >> 4;
}

}  // namespace qrosa
