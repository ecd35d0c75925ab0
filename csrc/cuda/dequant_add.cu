#include "dequant_add.cuh"

#include "launch.h"

namespace qrosa {

cudaError_t launch_dequant_add(const Nf4View& nf4, const CsrView& csr, Float type, void* out, int64_t rows,
                               int64_t columns, cudaStream_t stream) {
  const bool vector = is_aligned(nf4.codes) && is_aligned(out) && nf4.block_shift >= kMinVectorBlockShift;
  const auto blocks = static_cast<unsigned>(ceil_div(rows * columns, kSpan * kDequantWarps));
  constexpr int kThreads = kDequantWarps * kWarpSize;
  switch (type) {
    case Float::kBf16:
      dequant_add_kernel<<<blocks, kThreads, 0, stream>>>(nf4, csr, static_cast<Bf16*>(out), rows, columns, vector);
      break;
    case Float::kFp16:
      dequant_add_kernel<<<blocks, kThreads, 0, stream>>>(nf4, csr, static_cast<Fp16*>(out), rows, columns, vector);
      break;
    case Float::kFp32:
      dequant_add_kernel<<<blocks, kThreads, 0, stream>>>(nf4, csr, static_cast<float*>(out), rows, columns, vector);
      break;
  }
  return cudaPeekAtLastError();
}

}  // namespace qrosa
