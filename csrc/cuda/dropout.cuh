// Dropout by a hash of each element's index (csrc/dropout.h): no generator state, the same mask as on the CPU.
#pragma once

#include "../dropout.h"
#include "warp.cuh"

namespace qrosa {

constexpr int kDropoutThreads = 256;

// `vector`: both pointers are 16-byte aligned.
template <typename T>
__global__ void __launch_bounds__(kDropoutThreads)
    dropout_kernel(const T* x, T* out, int64_t count, DropoutKeys keys, uint32_t threshold, float scale, bool vector) {
  constexpr int kPerPiece = kPieceBytes / sizeof(T);
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) * kDropoutThreads + threadIdx.x) * kPerPiece;
  if (begin >= count) return;
  const bool whole = vector && begin + kPerPiece <= count;
  const int length = count - begin < kPerPiece ? static_cast<int>(count - begin) : kPerPiece;
  __align__(16) T values[kPerPiece];
  if (whole) {
    *reinterpret_cast<uint4*>(values) = *reinterpret_cast<const uint4*>(x + begin);
  } else {
#pragma unroll
    for (int i = 0; i < kPerPiece; ++i) {
      if (i < length) values[i] = x[begin + i];
    }
  }
#pragma unroll
  for (int i = 0; i < kPerPiece; ++i) {
    const bool keep = dropout_hash(static_cast<uint32_t>(begin + i), keys) >= threshold;
    values[i] = from_float<T>(keep ? rounded_product(to_float(values[i]), scale) : 0.0f);
  }
  if (whole) {
    *reinterpret_cast<uint4*>(out + begin) = *reinterpret_cast<uint4*>(values);
  } else {
#pragma unroll
    for (int i = 0; i < kPerPiece; ++i) {
      if (i < length) out[begin + i] = values[i];
    }
  }
}

}  // namespace qrosa
