#include <cstdlib>
#include <cstring>

#include "launch.h"
#include "sddmm_gather.cuh"
#include "sddmm_tile.cuh"

namespace qrosa {
namespace {

// Beside the lines a block keeps its list; what the compiler adds is rounded up.
constexpr int64_t kListBytes = sizeof(GatherShared) + 1024;

// QROSA_SDDMM=gather or tiles overrides the rule, so that a benchmark can measure both ways and a test can run them.
bool gathers(const Pair& pair, int64_t nnz) {
  if (pair.type == Float::kFp32) return false;
  const char* way = std::getenv("QROSA_SDDMM");
  if (way != nullptr && std::strcmp(way, "gather") == 0) return true;
  if (way != nullptr && std::strcmp(way, "tiles") == 0) return false;
  return gather_is_cheaper(pair.tokens, pair.rows, pair.columns, nnz);
}

GatherPlan plan_of(const Pair& pair, int64_t nnz, const Card& card) {
  return plan_gather(pair.tokens, pair.rows, pair.columns, nnz, card.shared_bytes - kListBytes, card.processors);
}

int64_t list_words(const GatherPlan& plan) { return plan.column_parts * plan.tiles * kGatherRows; }

Operands operands_of(const Pair& pair) {
  const bool vector = is_aligned(pair.dy) && is_aligned(pair.x) && pair.rows % 8 == 0 && pair.columns % 8 == 0;
  return {pair.dy, pair.x, pair.tokens, pair.rows, pair.columns, vector};
}

template <typename T>
cudaError_t launch_gather(const Operands& in, const CsrView& csr, const GatherPlan& plan, int32_t* scratch, float* out,
                          cudaStream_t stream) {
  const int64_t listed = list_words(plan);
  const GatherIndex index{scratch, scratch + listed, scratch + 2 * listed};
  float* sums =
      plan.token_groups == 1 ? out : reinterpret_cast<float*>(scratch + 2 * listed + plan.column_parts * plan.tiles);
  const cudaError_t allowed = cudaFuncSetAttribute(gather_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(plan.shared_bytes()));
  if (allowed != cudaSuccess) return allowed;
  const dim3 lists(static_cast<unsigned>(plan.tiles), static_cast<unsigned>(plan.column_parts));
  gather_index_kernel<<<lists, kGatherRows, 0, stream>>>(csr, index, in.rows, plan.columns);
  const dim3 grid(static_cast<unsigned>(plan.column_parts), static_cast<unsigned>(plan.token_groups),
                  static_cast<unsigned>(plan.row_parts));
  gather_kernel<T>
      <<<grid, kGatherThreads, static_cast<size_t>(plan.shared_bytes()), stream>>>(in, csr, index, plan, sums);
  if (plan.token_groups > 1) {
    gather_sum_kernel<<<static_cast<unsigned>(ceil_div(csr.nnz, 256)), 256, 0, stream>>>(
        sums, out, csr.nnz, static_cast<int>(plan.token_groups));
  }
  return cudaPeekAtLastError();
}

dim3 tiles_of(const Pair& pair, int64_t rows, int64_t columns) {
  return dim3(static_cast<unsigned>(ceil_div(pair.columns, columns)), static_cast<unsigned>(ceil_div(pair.rows, rows)));
}

}  // namespace

int64_t sddmm_scratch_words(const Pair& pair, int64_t nnz, const Card& card) {
  if (!gathers(pair, nnz)) return 0;
  const GatherPlan plan = plan_of(pair, nnz, card);
  const int64_t sums = plan.token_groups > 1 ? plan.token_groups * nnz : 0;
  return 2 * list_words(plan) + plan.column_parts * plan.tiles + sums;
}

cudaError_t launch_sddmm(const Pair& pair, const CsrView& csr, const Card& card, int32_t* scratch, float* out,
                         cudaStream_t stream) {
  const Operands in = operands_of(pair);
  if (pair.type == Float::kFp32) {
    sddmm_wide_kernel<<<tiles_of(pair, kWideTile, kWideTile), kTileThreads, 0, stream>>>(in, csr, out);
    return cudaPeekAtLastError();
  }
  if (gathers(pair, csr.nnz)) {
    const GatherPlan plan = plan_of(pair, csr.nnz, card);
    return pair.type == Float::kBf16 ? launch_gather<Bf16>(in, csr, plan, scratch, out, stream)
                                     : launch_gather<Fp16>(in, csr, plan, scratch, out, stream);
  }
  const dim3 grid = tiles_of(pair, kTileRows, kTileColumns);
  if (pair.type == Float::kBf16) {
    sddmm_tile_kernel<Bf16><<<grid, kTileThreads, 0, stream>>>(in, csr, out);
  } else {
    sddmm_tile_kernel<Fp16><<<grid, kTileThreads, 0, stream>>>(in, csr, out);
  }
  return cudaPeekAtLastError();
}

}  // namespace qrosa
