// Starting a kernel: the grid, the call, and what becomes of a refusal. Compiles without nvcc, so that tests run the
// launchers on a model of the runtime (tests/ops/emulator/cuda_runtime.h).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../tile.h"

namespace qrosa {

struct Grid {
  unsigned x = 1, y = 1, z = 1;
};

constexpr int64_t kMostBlocksY = 65535;  // of gridDim.y and gridDim.z; gridDim.x goes to 2^31 - 1

// A block for each of x by y pieces. A long second axis is folded over y and z, and block_row() in the kernel undoes
// that; the last fold may start blocks past `y`, which find no rows to work on.
inline Grid grid_of(int64_t x, int64_t y) {
  const int64_t folds = ceil_div(y, kMostBlocksY);
  return {static_cast<unsigned>(x), static_cast<unsigned>(ceil_div(y, folds)), static_cast<unsigned>(folds)};
}

// Passes an error on and takes it away from the runtime, which keeps the last one of a thread and would hand it to the
// next op that asks: our runtime is linked in, so nobody else clears it.
inline cudaError_t taken(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

// Starts kernel(arguments...) on `stream`; `shared` is dynamic shared memory in bytes.
template <typename... Parameters, typename... Arguments>
cudaError_t start(void (*kernel)(Parameters...), const Grid& grid, int threads, int64_t shared, cudaStream_t stream,
                  const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid.x, grid.y, grid.z);
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  config.stream = stream;
  return taken(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
}

}  // namespace qrosa
