// dY^T X at the stored positions: a dot product over the rows of both, for each position.
//
// Row-major inputs hold the two columns of a dot product strided, so a chunk of rows is packed first: each column
// becomes one run of 32-bit words (two bf16 rows in a word, the operand of the bf16 dot product), transposed in
// registers. The packed chunk of X stays in the L2 cache while all rows of the delta walk over it.
#pragma once

#include "simd.h"

namespace qrosa::QROSA_ISA {

// Transposes kLanes x kLanes words; register r, word 4 * l + j (128-bit lane l) goes to register 4 * l + j, word r.
#if defined(__AVX512F__)
static inline void transpose(__m512i* r) {
  __m512i t[16];
  for (int g = 0; g < 16; g += 4) {
    const __m512i a = _mm512_unpacklo_epi32(r[g], r[g + 1]), b = _mm512_unpackhi_epi32(r[g], r[g + 1]);
    const __m512i c = _mm512_unpacklo_epi32(r[g + 2], r[g + 3]), d = _mm512_unpackhi_epi32(r[g + 2], r[g + 3]);
    t[g] = _mm512_unpacklo_epi64(a, c);
    t[g + 1] = _mm512_unpackhi_epi64(a, c);
    t[g + 2] = _mm512_unpacklo_epi64(b, d);
    t[g + 3] = _mm512_unpackhi_epi64(b, d);
  }
  for (int j = 0; j < 4; ++j) {
    const __m512i even01 = _mm512_shuffle_i32x4(t[j], t[4 + j], 0x88),
                  odd01 = _mm512_shuffle_i32x4(t[j], t[4 + j], 0xDD);
    const __m512i even23 = _mm512_shuffle_i32x4(t[8 + j], t[12 + j], 0x88);
    const __m512i odd23 = _mm512_shuffle_i32x4(t[8 + j], t[12 + j], 0xDD);
    r[j] = _mm512_shuffle_i32x4(even01, even23, 0x88);
    r[4 + j] = _mm512_shuffle_i32x4(odd01, odd23, 0x88);
    r[8 + j] = _mm512_shuffle_i32x4(even01, even23, 0xDD);
    r[12 + j] = _mm512_shuffle_i32x4(odd01, odd23, 0xDD);
  }
}
#elif defined(__AVX2__)
static inline void transpose(__m256i* r) {
  __m256i t[8];
  for (int g = 0; g < 8; g += 4) {
    const __m256i a = _mm256_unpacklo_epi32(r[g], r[g + 1]), b = _mm256_unpackhi_epi32(r[g], r[g + 1]);
    const __m256i c = _mm256_unpacklo_epi32(r[g + 2], r[g + 3]), d = _mm256_unpackhi_epi32(r[g + 2], r[g + 3]);
    t[g] = _mm256_unpacklo_epi64(a, c);
    t[g + 1] = _mm256_unpackhi_epi64(a, c);
    t[g + 2] = _mm256_unpacklo_epi64(b, d);
    t[g + 3] = _mm256_unpackhi_epi64(b, d);
  }
  for (int j = 0; j < 4; ++j) {
    r[j] = _mm256_permute2x128_si256(t[j], t[4 + j], 0x20);
    r[4 + j] = _mm256_permute2x128_si256(t[j], t[4 + j], 0x31);
  }
}
#endif

// One block of the source in registers, one row (or pair of rows) of words a register.
template <class T>
struct Block {
  static constexpr int kRows = kLanes, kColumns = kLanes;
};
template <>
struct Block<Bf16> {
  static constexpr int kRows = 2 * kLanes, kColumns = 2 * kLanes;
};

#if defined(__AVX512F__)
static inline void store_words(uint32_t* p, __m512i w) { _mm512_storeu_si512(p, w); }
static inline __m512i as_words(Vec v) { return _mm512_castps_si512(v); }
static inline __m512i load_row(const Bf16* p) { return _mm512_loadu_si512(p); }
static inline __m512i pair_low(__m512i a, __m512i b) { return _mm512_unpacklo_epi16(a, b); }
static inline __m512i pair_high(__m512i a, __m512i b) { return _mm512_unpackhi_epi16(a, b); }
#elif defined(__AVX2__)
static inline void store_words(uint32_t* p, __m256i w) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), w); }
static inline __m256i as_words(Vec v) { return _mm256_castps_si256(v); }
static inline __m256i load_row(const Bf16* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
static inline __m256i pair_low(__m256i a, __m256i b) { return _mm256_unpacklo_epi16(a, b); }
static inline __m256i pair_high(__m256i a, __m256i b) { return _mm256_unpackhi_epi16(a, b); }
#endif

// packed[c * words + w] for one full block; columns past `keep` are not stored.
template <class T>
static inline void pack_block(const T* src, int64_t stride, uint32_t* packed, int64_t words, int64_t keep) {
#if defined(__AVX2__)
  Words r[kLanes];
  if constexpr (sizeof(T) == 2 && Block<T>::kRows == 2 * kLanes) {
    for (int half = 0; half < 2; ++half) {  // unpacking leaves columns 8l..8l+3 in one half, 8l+4..8l+7 in the other
      for (int p = 0; p < kLanes; ++p) {
        const Words a = load_row(src + 2 * p * stride), b = load_row(src + (2 * p + 1) * stride);
        r[p] = half == 0 ? pair_low(a, b) : pair_high(a, b);
      }
      transpose(r);
      for (int i = 0; i < kLanes; ++i) {
        const int64_t c = (i / 4) * 8 + half * 4 + i % 4;
        if (c < keep) store_words(packed + c * words, r[i]);
      }
    }
  } else {
    for (int i = 0; i < kLanes; ++i) r[i] = as_words(load(src + i * stride));
    transpose(r);
    for (int i = 0; i < kLanes; ++i) {
      if (i < keep) store_words(packed + i * words, r[i]);
    }
  }
#else
  for (int64_t c = 0; c < keep; ++c) {
    for (int w = 0; w < kLanes; ++w) {
      if constexpr (Block<T>::kRows == 2 * kLanes) {
        packed[c * words + w] = src[2 * w * stride + c].bits | static_cast<uint32_t>(src[(2 * w + 1) * stride + c].bits)
                                                                   << 16;
      } else {
        packed[c * words + w] = float_bits(widen(src[w * stride + c]));
      }
    }
  }
#endif
}

template <class T>
static void pack_columns_as(const T* src, int64_t stride, int64_t rows, int64_t columns, uint32_t* packed,
                            int64_t words) {
  constexpr int kRows = Block<T>::kRows, kColumns = Block<T>::kColumns;
  // Along the rows first: a column of a wide matrix has a page, and one set of the nearest cache, for all its lines.
  for (int64_t r = 0; r < rows; r += kRows) {
    const int64_t height = lesser(kRows, rows - r);
    for (int64_t c = 0; c < columns; c += kColumns) {
      const int64_t keep = lesser(kColumns, columns - c);
      uint32_t* target = packed + c * words + r / (kRows / kLanes);
      if (height == kRows && keep == kColumns) {
        pack_block(src + r * stride + c, stride, target, words, keep);
      } else {  // a zero-padded copy of the edge
        T edge[kRows * kColumns] = {};
        for (int64_t i = 0; i < height; ++i) {
          std::memcpy(edge + i * kColumns, src + (r + i) * stride + c, static_cast<size_t>(keep) * sizeof(T));
        }
        pack_block(edge, kColumns, target, words, keep);
      }
    }
  }
}

static int64_t packed_words(Float type, int64_t rows) {
  return round_up(type == Float::kBf16 ? (rows + 1) / 2 : rows, kLanes);
}

static void pack_columns(Float type, const void* src, int64_t stride, int64_t rows, int64_t columns, uint32_t* packed) {
  with_type(type, [&](auto* tag) {
    pack_columns_as(static_cast<decltype(tag)>(const_cast<void*>(src)), stride, rows, columns, packed,
                    packed_words(type, rows));
  });
}

constexpr int kTogether = 8;

// out[i] (+)= sum(acc[i]) for the first kCount; the additions are those of `sum`, in the same order.
template <int kCount>
static inline void add_sums_of(const Vec* acc, bool first, float* out) {
#if defined(__AVX512F__)
  if constexpr (kCount > 2) {  // eight sums share their shuffles
    Vec t[4], u[2];
    for (int i = 0; i < 4; ++i) {
      t[i] = add(_mm512_shuffle_f32x4(acc[i], acc[i + 4], 0x44), _mm512_shuffle_f32x4(acc[i], acc[i + 4], 0xEE));
    }
    for (int i = 0; i < 2; ++i) {
      u[i] = add(_mm512_shuffle_f32x4(t[i], t[i + 2], 0x88), _mm512_shuffle_f32x4(t[i], t[i + 2], 0xDD));
    }
    const Vec halves = add(_mm512_unpacklo_ps(u[0], u[1]), _mm512_unpackhi_ps(u[0], u[1]));
    const Vec sums = add(halves, _mm512_shuffle_ps(halves, halves, 0xEE));  // 0 1 . . 4 5 . . 2 3 . . 6 7 . .
    const Vec ordered =
        _mm512_permutexvar_ps(_mm512_set_epi32(13, 12, 5, 4, 9, 8, 1, 0, 13, 12, 5, 4, 9, 8, 1, 0), sums);
    constexpr __mmask16 kMask = (1u << kCount) - 1;
    const Vec before = first ? zero() : _mm512_maskz_loadu_ps(kMask, out);
    _mm512_mask_storeu_ps(out, kMask, add(before, ordered));
    return;
  }
#endif
  for (int i = 0; i < kCount; ++i) out[i] = (first ? 0.0f : out[i]) + sum(acc[i]);
}

// kCount positions of one row at once: the words of dY are loaded once, and the sums are independent chains. Each
// position has one chain whatever the grouping, so that grouping does not change a bit.
template <bool kPairs, int kCount>
static inline void dot_group(const uint32_t* dy, const uint32_t* const* x, int64_t words, bool first, float* out) {
  Vec acc[kTogether];
  for (int i = 0; i < kTogether; ++i) acc[i] = zero();
  for (int64_t w = 0; w < words; w += kLanes) {
    const Words shared = load_words(dy + w);
    for (int i = 0; i < kCount; ++i) acc[i] = dot_words<kPairs>(acc[i], shared, load_words(x[i] + w));
  }
  add_sums_of<kCount>(acc, first, out);
}

// One instance for each count: a row's last few positions go together as well, not one by one.
template <bool kPairs>
static inline void dot_positions(int64_t count, const uint32_t* dy, const uint32_t* const* x, int64_t words, bool first,
                                 float* out) {
  switch (count) {
    case 1:
      return dot_group<kPairs, 1>(dy, x, words, first, out);
    case 2:
      return dot_group<kPairs, 2>(dy, x, words, first, out);
    case 3:
      return dot_group<kPairs, 3>(dy, x, words, first, out);
    case 4:
      return dot_group<kPairs, 4>(dy, x, words, first, out);
    case 5:
      return dot_group<kPairs, 5>(dy, x, words, first, out);
    case 6:
      return dot_group<kPairs, 6>(dy, x, words, first, out);
    case 7:
      return dot_group<kPairs, 7>(dy, x, words, first, out);
    default:
      return dot_group<kPairs, kTogether>(dy, x, words, first, out);
  }
}

template <bool kPairs>
static bool sddmm_rows_as(const CsrView& csr, const uint32_t* packed_dy, const uint32_t* packed_x, int64_t words,
                          int64_t columns, int64_t begin, int64_t end, bool first, float* out) {
  for (int64_t row = begin; row < end; ++row) {
    if (!row_in_bounds(csr, row)) return false;
    const uint32_t* dy = packed_dy + (row - begin) * words;
    const int64_t stop = csr.row_ptr[row + 1];
    for (int64_t i = csr.row_ptr[row]; i < stop;) {
      const uint32_t* x[kTogether];
      const int64_t count = lesser(kTogether, stop - i);
      for (int64_t j = 0; j < count; ++j) {
        const int64_t col = column(csr, i + j);
        if (!column_in_bounds(col, columns)) return false;
        x[j] = packed_x + col * words;
      }
      dot_positions<kPairs>(count, dy, x, words, first, out + i);
      i += count;
    }
  }
  return true;
}

static bool sddmm_rows(Float type, const CsrView& csr, const uint32_t* packed_dy, const uint32_t* packed_x,
                       int64_t words, int64_t columns, int64_t begin, int64_t end, bool first, float* out) {
  return type == Float::kBf16 ? sddmm_rows_as<true>(csr, packed_dy, packed_x, words, columns, begin, end, first, out)
                              : sddmm_rows_as<false>(csr, packed_dy, packed_x, words, columns, begin, end, first, out);
}

}  // namespace qrosa::QROSA_ISA
