#include "rms_norm.cuh"

#include "launch.h"
#include "start.h"

namespace qrosa {
namespace {

template <typename T, int kRowThreads>
cudaError_t launch_rows(const NormWork& work, bool vector, cudaStream_t stream) {
  const Grid grid = grid_of(ceil_div(work.rows, kNormThreads / kRowThreads), 1);
  const auto kernel = work.dy == nullptr ? rms_norm_kernel<T, kRowThreads> : rms_norm_backward_kernel<T, kRowThreads>;
  return start(kernel, grid, kNormThreads, 0, stream, work, vector);
}

template <typename T>
cudaError_t launch(const NormWork& work, cudaStream_t stream) {
  const int64_t bytes = work.width * static_cast<int64_t>(sizeof(T));
  const bool aligned = is_aligned(work.x) && is_aligned(work.weight) && is_aligned(work.dy) && is_aligned(work.out);
  const bool vector = aligned && bytes % kPieceBytes == 0;
  return bytes <= kWarpRowBytes ? launch_rows<T, kWarpSize>(work, vector, stream)
                                : launch_rows<T, kNormThreads>(work, vector, stream);
}

}  // namespace

cudaError_t launch_rms_norm(Float type, const NormWork& work, cudaStream_t stream) {
  switch (type) {
    case Float::kBf16:
      return launch<Bf16>(work, stream);
    case Float::kFp16:
      return launch<Fp16>(work, stream);
    case Float::kFp32:
      return launch<float>(work, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace qrosa
