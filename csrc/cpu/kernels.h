// What each instruction set provides: one table of kernels, filled by the file kernels_<isa>.cpp.
//
// The bindings split the work among threads and call through the table that `kernels()` picked for this machine. A
// kernel works on a range, on raw pointers that were checked, and returns false when it met an index outside the
// matrix.
#pragma once

#include <cstdint>

#include "../csr.h"
#include "../dropout.h"
#include "../nf4.h"
#include "../norm.h"

namespace qrosa {

enum class Float { kBf16, kFp16, kFp32 };

enum class Isa { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4 };

// Dropout of a matrix whose first element has the index `first`; threshold 0 keeps everything.
struct Dropout {
  DropoutKeys keys;
  uint32_t threshold, first;
};

// A product with W_eff [features, columns] of NF4 and CSR, bf16 throughout (see dequant_matmul.h).
struct MatmulWork {
  bool forward;  // X W_eff^T + left right^T + bias, or dY W_eff + drop(left right)
  Nf4View nf4;
  CsrView csr;
  int64_t tokens, features, columns, rank;
  const void* right;  // [features, rank] forward, [rank, columns] backward; null at rank 0
  const float* bias;  // [features] or null
  Dropout dropout;    // backward only, for ranks up to kMaskedRank
  void* out;          // [tokens, features] forward, [tokens, columns] backward
};

constexpr int64_t kMaskedRank = 256;

// Tokens on their way into tiles, and their product with a thin factor (see low_rank.h).
struct TokenWork {
  bool forward;
  const void* src;  // [tokens, depth]
  int64_t tokens, depth, rank;
  const void* factor;  // tiles, by pack_factor
  Dropout dropout;     // of src, in the thin product only
  float scale;         // projected = scale * (src factor), left = left_scale * projected
  float left_scale;
  void* projected;             // [tokens, rank]
  void *packed, *packed_left;  // tiles; null: not wanted
};

// Packed columns of a chunk of tokens times a thin factor.
struct ColumnWork {
  int64_t columns, rank, words;
  const void* factor;  // tiles, by pack_factor
  Dropout dropout;     // of the columns; `first` is that of the chunk
  bool first;          // the first chunk
};

// A layer for few rows of x, y = x W_eff^T + scale (x A^T) B^T + bias (see dequant_spmm.h).
struct DecodeWork {
  Nf4View nf4;
  CsrView csr;
  int64_t tokens, features, columns, rank;
  Float type, low_rank_type;
  const void* x;      // [tokens, columns]
  const void *a, *b;  // [rank, columns], [features, rank]; null at rank 0
  float scale;
  const void* bias;  // [features] in x's type, or null
  void* y;           // [tokens, features] in x's type
};

struct Kernels {
  // out[row, :] = round(deq + S) for rows [begin, end); out is the whole [N, K].
  bool (*dequant_rows)(const Nf4View& nf4, const CsrView& csr, Float type, void* out, int64_t columns, int64_t begin,
                       int64_t end);

  // 32-bit words that one packed column of `rows` rows takes (bf16 packs two rows in a word), padded for the vectors.
  int64_t (*packed_words)(Float type, int64_t rows);
  // packed[c * words + ...] = column c of src [rows, columns], zero-padded; src rows are `stride` elements apart.
  void (*pack_columns)(Float type, const void* src, int64_t stride, int64_t rows, int64_t columns, uint32_t* packed);
  // out[i] (+)= packed_dy[row] . packed_x[column i] for the stored positions of rows [begin, end).
  bool (*sddmm_rows)(Float type, const CsrView& csr, const uint32_t* packed_dy, const uint32_t* packed_x, int64_t words,
                     int64_t columns, int64_t begin, int64_t end, bool first, float* out);

  // Floats that decode_prepare writes, and that a thread needs for itself in decode_rows.
  int64_t (*decode_workspace)(const DecodeWork& work);
  int64_t (*decode_tile)(const DecodeWork& work);
  void (*decode_prepare)(const DecodeWork& work, float* prepared);
  // y[:, n] for n in [begin, end); begin is a multiple of 4.
  bool (*decode_rows)(const DecodeWork& work, const float* prepared, int64_t begin, int64_t end, float* tile);

  // tile [n, k] += dY^T X over `depth` rows; packed_dy as by pack_columns, x rows `stride` elements apart.
  void (*score_tile)(Float type, const uint32_t* packed_dy, int64_t words, const void* x, int64_t stride, int64_t depth,
                     int64_t n, int64_t k, uint32_t* packed_x, float* tile, int64_t tile_stride);
  // stat += tile, or tile squared.
  void (*score_add)(const float* tile, int64_t tile_stride, int64_t n, int64_t k, bool square, float* stat,
                    int64_t stat_stride);

  // out[i] = keep(i) ? x[i] * scale : 0 for i in [begin, end).
  void (*dropout)(Float type, const void* x, void* out, int64_t begin, int64_t end, DropoutKeys keys,
                  uint32_t threshold, float scale);

  // Rows [begin, end) of what norm.h says.
  void (*rms_norm)(Float type, const NormWork& work, int64_t begin, int64_t end);
  void (*gate)(Float type, const GateWork& work, int64_t begin, int64_t end);

  // Products that never write the dense weight; null where the processor has no matrix tiles.
  int64_t (*matmul_units)(const MatmulWork& work);
  int64_t (*matmul_workspace)(const MatmulWork& work);
  void (*pack_factor)(bool by_rows, const void* src, int64_t rank, int64_t depth, void* tiles);
  int64_t (*token_workspace)(const TokenWork& work);
  void (*pack_tokens)(const TokenWork& work, int64_t begin, int64_t end, void* space);
  void (*column_products)(const ColumnWork& work, const uint32_t* packed, int64_t begin, int64_t end, float* sums,
                          void* space);
  void (*write_columns)(const ColumnWork& work, bool across, const float* sums, float scale, int64_t begin, int64_t end,
                        void* out);
  bool (*matmul)(const MatmulWork& work, const void* packed, const void* packed_left, int64_t begin, int64_t end,
                 void* space);
};

extern const Kernels kPortableKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx512Bf16Kernels;
extern const Kernels kAmxKernels;
#endif

// The kernels for this machine, or what QROSA_CPU_ISA / qrosa::cpu_isa asked for.
const Kernels& kernels();
Isa current_isa();
// Uses `isa`, or the best below it that this machine has; returns what is used.
Isa force_isa(Isa isa);

}  // namespace qrosa
