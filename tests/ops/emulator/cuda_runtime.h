// Stands in for the CUDA runtime, so that the launchers of csrc/cuda/*.cu compile for the CPU as they are: a kernel
// started here runs on the model of a block (warp_model.h), or is only recorded. What the real runtime refuses, this
// one refuses: grids past the card's limits, and more dynamic shared memory than the kernel was allowed. Like the real
// one it keeps the last error of a thread until cudaGetLastError takes it.
#pragma once

#include <map>
#include <utility>

#include "../../../csrc/cuda/warp.cuh"

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
using cudaStream_t = void*;
using dim3 = Dim3;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

namespace qrosa::model {

struct Launch {
  const void* kernel;
  Dim3 grid;
  int64_t shared;
};

struct Runtime {
  cudaError_t last = cudaSuccess;
  std::vector<Launch> launches;
  std::map<const void*, std::vector<int>> limits;  // of each kernel, every limit that was ever set
  bool runs = true;                                // whether kernels run or are only recorded
  bool folds = false;  // run a grid [x, y, 1] as [x, ceil(y / 3), 3], as a huge one would be
  int refused = 0;     // this call from now on is refused, 1 for the next; 0 for none
};

inline Runtime runtime;

inline constexpr unsigned kMostX = 0x7FFFFFFFu, kMostYZ = 65535;
inline constexpr size_t kSharedOnRequest = 48 << 10;  // beyond that a kernel's limit must have been raised

inline cudaError_t remembered(cudaError_t error) {
  if (error != cudaSuccess) runtime.last = error;
  return error;
}

inline bool refuses_this_call() { return runtime.refused > 0 && --runtime.refused == 0; }

inline bool fits(const void* kernel, const cudaLaunchConfig_t& config) {
  const Dim3 &grid = config.gridDim, &block = config.blockDim;
  const auto limit = runtime.limits.find(kernel);
  const size_t shared = limit == runtime.limits.end() ? kSharedOnRequest : static_cast<size_t>(limit->second.back());
  return grid.x >= 1 && grid.x <= kMostX && grid.y >= 1 && grid.y <= kMostYZ && grid.z >= 1 && grid.z <= kMostYZ &&
         block.x * block.y * block.z <= 1024 && config.dynamicSmemBytes <= shared;
}

}  // namespace qrosa::model

inline cudaError_t cudaPeekAtLastError() { return qrosa::model::runtime.last; }
inline cudaError_t cudaGetLastError() { return std::exchange(qrosa::model::runtime.last, cudaSuccess); }

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  using namespace qrosa::model;
  if (refuses_this_call()) return remembered(cudaErrorInvalidValue);
  runtime.limits[reinterpret_cast<const void*>(kernel)].push_back(bytes);
  return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  using namespace qrosa::model;
  const auto* name = reinterpret_cast<const void*>(kernel);
  if (refuses_this_call() || !fits(name, *config)) return remembered(cudaErrorInvalidConfiguration);
  runtime.launches.push_back({name, config->gridDim, static_cast<int64_t>(config->dynamicSmemBytes)});
  if (!runtime.runs) return cudaSuccess;
  Dim3 grid = config->gridDim;
  if (runtime.folds && grid.y > 1 && grid.z == 1) grid = {grid.x, (grid.y + 2) / 3, 3};
  launch(grid, static_cast<int>(config->blockDim.x), static_cast<int64_t>(config->dynamicSmemBytes),
         [&] { kernel(arguments...); });
  return cudaSuccess;
}
