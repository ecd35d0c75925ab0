#include "dropout.cuh"

#include "launch.h"

namespace qrosa {
namespace {

template <typename T>
void launch(const void* x, void* out, int64_t count, DropoutKeys keys, uint32_t threshold, float scale,
            cudaStream_t stream) {
  const bool vector = is_aligned(x) && is_aligned(out);
  const int64_t per_block = kDropoutThreads * (kPieceBytes / static_cast<int64_t>(sizeof(T)));
  dropout_kernel<<<static_cast<unsigned>(ceil_div(count, per_block)), kDropoutThreads, 0, stream>>>(
      static_cast<const T*>(x), static_cast<T*>(out), count, keys, threshold, scale, vector);
}

}  // namespace

cudaError_t launch_dropout(Float type, const void* x, void* out, int64_t count, DropoutKeys keys, uint32_t threshold,
                           float scale, cudaStream_t stream) {
  switch (type) {
    case Float::kBf16:
      launch<Bf16>(x, out, count, keys, threshold, scale, stream);
      break;
    case Float::kFp16:
      launch<Fp16>(x, out, count, keys, threshold, scale, stream);
      break;
    case Float::kFp32:
      launch<float>(x, out, count, keys, threshold, scale, stream);
      break;
  }
  return cudaPeekAtLastError();
}

}  // namespace qrosa
