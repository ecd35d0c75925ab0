// Tiles of dY^T X on tensor cores, and in fp32 on the ordinary units; what becomes of a tile is its caller's matter.
//
// dY [T, N] and X [T, K] are row-major with tokens outermost, so both operands lie "transposed" in memory. They are
// staged as they are, 32 tokens at a time through three buffers, and ldmatrix transposes on the way to the tensor
// cores: no transposed or widened copy exists anywhere. One thread owns each sum and adds tokens in order:
// deterministic.
#pragma once

#include "../rows.h"
#include "warp.cuh"

namespace qrosa {

struct Operands {
  const void *dy, *x;  // [tokens, rows], [tokens, columns]
  int64_t tokens, rows, columns;
  bool vector;  // both 16-byte aligned in every row
};

// 16 bytes (8 values) of one token into shared memory, zeros outside the matrix.
__device__ __forceinline__ void stage_piece(unsigned char* to, const uint16_t* from, int64_t tokens, int64_t width,
                                            int64_t token, int64_t column, bool vector) {
  const bool present = token < tokens && column < width;
  if (vector) {
    copy_async(to, present ? from + token * width + column : from, present);
    return;
  }
#pragma unroll 1
  for (int i = 0; i < 8; ++i) {
    const bool inside = present && column + i < width;
    reinterpret_cast<uint16_t*>(to)[i] = inside ? from[token * width + column + i] : uint16_t{0};
  }
}

// One stage: 32 tokens by 128 rows of dY^T, then 32 tokens by 128 columns of X.
__device__ __forceinline__ void load_stage(unsigned char* stage, const Operands& in, int64_t token, int64_t row,
                                           int64_t column) {
#pragma unroll
  for (int i = 0; i < kStageTokens * kTilePieces / kTileThreads; ++i) {
    const int place = i * kTileThreads + threadIdx.x;
    const int t = place / kTilePieces, piece = place % kTilePieces;
    const int offset = stage_offset(t, piece);
    stage_piece(stage + offset, static_cast<const uint16_t*>(in.dy), in.tokens, in.rows, token + t, row + piece * 8,
                in.vector);
    stage_piece(stage + kStageBytes + offset, static_cast<const uint16_t*>(in.x), in.tokens, in.columns, token + t,
                column + piece * 8, in.vector);
  }
}

// A warp's accumulators: 4 x 4 products of [16, 8].
struct WarpSums {
  float values[4][4][4];
};

// Adds 16 tokens of a stage, starting at `token`, to a warp's sums; (row, column) is the warp's corner in the tile.
template <typename T>
__device__ __forceinline__ void add_tokens(WarpSums& sums, const unsigned char* stage, int token, int row, int column,
                                           int lane) {
  uint32_t a[4][4], b[2][4];
  const MatrixRow from_a = operand_a_row(lane), from_b = operand_b_row(lane);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    load_matrices_transposed(a[i], stage + stage_offset(token + from_a.token, (row + 16 * i + from_a.column) / 8));
  }
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int piece = (column + 16 * j + from_b.column) / 8;
    load_matrices_transposed(b[j], stage + kStageBytes + stage_offset(token + from_b.token, piece));
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
      multiply_add<T>(sums.values[i][j], a[i], b[j / 2][2 * (j % 2)], b[j / 2][2 * (j % 2) + 1]);
  }
}

// The whole tile at (row, column), 256 threads. `stages` holds kStages * 2 * kStageBytes. At the end all copies have
// landed (the groups committed last are empty), but other warps may still read their last stage.
template <typename T>
__device__ __forceinline__ void tile_product(WarpSums& sums, unsigned char* stages, const Operands& in, int64_t row,
                                             int64_t column) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int warp_row = warp / 4 * kWarpRows, warp_column = warp % 4 * kWarpColumns;
  const auto count = static_cast<int>(ceil_div(in.tokens, kStageTokens));
  for (int i = 0; i < kStages - 1; ++i) {
    if (i < count) load_stage(stages + i * 2 * kStageBytes, in, static_cast<int64_t>(i) * kStageTokens, row, column);
    commit_copies();
  }
  for (int i = 0; i < count; ++i) {
    wait_copies<kStages - 2>();
    sync_block();  // stage i has arrived for all, and all are done with the buffer that is filled next
    const int next = i + kStages - 1;
    if (next < count) {
      load_stage(stages + next % kStages * 2 * kStageBytes, in, static_cast<int64_t>(next) * kStageTokens, row, column);
    }
    commit_copies();
    const unsigned char* stage = stages + i % kStages * 2 * kStageBytes;
#pragma unroll
    for (int token = 0; token < kStageTokens; token += 16)
      add_tokens<T>(sums, stage, token, warp_row, warp_column, lane);
  }
}

// ---- fp32 -----------------------------------------------------------------------------------------------------------

constexpr int kWideTile = 64, kWideTokens = 16;  // a tile of 64 x 64, 16 tokens a stage; 4 x 4 sums a thread
constexpr int kWidePitch = kWideTile + 4;

__device__ __forceinline__ void load_wide(float (*stage)[kWideTile], const float* from, int64_t tokens, int64_t width,
                                          int64_t token, int64_t column) {
#pragma unroll
  for (int i = 0; i < kWideTokens * kWideTile / kTileThreads; ++i) {
    const int place = i * kTileThreads + threadIdx.x;
    const int t = place / kWideTile, c = place % kWideTile;
    const bool inside = token + t < tokens && column + c < width;
    stage[t][c] = inside ? from[(token + t) * width + column + c] : 0.0f;
  }
}

// The 64 x 64 tile at (row, column); thread (i / 16, i % 16) gets rows 4 (i / 16) .. + 3 and columns 4 (i % 16) .. + 3.
__device__ __forceinline__ void wide_product(float (&sums)[4][4], float (*dy)[kWideTile], float (*x)[kWideTile],
                                             const Operands& in, int64_t row, int64_t column) {
  const int r = threadIdx.x / 16 * 4, c = threadIdx.x % 16 * 4;
  for (int64_t token = 0; token < in.tokens; token += kWideTokens) {
    load_wide(dy, static_cast<const float*>(in.dy), in.tokens, in.rows, token, row);
    load_wide(x, static_cast<const float*>(in.x), in.tokens, in.columns, token, column);
    sync_block();
#pragma unroll
    for (int t = 0; t < kWideTokens; ++t) {
      const float4 a = *reinterpret_cast<const float4*>(&dy[t][r]);
      const float4 b = *reinterpret_cast<const float4*>(&x[t][c]);
      const float left[4] = {a.x, a.y, a.z, a.w}, right[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][j] += left[i] * right[j];
      }
    }
    sync_block();
  }
}

}  // namespace qrosa
