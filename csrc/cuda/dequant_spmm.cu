#include "dequant_spmm.cuh"

#include "launch.h"

namespace qrosa {
namespace {

constexpr int64_t kFewTokens = 4;  // up to here multiplying on the ordinary units keeps up with the codes' bytes

dim3 grid_of(const Decode& in, int64_t rows, int64_t tokens) {
  return dim3(static_cast<unsigned>(ceil_div(in.rows, rows)), static_cast<unsigned>(ceil_div(in.tokens, tokens)));
}

bool in_pieces(const Decode& in) {
  return in.columns % kLaneCodes == 0 && in.nf4.block_shift >= kMinVectorBlockShift && is_aligned(in.nf4.codes) &&
         is_aligned(in.x);
}

template <typename X, int kTokens>
void launch_rows(const Decode& in, cudaStream_t stream) {
  spmm_rows_kernel<X, kTokens><<<grid_of(in, kSpmmWarps * kSpmmRows, kTokens), kSpmmThreads, 0, stream>>>(in);
}

template <typename X>
void launch_few(const Decode& in, cudaStream_t stream) {
  if (in.tokens == 1) {
    launch_rows<X, 1>(in, stream);
  } else if (in.tokens == 2) {
    launch_rows<X, 2>(in, stream);
  } else {
    launch_rows<X, 4>(in, stream);
  }
}

template <typename X, int kTokenTiles>
void launch_tensor(const Decode& in, cudaStream_t stream) {
  spmm_tensor_kernel<X, kTokenTiles>
      <<<grid_of(in, kDecodeRows, 8 * kTokenTiles), kDecodeWarps * kWarpSize, 0, stream>>>(in);
}

template <typename X>
void launch(const Decode& in, cudaStream_t stream) {
  if (!in_pieces(in)) {
    spmm_any_kernel<X><<<grid_of(in, kSpmmWarps, 4), kSpmmThreads, 0, stream>>>(in);
    return;
  }
  if constexpr (sizeof(X) == 2) {
    if (in.tokens > kFewTokens) {
      in.tokens <= 8 ? launch_tensor<X, 1>(in, stream) : launch_tensor<X, 2>(in, stream);
      return;
    }
  }
  launch_few<X>(in, stream);
}

}  // namespace

cudaError_t launch_dequant_spmm(const Nf4View& nf4, const CsrView& csr, Float type, const void* x, void* y,
                                int64_t tokens, int64_t rows, int64_t columns, cudaStream_t stream) {
  const Decode in{nf4, csr, x, y, tokens, rows, columns};
  switch (type) {
    case Float::kBf16:
      launch<Bf16>(in, stream);
      break;
    case Float::kFp16:
      launch<Fp16>(in, stream);
      break;
    case Float::kFp32:
      launch<float>(in, stream);
      break;
  }
  return cudaPeekAtLastError();
}

}  // namespace qrosa
