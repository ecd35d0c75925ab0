#include "gate.cuh"

#include "launch.h"
#include "start.h"

namespace qrosa {
namespace {

template <typename T>
cudaError_t launch(GateWork work, cudaStream_t stream) {
  constexpr int64_t kSize = sizeof(T);
  if (work.gate_stride == work.columns && work.up_stride == work.columns) {
    work.columns *= work.rows;
    work.gate_stride = work.up_stride = work.columns;
    work.rows = 1;
  }
  const auto whole = [&](const void* pointer, int64_t stride) {
    return is_aligned(pointer) && (work.rows == 1 || stride * kSize % kPieceBytes == 0);
  };
  const bool vector = work.columns * kSize % kPieceBytes == 0 && whole(work.gate, work.gate_stride) &&
                      whole(work.up, work.up_stride) && whole(work.dy, work.columns) && whole(work.out, work.columns) &&
                      whole(work.dup, work.columns);
  const Grid grid = grid_of(ceil_div(work.columns, kGateThreads * (kPieceBytes / kSize)), work.rows);
  const auto kernel = work.dy == nullptr ? gate_kernel<T> : gate_backward_kernel<T>;
  return start(kernel, grid, kGateThreads, 0, stream, work, vector);
}

}  // namespace

cudaError_t launch_gate(Float type, const GateWork& work, cudaStream_t stream) {
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
