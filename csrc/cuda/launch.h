// The launchers: raw pointers in, kernels onto a stream. ops.cpp has checked everything; nothing here waits for the
// card. A launcher returns its own error and leaves none behind in the runtime.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../csr.h"
#include "../dropout.h"
#include "../nf4.h"
#include "../norm.h"
#include "../sddmm_plan.h"

namespace qrosa {

enum class Float { kBf16, kFp16, kFp32 };

// out [rows, columns]
cudaError_t launch_dequant_add(const Nf4View& nf4, const CsrView& csr, Float type, void* out, int64_t rows,
                               int64_t columns, cudaStream_t stream);

// x [tokens, columns] -> y [tokens, rows]
cudaError_t launch_dequant_spmm(const Nf4View& nf4, const CsrView& csr, Float type, const void* x, void* y,
                                int64_t tokens, int64_t rows, int64_t columns, cudaStream_t stream);

// dY [tokens, rows], X [tokens, columns], both of one type; the product dY^T X is [rows, columns].
struct Pair {
  const void *dy, *x;
  int64_t tokens, rows, columns;
  Float type;
};

struct Card {
  int64_t shared_bytes, processors;  // shared memory that a block can opt in to
};

// The two ways to a sparse gradient (csrc/sddmm_plan.h), and the rule that picks the cheaper one.
enum class SddmmWay { kRule, kGather, kTiles };

// Everything about one call that follows from its shapes, the card and the way asked for. Made once a call: the scratch
// that is allocated and the kernels that write to it then cannot disagree.
struct SddmmPlan {
  bool gathers;
  GatherPlan gather;      // if it does
  int64_t shared_limit;   // dynamic shared memory that the gathering kernel may ever ask for on this card
  int64_t scratch_words;  // of 4 bytes
};
SddmmPlan plan_sddmm(const Pair& pair, int64_t nnz, const Card& card, SddmmWay way);

// out fp32 [nnz]
cudaError_t launch_sddmm(const Pair& pair, const CsrView& csr, const SddmmPlan& plan, int32_t* scratch, float* out,
                         cudaStream_t stream);

// stat fp32 [rows, columns]
cudaError_t launch_score_accumulate(const Pair& pair, float* stat, bool square, cudaStream_t stream);

cudaError_t launch_dropout(Float type, const void* x, void* out, int64_t count, DropoutKeys keys, uint32_t threshold,
                           float scale, cudaStream_t stream);

// Forward where work.dy is null, else backward (csrc/norm.h).
cudaError_t launch_rms_norm(Float type, const NormWork& work, cudaStream_t stream);
cudaError_t launch_gate(Float type, const GateWork& work, cudaStream_t stream);

inline bool is_aligned(const void* pointer, int64_t bytes = 16) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

}  // namespace qrosa
