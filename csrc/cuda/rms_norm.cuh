// RMSNorm and its gradient: a row a warp, or a row a block where rows are wide. The second pass over a row finds it in
// the cache, so that memory is read once.
#pragma once

#include "../norm.h"
#include "pieces.cuh"

namespace qrosa {

constexpr int kNormThreads = 256;
constexpr int kNormWarps = kNormThreads / kWarpSize;
constexpr int64_t kWarpRowBytes = 2048;  // up to so many bytes a row, a warp takes it

// The sum of `value` over the threads of a row, the same for all of them and in a fixed order; `sums` is shared memory
// for a number a warp.
template <int kRowThreads>
__device__ __forceinline__ float row_sum(float value, float* sums) {
  value = warp_sum(value);
  if constexpr (kRowThreads > kWarpSize) {
    if (threadIdx.x % kWarpSize == 0) sums[threadIdx.x / kWarpSize] = value;
    sync_block();
    value = 0.0f;
#pragma unroll
    for (int i = 0; i < kNormWarps; ++i) value += sums[i];
  }
  return value;
}

// `vector`: every row of x, dy and out, and the weight, is aligned to 16 bytes and holds whole pieces.
template <typename T, int kRowThreads>
__global__ void __launch_bounds__(kNormThreads) rms_norm_kernel(NormWork work, bool vector) {
  constexpr int kCount = Piece<T>::kCount, kStep = kRowThreads * kCount;
  __shared__ float sums[kNormWarps];
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kNormThreads / kRowThreads) + threadIdx.x / kRowThreads;
  if (row >= work.rows) return;
  const int width = static_cast<int>(work.width), first = static_cast<int>(threadIdx.x % kRowThreads) * kCount;
  const T* x = static_cast<const T*>(work.x) + row * work.width;
  const T* weight = static_cast<const T*>(work.weight);
  T* out = static_cast<T*>(work.out) + row * work.width;
  float squares = 0.0f;
  for (int begin = first; begin < width; begin += kStep) {
    const Piece<T> piece = load_piece(x, begin, width, vector);
#pragma unroll
    for (int i = 0; i < kCount; ++i) squares += piece.at[i] * piece.at[i];
  }
  const float mean = row_sum<kRowThreads>(squares, sums) / static_cast<float>(width);
  const float rstd = 1.0f / sqrtf(mean + work.eps);
  if (first == 0) work.rstd[row] = rstd;
  for (int begin = first; begin < width; begin += kStep) {
    Piece<T> piece = load_piece(x, begin, width, vector);
    const Piece<T> factor = load_piece(weight, begin, width, vector);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float scaled = rounded_product(piece.at[i], rstd);
      piece.at[i] = (work.rounds ? to_float(from_float<T>(scaled)) : scaled) * (work.offset + factor.at[i]);
    }
    store_piece(out, begin, width, vector, piece);
  }
}

// With g = (offset + weight) dy: dx = rstd (g - x rstd^2 mean(g x)).
template <typename T, int kRowThreads>
__global__ void __launch_bounds__(kNormThreads) rms_norm_backward_kernel(NormWork work, bool vector) {
  constexpr int kCount = Piece<T>::kCount, kStep = kRowThreads * kCount;
  __shared__ float sums[kNormWarps];
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kNormThreads / kRowThreads) + threadIdx.x / kRowThreads;
  if (row >= work.rows) return;
  const int width = static_cast<int>(work.width), first = static_cast<int>(threadIdx.x % kRowThreads) * kCount;
  const T* x = static_cast<const T*>(work.x) + row * work.width;
  const T* dy = static_cast<const T*>(work.dy) + row * work.width;
  const T* weight = static_cast<const T*>(work.weight);
  T* out = static_cast<T*>(work.out) + row * work.width;
  float products = 0.0f;
  for (int begin = first; begin < width; begin += kStep) {
    const Piece<T> piece = load_piece(x, begin, width, vector);
    const Piece<T> gradient = load_piece(dy, begin, width, vector);
    const Piece<T> factor = load_piece(weight, begin, width, vector);
#pragma unroll
    for (int i = 0; i < kCount; ++i) products += gradient.at[i] * (work.offset + factor.at[i]) * piece.at[i];
  }
  const float rstd = work.rstd[row];
  const float share = row_sum<kRowThreads>(products, sums) / static_cast<float>(width) * rstd * rstd;
  for (int begin = first; begin < width; begin += kStep) {
    Piece<T> piece = load_piece(x, begin, width, vector);
    const Piece<T> gradient = load_piece(dy, begin, width, vector);
    const Piece<T> factor = load_piece(weight, begin, width, vector);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      piece.at[i] = rstd * (gradient.at[i] * (work.offset + factor.at[i]) - piece.at[i] * share);
    }
    store_piece(out, begin, width, vector, piece);
  }
}

}  // namespace qrosa
