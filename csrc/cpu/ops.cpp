// The CPU bindings: check, split among torch's threads, call the kernels.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cstdlib>
#include <new>

#include "../checks.h"
#include "kernels.h"

namespace qrosa {
namespace {

constexpr int64_t kPackedBytes = 1 << 20;  // of a packed chunk of X: half of a common L2 cache
constexpr int64_t kStripRows = 256;        // columns of dY packed at a time
constexpr int64_t kScoreRows = 256, kScoreColumns = 512, kScoreDepth = 512;  // of a tile of the mask statistic

Float float_type(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  return type == ScalarType::BFloat16 ? Float::kBf16 : type == ScalarType::Half ? Float::kFp16 : Float::kFp32;
}

int64_t bytes_of(Float type) { return type == Float::kFp32 ? 4 : 2; }

const void* offset(const void* base, int64_t elements, Float type) {
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

thread_local Workspace shared_space, strip_space, tile_space;

void check_indices(const std::atomic<bool>& sound) {
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

int64_t grain_rows(int64_t columns) { return columns > 0 ? 1 + 32768 / columns : 1; }

void dequant_add(const Tensor& codes, const Tensor& absmax, const OptionalTensor& absmax_code,
                 const OptionalTensor& absmax_scale, const OptionalTensor& absmax_offset, int64_t block_size,
                 const OptionalTensor& row_ptr, const OptionalTensor& col, const OptionalTensor& values, Tensor out) {
  check_matrix(out, "out");
  const int64_t rows = out.size(0), columns = out.size(1);
  const Nf4View nf4 = nf4_view(codes, absmax, absmax_code, absmax_scale, absmax_offset, block_size, rows, columns, out);
  const CsrView csr = optional_csr_view(row_ptr, col, values, rows, columns, out);
  void* target = out.mutable_data_ptr();
  const Float type = float_type(out);
  const Kernels& use = kernels();
  over_rows(rows, grain_rows(columns),
            [&](int64_t begin, int64_t end) { return use.dequant_rows(nf4, csr, type, target, columns, begin, end); });
}

void check_pair(const Tensor& dy, const Tensor& x) {
  check_matrix(dy, "dy");
  check_matrix(x, "x");
  STD_TORCH_CHECK(dy.size(0) == x.size(0), "dy has ", dy.size(0), " rows, x has ", x.size(0));
  STD_TORCH_CHECK(dy.scalar_type() == x.scalar_type(), "dy and x differ in dtype");
}

// Rows of dY and X in one packed chunk: a pure function of the shape, so that sums never depend on threads.
int64_t chunk_rows(int64_t rows, int64_t columns, Float type) {
  const int64_t fitting = kPackedBytes / (bytes_of(type) * (columns > 0 ? columns : 1)) / 64 * 64;
  const int64_t limited = fitting < 64 ? 64 : fitting > 512 ? 512 : fitting;
  return rows < limited ? rows : limited;
}

struct SddmmWork {
  Float type;
  CsrView csr;
  const void *dy, *x;
  int64_t rows, features, columns;
  float* out;
};

bool sddmm_chunk(const Kernels& use, const SddmmWork& work, int64_t start, int64_t depth, uint32_t* packed_x) {
  const int64_t words = use.packed_words(work.type, depth);
  torch::stable::parallel_for(0, (work.columns + 63) / 64, 4, [&](int64_t begin, int64_t end) {
    const int64_t first = 64 * begin, last = 64 * end < work.columns ? 64 * end : work.columns;
    use.pack_columns(work.type, offset(work.x, start * work.columns + first, work.type), work.columns, depth,
                     last - first, packed_x + first * words);
  });
  std::atomic<bool> sound{true};
  torch::stable::parallel_for(0, (work.features + kStripRows - 1) / kStripRows, 1, [&](int64_t begin, int64_t end) {
    uint32_t* packed_dy = strip_space.get<uint32_t>(kStripRows * words);
    for (int64_t strip = begin; strip < end; ++strip) {
      const int64_t first = strip * kStripRows;
      const int64_t last = first + kStripRows < work.features ? first + kStripRows : work.features;
      if (work.csr.row_ptr[first] == work.csr.row_ptr[last]) continue;
      use.pack_columns(work.type, offset(work.dy, start * work.features + first, work.type), work.features, depth,
                       last - first, packed_dy);
      if (!use.sddmm_rows(work.type, work.csr, packed_dy, packed_x, words, work.columns, first, last, start == 0,
                          work.out)) {
        sound.store(false);
      }
    }
  });
  return sound.load();
}

Tensor sddmm(const Tensor& dy, const Tensor& x, const Tensor& row_ptr, const Tensor& col) {
  check_pair(dy, x);
  SddmmWork work{float_type(x), {}, dy.data_ptr(), x.data_ptr(), x.size(0), dy.size(1), x.size(1), nullptr};
  work.csr = csr_view(row_ptr, col, std::nullopt, work.features, work.columns, x);
  Tensor out = torch::stable::new_empty(x, {work.csr.nnz}, ScalarType::Float);
  if (work.csr.nnz == 0) return out;
  if (work.rows == 0) return torch::stable::zero_(out);
  work.out = static_cast<float*>(out.mutable_data_ptr());
  const Kernels& use = kernels();
  const int64_t chunk = chunk_rows(work.rows, work.columns, work.type);
  uint32_t* packed_x = shared_space.get<uint32_t>(use.packed_words(work.type, chunk) * work.columns);
  STD_TORCH_CHECK(work.csr.row_ptr[0] == 0 && work.csr.row_ptr[work.features] == work.csr.nnz,
                  "row_ptr must start at 0 and end at the number of values");
  for (int64_t start = 0; start < work.rows; start += chunk) {
    const int64_t depth = start + chunk < work.rows ? chunk : work.rows - start;
    STD_TORCH_CHECK(sddmm_chunk(use, work, start, depth, packed_x),
                    "the sparse delta's row_ptr or col points outside the matrix");
  }
  return out;
}

Tensor dequant_spmm(const Tensor& x, const Tensor& codes, const Tensor& absmax, const OptionalTensor& absmax_code,
                    const OptionalTensor& absmax_scale, const OptionalTensor& absmax_offset, int64_t block_size,
                    const OptionalTensor& row_ptr, const OptionalTensor& col, const OptionalTensor& values,
                    int64_t features) {
  check_matrix(x, "x");
  const int64_t rows = x.size(0), columns = x.size(1);
  const Nf4View nf4 =
      nf4_view(codes, absmax, absmax_code, absmax_scale, absmax_offset, block_size, features, columns, x);
  const CsrView csr = optional_csr_view(row_ptr, col, values, features, columns, x);
  Tensor y = torch::stable::new_empty(x, {rows, features});
  const Float type = float_type(x);
  const Kernels& use = kernels();
  float* prepared = shared_space.get<float>(use.spmm_workspace(rows, columns));
  use.spmm_prepare(nf4, type, x.data_ptr(), rows, columns, prepared);
  const void* source = x.data_ptr();
  void* target = y.mutable_data_ptr();
  over_rows(features, grain_rows(columns), [&](int64_t begin, int64_t end) {
    float* tile = tile_space.get<float>(columns + 64);
    return use.spmm_rows(nf4, csr, type, source, prepared, target, rows, columns, features, begin, end, tile);
  });
  return y;
}

void score_block(const Kernels& use, const Tensor& dy, const Tensor& x, float* stat, bool square, int64_t n0,
                 int64_t k0) {
  const Float type = float_type(x);
  const int64_t rows = x.size(0), features = dy.size(1), columns = x.size(1);
  const int64_t n = n0 + kScoreRows < features ? kScoreRows : features - n0;
  const int64_t k = k0 + kScoreColumns < columns ? kScoreColumns : columns - k0;
  float* tile = tile_space.get<float>(kScoreRows * kScoreColumns);
  for (int64_t i = 0; i < n * kScoreColumns; ++i) tile[i] = 0.0f;
  const int64_t most_words = use.packed_words(type, kScoreDepth);
  uint32_t* packed_dy = strip_space.get<uint32_t>(most_words * (kScoreRows + kScoreColumns + 64));
  for (int64_t start = 0; start < rows; start += kScoreDepth) {
    const int64_t depth = start + kScoreDepth < rows ? kScoreDepth : rows - start;
    const int64_t words = use.packed_words(type, depth);
    use.pack_columns(type, offset(dy.data_ptr(), start * features + n0, type), features, depth, n, packed_dy);
    use.score_tile(type, packed_dy, words, offset(x.data_ptr(), start * columns + k0, type), columns, depth, n, k,
                   packed_dy + most_words * kScoreRows, tile, kScoreColumns);
  }
  use.score_add(tile, kScoreColumns, n, k, square, stat + n0 * columns + k0, columns);
}

void score_accumulate(const Tensor& dy, const Tensor& x, Tensor stat, bool square) {
  check_pair(dy, x);
  STD_TORCH_CHECK(stat.dim() == 2 && stat.size(0) == dy.size(1) && stat.size(1) == x.size(1), "stat must be [",
                  dy.size(1), ", ", x.size(1), "]");
  STD_TORCH_CHECK(stat.scalar_type() == ScalarType::Float, "stat must be fp32");
  check_dense(stat, "stat");
  auto* target = static_cast<float*>(stat.mutable_data_ptr());
  const int64_t across = (x.size(1) + kScoreColumns - 1) / kScoreColumns;
  const int64_t blocks = across * ((dy.size(1) + kScoreRows - 1) / kScoreRows);
  const Kernels& use = kernels();
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      score_block(use, dy, x, target, square, i / across * kScoreRows, i % across * kScoreColumns);
    }
  });
}

Tensor dropout(const Tensor& x, double p, int64_t seed) {
  STD_TORCH_CHECK(p >= 0.0 && p < 1.0, "dropout must be in [0, 1), got ", p);
  STD_TORCH_CHECK(is_kernel_float(x.scalar_type()), "x must be bf16, fp16 or fp32");
  check_dense(x, "x");
  Tensor out = torch::stable::empty_like(x);
  const void* source = x.data_ptr();
  void* target = out.mutable_data_ptr();
  const Float type = float_type(x);
  const Kernels& use = kernels();
  const DropoutKeys keys = dropout_keys(seed);
  const auto scale = static_cast<float>(1.0 / (1.0 - p));
  torch::stable::parallel_for(0, x.numel(), 32768, [&](int64_t begin, int64_t end) {
    use.dropout(type, source, target, begin, end, keys, dropout_threshold(p), scale);
  });
  return out;
}

// Tokens that are multiplied with one decoding of the weight: their sums for a panel (512 fp32 numbers each) stay in
// L2.
constexpr int64_t kTokens = 512;

void matmul_block(const Kernels& use, const MatmulWork& work, const void* x, const void* left) {
  const int64_t depth = work.forward ? work.columns : work.features;
  const int64_t blocks = (work.tokens + 31) / 32 * 2;
  const int64_t bytes = blocks * 1024 * ((depth + 31) / 32), left_bytes = blocks * 1024 * ((work.rank + 31) / 32);
  char* packed = shared_space.get<char>(bytes + left_bytes);
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    use.pack_tokens(work.forward, x, work.tokens, depth, begin, end, packed);
    if (work.rank > 0) use.pack_tokens(work.forward, left, work.tokens, work.rank, begin, end, packed + bytes);
  });
  over_rows(use.matmul_units(work), 1, [&](int64_t begin, int64_t end) {
    return use.matmul(work, packed, packed + bytes, begin, end, tile_space.get<char>(use.matmul_workspace(work)));
  });
}

void check_bf16(const OptionalTensor& tensor, int64_t rows, int64_t columns, const char* name) {
  if (!tensor.has_value()) return;
  check_matrix(*tensor, name);
  STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::BFloat16, name, " must be bf16");
  STD_TORCH_CHECK(tensor->size(0) == rows && tensor->size(1) == columns, name, " must be [", rows, ", ", columns, "]");
}

Tensor dequant_matmul(const Tensor& x, const Tensor& codes, const Tensor& absmax, const OptionalTensor& absmax_code,
                      const OptionalTensor& absmax_scale, const OptionalTensor& absmax_offset, int64_t block_size,
                      const OptionalTensor& row_ptr, const OptionalTensor& col, const OptionalTensor& values,
                      int64_t features, int64_t columns, bool forward, const OptionalTensor& left,
                      const OptionalTensor& right, const OptionalTensor& bias) {
  const Kernels& use = kernels();
  STD_TORCH_CHECK(use.matmul != nullptr, "dequant_matmul needs a processor with AMX");
  STD_TORCH_CHECK(block_size == 64 && columns % 64 == 0, "dequant_matmul needs blocks of 64 that do not cross rows");
  const int64_t tokens = x.size(0), depth = forward ? columns : features, width = forward ? features : columns;
  check_bf16(x, tokens, depth, "x");
  STD_TORCH_CHECK(left.has_value() == right.has_value(), "left and right come together or not at all");
  MatmulWork work{};
  work.forward = forward;
  work.nf4 = nf4_view(codes, absmax, absmax_code, absmax_scale, absmax_offset, block_size, features, columns, x);
  work.csr = optional_csr_view(row_ptr, col, values, features, columns, x);
  work.features = features;
  work.columns = columns;
  if (left.has_value()) {
    work.rank = left->size(1);
    check_bf16(left, tokens, work.rank, "left");
    check_bf16(right, forward ? features : work.rank, forward ? work.rank : columns, "right");
    work.right = right->data_ptr();
  }
  if (bias.has_value()) work.bias = checked_data<float>(*bias, ScalarType::Float, features, x, "bias");
  Tensor out = torch::stable::new_empty(x, {tokens, width});
  auto* target = static_cast<char*>(out.mutable_data_ptr());
  for (int64_t start = 0; start < tokens; start += kTokens) {
    work.tokens = start + kTokens < tokens ? kTokens : tokens - start;
    work.out = target + start * width * 2;
    matmul_block(use, work, offset(x.data_ptr(), start * depth, Float::kBf16),
                 left.has_value() ? offset(left->data_ptr(), start * work.rank, Float::kBf16) : nullptr);
  }
  return out;
}

// Forces an instruction set when `request` names one (0 portable ... 4 AMX); returns the one in use.
int64_t cpu_isa(int64_t request) {
  STD_TORCH_CHECK(request >= -1 && request <= 4, "no such instruction set: ", request);
  return static_cast<int64_t>(request < 0 ? current_isa() : force_isa(static_cast<Isa>(request)));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qrosa, CPU, library) {
  library.impl("dequant_add", TORCH_BOX(&dequant_add));
  library.impl("sddmm", TORCH_BOX(&sddmm));
  library.impl("dequant_spmm", TORCH_BOX(&dequant_spmm));
  library.impl("dequant_matmul", TORCH_BOX(&dequant_matmul));
  library.impl("score_accumulate", TORCH_BOX(&score_accumulate));
  library.impl("dropout", TORCH_BOX(&dropout));
}

STABLE_TORCH_LIBRARY_IMPL(qrosa, CompositeExplicitAutograd, library) { library.impl("cpu_isa", TORCH_BOX(&cpu_isa)); }

}  // namespace qrosa
