#include "score_accumulate.cuh"

#include "launch.h"
#include "start.h"

namespace qrosa {

cudaError_t launch_score_accumulate(const Pair& pair, float* stat, bool square, cudaStream_t stream) {
  const bool vector = is_aligned(pair.dy) && is_aligned(pair.x) && pair.rows % 8 == 0 && pair.columns % 8 == 0;
  const Operands in{pair.dy, pair.x, pair.tokens, pair.rows, pair.columns, vector};
  const Statistic target{stat, square, pair.columns % 2 == 0 && is_aligned(stat, 8)};
  const int64_t side = pair.type == Float::kFp32 ? kWideTile : kTileRows;
  const Grid grid = grid_of(ceil_div(pair.columns, side), ceil_div(pair.rows, side));
  switch (pair.type) {
    case Float::kBf16:
      return start(score_kernel<Bf16>, grid, kTileThreads, 0, stream, in, target);
    case Float::kFp16:
      return start(score_kernel<Fp16>, grid, kTileThreads, 0, stream, in, target);
    case Float::kFp32:
      return start(score_wide_kernel, grid, kTileThreads, 0, stream, in, target);
  }
  return cudaErrorInvalidValue;
}

}  // namespace qrosa
