// A tile of dY^T X in fp32, and its sum (squared or not) into the mask statistic.
//
// An ordinary register-blocked product: the columns of dY come packed as for sddmm, and X as vectors of words in which
// two bf16 rows are interleaved, so that no transposing of X is needed.
#pragma once

#include "sddmm.h"

namespace qrosa::QROSA_ISA {

#if defined(__AVX512F__)
constexpr int kTileRows = 6, kTileVectors = 4;
#else
constexpr int kTileRows = 4, kTileVectors = 2;
#endif
constexpr int kTileColumns = kTileVectors * kLanes;

static inline uint32_t word_of(const Bf16* x, int64_t stride, int64_t word, int64_t depth, int64_t k) {
  const uint32_t low = x[2 * word * stride + k].bits;
  return 2 * word + 1 < depth ? low | static_cast<uint32_t>(x[(2 * word + 1) * stride + k].bits) << 16 : low;
}
template <class T>
static inline uint32_t word_of(const T* x, int64_t stride, int64_t word, int64_t, int64_t k) {
  return float_bits(widen(x[word * stride + k]));
}

// Panels of kTileColumns columns, each [words, kTileColumns], zero-padded; x rows are `stride` apart.
template <class T>
static void pack_panels(const T* x, int64_t stride, int64_t depth, int64_t words, int64_t k, uint32_t* packed) {
  for (int64_t panel = 0; panel < k; panel += kTileColumns) {
    const int64_t width = lesser(kTileColumns, k - panel);
    for (int64_t w = 0; w < words; ++w, packed += kTileColumns) {
      for (int64_t c = 0; c < width; ++c) packed[c] = word_of(x, stride, w, depth, panel + c);
      for (int64_t c = width; c < kTileColumns; ++c) packed[c] = 0;
    }
  }
}

template <bool kPairs, int kRows>
static inline void micro_tile(const uint32_t* dy, int64_t dy_words, const uint32_t* panel, int64_t words, int64_t width,
                              float* tile, int64_t tile_stride) {
  Vec acc[kRows][kTileVectors];
  for (int n = 0; n < kRows; ++n) {
    for (int v = 0; v < kTileVectors; ++v) acc[n][v] = zero();
  }
  for (int64_t w = 0; w < words; ++w) {
    for (int n = 0; n < kRows; ++n) {
      const Words left = splat_word(dy[n * dy_words + w]);
      for (int v = 0; v < kTileVectors; ++v) {
        acc[n][v] = dot_words<kPairs>(acc[n][v], left, load_words(panel + w * kTileColumns + v * kLanes));
      }
    }
  }
  for (int n = 0; n < kRows; ++n) {
    float row[kTileColumns];
    for (int v = 0; v < kTileVectors; ++v) store(row + v * kLanes, acc[n][v]);
    for (int64_t c = 0; c < width; ++c) tile[n * tile_stride + c] += row[c];
  }
}

template <class T>
static void score_tile_as(const uint32_t* packed_dy, int64_t dy_words, const T* x, int64_t stride, int64_t depth,
                          int64_t n, int64_t k, uint32_t* packed_x, float* tile, int64_t tile_stride) {
  constexpr bool kPairs = Block<T>::kRows == 2 * kLanes;
  const int64_t words = kPairs ? (depth + 1) / 2 : depth;
  pack_panels(x, stride, depth, words, k, packed_x);
  for (int64_t panel = 0; panel < k; panel += kTileColumns, packed_x += words * kTileColumns) {
    const int64_t width = lesser(kTileColumns, k - panel);
    int64_t row = 0;
    for (; row + kTileRows <= n; row += kTileRows) {
      micro_tile<kPairs, kTileRows>(packed_dy + row * dy_words, dy_words, packed_x, words, width,
                                    tile + row * tile_stride + panel, tile_stride);
    }
    for (; row < n; ++row) {
      micro_tile<kPairs, 1>(packed_dy + row * dy_words, dy_words, packed_x, words, width,
                            tile + row * tile_stride + panel, tile_stride);
    }
  }
}

static void score_tile(Float type, const uint32_t* packed_dy, int64_t words, const void* x, int64_t stride,
                       int64_t depth, int64_t n, int64_t k, uint32_t* packed_x, float* tile, int64_t tile_stride) {
  with_type(type, [&](auto* tag) {
    score_tile_as(packed_dy, words, static_cast<decltype(tag)>(const_cast<void*>(x)), stride, depth, n, k, packed_x,
                  tile, tile_stride);
  });
}

static void score_add(const float* tile, int64_t tile_stride, int64_t n, int64_t k, bool square, float* stat,
                      int64_t stat_stride) {
  for (int64_t row = 0; row < n; ++row) {
    const float* source = tile + row * tile_stride;
    float* target = stat + row * stat_stride;
    if (square) {
      for (int64_t c = 0; c < k; ++c) target[c] += source[c] * source[c];
    } else {
      for (int64_t c = 0; c < k; ++c) target[c] += source[c];
    }
  }
}

}  // namespace qrosa::QROSA_ISA
