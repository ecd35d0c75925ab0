#include "dequant_spmm.cuh"

#include "launch.h"
#include "start.h"

namespace qrosa {
namespace {

constexpr int64_t kFewTokens = 4;  // up to here multiplying on the ordinary units keeps up with the codes' bytes

// Blocks of `rows` rows of the base by `tokens` tokens.
Grid blocks_of(const Decode& in, int64_t rows, int64_t tokens) {
  return grid_of(ceil_div(in.rows, rows), ceil_div(in.tokens, tokens));
}

bool in_pieces(const Decode& in) {
  return in.columns % kLaneCodes == 0 && in.nf4.block_shift >= kMinVectorBlockShift && is_aligned(in.nf4.codes) &&
         is_aligned(in.x);
}

template <typename X, int kTokens>
cudaError_t launch_rows(const Decode& in, cudaStream_t stream) {
  return start(spmm_rows_kernel<X, kTokens>, blocks_of(in, kSpmmWarps * kSpmmRows, kTokens), kSpmmThreads, 0, stream,
               in);
}

template <typename X>
cudaError_t launch_few(const Decode& in, cudaStream_t stream) {
  if (in.tokens == 1) return launch_rows<X, 1>(in, stream);
  return in.tokens == 2 ? launch_rows<X, 2>(in, stream) : launch_rows<X, 4>(in, stream);
}

template <typename X, int kTokenTiles>
cudaError_t launch_tensor(const Decode& in, cudaStream_t stream) {
  return start(spmm_tensor_kernel<X, kTokenTiles>, blocks_of(in, kDecodeRows, 8 * kTokenTiles),
               kDecodeWarps * kWarpSize, 0, stream, in);
}

template <typename X>
cudaError_t launch(const Decode& in, cudaStream_t stream) {
  if (!in_pieces(in)) {
    return start(spmm_any_kernel<X>, blocks_of(in, kSpmmWarps, kAnyTokens), kSpmmThreads, 0, stream, in);
  }
  if constexpr (sizeof(X) == 2) {
    if (in.tokens > kFewTokens) {
      return in.tokens <= 8 ? launch_tensor<X, 1>(in, stream) : launch_tensor<X, 2>(in, stream);
    }
  }
  return launch_few<X>(in, stream);
}

}  // namespace

cudaError_t launch_dequant_spmm(const Nf4View& nf4, const CsrView& csr, Float type, const void* x, void* y,
                                int64_t tokens, int64_t rows, int64_t columns, cudaStream_t stream) {
  const Decode in{nf4, csr, x, y, tokens, rows, columns};
  switch (type) {
    case Float::kBf16:
      return launch<Bf16>(in, stream);
    case Float::kFp16:
      return launch<Fp16>(in, stream);
    case Float::kFp32:
      return launch<float>(in, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace qrosa
