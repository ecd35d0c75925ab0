// x @ (deq + S)^T + scale (x @ A^T) @ B^T + bias for few rows of x, straight from the 4-bit codes, rounded once.
//
// With AVX-512 or AVX2 the decoded weight does not exist: a 32-bit word of codes holds eight nibbles, and shifting a
// vector of words by 0, 4, ... 28 bits gives eight vectors of table indices; x is laid out once in that order. A
// block's absmax multiplies the block's sum instead of its elements. Several rows of the weight go through at once:
// they share the loads of x and one reduction, and the cache lines of the next ones are asked for meanwhile, since in a
// model every matrix comes from memory. The sparse and the low-rank part are what a row's sums start from.
//
// Elsewhere, and where blocks cross rows, a decoded row passes through the nearest cache. (bf16 dot products with the
// table split in two halves were measured, and are slower.)
#pragma once

#include "dequant_add.h"

namespace qrosa::QROSA_ISA {

constexpr int64_t kGroup = 8 * kLanes;         // weights of one vector of words: two blocks with AVX-512, one with AVX2
constexpr int64_t kXPadding = 128;             // rows of prepared x are padded to as many
constexpr int64_t kTileAbsmax = 1024;          // decoded at a time
constexpr int64_t kAheadBytes = 6144;          // how far before their use codes are asked for
constexpr int kMostRows = 4, kMostTokens = 4;  // of one step

// What decode_prepare writes, in this order; all in fp32, padded with zeros.
struct PreparedX {
  const float* plain;      // [tokens, stride]
  const float* ordered;    // [tokens, stride / kGroup, 8 nibbles, kLanes words]; a half group has its words twice
  const float* projected;  // [tokens, rank_stride]: scale * (x @ A^T)
  int64_t stride, rank_stride;
};

static inline PreparedX prepared_x(const DecodeWork& work, const float* space) {
  const int64_t stride = round_up(work.columns, kXPadding), rank_stride = round_up(work.rank, kLanes);
  return {space, space + work.tokens * stride, space + 2 * work.tokens * stride, stride, rank_stride};
}

static int64_t decode_workspace(const DecodeWork& work) {
  return work.tokens * (2 * round_up(work.columns, kXPadding) + round_up(work.rank, kLanes));
}

static int64_t decode_tile(const DecodeWork& work) {
  const int64_t blocks = work.columns / 64 + 1;
  return (kTileAbsmax > kMostRows * blocks ? kTileAbsmax : kMostRows * blocks) + work.columns + 64;
}

template <class T>
static inline float dot(const T* a, const float* b, int64_t count) {
  Vec acc[4] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    for (int j = 0; j < 4; ++j) acc[j] = fma(load(a + i + j * kLanes), load(b + i + j * kLanes), acc[j]);
  }
  for (; i + kLanes <= count; i += kLanes) acc[0] = fma(load(a + i), load(b + i), acc[0]);
  float total = sum(add(add(acc[0], acc[1]), add(acc[2], acc[3])));
  for (; i < count; ++i) total += widen(a[i]) * b[i];
  return total;
}

#if defined(__AVX2__)
// [groups, 8 nibbles, kLanes words] of one row; the lower nibble of a byte is the later element.
static inline void order_by_words(const float* plain, int64_t columns, int64_t stride, float* ordered) {
  for (int64_t group = 0; group < stride; group += kGroup) {
    const int words = columns - group < kGroup ? kLanes / 2 : kLanes;  // only AVX-512 meets half a group
    alignas(64) int32_t first[kLanes];                                 // element of each word
    for (int lane = 0; lane < kLanes; ++lane) first[lane] = 8 * (lane % words);
    const Words index = load_words(reinterpret_cast<const uint32_t*>(first));
    for (int j = 0; j < 8; ++j, ordered += kLanes) {
#if defined(__AVX512F__)
      store(ordered, _mm512_i32gather_ps(index, plain + group + (j ^ 1), 4));
#else
      store(ordered, _mm256_i32gather_ps(plain + group + (j ^ 1), index, 4));
#endif
    }
  }
}
#endif

static void decode_prepare(const DecodeWork& work, float* space) {
  const PreparedX to = prepared_x(work, space);
  float* plain = const_cast<float*>(to.plain);
  with_type(work.type, [&](auto* tag) {
    const auto* x = static_cast<decltype(tag)>(const_cast<void*>(work.x));
    for (int64_t t = 0; t < work.tokens; ++t) {
      float* row = plain + t * to.stride;
      int64_t i = 0;
      for (; i + kLanes <= work.columns; i += kLanes) store(row + i, load(x + t * work.columns + i));
      for (; i < work.columns; ++i) row[i] = widen(x[t * work.columns + i]);
      for (; i < to.stride; ++i) row[i] = 0.0f;
#if defined(__AVX2__)
      order_by_words(row, work.columns, to.stride, const_cast<float*>(to.ordered) + t * to.stride);
#endif
    }
  });
  if (work.rank == 0) return;
  with_type(work.low_rank_type, [&](auto* tag) {
    const auto* a = static_cast<decltype(tag)>(const_cast<void*>(work.a));
    for (int64_t t = 0; t < work.tokens; ++t) {
      float* row = const_cast<float*>(to.projected) + t * to.rank_stride;
      for (int64_t i = 0; i < to.rank_stride; ++i) {
        row[i] = i < work.rank ? work.scale * dot(a + i * work.columns, plain + t * to.stride, work.columns) : 0.0f;
      }
    }
  });
}

// y[t, row] of `count` rows of x from `token` on; sums [count], one for each.
static inline void finish_row(const DecodeWork& work, int64_t token, int64_t count, int64_t row, const float* sums) {
  with_type(work.type, [&](auto* tag) {
    auto* y = static_cast<decltype(tag)>(work.y) + token * work.features + row;
    const float bias =
        work.bias == nullptr ? 0.0f : widen(static_cast<decltype(tag)>(const_cast<void*>(work.bias))[row]);
    for (int64_t t = 0; t < count; ++t) narrow(sums[t] + bias, &y[t * work.features]);
  });
}

#if defined(__AVX2__)

#if defined(__AVX512F__)
struct Levels {
  Vec table = _mm512_load_ps(kTable);
  // Bits past the fourth of an index belong to later nibbles: the permutation does not read them.
  Vec of(Words words, int j) const {
    return _mm512_permutexvar_ps(_mm512_srli_epi32(words, static_cast<unsigned>(4 * j)), table);
  }
};
static inline Vec load_part(const float* p, int64_t count) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
}
static inline Vec load_part(const Bf16* p, int64_t count) {
  const __m256i half = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
static inline Vec load_part(const Fp16* p, int64_t count) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), p));
}
#else
struct Levels {
  Vec low = _mm256_load_ps(kTable), high = _mm256_load_ps(kTable + 8);
  Vec of(Words words, int j) const {
    const __m256i index = _mm256_srli_epi32(words, 4 * j);
    const __m256 pick_high = _mm256_castsi256_ps(_mm256_slli_epi32(words, 28 - 4 * j));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index), pick_high);
  }
};
template <class T>
static inline Vec load_part(const T* p, int64_t count) {
  alignas(32) float lanes[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = widen(p[i]);
  return _mm256_load_ps(lanes);
}
#endif

// The delta's products of one row, lane by lane, added to acc [count]. False: an index lies outside the matrix.
static inline bool add_sparse(const CsrView& csr, int64_t row, const float* x, int64_t stride, int64_t columns,
                              int count, Vec* acc) {
  if (!row_in_bounds(csr, row)) return false;
  const int64_t end = csr.row_ptr[row + 1];
#if defined(__AVX512F__)
  for (int64_t i = csr.row_ptr[row]; i < end; i += kLanes) {
    const auto present = static_cast<__mmask16>(end - i >= kLanes ? 0xFFFF : (1u << (end - i)) - 1);
    const __m512i col =
        csr.wide ? _mm512_maskz_loadu_epi32(present, static_cast<const int32_t*>(csr.col) + i)
                 : _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(present, static_cast<const uint16_t*>(csr.col) + i));
    if (_mm512_cmpge_epu32_mask(col, _mm512_set1_epi32(static_cast<int>(columns))) != 0) return false;
    const __m512 values = _mm512_maskz_loadu_ps(present, csr.values + i);
    for (int t = 0; t < count; ++t) {
      acc[t] = fma(values, _mm512_mask_i32gather_ps(zero(), present, col, x + t * stride, 4), acc[t]);
    }
  }
#else
  float total[kMostTokens] = {};
  for (int64_t i = csr.row_ptr[row]; i < end; ++i) {
    const int64_t col = column(csr, i);
    if (!column_in_bounds(col, columns)) return false;
    for (int t = 0; t < count; ++t) total[t] += csr.values[i] * x[t * stride + col];
  }
  for (int t = 0; t < count; ++t) acc[t] = add(acc[t], _mm256_set_ps(0, 0, 0, 0, 0, 0, 0, total[t]));
#endif
  return true;
}

// The low-rank part of one row, lane by lane, added to acc [count].
template <class T>
static inline void add_low_rank(const T* b, int64_t rank, const float* projected, int64_t stride, int count, Vec* acc) {
  for (int64_t i = 0; i < rank; i += kLanes) {
    const Vec part = rank - i >= kLanes ? load(b + i) : load_part(b + i, rank - i);
    for (int t = 0; t < count; ++t) acc[t] = fma(part, load(projected + t * stride + i), acc[t]);
  }
}

// The absmax of `count` blocks from `block` on, a vector at a time where they share a scale. Bit-equal to block_absmax.
static inline void decode_absmax(const Nf4View& nf4, int64_t block, int64_t count, float* out) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; nf4.absmax == nullptr && i + kLanes <= count; i += kLanes) {
    const int64_t first = (block + i) >> kNestedShift, last = (block + i + kLanes - 1) >> kNestedShift;
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(nf4.absmax_q + block + i));
    const __m512 code = _mm512_i32gather_ps(_mm512_cvtepu8_epi32(bytes), nf4.absmax_code, 4);
    const auto later = static_cast<__mmask16>(first == last ? 0 : 0xFFFFu << ((last << kNestedShift) - block - i));
    const __m512 scale = _mm512_mask_mov_ps(splat(nf4.absmax_scale[first]), later, splat(nf4.absmax_scale[last]));
    store(out + i, add(mul(code, scale), splat(*nf4.absmax_offset)));
  }
#endif
  for (; i < count; ++i) out[i] = block_absmax(nf4, block + i);
}

struct DecodeRow {
  const uint8_t* codes;
  const float* absmax;
};

// acc[r][t] += row r of the weight times row t of x.
template <int kRows, int kTokens>
static inline void rows_times(const DecodeRow* rows, int64_t ahead, const float* x, int64_t stride, int64_t columns,
                              Vec (&acc)[kRows][kTokens]) {
  const Levels levels;
  const int64_t whole = columns / kGroup * kGroup;
  for (int64_t at = 0; at < whole; at += kGroup) {
    Words words[kRows];
    Vec chain[kRows][kTokens];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      words[r] = load_words(reinterpret_cast<const uint32_t*>(rows[r].codes + at / 2));
      __builtin_prefetch(rows[r].codes + at / 2 + ahead, 0, 2);  // into L2
    }
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const Vec weight = levels.of(words[r], j);
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) {
          const Vec part = load(x + t * stride + at + kLanes * j);
          chain[r][t] = j == 0 ? mul(weight, part) : fma(weight, part, chain[r][t]);
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const float* absmax = rows[r].absmax + at / 64;
#if defined(__AVX512F__)
      const Vec scale = _mm512_mask_broadcastss_ps(splat(absmax[0]), 0xFF00, _mm_load_ss(absmax + 1));
#else
      const Vec scale = splat(absmax[0]);
#endif
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) acc[r][t] = fma(chain[r][t], scale, acc[r][t]);
    }
  }
#if defined(__AVX512F__)
  if (whole == columns) return;
  const int64_t last = whole / 64;  // half a group is left: two rows share a vector
#pragma GCC unroll 4
  for (int r = 0; r < kRows; r += 2) {
    const DecodeRow &one = rows[r], &other = rows[kRows == 1 ? r : r + 1];
    const __m256i lower = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(one.codes + whole / 2));
    const __m256i upper = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(other.codes + whole / 2));
    const Words words = _mm512_inserti64x4(_mm512_castsi256_si512(lower), upper, 1);
    const Vec scale = _mm512_mask_broadcastss_ps(splat(one.absmax[last]), 0xFF00, _mm_load_ss(other.absmax + last));
    Vec chain[kTokens];
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      const Vec weight = levels.of(words, j);
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) {
        const Vec part = load(x + t * stride + whole + kLanes * j);
        chain[t] = j == 0 ? mul(weight, part) : fma(weight, part, chain[t]);
      }
    }
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) {
      acc[r][t] = _mm512_mask3_fmadd_ps(chain[t], scale, acc[r][t], 0x00FF);
      if (kRows > 1) acc[r + 1][t] = _mm512_mask3_fmadd_ps(chain[t], scale, acc[r + 1][t], 0xFF00);
    }
  }
#endif
}

// Sums of four vectors.
static inline void sums4(const Vec* v, float* out) {
#if defined(__AVX512F__)
  const __m512 ab = add(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
  const __m512 cd = add(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
  const __m512 all = add(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xEE));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
#else
  const __m256 ab = _mm256_hadd_ps(v[0], v[1]), cd = _mm256_hadd_ps(v[2], v[3]);
  const __m256 half = _mm256_hadd_ps(ab, cd);
#endif
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

template <int kRows, int kTokens>
static inline bool decode_step(const DecodeWork& work, const PreparedX& x, int64_t token, int64_t row,
                               const float* absmax) {
  const int64_t blocks = work.columns / 64, row_bytes = work.columns / 2;
  const int64_t step_bytes = kRows * row_bytes;
  const int64_t ahead = step_bytes * (1 + kAheadBytes / step_bytes);
  const float* plain = x.plain + token * x.stride;
  DecodeRow rows[kRows];
  Vec acc[kRows][kTokens];
  for (int r = 0; r < kRows; ++r) {
    rows[r] = {work.nf4.codes + (row + r) * row_bytes, absmax + r * blocks};
    for (int t = 0; t < kTokens; ++t) acc[r][t] = zero();
    if (work.csr.row_ptr != nullptr && !add_sparse(work.csr, row + r, plain, x.stride, work.columns, kTokens, acc[r])) {
      return false;
    }
    if (work.rank > 0) {
      with_type(work.low_rank_type, [&](auto* tag) {
        const auto* b = static_cast<decltype(tag)>(const_cast<void*>(work.b)) + (row + r) * work.rank;
        add_low_rank(b, work.rank, x.projected + token * x.rank_stride, x.rank_stride, kTokens, acc[r]);
      });
    }
  }
  rows_times<kRows, kTokens>(rows, ahead, x.ordered + token * x.stride, x.stride, work.columns, acc);
  float sums[kRows * kTokens];
  if constexpr (kRows * kTokens % 4 == 0) {
    for (int i = 0; i < kRows * kTokens; i += 4) sums4(&acc[0][0] + i, sums + i);
  } else {
    for (int i = 0; i < kRows * kTokens; ++i) sums[i] = sum((&acc[0][0])[i]);
  }
  for (int r = 0; r < kRows; ++r) finish_row(work, token, kTokens, row + r, sums + r * kTokens);
  return true;
}

template <int kTokens>
static bool decode_words(const DecodeWork& work, const PreparedX& x, int64_t token, int64_t begin, int64_t end,
                         const float* absmax) {
  constexpr int kRows = kTokens <= 2 ? kMostRows : 2;
  const int64_t blocks = work.columns / 64;
  for (int64_t row = begin; row < end;) {
    const float* scales = absmax + (row - begin) * blocks;
    const int64_t left = end - row, step = left >= kRows ? kRows : left >= 2 ? 2 : 1;
    const bool sound = step == kRows ? decode_step<kRows, kTokens>(work, x, token, row, scales)
                       : step == 2   ? decode_step<2, kTokens>(work, x, token, row, scales)
                                     : decode_step<1, kTokens>(work, x, token, row, scales);
    if (!sound) return false;
    row += step;
  }
  return true;
}

static bool decode_rows_from_words(const DecodeWork& work, const PreparedX& x, int64_t begin, int64_t end,
                                   float* tile) {
  const int64_t blocks = work.columns / 64;
  const int64_t some = kTileAbsmax / blocks / kMostRows * kMostRows, rows = some > 0 ? some : kMostRows;
  for (int64_t row = begin; row < end; row += rows) {
    const int64_t stop = lesser(row + rows, end);
    const float* absmax = work.nf4.absmax != nullptr ? work.nf4.absmax + row * blocks : tile;
    if (absmax == tile) decode_absmax(work.nf4, row * blocks, (stop - row) * blocks, tile);
    for (int64_t t = 0; t < work.tokens; t += kMostTokens) {
      const int64_t left = work.tokens - t;
      const bool sound = left >= 4   ? decode_words<4>(work, x, t, row, stop, absmax)
                         : left == 3 ? decode_words<3>(work, x, t, row, stop, absmax)
                         : left == 2 ? decode_words<2>(work, x, t, row, stop, absmax)
                                     : decode_words<1>(work, x, t, row, stop, absmax);
      if (!sound) return false;
    }
  }
  return true;
}
#endif

static bool decode_rows(const DecodeWork& work, const float* prepared, int64_t begin, int64_t end, float* tile) {
  const PreparedX x = prepared_x(work, prepared);
#if defined(__AVX2__)
  if (work.nf4.block_shift == 6 && work.columns % 64 == 0 && work.columns > 0) {
    return decode_rows_from_words(work, x, begin, end, tile);
  }
#endif
  for (int64_t row = begin; row < end; ++row) {
    dequant_span(work.nf4, row * work.columns, work.columns, tile);
    if (work.csr.row_ptr != nullptr && !patch_row(work.nf4, work.csr, row, work.columns, tile)) return false;
    for (int64_t t = 0; t < work.tokens; ++t) {
      float total = dot(tile, x.plain + t * x.stride, work.columns);
      if (work.rank > 0) {
        total += with_type(work.low_rank_type, [&](auto* tag) {
          const auto* b = static_cast<decltype(tag)>(const_cast<void*>(work.b)) + row * work.rank;
          return dot(b, x.projected + t * x.rank_stride, work.rank);
        });
      }
      finish_row(work, t, 1, row, &total);
    }
  }
  return true;
}

}  // namespace qrosa::QROSA_ISA
