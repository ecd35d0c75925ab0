// NF4 -> dense rows, with the sparse delta added before the one rounding.
//
// A block of 64 elements has 16 possible values: table * absmax, rounded to the output type. So the arithmetic is done
// 16 times a block, not 64, and the elements are looked up. Positions that carry a sparse value are computed again from
// their 4-bit code in fp32 and overwrite the row while it is in the nearest cache.
#pragma once

#include "simd.h"

namespace qrosa::QROSA_ISA {

// The 16 values of one block in the output type. pick() serves single elements, expand() whole bytes.
template <class Out>
struct Lut;

#if defined(__AVX512F__)

// 16 fp32 -> 16-bit words, round to nearest even.
static inline __m256i narrow_words(__m512 value, Bf16*) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i lsb = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded =
      _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(lsb, _mm512_set1_epi32(0x7FFF))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7FC0)));
}
static inline __m256i narrow_words(__m512 value, Fp16*) {
  return _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

template <class Out>
struct Lut16 {
  __m512i words;  // the 16 values twice: vpermw reads five bits of an index, the fifth is noise
  explicit Lut16(float absmax) {
    const __m256i half =
        narrow_words(_mm512_mul_ps(_mm512_load_ps(kTable), _mm512_set1_ps(absmax)), static_cast<Out*>(nullptr));
    words = _mm512_broadcast_i64x4(half);
  }
  Out pick(int code) const {
    alignas(64) uint16_t values[32];
    _mm512_store_si512(values, words);
    return Out{values[code]};
  }
  // 16 bytes -> 32 elements: each byte becomes a 32-bit lane whose words index the high, then the low nibble.
  __m512i look_up(__m128i bytes) const {
    const __m512i lanes = _mm512_cvtepu8_epi32(bytes);
    const __m512i index = _mm512_or_si512(_mm512_srli_epi32(lanes, 4), _mm512_slli_epi32(lanes, 16));
    return _mm512_permutexvar_epi16(index, words);
  }
  void expand(const uint8_t* codes, int64_t bytes, Out* out) const {
    int64_t i = 0;
    for (; i + 16 <= bytes; i += 16) {
      _mm512_storeu_si512(out + 2 * i, look_up(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i))));
    }
    if (i < bytes) {
      const int left = static_cast<int>(bytes - i);
      const __m128i tail = _mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << left) - 1), codes + i);
      _mm512_mask_storeu_epi32(out + 2 * i, static_cast<__mmask16>((1u << left) - 1), look_up(tail));
    }
  }
};
template <>
struct Lut<Bf16> : Lut16<Bf16> {
  using Lut16::Lut16;
};
template <>
struct Lut<Fp16> : Lut16<Fp16> {
  using Lut16::Lut16;
};

template <>
struct Lut<float> {
  __m512 values;
  explicit Lut(float absmax) { values = _mm512_mul_ps(_mm512_load_ps(kTable), _mm512_set1_ps(absmax)); }
  float pick(int code) const {
    alignas(64) float all[16];
    _mm512_store_ps(all, values);
    return all[code];
  }
  __m512 look_up(uint64_t bytes) const {
    const __m512i lanes = _mm512_cvtepu8_epi64(_mm_cvtsi64_si128(static_cast<int64_t>(bytes)));
    const __m512i index = _mm512_or_si512(_mm512_srli_epi64(lanes, 4), _mm512_slli_epi64(lanes, 32));
    return _mm512_permutexvar_ps(index, values);
  }
  void expand(const uint8_t* codes, int64_t bytes, float* out) const {
    for (int64_t i = 0; i < bytes; i += 8) {
      const int64_t count = lesser(8, bytes - i);
      uint64_t chunk = 0;
      std::memcpy(&chunk, codes + i, static_cast<size_t>(count));
      _mm512_mask_storeu_ps(out + 2 * i, static_cast<__mmask16>((1u << (2 * count)) - 1), look_up(chunk));
    }
  }
};

#else

// The values as an array; the AVX2 paths add byte planes for vpshufb.
template <class Out>
struct LutArray {
  Out values[16];
  explicit LutArray(float absmax) {
    for (int i = 0; i < 16; ++i) narrow(kTable[i] * absmax, &values[i]);
  }
  Out pick(int code) const { return values[code]; }
  void expand_tail(const uint8_t* codes, int64_t begin, int64_t bytes, Out* out) const {
    for (int64_t i = begin; i < bytes; ++i) {
      out[2 * i] = values[codes[i] >> 4];
      out[2 * i + 1] = values[codes[i] & 15];
    }
  }
};

#if defined(__AVX2__)
// 16 bytes -> 32 nibbles in element order.
static inline __m256i nibbles(const uint8_t* codes) {
  const __m256i lanes = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
  const __m256i index = _mm256_or_si256(_mm256_srli_epi16(lanes, 4), _mm256_slli_epi16(lanes, 8));
  return _mm256_and_si256(index, _mm256_set1_epi8(15));
}

template <class Out>
struct Lut16 : LutArray<Out> {
  __m256i low, high;  // the low and the high bytes of the 16 values, in both lanes
  explicit Lut16(float absmax) : LutArray<Out>(absmax) {
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(this->values));
    const __m256i low_words = _mm256_and_si256(both, _mm256_set1_epi16(255));
    const __m256i high_words = _mm256_srli_epi16(both, 8);
    const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packus_epi16(low_words, high_words), 0xD8);
    low = _mm256_permute2x128_si256(bytes, bytes, 0x00);
    high = _mm256_permute2x128_si256(bytes, bytes, 0x11);
  }
  void expand(const uint8_t* codes, int64_t bytes, Out* out) const {
    int64_t i = 0;
    for (; i + 16 <= bytes; i += 16) {
      const __m256i index = nibbles(codes + i);
      const __m256i lows = _mm256_shuffle_epi8(low, index), highs = _mm256_shuffle_epi8(high, index);
      const __m256i first = _mm256_unpacklo_epi8(lows, highs), second = _mm256_unpackhi_epi8(lows, highs);
      auto* target = reinterpret_cast<__m256i*>(out + 2 * i);
      _mm256_storeu_si256(target, _mm256_permute2x128_si256(first, second, 0x20));
      _mm256_storeu_si256(target + 1, _mm256_permute2x128_si256(first, second, 0x31));
    }
    this->expand_tail(codes, i, bytes, out);
  }
};
template <>
struct Lut<Bf16> : Lut16<Bf16> {
  using Lut16::Lut16;
};
template <>
struct Lut<Fp16> : Lut16<Fp16> {
  using Lut16::Lut16;
};
template <>
struct Lut<float> : LutArray<float> {
  using LutArray::LutArray;
  void expand(const uint8_t* codes, int64_t bytes, float* out) const {
    const __m256 low = _mm256_loadu_ps(values), high = _mm256_loadu_ps(values + 8);
    int64_t i = 0;
    for (; i + 4 <= bytes; i += 4) {
      int32_t chunk;
      std::memcpy(&chunk, codes + i, 4);
      const __m128i lanes = _mm_cvtepu8_epi16(_mm_cvtsi32_si128(chunk));
      const __m128i bytes8 = _mm_or_si128(_mm_srli_epi16(lanes, 4), _mm_slli_epi16(lanes, 8));
      const __m256i index = _mm256_cvtepu8_epi32(_mm_and_si128(bytes8, _mm_set1_epi8(15)));
      const __m256 pick_high = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
      _mm256_storeu_ps(out + 2 * i, _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index),
                                                     _mm256_permutevar8x32_ps(high, index), pick_high));
    }
    expand_tail(codes, i, bytes, out);
  }
};
#else
template <class Out>
struct Lut : LutArray<Out> {
  using LutArray<Out>::LutArray;
  void expand(const uint8_t* codes, int64_t bytes, Out* out) const { this->expand_tail(codes, 0, bytes, out); }
};
#endif
#endif

// Elements [begin, begin + count) of the flat array, without the delta.
template <class Out>
static inline void dequant_span(const Nf4View& nf4, int64_t begin, int64_t count, Out* out) {
  const int64_t end = begin + count;
  for (int64_t at = begin; at < end;) {
    const int64_t block = at >> nf4.block_shift;
    const int64_t stop = lesser(end, (block + 1) << nf4.block_shift);
    const Lut<Out> lut(block_absmax(nf4, block));
    if ((at & 1) != 0) *out++ = lut.pick(nibble(nf4.codes, at++));
    const int64_t bytes = (stop - at) >> 1;
    lut.expand(nf4.codes + (at >> 1), bytes, out);
    out += 2 * bytes;
    at += 2 * bytes;
    if (at < stop) *out++ = lut.pick(nibble(nf4.codes, at++));
  }
}

// Writes deq + S, summed in fp32, over the positions of one row. False: an index lies outside the matrix.
template <class Out>
static inline bool patch_row(const Nf4View& nf4, const CsrView& csr, int64_t row, int64_t columns, Out* out) {
  if (!row_in_bounds(csr, row)) return false;
  const int64_t base = row * columns;
  for (int64_t i = csr.row_ptr[row]; i < csr.row_ptr[row + 1]; ++i) {
    const int64_t col = column(csr, i);
    if (!column_in_bounds(col, columns)) return false;
    const float dense = kTable[nibble(nf4.codes, base + col)] * block_absmax(nf4, (base + col) >> nf4.block_shift);
    narrow(dense + csr.values[i], &out[col]);
  }
  return true;
}

template <class Out>
static bool dequant_rows_as(const Nf4View& nf4, const CsrView& csr, Out* out, int64_t columns, int64_t begin,
                            int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    dequant_span(nf4, row * columns, columns, out + row * columns);
    if (csr.row_ptr != nullptr && !patch_row(nf4, csr, row, columns, out + row * columns)) return false;
  }
  return true;
}

static bool dequant_rows(const Nf4View& nf4, const CsrView& csr, Float type, void* out, int64_t columns, int64_t begin,
                         int64_t end) {
  return with_type(
      type, [&](auto* tag) { return dequant_rows_as(nf4, csr, static_cast<decltype(tag)>(out), columns, begin, end); });
}

}  // namespace qrosa::QROSA_ISA
