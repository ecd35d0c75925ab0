// The mask statistic: stat [N, K] += dY^T X, squared or not, a tile at a time; each element has one owner.
//
// Roofline: 2 T operations against 8 bytes of statistic an element; bound by the tensor cores from some 100 tokens on.
#pragma once

#include "tile_product.cuh"

namespace qrosa {

struct Statistic {
  float* values;  // [rows, columns]
  bool square;
  bool pairs;  // two neighbours at an even column can be read and written as one 8-byte word
};

__device__ __forceinline__ float added(float old, float product, bool square) {
  return old + (square ? product * product : product);
}

// Adds two neighbouring products at (row, column), column even.
__device__ __forceinline__ void add_pair(const Statistic& stat, const Operands& in, int64_t row, int64_t column,
                                         float first, float second) {
  if (row >= in.rows || column >= in.columns) return;
  float* target = stat.values + row * in.columns + column;
  if (stat.pairs) {
    float2 old = *reinterpret_cast<float2*>(target);
    old.x = added(old.x, first, stat.square);
    old.y = added(old.y, second, stat.square);
    *reinterpret_cast<float2*>(target) = old;
    return;
  }
  target[0] = added(target[0], first, stat.square);
  if (column + 1 < in.columns) target[1] = added(target[1], second, stat.square);
}

template <typename T>
__global__ void __launch_bounds__(kTileThreads, 2) score_kernel(Operands in, Statistic stat) {
  __shared__ __align__(16) unsigned char stages[kStages * 2 * kStageBytes];
  const int64_t row0 = block_row() * kTileRows;
  const int64_t column0 = static_cast<int64_t>(blockIdx.x) * kTileColumns;
  WarpSums sums{};
  tile_product<T>(sums, stages, in, row0, column0);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t row = row0 + warp / 4 * kWarpRows + 16 * i + accumulator_row(lane, 0);
      const int64_t column = column0 + warp % 4 * kWarpColumns + 8 * j + accumulator_column(lane, 0);
      add_pair(stat, in, row, column, sums.values[i][j][0], sums.values[i][j][1]);
      add_pair(stat, in, row + 8, column, sums.values[i][j][2], sums.values[i][j][3]);
    }
  }
}

static __global__ void __launch_bounds__(kTileThreads, 2) score_wide_kernel(Operands in, Statistic stat) {
  __shared__ __align__(16) float dy[kWideTokens][kWideTile];
  __shared__ __align__(16) float x[kWideTokens][kWideTile];
  const int64_t row0 = block_row() * kWideTile;
  const int64_t column0 = static_cast<int64_t>(blockIdx.x) * kWideTile;
  float sums[4][4] = {};
  wide_product(sums, dy, x, in, row0, column0);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t row = row0 + threadIdx.x / 16 * 4 + i, column = column0 + threadIdx.x % 16 * 4;
    add_pair(stat, in, row, column, sums[i][0], sums[i][1]);
    add_pair(stat, in, row, column + 2, sums[i][2], sums[i][3]);
  }
}

}  // namespace qrosa
