// How the sparse gradient is computed on a card: which of two ways, and how the work is cut. Pure functions of shapes.
//
// Way 1 gathers: per sparse position, a dot product over tokens of two staged lines, eight positions a tensor-core
// product of which the diagonal is used: nnz * T * 16 multiply-adds of the tensor cores. Way 2 computes tiles of dY^T X
// and keeps what is asked for: N * K * T. The constants weigh staging and epilogues; they follow from counting
// instructions and are not measured on a card yet (bench/gpu.py measures both ways at several densities).
#pragma once

#include <cstdint>

#include "tile.h"

namespace qrosa {

constexpr int64_t kGatherCost = 32;  // a position and token, in multiply-adds of a dense tile: 16, and as much again
constexpr int kMaxTokenGroups = 8, kMaxRowParts = 16;
constexpr double kEntryCost = 3;  // of one position, in lines staged

// Whether gathering beats dense tiles. Both pad the tokens to what they stage at a time. In doubles, as the costs
// below: 64 bits do not hold products of three sizes of 2^31.
inline bool gather_is_cheaper(int64_t tokens, int64_t rows, int64_t columns, int64_t nnz) {
  const auto gathered =
      static_cast<double>(nnz * kGatherCost) * static_cast<double>(ceil_div(tokens, kGatherTokens) * kGatherTokens);
  const auto dense =
      static_cast<double>(rows * columns) * static_cast<double>(ceil_div(tokens, kStageTokens) * kStageTokens);
  return gathered < dense;
}

// A block takes one part of the columns, one group of 64-token chunks (every `token_groups`-th) and one part of the
// rows.
struct GatherPlan {
  int column_parts, columns;        // of a part, a multiple of 64
  int token_groups, chunks;         // each group sums into its own [nnz], added up in a fixed order at the end
  int row_parts, row_tiles, tiles;  // tiles of 256 rows of a part, and of all rows

  int64_t blocks() const { return int64_t{column_parts} * token_groups * row_parts; }
  int64_t shared_bytes() const { return (columns + kGatherRows) * kGatherLineBytes; }
  int64_t lists() const { return int64_t{column_parts} * tiles; }  // of the index: one a part and tile
  int64_t listed_rows() const { return lists() * kGatherRows; }
  int64_t index_words() const { return 2 * listed_rows() + lists(); }
};

// Relative time of a plan: waves of blocks by the lines that a block stages and the positions that it visits.
inline double gather_cost(const GatherPlan& plan, int64_t rows, int64_t all_columns, int64_t nnz, int64_t processors) {
  const auto waves = static_cast<double>(ceil_div(plan.blocks(), processors));
  const auto tile_entries = static_cast<double>(nnz * kGatherRows / rows * plan.columns / all_columns);
  const double tile = kGatherRows + kEntryCost * tile_entries;
  return waves * static_cast<double>(ceil_div(plan.chunks, plan.token_groups)) * (plan.columns + plan.row_tiles * tile);
}

// The cheapest cut that fits `shared_bytes` of shared memory a block, for a card with so many multiprocessors.
inline GatherPlan plan_gather(int64_t tokens, int64_t rows, int64_t columns, int64_t nnz, int64_t shared_bytes,
                              int64_t processors) {
  const int64_t lines = shared_bytes / kGatherLineBytes - kGatherRows;
  const int64_t most_columns = lines / kGatherColumnStep * kGatherColumnStep;
  const int64_t fewest_parts = ceil_div(columns, most_columns);
  GatherPlan best{};
  double best_cost = 0.0;
  for (int64_t parts = fewest_parts; parts < fewest_parts + 4; ++parts) {
    for (int groups = 1; groups <= kMaxTokenGroups; groups *= 2) {
      for (int row_parts = 1; row_parts <= kMaxRowParts; row_parts *= 2) {
        GatherPlan plan{};
        const auto count = [](int64_t value, int64_t by) { return static_cast<int>(ceil_div(value, by)); };
        plan.columns = count(ceil_div(columns, parts), kGatherColumnStep) * kGatherColumnStep;
        plan.column_parts = count(columns, plan.columns);
        plan.chunks = count(tokens, kGatherTokens);
        plan.token_groups = groups < plan.chunks ? groups : plan.chunks;
        plan.tiles = count(rows, kGatherRows);
        plan.row_tiles = count(plan.tiles, row_parts);
        plan.row_parts = count(plan.tiles, plan.row_tiles);
        const double cost = gather_cost(plan, rows, columns, nnz, processors);
        if (best.columns == 0 || cost < best_cost) {
          best = plan;
          best_cost = cost;
        }
      }
    }
  }
  return best;
}

}  // namespace qrosa
