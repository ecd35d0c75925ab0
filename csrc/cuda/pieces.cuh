// Runs of a row in pieces of 16 bytes: vector loads and stores where the row allows them, element by element elsewhere.
#pragma once

#include "warp.cuh"

namespace qrosa {

// Up to 16 bytes of values as floats.
template <typename T>
struct Piece {
  static constexpr int kCount = kPieceBytes / sizeof(T);
  float at[kCount];
};

// Elements [begin, begin + kCount) of a run of `count`, zeros beyond it. `vector`: the run is 16-byte aligned and holds
// whole pieces.
template <typename T, typename Index>
__device__ __forceinline__ Piece<T> load_piece(const T* run, Index begin, Index count, bool vector) {
  constexpr int kCount = Piece<T>::kCount;
  __align__(16) T values[kCount];
  Piece<T> piece;
  if (vector) {
    *reinterpret_cast<uint4*>(values) = *reinterpret_cast<const uint4*>(run + begin);
#pragma unroll
    for (int i = 0; i < kCount; ++i) piece.at[i] = to_float(values[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) piece.at[i] = begin + i < count ? to_float(run[begin + i]) : 0.0f;
  }
  return piece;
}

template <typename T, typename Index>
__device__ __forceinline__ void store_piece(T* run, Index begin, Index count, bool vector, const Piece<T>& piece) {
  constexpr int kCount = Piece<T>::kCount;
  if (vector) {
    __align__(16) T values[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = from_float<T>(piece.at[i]);
    *reinterpret_cast<uint4*>(run + begin) = *reinterpret_cast<uint4*>(values);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (begin + i < count) run[begin + i] = from_float<T>(piece.at[i]);
    }
  }
}

}  // namespace qrosa
