// The bindings of training: the sparse gradient, and the whole layer on matrix tiles.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "binding.h"

namespace qrosa {
namespace {

constexpr int64_t kPackedBytes = 1 << 20;  // of a packed chunk of X: half of a common L2 cache
constexpr int64_t kStripRows = 256;        // columns of dY packed at a time
constexpr int64_t kUnit = 64;              // columns of dY and X that threads share out
// Up to so many threads pack all of X each for itself: to fetch what another core has just written takes longer than to
// pack it again (2048 x 2048 on two cores: 350 us against 200).
constexpr uint32_t kOwnCopies = 3;
constexpr int64_t kTileBytes = 1024;
// Tokens that are multiplied with one decoding of the weight: their sums for a panel (512 fp32 numbers each) stay in
// L2.
constexpr int64_t kTokens = 512;

int64_t groups(int64_t count, int64_t size) { return (count + size - 1) / size; }
int64_t factor_bytes(int64_t rank, int64_t depth) { return groups(rank, 16) * groups(depth, 32) * kTileBytes; }
int64_t sums_count(int64_t rank, int64_t columns) { return groups(rank, 16) * groups(columns, 16) * 256; }

// ---- gradients of the adapters -------------------------------------------------------------------------------------

// Rows of dY and X in one packed chunk: a pure function of the shape, so that sums never depend on threads.
int64_t chunk_rows(int64_t rows, int64_t columns, Float type) {
  const int64_t fitting = kPackedBytes / (bytes_of(type) * (columns > 0 ? columns : 1)) / 64 * 64;
  const int64_t limited = fitting < 64 ? 64 : fitting > 512 ? 512 : fitting;
  return rows < limited ? rows : limited;
}

struct GradientWork {
  Float type;
  const void *dy, *x;
  int64_t rows, features, columns;
  CsrView csr;  // row_ptr null: the sparse gradient is not wanted
  float* out;
  int64_t rank;                   // of the low-rank part; 0: its gradients are not wanted
  const void *inner, *projected;  // [rows, rank]; null: without dA, dB
  Dropout dropout;                // of x, for dA
  float *sums_a, *sums_b;         // tiles (low_rank.h)
};

// What a chunk of tokens works with.
struct Chunk {
  int64_t start, depth, words;
  uint32_t* packed_x;
  const char *inner, *projected;  // tiles
};

Chunk make_chunk(const Kernels& use, const GradientWork& work, int64_t start, int64_t depth) {
  Chunk chunk{start, depth, use.packed_words(work.type, depth), nullptr, nullptr, nullptr};
  if (work.rank == 0) return chunk;
  const int64_t bytes = factor_bytes(work.rank, depth);
  char* tiles = factor_space.get<char>(2 * bytes);
  chunk.inner = tiles;
  chunk.projected = tiles + bytes;
  if (work.inner != nullptr) {
    use.pack_factor(false, offset(work.inner, start * work.rank, work.type), work.rank, depth, tiles);
  }
  if (work.projected != nullptr) {
    use.pack_factor(false, offset(work.projected, start * work.rank, work.type), work.rank, depth, tiles + bytes);
  }
  return chunk;
}

// Columns [first, last) of X into their place, and their part of dA if wanted.
void pack_x(const Kernels& use, const GradientWork& work, const Chunk& chunk, int64_t first, int64_t last,
            bool products) {
  uint32_t* target = chunk.packed_x + first * chunk.words;
  use.pack_columns(work.type, offset(work.x, chunk.start * work.columns + first, work.type), work.columns, chunk.depth,
                   last - first, target);
  if (!products || work.inner == nullptr) return;
  ColumnWork thin{work.columns, work.rank, chunk.words, chunk.inner, work.dropout, chunk.start == 0};
  thin.dropout.first = static_cast<uint32_t>(chunk.start * work.columns);
  use.column_products(thin, target, first, last, work.sums_a, tile_space.get<char>(64 * chunk.words));
}

// Columns [first, last) of dY.
bool strip_gradients(const Kernels& use, const GradientWork& work, const Chunk& chunk, int64_t first, int64_t last) {
  const bool sparse = work.csr.row_ptr != nullptr && work.csr.row_ptr[first] != work.csr.row_ptr[last];
  if (!sparse && work.projected == nullptr) return true;
  uint32_t* packed = strip_space.get<uint32_t>(kStripRows * chunk.words);
  use.pack_columns(work.type, offset(work.dy, chunk.start * work.features + first, work.type), work.features,
                   chunk.depth, last - first, packed);
  if (work.projected != nullptr) {
    const ColumnWork thin{work.features, work.rank, chunk.words, chunk.projected, {}, chunk.start == 0};
    use.column_products(thin, packed, first, last, work.sums_b, nullptr);
  }
  return !sparse || use.sddmm_rows(work.type, work.csr, packed, chunk.packed_x, chunk.words, work.columns, first, last,
                                   chunk.start == 0, work.out);
}

// All gradients that need both whole matrices, each of which is read and packed once.
void adapter_gradients(const Kernels& use, const GradientWork& work) {
  if (work.csr.row_ptr != nullptr) {
    STD_TORCH_CHECK(work.csr.row_ptr[0] == 0 && work.csr.row_ptr[work.features] == work.csr.nnz,
                    "row_ptr must start at 0 and end at the number of values");
  }
  const int64_t size = chunk_rows(work.rows, work.columns, work.type);
  for (int64_t start = 0; start < work.rows; start += size) {
    Chunk chunk = make_chunk(use, work, start, start + size < work.rows ? size : work.rows - start);
    const auto strips = [&](const Chunk& with, int64_t begin, int64_t end) {
      bool sound = true;
      const int64_t stop = kUnit * end < work.features ? kUnit * end : work.features;
      for (int64_t first = kUnit * begin; first < stop; first += kStripRows) {
        const int64_t last = first + kStripRows < stop ? first + kStripRows : stop;
        sound = strip_gradients(use, work, with, first, last) && sound;
      }
      return sound;
    };
    const bool sparse = work.csr.row_ptr != nullptr;
    const int64_t units = groups(work.features, kUnit), x_units = groups(work.columns, kUnit);
    const auto x_end = [&](int64_t unit) { return kUnit * unit < work.columns ? kUnit * unit : work.columns; };
    if (units == 0 || torch::stable::get_num_threads() > kOwnCopies) {
      chunk.packed_x = shared_space.get<uint32_t>(chunk.words * work.columns);
      torch::stable::parallel_for(0, sparse || work.inner != nullptr ? x_units : 0, 4, [&](int64_t begin, int64_t end) {
        pack_x(use, work, chunk, x_end(begin), x_end(end), true);
      });
      over_rows(units, 1, [&](int64_t begin, int64_t end) { return strips(chunk, begin, end); });
      continue;
    }
    over_rows(units, 1, [&](int64_t begin, int64_t end) {
      Chunk own = chunk;
      own.packed_x = shared_space.get<uint32_t>(chunk.words * work.columns);
      const int64_t first = x_end(x_units * begin / units), last = x_end(x_units * end / units);
      pack_x(use, work, own, first, last, true);
      if (sparse) {
        pack_x(use, work, own, 0, first, false);
        pack_x(use, work, own, last, work.columns, false);
      }
      return strips(own, begin, end);
    });
  }
}

Tensor sddmm(const Tensor& dy, const Tensor& x, const Tensor& row_ptr, const Tensor& col) {
  check_pair(dy, x);
  GradientWork work{};
  work.type = float_type(x);
  work.dy = dy.data_ptr();
  work.x = x.data_ptr();
  work.rows = x.size(0);
  work.features = dy.size(1);
  work.columns = x.size(1);
  work.csr = csr_view(row_ptr, col, std::nullopt, work.features, work.columns, x);
  Tensor out = torch::stable::new_empty(x, {work.csr.nnz}, ScalarType::Float);
  if (work.csr.nnz == 0) return out;
  if (work.rows == 0) return torch::stable::zero_(out);
  work.out = static_cast<float*>(out.mutable_data_ptr());
  adapter_gradients(kernels(), work);
  return out;
}

// ---- the layer on matrix tiles -------------------------------------------------------------------------------------

void check_bf16(const OptionalTensor& tensor, int64_t rows, int64_t columns, const char* name) {
  if (!tensor.has_value()) return;
  check_matrix(*tensor, name);
  STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::BFloat16, name, " must be bf16");
  STD_TORCH_CHECK(tensor->size(0) == rows && tensor->size(1) == columns, name, " must be [", rows, ", ", columns, "]");
}

// Checks what forward and backward are both given; returns the rank.
int64_t check_layer(const Tensor& x, int64_t block_size, int64_t features, const OptionalTensor& a,
                    const OptionalTensor& b, double dropout_p) {
  const int64_t columns = x.size(1);
  STD_TORCH_CHECK(kernels().matmul != nullptr, "linear_tiles needs a processor with AMX");
  STD_TORCH_CHECK(block_size == 64 && columns % 64 == 0, "linear_tiles needs blocks of 64 that do not cross rows");
  check_bf16(x, x.size(0), columns, "x");
  STD_TORCH_CHECK(x.size(0) > 0, "there are no tokens");
  STD_TORCH_CHECK(features * columns <= int64_t{1} << 31, "linear_tiles counts the weight's elements in 32 bits");
  STD_TORCH_CHECK(a.has_value() == b.has_value(), "a and b come together or not at all");
  STD_TORCH_CHECK(dropout_p >= 0.0 && dropout_p < 1.0, "dropout must be in [0, 1), got ", dropout_p);
  if (!a.has_value()) return 0;
  const int64_t rank = a->size(0);
  check_bf16(a, rank, columns, "a");
  check_bf16(b, features, rank, "b");
  STD_TORCH_CHECK(dropout_p == 0.0 || rank <= kMaskedRank, "with dropout, linear_tiles takes a rank of at most ",
                  kMaskedRank);
  return rank;
}

// A block of tokens into tiles with their thin product, then the wide product (unless work.out is null).
void tile_products(const Kernels& use, MatmulWork& work, TokenWork& tokens) {
  const int64_t blocks = groups(work.tokens, 32) * 2;
  const int64_t bytes = blocks * kTileBytes * groups(tokens.depth, 32);
  char* packed = shared_space.get<char>(bytes + blocks * kTileBytes * groups(work.rank, 32));
  tokens.tokens = work.tokens;
  tokens.packed = work.out == nullptr ? nullptr : packed;
  tokens.packed_left = work.out == nullptr ? nullptr : packed + bytes;
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    use.pack_tokens(tokens, begin, end, tile_space.get<char>(use.token_workspace(tokens)));
  });
  if (work.out == nullptr) return;
  over_rows(use.matmul_units(work), 1, [&](int64_t begin, int64_t end) {
    return use.matmul(work, packed, packed + bytes, begin, end, tile_space.get<char>(use.matmul_workspace(work)));
  });
}

// All tokens of src, some hundred at a time; `projected` [tokens, rank] and `out` [tokens, width] may be null.
void over_tokens(const Kernels& use, MatmulWork& work, TokenWork& thin, const Tensor& src, void* projected, void* out) {
  const int64_t count = src.size(0), width = work.forward ? work.features : work.columns;
  for (int64_t start = 0; start < count; start += kTokens) {
    work.tokens = start + kTokens < count ? kTokens : count - start;
    work.out = out == nullptr ? nullptr : static_cast<char*>(out) + start * width * 2;
    work.dropout.first = thin.dropout.first = static_cast<uint32_t>(start * work.columns);
    thin.src = offset(src.data_ptr(), start * thin.depth, Float::kBf16);
    thin.projected = projected == nullptr ? nullptr : static_cast<char*>(projected) + start * work.rank * 2;
    tile_products(use, work, thin);
  }
}

std::tuple<Tensor, Tensor> linear_tiles(const Tensor& x, const Tensor& codes, const Tensor& absmax,
                                        const OptionalTensor& absmax_code, const OptionalTensor& absmax_scale,
                                        const OptionalTensor& absmax_offset, int64_t block_size, int64_t features,
                                        const OptionalTensor& bias, const OptionalTensor& row_ptr,
                                        const OptionalTensor& col, const OptionalTensor& values,
                                        const OptionalTensor& a, const OptionalTensor& b, double scale,
                                        double dropout_p, int64_t seed) {
  const Kernels& use = kernels();
  MatmulWork work{};
  work.forward = true;
  work.features = features;
  work.columns = x.size(1);
  work.rank = check_layer(x, block_size, features, a, b, dropout_p);
  work.nf4 = nf4_view(codes, absmax, absmax_code, absmax_scale, absmax_offset, block_size, features, work.columns, x);
  work.csr = optional_csr_view(row_ptr, col, values, features, work.columns, x);
  if (bias.has_value()) work.bias = checked_data<float>(*bias, ScalarType::Float, features, x, "bias");
  TokenWork thin{};
  thin.forward = true;
  thin.depth = work.columns;
  thin.rank = work.rank;
  thin.dropout = {dropout_keys(seed), dropout_threshold(dropout_p), 0};
  thin.scale = static_cast<float>(1.0 / (1.0 - dropout_p));
  thin.left_scale = static_cast<float>(scale);
  Tensor y = torch::stable::new_empty(x, {x.size(0), features});
  Tensor projected =
      a.has_value() ? torch::stable::new_empty(x, {x.size(0), work.rank}) : torch::stable::new_empty(x, {int64_t{0}});
  if (work.rank > 0) {
    work.right = b->data_ptr();
    char* tiles = factor_space.get<char>(factor_bytes(work.rank, work.columns));
    use.pack_factor(true, a->data_ptr(), work.rank, work.columns, tiles);
    thin.factor = tiles;
  }
  over_tokens(use, work, thin, x, projected.mutable_data_ptr(), y.mutable_data_ptr());
  return {y, projected};
}

struct Wanted {
  bool x, values, a, b;
};

// dX [tokens, columns] and inner = scale / (1 - p) * dY B [tokens, rank], each if wanted.
void input_gradient(const Kernels& use, MatmulWork& work, const Tensor& dy, const OptionalTensor& a,
                    const OptionalTensor& b, double scale, double dropout_p, int64_t seed, void* inner, void* dx) {
  TokenWork thin{};
  thin.depth = work.features;
  thin.rank = work.rank;
  thin.scale = static_cast<float>(scale / (1.0 - dropout_p));
  thin.left_scale = 1.0f;
  work.dropout = {dropout_keys(seed), dropout_threshold(dropout_p), 0};
  if (work.rank > 0) {
    work.right = a->data_ptr();
    char* tiles = factor_space.get<char>(factor_bytes(work.rank, work.features));
    use.pack_factor(false, b->data_ptr(), work.rank, work.features, tiles);
    thin.factor = tiles;
  }
  over_tokens(use, work, thin, dy, inner, dx);
}

// The low-rank gradients from their sums, [rank, columns] and [features, rank].
void write_low_rank(const Kernels& use, const GradientWork& work, float scale, void* da, void* db) {
  const auto write = [&](int64_t columns, bool across, const float* sums, float factor, void* out) {
    if (out == nullptr) return;
    const ColumnWork thin{columns, work.rank, 0, nullptr, {}, false};
    torch::stable::parallel_for(0, groups(columns, 16), 64, [&](int64_t begin, int64_t end) {
      use.write_columns(thin, across, sums, factor, 16 * begin, 16 * end < columns ? 16 * end : columns, out);
    });
  };
  write(work.columns, true, work.sums_a, 1.0f, da);
  write(work.features, false, work.sums_b, scale, db);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_tiles_backward(
    const Tensor& dy, const Tensor& x, const Tensor& projected, const Tensor& codes, const Tensor& absmax,
    const OptionalTensor& absmax_code, const OptionalTensor& absmax_scale, const OptionalTensor& absmax_offset,
    int64_t block_size, const OptionalTensor& row_ptr, const OptionalTensor& col, const OptionalTensor& values,
    const OptionalTensor& a, const OptionalTensor& b, double scale, double dropout_p, int64_t seed, bool needs_x,
    bool needs_values, bool needs_a, bool needs_b) {
  const Kernels& use = kernels();
  check_pair(dy, x);
  const int64_t tokens = x.size(0), features = dy.size(1), columns = x.size(1);
  MatmulWork work{};
  work.features = features;
  work.columns = columns;
  work.rank = check_layer(x, block_size, features, a, b, dropout_p);
  work.nf4 = nf4_view(codes, absmax, absmax_code, absmax_scale, absmax_offset, block_size, features, columns, x);
  work.csr = optional_csr_view(row_ptr, col, values, features, columns, x);
  const Wanted want{needs_x, needs_values && row_ptr.has_value(), needs_a && work.rank > 0, needs_b && work.rank > 0};
  if (want.b) check_bf16(projected, tokens, work.rank, "projected");
  const auto empty = [&](bool wanted, int64_t rows, int64_t wide) {
    return wanted ? torch::stable::new_empty(x, {rows, wide}) : torch::stable::new_empty(x, {int64_t{0}});
  };
  Tensor dx = empty(want.x, tokens, columns), da = empty(want.a, work.rank, columns);
  Tensor db = empty(want.b, features, work.rank), inner = empty(want.x || want.a, tokens, work.rank);
  Tensor dvalues = torch::stable::new_empty(x, {want.values ? work.csr.nnz : int64_t{0}},
                                            want.values ? ScalarType::Float : ScalarType::BFloat16);
  if (want.x || want.a) {
    input_gradient(use, work, dy, a, b, scale, dropout_p, seed, inner.mutable_data_ptr(),
                   want.x ? dx.mutable_data_ptr() : nullptr);
  }
  GradientWork rest{};
  rest.type = Float::kBf16;
  rest.dy = dy.data_ptr();
  rest.x = x.data_ptr();
  rest.rows = tokens;
  rest.features = features;
  rest.columns = columns;
  if (want.values && work.csr.nnz > 0) {
    rest.csr = work.csr;
    rest.out = static_cast<float*>(dvalues.mutable_data_ptr());
  }
  if (want.a || want.b) rest.rank = work.rank;
  if (want.a) rest.inner = inner.data_ptr();
  if (want.b) rest.projected = projected.data_ptr();
  rest.dropout = work.dropout;
  rest.sums_a = sums_space.get<float>(sums_count(work.rank, columns) + sums_count(work.rank, features));
  rest.sums_b = rest.sums_a + sums_count(work.rank, columns);
  adapter_gradients(use, rest);
  write_low_rank(use, rest, static_cast<float>(scale), want.a ? da.mutable_data_ptr() : nullptr,
                 want.b ? db.mutable_data_ptr() : nullptr);
  return {dx, dvalues, da, db};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qrosa, CPU, library) {
  library.impl("sddmm", TORCH_BOX(&sddmm));
  library.impl("linear_tiles", TORCH_BOX(&linear_tiles));
  library.impl("linear_tiles_backward", TORCH_BOX(&linear_tiles_backward));
}

}  // namespace qrosa
