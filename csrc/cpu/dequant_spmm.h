// x @ (deq + S)^T for few rows of x, straight from the 4-bit codes.
//
// In general a row of the weight is decoded to fp32 in the nearest cache and multiplied there. With bf16 dot products the
// decoded row does not exist either: a 16-bit word of codes holds four nibbles, and shifting a vector of words by 0, 4, 8 and
// 12 bits gives four vectors of table indices; x is laid out once in that order. The table is split into two bf16 parts, so
// products keep 16 bits of it, and the block's absmax multiplies the block's sum instead of its elements.
#pragma once

#include "dequant_add.h"

namespace qrosa::QROSA_ISA {

constexpr int64_t kGroup = 128;  // weights of one step of the bf16 path: 32 words, two blocks

static inline bool spmm_from_words(const Nf4View& nf4, Float type, int64_t columns) {
#if defined(__AVX512BF16__)
  return type == Float::kBf16 && nf4.block_shift == 6 && columns % 64 == 0;
#else
  (void)nf4, (void)type, (void)columns;
  return false;
#endif
}

static int64_t spmm_workspace(Float, int64_t rows, int64_t columns) { return rows * round_up(columns, kGroup); }

// x as fp32 [rows, columns], or in word order as bf16 [rows, groups, 4, 32] (in the space of floats).
static void spmm_prepare(const Nf4View& nf4, Float type, const void* x, int64_t rows, int64_t columns, float* prepared) {
  if (!spmm_from_words(nf4, type, columns)) {
    with_type(type, [&](auto* tag) {
      const auto* source = static_cast<decltype(tag)>(const_cast<void*>(x));
      for (int64_t i = 0; i < rows * columns; ++i) prepared[i] = widen(source[i]);
    });
    return;
  }
  const auto* source = static_cast<const uint16_t*>(x);
  auto* target = reinterpret_cast<uint16_t*>(prepared);
  constexpr int kElement[4] = {1, 0, 3, 2};  // which element of a word its nibble at bit 0, 4, 8, 12 is
  for (int64_t t = 0; t < rows; ++t) {
    for (int64_t group = 0; group < columns; group += kGroup) {
      for (int j = 0; j < 4; ++j) {
        for (int64_t word = 0; word < 32; ++word, ++target) {
          const int64_t element = group + 4 * word + kElement[j];
          *target = element < columns ? source[t * columns + element] : 0;
        }
      }
    }
  }
}

static inline float sparse_dot(const CsrView& csr, int64_t row, const Bf16* x) {
  float total = 0.0f;
  for (int64_t i = csr.row_ptr[row]; i < csr.row_ptr[row + 1]; ++i) total += csr.values[i] * widen(x[column(csr, i)]);
  return total;
}

static inline bool check_row(const CsrView& csr, int64_t row, int64_t columns) {
  if (!row_in_bounds(csr, row)) return false;
  for (int64_t i = csr.row_ptr[row]; i < csr.row_ptr[row + 1]; ++i) {
    if (!column_in_bounds(column(csr, i), columns)) return false;
  }
  return true;
}

#if defined(__AVX512BF16__)
constexpr int kRowsAtOnce = 4;

struct SplitTable {
  __m512i high, low;  // the table as the sum of two bf16 numbers, each 16 values twice
  SplitTable() {
    alignas(64) uint16_t highs[32], lows[32];
    for (int i = 0; i < 32; ++i) {
      Bf16 part;
      narrow(kTable[i % 16], &part);
      highs[i] = part.bits;
      narrow(kTable[i % 16] - widen(part), &part);
      lows[i] = part.bits;
    }
    high = _mm512_load_si512(highs);
    low = _mm512_load_si512(lows);
  }
};

// The absmax of `count` blocks from `block` on.
static inline void decode_absmax(const Nf4View& nf4, int64_t block, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = block_absmax(nf4, block + i);
}

template <int kCount>
static inline void row_times(const uint8_t* codes, const uint16_t* x, int64_t x_stride, const float* absmax,
                             int64_t columns, const SplitTable& table, float* out) {
  __m512 acc[kCount];
  for (int t = 0; t < kCount; ++t) acc[t] = _mm512_setzero_ps();
  for (int64_t at = 0; at < columns; at += kGroup) {
    const bool whole = columns - at >= kGroup;
    const __m512i words = whole ? _mm512_loadu_si512(codes + at / 2)
                                : _mm512_maskz_loadu_epi64(0x0F, codes + at / 2);
    const __m512 scale = _mm512_mask_broadcastss_ps(_mm512_set1_ps(absmax[at / 64]), 0xFF00,
                                                    _mm_load_ss(absmax + at / 64 + 1));
    __m512 block[kCount], rest[kCount];
    for (int t = 0; t < kCount; ++t) block[t] = rest[t] = _mm512_setzero_ps();
    for (int j = 0; j < 4; ++j) {
      const __m512i index = _mm512_srli_epi16(words, static_cast<unsigned>(4 * j));
      // Bit 4 of an index is the next nibble's: the doubled table does not mind.
      const auto high = reinterpret_cast<__m512bh>(_mm512_permutexvar_epi16(index, table.high));
      const auto low = reinterpret_cast<__m512bh>(_mm512_permutexvar_epi16(index, table.low));
      for (int t = 0; t < kCount; ++t) {
        const auto part = reinterpret_cast<__m512bh>(_mm512_loadu_si512(x + t * x_stride + at + 32 * j));
        block[t] = _mm512_dpbf16_ps(block[t], high, part);
        rest[t] = _mm512_dpbf16_ps(rest[t], low, part);
      }
    }
    for (int t = 0; t < kCount; ++t) acc[t] = _mm512_fmadd_ps(_mm512_add_ps(block[t], rest[t]), scale, acc[t]);
  }
  for (int t = 0; t < kCount; ++t) out[t] = _mm512_reduce_add_ps(acc[t]);
}

static bool spmm_rows_from_words(const Nf4View& nf4, const CsrView& csr, const Bf16* x, const uint16_t* prepared, Bf16* y,
                                 int64_t rows, int64_t columns, int64_t features, int64_t begin, int64_t end,
                                 float* absmax) {
  const SplitTable table;
  const int64_t blocks = columns / 64, stride = round_up(columns, kGroup);
  absmax[blocks] = 0.0f;  // stands beside the last half group
  for (int64_t row = begin; row < end; ++row) {
    if (csr.row_ptr != nullptr && !check_row(csr, row, columns)) return false;
    decode_absmax(nf4, row * blocks, blocks, absmax);
    const uint8_t* codes = nf4.codes + row * columns / 2;
    for (int64_t t = 0; t < rows;) {
      float out[kRowsAtOnce];
      const int64_t count = rows - t >= kRowsAtOnce ? kRowsAtOnce : 1;
      if (count == kRowsAtOnce) {
        row_times<kRowsAtOnce>(codes, prepared + t * stride, stride, absmax, columns, table, out);
      } else {
        row_times<1>(codes, prepared + t * stride, stride, absmax, columns, table, out);
      }
      for (int64_t i = 0; i < count; ++i, ++t) {
        const float delta = csr.row_ptr != nullptr ? sparse_dot(csr, row, x + t * columns) : 0.0f;
        narrow(out[i] + delta, &y[t * features + row]);
      }
    }
  }
  return true;
}
#endif

static inline float dot(const float* a, const float* b, int64_t count) {
  Vec acc[4] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    for (int j = 0; j < 4; ++j) acc[j] = fma(load(a + i + j * kLanes), load(b + i + j * kLanes), acc[j]);
  }
  float total = sum(add(add(acc[0], acc[1]), add(acc[2], acc[3])));
  for (; i < count; ++i) total += a[i] * b[i];
  return total;
}

static bool spmm_rows(const Nf4View& nf4, const CsrView& csr, Float type, [[maybe_unused]] const void* x,
                      const float* prepared, void* y, int64_t rows, int64_t columns, int64_t features, int64_t begin,
                      int64_t end, float* tile) {
#if defined(__AVX512BF16__)
  if (spmm_from_words(nf4, type, columns)) {
    return spmm_rows_from_words(nf4, csr, static_cast<const Bf16*>(x), reinterpret_cast<const uint16_t*>(prepared),
                                static_cast<Bf16*>(y), rows, columns, features, begin, end, tile);
  }
#endif
  return with_type(type, [&](auto* tag) {
    auto* out = static_cast<decltype(tag)>(y);
    for (int64_t row = begin; row < end; ++row) {
      dequant_span(nf4, row * columns, columns, tile);
      if (csr.row_ptr != nullptr && !patch_row(nf4, csr, row, columns, tile)) return false;
      for (int64_t t = 0; t < rows; ++t) narrow(dot(prepared + t * columns, tile, columns), &out[t * features + row]);
    }
    return true;
  });
}

}  // namespace qrosa::QROSA_ISA
