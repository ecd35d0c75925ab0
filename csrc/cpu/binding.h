// What the CPU bindings share: sizes, scratch that threads keep, and work split among torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cstdlib>
#include <new>

#include "../checks.h"
#include "kernels.h"

namespace qrosa {

inline Float float_type(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  return type == ScalarType::BFloat16 ? Float::kBf16 : type == ScalarType::Half ? Float::kFp16 : Float::kFp32;
}

inline int64_t bytes_of(Float type) { return type == Float::kFp32 ? 4 : 2; }

inline const void* offset(const void* base, int64_t elements, Float type) {
  return static_cast<const char*>(base) + elements * bytes_of(type);
}

// A buffer that a thread keeps and only ever grows: fresh pages cost more than the work on them.
class Workspace {
 public:
  template <class T>
  T* get(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    if (bytes > size_) {
      std::free(data_);
      size_ = 0;
      data_ = std::aligned_alloc(64, bytes);
      if (data_ == nullptr) throw std::bad_alloc();
      size_ = bytes;
    }
    return static_cast<T*>(data_);
  }
  ~Workspace() { std::free(data_); }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

inline thread_local Workspace shared_space, strip_space, tile_space, factor_space, sums_space;

inline void check_indices(const std::atomic<bool>& sound) {
  STD_TORCH_CHECK(sound.load(), "the sparse delta's row_ptr or col points outside the matrix");
}

// Runs f(begin, end) over [0, count) on torch's threads; f returns false on a bad index.
template <class F>
void over_rows(int64_t count, int64_t grain, F f) {
  std::atomic<bool> sound{true};
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    if (!f(begin, end)) sound.store(false);
  });
  check_indices(sound);
}

inline int64_t grain_rows(int64_t columns) { return columns > 0 ? 1 + 32768 / columns : 1; }

inline void check_pair(const Tensor& dy, const Tensor& x) {
  check_matrix(dy, "dy");
  check_matrix(x, "x");
  STD_TORCH_CHECK(dy.size(0) == x.size(0), "dy has ", dy.size(0), " rows, x has ", x.size(0));
  STD_TORCH_CHECK(dy.scalar_type() == x.scalar_type(), "dy and x differ in dtype");
}

}  // namespace qrosa
