// The gate of a feed-forward block, act(gate) up, and its gradient: memory only. A row of blocks for a row of the
// matrices where those are views into a wider one; dense matrices are one row.
#pragma once

#include "../norm.h"
#include "pieces.cuh"

namespace qrosa {

constexpr int kGateThreads = 256;

struct Activation {
  float share;  // sigmoid(s)
  float slope;  // of the activation g sigmoid(s)
};

__device__ __forceinline__ Activation activation(float g, bool gelu) {
  const float cube = kGeluCube * g * g;
  const float s = gelu ? kGeluScale * (g + cube * g) : g;
  const float other = expf(fminf(-s, 88.0f)), share = 1.0f / (1.0f + other);  // finite, so that its product is 1
  const float rise = gelu ? kGeluScale * (1.0f + 3.0f * cube) : 1.0f;
  return {share, share + g * rise * (share * (other * share))};
}

// `vector`: every row of every matrix is aligned to 16 bytes and holds whole pieces.
template <typename T>
__global__ void __launch_bounds__(kGateThreads) gate_kernel(GateWork work, bool vector) {
  constexpr int kCount = Piece<T>::kCount;
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) * kGateThreads + threadIdx.x) * kCount;
  const int64_t row = block_row();
  if (begin >= work.columns || row >= work.rows) return;
  const T* gate = static_cast<const T*>(work.gate) + row * work.gate_stride;
  const T* up = static_cast<const T*>(work.up) + row * work.up_stride;
  Piece<T> piece = load_piece(gate, begin, work.columns, vector);
  const Piece<T> factor = load_piece(up, begin, work.columns, vector);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float active = piece.at[i] * activation(piece.at[i], work.gelu).share;
    piece.at[i] = to_float(from_float<T>(active)) * factor.at[i];
  }
  store_piece(static_cast<T*>(work.out) + row * work.columns, begin, work.columns, vector, piece);
}

template <typename T>
__global__ void __launch_bounds__(kGateThreads) gate_backward_kernel(GateWork work, bool vector) {
  constexpr int kCount = Piece<T>::kCount;
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) * kGateThreads + threadIdx.x) * kCount;
  const int64_t row = block_row();
  if (begin >= work.columns || row >= work.rows) return;
  const T* gate = static_cast<const T*>(work.gate) + row * work.gate_stride;
  const T* up = static_cast<const T*>(work.up) + row * work.up_stride;
  Piece<T> dgate = load_piece(gate, begin, work.columns, vector);
  Piece<T> dup = load_piece(up, begin, work.columns, vector);
  const Piece<T> dy = load_piece(static_cast<const T*>(work.dy) + row * work.columns, begin, work.columns, vector);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float g = dgate.at[i], factor = dup.at[i];
    const Activation active = activation(g, work.gelu);
    dgate.at[i] = dy.at[i] * factor * active.slope;
    dup.at[i] = dy.at[i] * (g * active.share);
  }
  store_piece(static_cast<T*>(work.out) + row * work.columns, begin, work.columns, vector, dgate);
  store_piece(static_cast<T*>(work.dup) + row * work.columns, begin, work.columns, vector, dup);
}

}  // namespace qrosa
