#include "dropout.cuh"

#include "launch.h"
#include "start.h"

namespace qrosa {
namespace {

template <typename T>
cudaError_t launch(const void* x, void* out, int64_t count, DropoutKeys keys, uint32_t threshold, float scale,
                   cudaStream_t stream) {
  const bool vector = is_aligned(x) && is_aligned(out);
  const int64_t per_block = kDropoutThreads * (kPieceBytes / static_cast<int64_t>(sizeof(T)));
  return start(dropout_kernel<T>, grid_of(ceil_div(count, per_block), 1), kDropoutThreads, 0, stream,
               static_cast<const T*>(x), static_cast<T*>(out), count, keys, threshold, scale, vector);
}

}  // namespace

cudaError_t launch_dropout(Float type, const void* x, void* out, int64_t count, DropoutKeys keys, uint32_t threshold,
                           float scale, cudaStream_t stream) {
  switch (type) {
    case Float::kBf16:
      return launch<Bf16>(x, out, count, keys, threshold, scale, stream);
    case Float::kFp16:
      return launch<Fp16>(x, out, count, keys, threshold, scale, stream);
    case Float::kFp32:
      return launch<float>(x, out, count, keys, threshold, scale, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace qrosa
