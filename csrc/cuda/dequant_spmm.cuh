// y = x (deq(Wq) + S)^T for few rows of x: every 4-bit weight is read once and never leaves the registers.
//
// Roofline: half a byte a weight from DRAM; x and y are small. Two kernels read codes in pieces of 16 bytes:
// up to four tokens multiply on the ordinary units, a warp two rows of the base, x in shared memory; from five on, the
// multiplications themselves would be the bound, so the tensor cores take 16 rows by 16 tokens a block, its eight warps
// splitting the columns. There each weight goes in as a sum of two 16-bit floats, which keeps some 16 bits of it: the
// weight is not rounded to x's type. A third kernel takes every other shape, one element at a time.
#pragma once

#include "decode.cuh"

namespace qrosa {

struct Decode {
  Nf4View nf4;
  CsrView csr;
  const void* x;  // [tokens, columns]
  void* y;        // [tokens, rows]
  int64_t tokens, rows, columns;
};

constexpr int kSpmmThreads = 256, kSpmmWarps = kSpmmThreads / kWarpSize;
constexpr int kSpmmRows = 2;   // of the base, a warp
constexpr int kAnyTokens = 4;  // of a block that takes any shape

// Columns of x kept in shared memory at a time, for each token; a step of a warp is 1024 columns.
template <typename X>
QROSA_HD constexpr int spmm_columns() {
  return sizeof(X) == 4 ? 1024 : 2048;
}

// The sparse part of one row for `kTokens` tokens, a lane's share of the row's entries: sums[t] += S[row, :] x[t, :].
template <typename X, int kTokens>
__device__ __forceinline__ void add_sparse_row(float (&sums)[kTokens], const Decode& in, int64_t row, int64_t token,
                                               int lane) {
  if (in.csr.row_ptr == nullptr || row >= in.rows || !row_in_bounds(in.csr, row)) return;
  const X* x = static_cast<const X*>(in.x) + token * in.columns;
  for (int64_t index = in.csr.row_ptr[row] + lane; index < in.csr.row_ptr[row + 1]; index += kWarpSize) {
    const int64_t col = column(in.csr, index);
    if (!column_in_bounds(col, in.columns)) continue;
    const float value = in.csr.values[index];
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      if (token + t < in.tokens) sums[t] += value * to_float(x[t * in.columns + col]);
    }
  }
}

// Sums over the warp; lane t writes token t.
template <typename X, int kTokens>
__device__ __forceinline__ void write_row(const float (&sums)[kTokens], const Decode& in, int64_t row, int64_t token,
                                          int lane) {
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    const float sum = warp_sum(sums[t]);
    if (lane == t && row < in.rows && token + t < in.tokens) {
      static_cast<X*>(in.y)[(token + t) * in.rows + row] = from_float<X>(sum);
    }
  }
}

// ---- any shape ------------------------------------------------------------------------------------------------------

template <typename X>
__global__ void __launch_bounds__(kSpmmThreads) spmm_any_kernel(Decode in) {
  constexpr int kTokens = kAnyTokens;
  __shared__ float table[16];
  load_table(table);
  sync_block();
  const int lane = threadIdx.x % kWarpSize;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kSpmmWarps + threadIdx.x / kWarpSize;
  const int64_t token = block_row() * kTokens;
  if (row >= in.rows) return;
  const X* x = static_cast<const X*>(in.x) + token * in.columns;
  float sums[kTokens] = {};
  for (int64_t k = lane; k < in.columns; k += kWarpSize) {
    const float weight = nf4_element(in.nf4, table, row * in.columns + k);
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      if (token + t < in.tokens) sums[t] += weight * to_float(x[t * in.columns + k]);
    }
  }
  add_sparse_row<X, kTokens>(sums, in, row, token, lane);
  write_row<X, kTokens>(sums, in, row, token, lane);
}

// ---- one to four tokens: columns a multiple of 32, codes and x 16-byte aligned, blocks of 32 or more ----------------

// Eight values of x out of shared memory.
template <typename X>
__device__ __forceinline__ void unpack_eight(float (&values)[8], const unsigned char* shared, int element) {
  if constexpr (sizeof(X) == 4) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int piece = swizzle_piece(element / 4 + half);
      const float4 four = *reinterpret_cast<const float4*>(shared + piece * kPieceBytes);
      values[4 * half] = four.x, values[4 * half + 1] = four.y, values[4 * half + 2] = four.z,
                 values[4 * half + 3] = four.w;
    }
  } else {
    const uint4 eight = *reinterpret_cast<const uint4*>(shared + swizzle_piece(element / 8) * kPieceBytes);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t word = piece_word(eight, i / 2);
      values[i] = to_float(X{static_cast<uint16_t>(i % 2 == 0 ? word & 0xFFFFu : word >> 16)});
    }
  }
}

// Stages columns [column0, column0 + spmm_columns) of each token, zeros outside the matrix.
template <typename X, int kTokens>
__device__ __forceinline__ void stage_x(unsigned char (*shared)[spmm_columns<X>() * sizeof(X)], const Decode& in,
                                        int64_t token, int64_t column0) {
  constexpr int kPieces = spmm_columns<X>() * sizeof(X) / kPieceBytes, kPerPiece = kPieceBytes / sizeof(X);
  for (int i = threadIdx.x; i < kTokens * kPieces; i += kSpmmThreads) {
    const int t = i / kPieces, piece = i % kPieces;
    const int64_t k = column0 + piece * kPerPiece;
    uint4 values{};
    if (token + t < in.tokens && k < in.columns) {
      values = __ldg(reinterpret_cast<const uint4*>(static_cast<const X*>(in.x) + (token + t) * in.columns + k));
    }
    *reinterpret_cast<uint4*>(shared[t] + swizzle_piece(piece) * kPieceBytes) = values;
  }
}

// A lane's 32 columns: part[r][t] = the run of row r's code values times x[t].
template <typename X, int kTokens>
__device__ __forceinline__ void multiply_run(float (&part)[kSpmmRows][kTokens],
                                             const unsigned char (*shared)[spmm_columns<X>() * sizeof(X)], int element,
                                             const uint4 (&packed)[kSpmmRows], const float* table) {
#pragma unroll
  for (int word = 0; word < 4; ++word) {
    float weights[kSpmmRows][8];
#pragma unroll
    for (int r = 0; r < kSpmmRows; ++r) {
#pragma unroll
      for (int i = 0; i < 8; ++i) weights[r][i] = table[word_code(piece_word(packed[r], word), i)];
    }
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      float values[8];
      unpack_eight<X>(values, shared[t], element + word * 8);
#pragma unroll
      for (int r = 0; r < kSpmmRows; ++r) {
#pragma unroll
        for (int i = 0; i < 8; ++i) part[r][t] += weights[r][i] * values[i];
      }
    }
  }
}

template <typename X, int kTokens>
__global__ void __launch_bounds__(kSpmmThreads) spmm_rows_kernel(Decode in) {
  constexpr int kColumns = spmm_columns<X>();
  constexpr bool kAsks = kTokens <= 2;  // with four tokens the registers of what is on its way would spill
  __shared__ float table[16];
  __shared__ __align__(16) unsigned char shared[kTokens][kColumns * sizeof(X)];
  load_table(table);
  const int lane = threadIdx.x % kWarpSize;
  const int64_t row0 = (static_cast<int64_t>(blockIdx.x) * kSpmmWarps + threadIdx.x / kWarpSize) * kSpmmRows;
  const int64_t token = block_row() * kTokens;
  float sums[kSpmmRows][kTokens] = {};
  for (int64_t column0 = 0; column0 < in.columns; column0 += kColumns) {
    sync_block();
    stage_x<X, kTokens>(shared, in, token, column0);
    sync_block();
#pragma unroll
    for (int step = 0; step < kColumns; step += kSpan) {
      const int64_t k = column0 + step + lane * kLaneCodes;
      if (k >= in.columns) continue;
      uint4 packed[kSpmmRows] = {};
      AskedAbsmax asked[kSpmmRows] = {};
#pragma unroll
      for (int r = 0; r < kSpmmRows; ++r) {  // all loads leave before anything waits
        if (row0 + r >= in.rows) continue;
        const int64_t element = (row0 + r) * in.columns + k;
        const auto* codes = reinterpret_cast<const uint4*>(in.nf4.codes + element / 2);
        if constexpr (kAsks) {
          packed[r] = load_now(codes);
          asked[r] = ask_absmax(in.nf4, element >> in.nf4.block_shift);
        } else {
          packed[r] = __ldg(codes);
          asked[r].scale = block_absmax(in.nf4, element >> in.nf4.block_shift);
        }
      }
      float part[kSpmmRows][kTokens] = {};
      multiply_run<X, kTokens>(part, shared, step + lane * kLaneCodes, packed, table);
#pragma unroll
      for (int r = 0; r < kSpmmRows; ++r) {
        float absmax = asked[r].scale;
        if constexpr (kAsks) absmax = row0 + r < in.rows ? absmax_of(in.nf4, asked[r]) : 0.0f;
#pragma unroll
        for (int t = 0; t < kTokens; ++t) sums[r][t] += absmax * part[r][t];
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kSpmmRows; ++r) {
    add_sparse_row<X, kTokens>(sums[r], in, row0 + r, token, lane);
    write_row<X, kTokens>(sums[r], in, row0 + r, token, lane);
  }
}

// ---- five to sixteen tokens on tensor cores: the same conditions, x of 16 bits --------------------------------------

// A pair of weights as the sum of two pairs of 16-bit floats.
template <typename X>
__device__ __forceinline__ void split_pair(uint32_t& high, uint32_t& low, float first, float second) {
  high = pack_pair<X>(first, second);
  const float kept_first = to_float(X{static_cast<uint16_t>(high & 0xFFFFu)});
  const float kept_second = to_float(X{static_cast<uint16_t>(high >> 16)});
  low = pack_pair<X>(first - kept_first, second - kept_second);
}

// One row's run of 32 codes at column k, zeros outside the matrix.
struct Run {
  uint4 packed;
  float absmax;
};
__device__ __forceinline__ Run load_run(const Decode& in, int64_t row, int64_t k) {
  if (row >= in.rows || k >= in.columns) return {{}, 0.0f};
  const int64_t element = row * in.columns + k;
  return {__ldg(reinterpret_cast<const uint4*>(in.nf4.codes + element / 2)),
          block_absmax(in.nf4, element >> in.nf4.block_shift)};
}

// 32 columns of each lane (128 of the step): sums [16 rows, 8 tokens] of each token tile.
template <typename X, int kTokenTiles>
__device__ __forceinline__ void multiply_step(float (&sums)[kTokenTiles][4], const Decode& in, const Run& upper,
                                              const Run& lower, int64_t token, int64_t k, int lane,
                                              const float* table) {
  const auto* x = static_cast<const uint16_t*>(in.x);
#pragma unroll
  for (int word = 0; word < 4; ++word) {  // 8 codes of both rows, 8 columns of x: two products
    uint4 columns[kTokenTiles];
#pragma unroll
    for (int tile = 0; tile < kTokenTiles; ++tile) {
      const int64_t t = token + 8 * tile + (lane >> 2);
      const bool present = t < in.tokens && k < in.columns;
      columns[tile] = present ? __ldg(reinterpret_cast<const uint4*>(x + t * in.columns + k + 8 * word)) : uint4{};
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t high[4], low[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // operand A: rows 0-7 and 8-15 at two columns, then at the next two
        const Run& run = i % 2 == 0 ? upper : lower;
        const uint32_t codes = piece_word(run.packed, word);
        const int code = 4 * half + 2 * (i / 2);
        const float first = rounded_product(table[word_code(codes, code)], run.absmax);
        const float second = rounded_product(table[word_code(codes, code + 1)], run.absmax);
        split_pair<X>(high[i], low[i], first, second);
      }
#pragma unroll
      for (int tile = 0; tile < kTokenTiles; ++tile) {
        const uint32_t b0 = piece_word(columns[tile], 2 * half), b1 = piece_word(columns[tile], 2 * half + 1);
        multiply_add<X>(sums[tile], high, b0, b1);
        multiply_add<X>(sums[tile], low, b0, b1);
      }
    }
  }
}

// The sparse part of rows [row0, row0 + 16), two rows a warp, into sparse [16 tokens, 16 rows].
template <typename X, int kTokens>
__device__ __forceinline__ void sparse_rows(float (*sparse)[kDecodeRows + 1], const Decode& in, int64_t row0,
                                            int64_t token, int lane, int warp) {
#pragma unroll 1
  for (int r = warp; r < kDecodeRows; r += kDecodeWarps) {
    float sums[kTokens] = {};
    add_sparse_row<X, kTokens>(sums, in, row0 + r, token, lane);
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      const float sum = warp_sum(sums[t]);
      if (lane == t) sparse[t][r] = sum;
    }
  }
}

template <typename X, int kTokenTiles>
__global__ void __launch_bounds__(kDecodeWarps* kWarpSize, 2) spmm_tensor_kernel(Decode in) {
  constexpr int kTokens = 8 * kTokenTiles;
  __shared__ float table[16];
  __shared__ float partial[kDecodeWarps + 1][kTokens][kDecodeRows + 1];
  load_table(table);
  sync_block();
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * kDecodeRows;
  const int64_t token = block_row() * kTokens;
  const int64_t row = row0 + (lane >> 2);
  float sums[kTokenTiles][4] = {};
#pragma unroll 2
  for (int64_t step = warp * kDecodeStep; step < in.columns; step += kDecodeWarps * kDecodeStep) {
    const int64_t k = step + decode_run(lane);
    const Run upper = load_run(in, row, k), lower = load_run(in, row + 8, k);
    multiply_step<X, kTokenTiles>(sums, in, upper, lower, token, k, lane, table);
  }
#pragma unroll
  for (int tile = 0; tile < kTokenTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      partial[warp][8 * tile + accumulator_column(lane, i)][accumulator_row(lane, i)] = sums[tile][i];
    }
  }
  sparse_rows<X, kTokens>(partial[kDecodeWarps], in, row0, token, lane, warp);
  sync_block();
  const int r = threadIdx.x % kDecodeRows, t = threadIdx.x / kDecodeRows;
  if (t >= kTokens || row0 + r >= in.rows || token + t >= in.tokens) return;
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w <= kDecodeWarps; ++w) sum += partial[w][t][r];
  static_cast<X*>(in.y)[(token + t) * in.rows + row0 + r] = from_float<X>(sum);
}

}  // namespace qrosa
