#include "launch.h"
#include "sddmm_gather.cuh"
#include "sddmm_tile.cuh"
#include "start.h"

namespace qrosa {
namespace {

// Beside the lines a block keeps its list; what the compiler adds is rounded up.
constexpr int64_t kListBytes = sizeof(GatherShared) + 1024;

Operands operands_of(const Pair& pair) {
  const bool vector = is_aligned(pair.dy) && is_aligned(pair.x) && pair.rows % 8 == 0 && pair.columns % 8 == 0;
  return {pair.dy, pair.x, pair.tokens, pair.rows, pair.columns, vector};
}

// Scratch holds the index, then the token groups' sums where there are several.
template <typename T>
cudaError_t launch_gather(const Operands& in, const CsrView& csr, const SddmmPlan& sddmm, int32_t* scratch, float* out,
                          cudaStream_t stream) {
  const GatherPlan& plan = sddmm.gather;
  const GatherIndex index{scratch, scratch + plan.listed_rows(), scratch + 2 * plan.listed_rows()};
  float* sums = plan.token_groups == 1 ? out : reinterpret_cast<float*>(scratch + plan.index_words());
  // The limit belongs to the kernel and the card, not to this launch: set to what the largest plan needs, it is the
  // same in every call, and no thread lowers it between another's call and launch.
  cudaError_t error = taken(cudaFuncSetAttribute(gather_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                 static_cast<int>(sddmm.shared_limit)));
  if (error != cudaSuccess) return error;
  const Grid lists = grid_of(plan.lists(), 1);
  error = start(gather_index_kernel, lists, kGatherRows, 0, stream, csr, index, in.rows, plan.columns, plan.tiles);
  if (error != cudaSuccess) return error;
  const Grid grid{static_cast<unsigned>(plan.column_parts), static_cast<unsigned>(plan.token_groups),
                  static_cast<unsigned>(plan.row_parts)};
  error = start(gather_kernel<T>, grid, kGatherThreads, plan.shared_bytes(), stream, in, csr, index, plan, sums);
  if (error != cudaSuccess || plan.token_groups == 1) return error;
  return start(gather_sum_kernel, grid_of(ceil_div(csr.nnz, kSumThreads), 1), kSumThreads, 0, stream, sums, out,
               csr.nnz, plan.token_groups);
}

Grid tiles_of(const Pair& pair, int64_t side) {
  return grid_of(ceil_div(pair.columns, side), ceil_div(pair.rows, side));
}

}  // namespace

SddmmPlan plan_sddmm(const Pair& pair, int64_t nnz, const Card& card, SddmmWay way) {
  SddmmPlan plan{};
  plan.gathers = pair.type != Float::kFp32 && way != SddmmWay::kTiles &&
                 (way == SddmmWay::kGather || gather_is_cheaper(pair.tokens, pair.rows, pair.columns, nnz));
  if (!plan.gathers) return plan;
  plan.shared_limit = card.shared_bytes - kListBytes;
  plan.gather = plan_gather(pair.tokens, pair.rows, pair.columns, nnz, plan.shared_limit, card.processors);
  plan.scratch_words = plan.gather.index_words() + (plan.gather.token_groups > 1 ? plan.gather.token_groups * nnz : 0);
  return plan;
}

cudaError_t launch_sddmm(const Pair& pair, const CsrView& csr, const SddmmPlan& plan, int32_t* scratch, float* out,
                         cudaStream_t stream) {
  static_assert(kTileRows == kTileColumns);
  const Operands in = operands_of(pair);
  switch (pair.type) {
    case Float::kBf16:
      return plan.gathers
                 ? launch_gather<Bf16>(in, csr, plan, scratch, out, stream)
                 : start(sddmm_tile_kernel<Bf16>, tiles_of(pair, kTileRows), kTileThreads, 0, stream, in, csr, out);
    case Float::kFp16:
      return plan.gathers
                 ? launch_gather<Fp16>(in, csr, plan, scratch, out, stream)
                 : start(sddmm_tile_kernel<Fp16>, tiles_of(pair, kTileRows), kTileThreads, 0, stream, in, csr, out);
    case Float::kFp32:
      return start(sddmm_wide_kernel, tiles_of(pair, kWideTile), kTileThreads, 0, stream, in, csr, out);
  }
  return cudaErrorInvalidValue;
}

}  // namespace qrosa
