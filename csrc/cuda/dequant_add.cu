#include "dequant_add.cuh"

#include "launch.h"
#include "start.h"

namespace qrosa {
namespace {

template <typename Out>
cudaError_t launch(const Nf4View& nf4, const CsrView& csr, void* out, int64_t rows, int64_t columns,
                   cudaStream_t stream) {
  const bool vector = is_aligned(nf4.codes) && is_aligned(out) && nf4.block_shift >= kMinVectorBlockShift;
  const Grid grid = grid_of(ceil_div(rows * columns, kSpan * kDequantWarps), 1);
  return start(dequant_add_kernel<Out>, grid, kDequantWarps * kWarpSize, 0, stream, nf4, csr, static_cast<Out*>(out),
               rows, columns, vector);
}

}  // namespace

cudaError_t launch_dequant_add(const Nf4View& nf4, const CsrView& csr, Float type, void* out, int64_t rows,
                               int64_t columns, cudaStream_t stream) {
  switch (type) {
    case Float::kBf16:
      return launch<Bf16>(nf4, csr, out, rows, columns, stream);
    case Float::kFp16:
      return launch<Fp16>(nf4, csr, out, rows, columns, stream);
    case Float::kFp32:
      return launch<float>(nf4, csr, out, rows, columns, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace qrosa
