// The sparse gradient position by position: a dot product over tokens of a column of X and a column of dY, both staged.
//
// Roofline: dY and X are read from DRAM once; what bounds is the tensor cores (16 multiply-adds for each one used) and
// the reads of dY from L2, once for each part of the columns. A block keeps 64 tokens of one part of X's columns in
// shared memory, each column one line of 128 bytes, and walks the rows in tiles of 256 lines of dY; every position in a
// tile of rows and a part of columns is then two lines. ldmatrix gathers any eight lines as if they were a matrix;
// eight positions make one 8 x 8 product of which the diagonal is kept. That wastes 15 of 16 multiply-adds and still
// beats unpacking 16-bit values for ordinary ones: 4 instructions a position and 64 tokens instead of some 10.
//
// X staged whole is why no transposed copy is needed in global memory, and why dY and X are not read at random. Token
// groups sum apart and are added in a fixed order: deterministic.
#pragma once

#include "../rows.h"
#include "../sddmm_plan.h"
#include "tile_product.cuh"

namespace qrosa {

// Where the entries of a part of the columns lie, row by row, in tiles of 256 rows.
struct GatherIndex {
  int* before;  // [column_parts, tiles, 256] entries of the tile in rows before this one
  int* shift;   // [column_parts, tiles, 256] add to a place in the tile's list to get the entry's index
  int* total;   // [column_parts, tiles]
};

// One block a tile and part, parts outermost: thread r finds row r's entries; a scan over the tile makes them one list.
static __global__ void __launch_bounds__(kGatherRows)
    gather_index_kernel(CsrView csr, GatherIndex index, int64_t rows, int part_columns, int tiles) {
  __shared__ int totals[kGatherRows / kWarpSize];
  const int r = threadIdx.x, lane = r % kWarpSize, warp = r / kWarpSize;
  const int64_t list = blockIdx.x, part = list / tiles;
  const int64_t row = list % tiles * kGatherRows + r;
  int begin = 0, count = 0;
  if (row < rows) {
    begin = static_cast<int>(row_lower_bound(csr, row, part * part_columns));
    count = static_cast<int>(row_lower_bound(csr, row, (part + 1) * part_columns)) - begin;
  }
  count = count < 0 ? 0 : count;  // of columns out of order
  int before = count;             // inclusive scan over the warp
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const int other = from_lane(before, lane >= distance ? lane - distance : lane);
    if (lane >= distance) before += other;
  }
  if (lane == kWarpSize - 1) totals[warp] = before;
  before -= count;
  sync_block();
  for (int w = 0; w < warp; ++w) before += totals[w];
  index.before[list * kGatherRows + r] = before;
  index.shift[list * kGatherRows + r] = begin - before;
  if (r == kGatherRows - 1) index.total[list] = before + count;
}

// 8 values of one token, zeros outside the matrix.
__device__ __forceinline__ uint4 load_eight(const uint16_t* from, int tokens, int width, int token, int column,
                                            bool vector) {
  uint4 result{};
  if (token >= tokens || column >= width) return result;
  const uint16_t* source = from + static_cast<int64_t>(token) * width + column;
  if (vector) return __ldg(reinterpret_cast<const uint4*>(source));
  uint32_t words[4] = {};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (column + i < width) words[i / 2] |= static_cast<uint32_t>(source[i]) << (16 * (i % 2));
  }
  return {words[0], words[1], words[2], words[3]};
}

// An 8 x 8 block on its way from global to shared memory.
struct Block {
  uint4 tokens[8];  // 8 columns each
};

__device__ __forceinline__ void load_block(Block& block, const void* from, int tokens, int width, int first_token,
                                           int first_line, int place, bool vector) {
  const StagedBlock at = staged_block(place);
#pragma unroll
  for (int t = 0; t < 8; ++t) {
    block.tokens[t] = load_eight(static_cast<const uint16_t*>(from), tokens, width, first_token + at.token + t,
                                 first_line + at.line, vector);
  }
}

// Writes the block transposed: eight lines, 8 tokens (16 bytes) of each.
__device__ __forceinline__ void store_block(unsigned char* lines, const Block& block, int place) {
  const StagedBlock at = staged_block(place);
#pragma unroll
  for (int c = 0; c < 8; ++c) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t first = piece_word(block.tokens[2 * i], c / 2),
                     second = piece_word(block.tokens[2 * i + 1], c / 2);
      words[i] = c % 2 == 0 ? low_halves(first, second) : high_halves(first, second);
    }
    *reinterpret_cast<uint4*>(lines + line_offset(at.line + c, at.token / 8)) = {words[0], words[1], words[2],
                                                                                 words[3]};
  }
}

// Dot products over 64 tokens of up to 32 positions, one a lane: `lines` packs its line of dY (upper half) and of X.
template <typename T>
__device__ __forceinline__ float gather_products(const unsigned char* dy_lines, const unsigned char* x_lines,
                                                 uint32_t lines, int lane) {
  float result = 0.0f;
#pragma unroll
  for (int group = 0; group < 4; ++group) {  // eight positions at a time
    const uint32_t mine = from_lane(lines, group * 8 + (lane & 7));
    const auto dy_line = static_cast<int>(mine >> 16), x_line = static_cast<int>(mine & 0xFFFFu);
    float even[4] = {}, odd[4] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int piece = gather_piece(4 * half + (lane >> 3), lane & 7);
      uint32_t a[4], b[4];
      load_matrices(a, dy_lines + line_offset(dy_line, piece));
      load_matrices(b, x_lines + line_offset(x_line, piece));
      // Operand A as it was loaded: rows 0 to 7 are pieces 0 and 2, rows 8 to 15 pieces 1 and 3. Each product is right
      // in the half of the rows whose pieces b holds; the other half is not read.
      multiply_add<T>(even, a, b[0], b[2]);
      multiply_add<T>(odd, a, b[1], b[3]);
    }
    const float diagonal = ((lane >> 2) & 1) != 0 ? even[1] + odd[3] : even[0] + odd[2];
    const float received = from_lane(diagonal, diagonal_lane(lane & 7));
    if (lane >> 3 == group) result = received;
  }
  return result;
}

struct GatherShared {
  int before[kGatherRows];
  int shift[kGatherRows];
};

// The row of a tile that holds place `place` of its list: the last one that starts at or before it.
__device__ __forceinline__ int row_of_place(const int* before, int place) {
  int row = 0;
#pragma unroll
  for (int step = kGatherRows / 2; step > 0; step /= 2) row += before[row + step] <= place ? step : 0;
  return row;
}

// Adds 64 tokens to the sums of all positions of one tile of rows. The same thread meets a position each time.
template <typename T>
__device__ __forceinline__ void add_positions(const unsigned char* dy_lines, const unsigned char* x_lines,
                                              const GatherShared& list, int total, const CsrView& csr, int column0,
                                              int part_columns, bool fresh, float* sums) {
  const int lane = threadIdx.x % kWarpSize;
  for (int start = threadIdx.x / kWarpSize * kWarpSize; start < total; start += kGatherThreads) {
    const int place = start + lane;
    uint32_t lines = 0;
    int entry = -1;
    if (place < total) {
      const int row = row_of_place(list.before, place);
      entry = place + list.shift[row];
      const uint32_t line = static_cast<uint32_t>(column(csr, entry)) - static_cast<uint32_t>(column0);
      if (line < static_cast<uint32_t>(part_columns)) lines = static_cast<uint32_t>(row) << 16 | line;
    }
    const float old = entry < 0 || fresh ? 0.0f : sums[entry];
    const float sum = gather_products<T>(dy_lines, x_lines, lines, lane);
    if (entry >= 0) sums[entry] = old + sum;
  }
}

// grid (column parts, token groups, row parts); sums [token groups, nnz].
template <typename T>
__global__ void __launch_bounds__(kGatherThreads, 1)
    gather_kernel(Operands in, CsrView csr, GatherIndex index, GatherPlan plan, float* sums) {
  QROSA_DYNAMIC_SHARED(lines);
  __shared__ GatherShared list;
  unsigned char* x_lines = lines;
  unsigned char* dy_lines = lines + plan.columns * kGatherLineBytes;
  // Sizes are below 2^31 (ops.cpp checks it); 64-bit counters would cost the registers that a block in flight needs.
  const auto tokens = static_cast<int>(in.tokens), rows = static_cast<int>(in.rows);
  const int part_columns = plan.columns, column0 = static_cast<int>(blockIdx.x) * part_columns;
  const int first_tile = static_cast<int>(blockIdx.z) * plan.row_tiles, past_tile = first_tile + plan.row_tiles;
  const int end_tile = past_tile < plan.tiles ? past_tile : plan.tiles;
  sums += blockIdx.y * csr.nnz;
  constexpr int kBlocks = kGatherRows * kGatherTokens / 64;  // of a tile of dY, held by the first threads
  const int i = threadIdx.x;
  for (int chunk = blockIdx.y; chunk < plan.chunks; chunk += gridDim.y) {
    const int token = chunk * kGatherTokens;
    Block block;
    sync_block();  // all are done with the lines of the chunk before
    for (int place = i; place < part_columns; place += kGatherThreads) {  // columns * 64 / 64 blocks
      load_block(block, in.x, tokens, static_cast<int>(in.columns), token, column0, place, in.vector);
      store_block(x_lines, block, place);
    }
    if (i < kBlocks) load_block(block, in.dy, tokens, rows, token, first_tile * kGatherRows, i, in.vector);
    for (int tile = first_tile; tile < end_tile; ++tile) {
      const int listed = static_cast<int>(blockIdx.x) * plan.tiles + tile;
      sync_block();  // all are done with the lines and the list of the tile before
      if (i < kBlocks) {
        store_block(dy_lines, block, i);
        list.before[i] = index.before[static_cast<int64_t>(listed) * kGatherRows + i];
        list.shift[i] = index.shift[static_cast<int64_t>(listed) * kGatherRows + i];
        if (tile + 1 < end_tile) {  // in flight while this tile is worked on
          load_block(block, in.dy, tokens, rows, token, (tile + 1) * kGatherRows, i, in.vector);
        }
      }
      const int total = index.total[listed];
      sync_block();
      add_positions<T>(dy_lines, x_lines, list, total, csr, column0, part_columns, chunk < static_cast<int>(gridDim.y),
                       sums);
    }
  }
}

constexpr int kSumThreads = 256;

// out [nnz] = the token groups' sums, in order.
static __global__ void __launch_bounds__(kSumThreads)
    gather_sum_kernel(const float* sums, float* out, int64_t nnz, int groups) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x;
  if (index >= nnz) return;
  float sum = sums[index];
  for (int group = 1; group < groups; ++group) sum += sums[group * nnz + index];
  out[index] = sum;
}

}  // namespace qrosa
