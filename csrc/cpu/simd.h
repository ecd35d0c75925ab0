// The vectors and conversions that the kernels are written in, once per instruction set.
//
// Included by each kernels_<isa>.cpp inside its own flags; everything is static inside namespace QROSA_ISA, so that no
// function compiled for AVX-512 can stand in for its portable twin at link time.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace qrosa::QROSA_ISA {

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

static inline int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

static inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
static inline float bits_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

static inline float widen(float value) { return value; }
static inline float widen(Bf16 value) { return bits_float(static_cast<uint32_t>(value.bits) << 16); }
static inline float widen(Fp16 value) {
  // The exponent is moved by a multiplication, which also makes subnormals right.
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7FFF) << 13;
  if (magnitude >= 0x0F800000u) return bits_float(sign | magnitude | 0x7F800000u);
  return bits_float(sign | float_bits(bits_float(magnitude) * bits_float(0x77800000u)));
}

// Round to nearest even.
static inline void narrow(float value, float* out) { *out = value; }
static inline void narrow(float value, Bf16* out) {
  const uint32_t bits = float_bits(value);
  const bool nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  out->bits = nan ? 0x7FC0 : static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}
static inline void narrow(float value, Fp16* out) {
  const uint32_t bits = float_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) {
    out->bits = static_cast<uint16_t>(sign | 0x7E00u);
  } else if (magnitude >= 0x477FF000u) {  // rounds to infinity
    out->bits = static_cast<uint16_t>(sign | 0x7C00u);
  } else if (magnitude < 0x38800000u) {  // subnormal: the addition aligns and rounds
    out->bits = static_cast<uint16_t>(sign | (float_bits(bits_float(magnitude) + 0.5f) - 0x3F000000u));
  } else {
    out->bits = static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13));
  }
}

alignas(64) static const float kTable[16] = QROSA_NF4_TABLE;

// ---- float vectors -------------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr int kLanes = 16;
using Vec = __m512;
static inline Vec zero() { return _mm512_setzero_ps(); }
static inline Vec splat(float value) { return _mm512_set1_ps(value); }
static inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
static inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
static inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
static inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
static inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
static inline float sum(Vec v) { return _mm512_reduce_add_ps(v); }
static inline Vec load(const Bf16* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
static inline Vec load(const Fp16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
using Words = __m512i;
static inline Words load_words(const uint32_t* p) { return _mm512_loadu_si512(p); }
static inline Words splat_word(uint32_t word) { return _mm512_set1_epi32(static_cast<int>(word)); }
static inline Vec as_floats(Words w) { return _mm512_castsi512_ps(w); }
static inline Vec even_bf16(Words w) { return _mm512_castsi512_ps(_mm512_slli_epi32(w, 16)); }
static inline Vec odd_bf16(Words w) {
  return _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u))));
}
#elif defined(__AVX2__)
constexpr int kLanes = 8;
using Vec = __m256;
static inline Vec zero() { return _mm256_setzero_ps(); }
static inline Vec splat(float value) { return _mm256_set1_ps(value); }
static inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
static inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
static inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
static inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
static inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
static inline float sum(Vec v) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
static inline Vec load(const Bf16* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
static inline Vec load(const Fp16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
using Words = __m256i;
static inline Words load_words(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
static inline Words splat_word(uint32_t word) { return _mm256_set1_epi32(static_cast<int>(word)); }
static inline Vec as_floats(Words w) { return _mm256_castsi256_ps(w); }
static inline Vec even_bf16(Words w) { return _mm256_castsi256_ps(_mm256_slli_epi32(w, 16)); }
static inline Vec odd_bf16(Words w) {
  return _mm256_castsi256_ps(_mm256_and_si256(w, _mm256_set1_epi32(static_cast<int>(0xFFFF0000u))));
}
#else
constexpr int kLanes = 4;
struct Vec {
  float lane[kLanes];
};
struct Words {
  uint32_t lane[kLanes];
};
template <class F>
static inline Vec each(F f) {
  Vec v;
  for (int i = 0; i < kLanes; ++i) v.lane[i] = f(i);
  return v;
}
static inline Vec zero() { return Vec{}; }
static inline Vec splat(float value) {
  return each([=](int) { return value; });
}
template <class T>
static inline Vec load(const T* p) {
  return each([=](int i) { return widen(p[i]); });
}
static inline void store(float* p, Vec v) { std::memcpy(p, v.lane, sizeof(v.lane)); }
static inline Vec fma(Vec a, Vec b, Vec c) {
  return each([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
}
static inline Vec mul(Vec a, Vec b) {
  return each([&](int i) { return a.lane[i] * b.lane[i]; });
}
static inline Vec add(Vec a, Vec b) {
  return each([&](int i) { return a.lane[i] + b.lane[i]; });
}
static inline float sum(Vec v) { return (v.lane[0] + v.lane[2]) + (v.lane[1] + v.lane[3]); }
static inline Words load_words(const uint32_t* p) {
  Words w;
  std::memcpy(w.lane, p, sizeof(w.lane));
  return w;
}
static inline Words splat_word(uint32_t word) { return Words{{word, word, word, word}}; }
static inline Vec as_floats(Words w) {
  return each([&](int i) { return bits_float(w.lane[i]); });
}
static inline Vec even_bf16(Words w) {
  return each([&](int i) { return bits_float(w.lane[i] << 16); });
}
static inline Vec odd_bf16(Words w) {
  return each([&](int i) { return bits_float(w.lane[i] & 0xFFFF0000u); });
}
#endif

// acc + the products of two packed columns. A word holds two bf16 rows, or one fp32.
template <bool kPairs>
static inline Vec dot_words(Vec acc, Words a, Words b) {
  if constexpr (kPairs) {
#if defined(__AVX512BF16__)
    return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
#else
    return fma(odd_bf16(a), odd_bf16(b), fma(even_bf16(a), even_bf16(b), acc));
#endif
  } else {
    return fma(as_floats(a), as_floats(b), acc);
  }
}

// Calls f with a null pointer of the element type that `type` names.
template <class F>
static inline auto with_type(Float type, F f) {
  switch (type) {
    case Float::kBf16:
      return f(static_cast<Bf16*>(nullptr));
    case Float::kFp16:
      return f(static_cast<Fp16*>(nullptr));
    default:
      return f(static_cast<float*>(nullptr));
  }
}

}  // namespace qrosa::QROSA_ISA
