// The sparse gradient by dense tiles: a tile of dY^T X stays in shared memory and gives up the positions asked for.
//
// For deltas so dense, or batches so short, that a tile costs less than its positions one by one (csrc/sddmm_plan.h).
#pragma once

#include "tile_product.cuh"

namespace qrosa {

// Copies the wanted elements of a product in shared memory, [count, width] at (row, column), to out [nnz]; waits for
// the block before it reads them. `bounds` holds 2 * count entry indices.
__device__ __forceinline__ void gather_product(const float* product, int pitch, int* bounds, int count, int width,
                                               int64_t row, int64_t column0, const CsrView& csr, const Operands& in,
                                               float* out) {
  for (int i = threadIdx.x; i < 2 * count; i += kTileThreads) {
    const int64_t n = row + i / 2;
    bounds[i] = n < in.rows ? static_cast<int>(row_lower_bound(csr, n, column0 + (i & 1) * width)) : 0;
  }
  sync_block();
  for (int r = threadIdx.x / kWarpSize; r < count; r += kTileThreads / kWarpSize) {
    for (int index = bounds[2 * r] + threadIdx.x % kWarpSize; index < bounds[2 * r + 1]; index += kWarpSize) {
      const int64_t place = column(csr, index) - column0;
      if (place >= 0 && place < width) out[index] = product[r * pitch + place];
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kTileThreads, 2) sddmm_tile_kernel(Operands in, CsrView csr, float* out) {
  __shared__ __align__(16) unsigned char shared[kStages * 2 * kStageBytes];
  const int64_t row0 = block_row() * kTileRows;
  const int64_t column0 = static_cast<int64_t>(blockIdx.x) * kTileColumns;
  WarpSums sums{};
  tile_product<T>(sums, shared, in, row0, column0);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  auto* product = reinterpret_cast<float*>(shared);
  int* bounds = reinterpret_cast<int*>(shared + kWarpRows * kProductPitch * sizeof(float));
  static_assert(kWarpRows * kProductPitch * sizeof(float) + 2 * kWarpRows * sizeof(int) <= sizeof(shared));
  for (int half = 0; half < kTileRows / kWarpRows; ++half) {  // half a tile at a time fits where the stages were
    sync_block();  // all are done with the stages, and then with the half before
    if (warp / 4 == half) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
          for (int k = 0; k < 4; k += 2) {
            const int row = 16 * i + accumulator_row(lane, k);
            const int column = warp % 4 * kWarpColumns + 8 * j + accumulator_column(lane, k);
            *reinterpret_cast<float2*>(product + row * kProductPitch + column) = {sums.values[i][j][k],
                                                                                  sums.values[i][j][k + 1]};
          }
        }
      }
    }
    gather_product(product, kProductPitch, bounds, kWarpRows, kTileColumns, row0 + half * kWarpRows, column0, csr, in,
                   out);
  }
}

static __global__ void __launch_bounds__(kTileThreads, 2) sddmm_wide_kernel(Operands in, CsrView csr, float* out) {
  __shared__ __align__(16) float dy[kWideTokens][kWideTile];
  __shared__ __align__(16) float x[kWideTokens][kWideTile];
  __shared__ float product[kWideTile * kWidePitch];
  __shared__ int bounds[2 * kWideTile];
  const int64_t row0 = block_row() * kWideTile;
  const int64_t column0 = static_cast<int64_t>(blockIdx.x) * kWideTile;
  float sums[4][4] = {};
  wide_product(sums, dy, x, in, row0, column0);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      product[(threadIdx.x / 16 * 4 + i) * kWidePitch + threadIdx.x % 16 * 4 + j] = sums[i][j];
    }
  }
  gather_product(product, kWidePitch, bounds, kWideTile, kWideTile, row0, column0, csr, in, out);
}

}  // namespace qrosa
