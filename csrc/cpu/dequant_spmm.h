// x @ (deq + S)^T for few rows of x, straight from the 4-bit codes.
//
// In general a row of the weight is decoded to fp32 in the nearest cache and multiplied there. With AVX-512 the decoded
// row does not exist either: a 32-bit word of codes holds eight nibbles, and shifting a vector of words by 0, 4, ... 28
// bits gives eight vectors of table indices; x is laid out once in that order. The block's absmax multiplies the
// block's sum instead of its elements. (Two bf16 dot products with a table split in halves were measured, and are
// slower.)
#pragma once

#include "dequant_add.h"

namespace qrosa::QROSA_ISA {

constexpr int64_t kGroup = 128;  // weights of one step of the AVX-512 path: 16 words, two blocks

static inline bool spmm_from_words(const Nf4View& nf4, int64_t columns) {
#if defined(__AVX512F__)
  return nf4.block_shift == 6 && columns % 64 == 0;
#else
  (void)nf4, (void)columns;
  return false;
#endif
}

static int64_t spmm_workspace(int64_t rows, int64_t columns) { return rows * round_up(columns, kGroup); }

// x in fp32: [rows, columns], or in the order of words [rows, groups, 8 nibbles, 16 words], zero-padded.
static void spmm_prepare(const Nf4View& nf4, Float type, const void* x, int64_t rows, int64_t columns,
                         float* prepared) {
  with_type(type, [&](auto* tag) {
    const auto* source = static_cast<decltype(tag)>(const_cast<void*>(x));
    if (!spmm_from_words(nf4, columns)) {
      for (int64_t i = 0; i < rows * columns; ++i) prepared[i] = widen(source[i]);
      return;
    }
    for (int64_t t = 0; t < rows; ++t, source += columns) {
      for (int64_t group = 0; group < columns; group += kGroup) {
        for (int64_t j = 0; j < 8; ++j) {  // the lower nibble of a byte is the later element
          for (int64_t word = 0; word < 16; ++word, ++prepared) {
            const int64_t element = group + 8 * word + (j ^ 1);
            *prepared = element < columns ? widen(source[element]) : 0.0f;
          }
        }
      }
    }
  });
}

// The delta's part of one row for `count` rows of x, added to out. False: an index lies outside the matrix.
template <class T>
static inline bool add_sparse_dot(const CsrView& csr, int64_t row, const T* x, int64_t columns, int64_t count,
                                  float* out) {
  if (!row_in_bounds(csr, row)) return false;
  for (int64_t i = csr.row_ptr[row]; i < csr.row_ptr[row + 1]; ++i) {
    const int64_t col = column(csr, i);
    if (!column_in_bounds(col, columns)) return false;
    for (int64_t t = 0; t < count; ++t) out[t] += csr.values[i] * widen(x[t * columns + col]);
  }
  return true;
}

#if defined(__AVX512F__)
constexpr int kRowsAtOnce = 4;

template <int kCount>
static inline void row_times(const uint8_t* codes, const float* x, int64_t x_stride, const float* absmax,
                             int64_t columns, float* out) {
  const __m512 table = _mm512_load_ps(kTable);
  __m512 acc[kCount];
  for (int t = 0; t < kCount; ++t) acc[t] = zero();
  for (int64_t at = 0; at < columns; at += kGroup) {
    const bool whole = columns - at >= kGroup;
    __m512i words = whole ? _mm512_loadu_si512(codes + at / 2) : _mm512_maskz_loadu_epi64(0x0F, codes + at / 2);
    const __m512 scale =
        _mm512_mask_broadcastss_ps(_mm512_set1_ps(absmax[at / 64]), 0xFF00, _mm_load_ss(absmax + at / 64 + 1));
    __m512 even[kCount], odd[kCount];  // two chains of sums
    for (int j = 0; j < 8; ++j) {
      // Bits past the fourth of an index belong to later nibbles: the permutation does not read them.
      const __m512 weight = _mm512_permutexvar_ps(_mm512_srli_epi32(words, static_cast<unsigned>(4 * j)), table);
      for (int t = 0; t < kCount; ++t) {
        __m512& chain = j % 2 == 0 ? even[t] : odd[t];
        const __m512 part = load(x + t * x_stride + at + 16 * j);
        chain = j < 2 ? mul(weight, part) : fma(weight, part, chain);
      }
    }
    for (int t = 0; t < kCount; ++t) acc[t] = fma(add(even[t], odd[t]), scale, acc[t]);
  }
  for (int t = 0; t < kCount; ++t) out[t] = sum(acc[t]);
}

// The absmax of `count` blocks from `block` on, 16 at a time where they share a scale. Bit-equal to block_absmax.
static inline void decode_absmax(const Nf4View& nf4, int64_t block, int64_t count, float* out) {
  int64_t i = 0;
  for (; nf4.absmax == nullptr && i + 16 <= count; i += 16) {
    const int64_t group = (block + i) >> kNestedShift;
    if ((block + i + 15) >> kNestedShift != group) break;
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(nf4.absmax_q + block + i));
    const __m512 code = _mm512_i32gather_ps(_mm512_cvtepu8_epi32(bytes), nf4.absmax_code, 4);
    store(out + i, add(mul(code, splat(nf4.absmax_scale[group])), splat(*nf4.absmax_offset)));
  }
  for (; i < count; ++i) out[i] = block_absmax(nf4, block + i);
}

template <class T>
static bool spmm_rows_from_words(const Nf4View& nf4, const CsrView& csr, const T* x, const float* prepared, T* y,
                                 int64_t rows, int64_t columns, int64_t features, int64_t begin, int64_t end,
                                 float* absmax) {
  const int64_t blocks = columns / 64, stride = round_up(columns, kGroup);
  absmax[blocks] = 0.0f;  // stands beside the last half group
  for (int64_t row = begin; row < end; ++row) {
    decode_absmax(nf4, row * blocks, blocks, absmax);
    const uint8_t* codes = nf4.codes + row * columns / 2;
    for (int64_t t = 0; t < rows;) {
      float out[kRowsAtOnce];
      const int64_t count = rows - t >= kRowsAtOnce ? kRowsAtOnce : 1;
      if (count == kRowsAtOnce) {
        row_times<kRowsAtOnce>(codes, prepared + t * stride, stride, absmax, columns, out);
      } else {
        row_times<1>(codes, prepared + t * stride, stride, absmax, columns, out);
      }
      if (csr.row_ptr != nullptr && !add_sparse_dot(csr, row, x + t * columns, columns, count, out)) return false;
      for (int64_t i = 0; i < count; ++i, ++t) narrow(out[i], &y[t * features + row]);
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

static bool spmm_rows(const Nf4View& nf4, const CsrView& csr, Float type, const void* x, const float* prepared, void* y,
                      int64_t rows, int64_t columns, int64_t features, int64_t begin, int64_t end, float* tile) {
  return with_type(type, [&](auto* tag) {
    auto* out = static_cast<decltype(tag)>(y);
#if defined(__AVX512F__)
    if (spmm_from_words(nf4, columns)) {
      return spmm_rows_from_words(nf4, csr, static_cast<decltype(tag)>(const_cast<void*>(x)), prepared, out, rows,
                                  columns, features, begin, end, tile);
    }
#else
    (void)x;
#endif
    for (int64_t row = begin; row < end; ++row) {
      dequant_span(nf4, row * columns, columns, tile);
      if (csr.row_ptr != nullptr && !patch_row(nf4, csr, row, columns, tile)) return false;
      for (int64_t t = 0; t < rows; ++t) narrow(dot(prepared + t * columns, tile, columns), &out[t * features + row]);
    }
    return true;
  });
}

}  // namespace qrosa::QROSA_ISA
