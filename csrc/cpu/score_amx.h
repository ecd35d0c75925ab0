// The mask statistic's product on AMX tiles; bf16 only, other types take the vector path.
#pragma once

#include "dequant_matmul.h"
#include "score_accumulate.h"

namespace qrosa::QROSA_ISA {

// x [depth, 32 columns] as right tiles, two tiles side by side: [2, depth_tiles].
static void pack_right(const Bf16* x, int64_t stride, int64_t depth, int64_t width, int64_t depth_tiles, Bf16* tiles) {
  for (int64_t pair = 0; pair < depth_tiles * 16; ++pair) {
    const Bf16* source = x + 2 * pair * stride;
    const __m512i upper = load_some(source, 2 * pair < depth ? width : 0);
    const __m512i lower = load_some(source + stride, 2 * pair + 1 < depth ? width : 0);
    Bf16* target = tiles + pair / 16 * kTile + pair % 16 * 32;
    _mm512_store_si512(target, _mm512_unpacklo_epi16(upper, lower));
    _mm512_store_si512(target + depth_tiles * kTile, _mm512_unpackhi_epi16(upper, lower));
  }
}

// Sums of 32 columns of dY by 32 columns of X.
static inline void multiply_score(const uint32_t* dy, int64_t words, const Bf16* x, int64_t depth_tiles, float* sums) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const auto stride = static_cast<int>(4 * words);
  for (int64_t step = 0; step < depth_tiles; ++step) {
    _tile_loadd(4, dy + 16 * step, stride);
    _tile_loadd(5, dy + 16 * words + 16 * step, stride);
    _tile_loadd(6, x + step * kTile, 64);
    _tile_loadd(7, x + (depth_tiles + step) * kTile, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + kSum, 64);
  _tile_stored(2, sums + 2 * kSum, 64);
  _tile_stored(3, sums + 3 * kSum, 64);
}

// tile [rows, width] += sums, whose two halves interleave in groups of four columns.
static inline void add_sums(const float* sums, int64_t rows, int64_t width, float* tile, int64_t tile_stride) {
  const __m512i first = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  const __mmask32 mask = width >= 32 ? ~__mmask32{0} : (1u << width) - 1;
  for (int64_t n = 0; n < rows; ++n) {
    const float* source = sums + n / 16 * 2 * kSum + n % 16 * 16;
    const __m512 even = _mm512_load_ps(source), odd = _mm512_load_ps(source + kSum);
    float* target = tile + n * tile_stride;
    const auto low = static_cast<__mmask16>(mask), high = static_cast<__mmask16>(mask >> 16);
    _mm512_mask_storeu_ps(target, low,
                          _mm512_add_ps(_mm512_maskz_loadu_ps(low, target), _mm512_permutex2var_ps(even, first, odd)));
    _mm512_mask_storeu_ps(
        target + 16, high,
        _mm512_add_ps(_mm512_maskz_loadu_ps(high, target + 16), _mm512_permutex2var_ps(even, second, odd)));
  }
}

static void score_tile_amx(Float type, const uint32_t* packed_dy, int64_t words, const void* x, int64_t stride,
                           int64_t depth, int64_t n, int64_t k, uint32_t* packed_x, float* tile, int64_t tile_stride) {
  if (type != Float::kBf16) {
    score_tile(type, packed_dy, words, x, stride, depth, n, k, packed_x, tile, tile_stride);
    return;
  }
  const TileShape shape;
  const int64_t depth_tiles = words / 16;
  auto* tiles = reinterpret_cast<Bf16*>(packed_x);
  alignas(64) float sums[4 * kSum];
  _tile_loadconfig(&shape);
  for (int64_t c = 0; c < k; c += 32) {
    pack_right(static_cast<const Bf16*>(x) + c, stride, depth, lesser(32, k - c), depth_tiles, tiles);
    for (int64_t row = 0; row < n; row += 32) {
      multiply_score(packed_dy + row * words, words, tiles, depth_tiles, sums);
      add_sums(sums, lesser(32, n - row), lesser(32, k - c), tile + row * tile_stride + c, tile_stride);
    }
  }
  _tile_release();
}

}  // namespace qrosa::QROSA_ISA
