// The low-rank part's thin products on AMX tiles, out of what the wide products pack anyway.
//
//   while tokens are packed     projected [T, r] = drop(X) A^T        inner [T, r] = dY B
//   from packed columns         dB [N, r] = dY^T projected            dA [r, K] = inner^T drop(X)
//
// A library's product of such a shape costs its set-up and one more pass over X or dY each; here both are in a nearby
// cache. Dropout is drawn where it is needed, on 16 positions at once, and no dropped copy of X is written.
#pragma once

#include "dequant_matmul.h"

namespace qrosa::QROSA_ISA {

static inline int64_t rank_tiles(int64_t rank) { return (rank + 15) / 16; }

// 16 rows of depth pairs by 16 columns: a right-hand tile out of rows of src, zero outside [rows, columns].
static inline void pack_pairs_tile(const Bf16* src, int64_t stride, int64_t rows, int64_t columns, Bf16* tile) {
  const __mmask16 mask = columns >= 16 ? 0xFFFF : static_cast<__mmask16>((1u << columns) - 1);
  for (int64_t p = 0; p < 16; ++p) {
    const auto row = [&](int64_t i) {
      return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(i < rows ? mask : __mmask16{0}, src + i * stride));
    };
    _mm512_store_si512(tile + 32 * p, _mm512_or_si512(row(2 * p), _mm512_slli_epi32(row(2 * p + 1), 16)));
  }
}

// The right-hand tiles [rank tile, depth tile] of a thin factor: A [rank, depth] by rows, or [depth, rank] by columns.
static void pack_factor(bool by_rows, const void* src, int64_t rank, int64_t depth, void* tiles) {
  const auto* from = static_cast<const Bf16*>(src);
  const int64_t steps = (depth + 31) / 32;
  for (int64_t j = 0; j < rank_tiles(rank); ++j) {
    for (int64_t d = 0; d < steps; ++d) {
      Bf16* tile = static_cast<Bf16*>(tiles) + (j * steps + d) * kTile;
      if (by_rows) {
        pack_token_tile(true, from + 16 * j * depth + 32 * d, depth, rank - 16 * j, depth - 32 * d, tile);
      } else {
        pack_pairs_tile(from + 32 * d * rank + 16 * j, rank, depth - 32 * d, rank - 16 * j, tile);
      }
    }
  }
}

// projected and left of 16 tokens, whose tiles lie at `rows`. space: two tiles of sums, then [16, rank tiles * 32].
static void project_block(const TokenWork& all, int64_t block, const Bf16* rows, float* sums) {
  const int64_t steps = (all.depth + 31) / 32, wide = round_up(all.rank, 32);
  auto* left = reinterpret_cast<Bf16*>(sums + 2 * kSum);  // [16, wide]
  std::memset(left, 0, static_cast<size_t>(32 * wide));
  for (int64_t j = 0; j < rank_tiles(all.rank); ++j) {
    const Bf16* factor = static_cast<const Bf16*>(all.factor) + j * steps * kTile;
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t d = 0; d < steps; ++d) {
      if (d % 2 == 0) {
        _tile_loadd(4, rows + d * kTile, 64);
        _tile_loadd(5, factor + d * kTile, 64);
        _tile_dpbf16ps(0, 4, 5);
      } else {
        _tile_loadd(6, rows + d * kTile, 64);
        _tile_loadd(7, factor + d * kTile, 64);
        _tile_dpbf16ps(1, 6, 7);
      }
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + kSum, 64);
    const int64_t count = lesser(16, all.rank - 16 * j);
    const auto mask = static_cast<__mmask16>((1u << count) - 1);
    for (int64_t i = 0; i < 16; ++i) {
      const __m512 sum = _mm512_add_ps(_mm512_load_ps(sums + 16 * i), _mm512_load_ps(sums + kSum + 16 * i));
      const auto narrow = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_mul_ps(sum, splat(all.scale))));
      const __m512 scaled = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16)),
                                          splat(all.left_scale));
      const auto final = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(scaled));
      _mm256_mask_storeu_epi16(left + i * wide + 16 * j, mask, final);
      const int64_t token = 16 * block + i;
      if (token < all.tokens) {
        _mm256_mask_storeu_epi16(static_cast<Bf16*>(all.projected) + token * all.rank + 16 * j, mask, narrow);
      }
    }
  }
  for (int64_t q = 0; q < wide / 32 && all.packed_left != nullptr; ++q) {
    pack_token_tile(all.forward, left + 32 * q, wide, 16, 32,
                    static_cast<Bf16*>(all.packed_left) + (block * (wide / 32) + q) * kTile);
  }
}

// Bytes of a thread's own memory for pack_tokens.
static int64_t token_workspace(const TokenWork& all) {
  return round_up(all.depth, 32) * 32 + 2 * kSum * 4 + round_up(all.rank, 32) * 32;
}

// Tiles of the tokens, [block, tile of depth], for the blocks [begin, end) of 16, and the low-rank part's view of them.
static void pack_tokens(const TokenWork& all, int64_t begin, int64_t end, void* space) {
  const TileShape shape;
  const int64_t steps = (all.depth + 31) / 32;
  auto* own = static_cast<Bf16*>(space);
  auto* sums = reinterpret_cast<float*>(own + steps * kTile);
  if (all.rank > 0) _tile_loadconfig(&shape);
  for (int64_t block = begin; block < end; ++block) {
    const auto* src = static_cast<const Bf16*>(all.src) + block * 16 * all.depth;
    const int64_t rows = all.tokens - 16 * block;
    auto* packed = all.packed == nullptr ? own : static_cast<Bf16*>(all.packed) + block * steps * kTile;
    const bool apart = all.rank > 0 && (all.forward || all.packed == nullptr);  // rows as they are, beside `packed`
    for (int64_t d = 0; d < steps; ++d) {
      __m512i row[16];
      for (int64_t i = 0; i < 16; ++i) {
        row[i] = i < rows ? load_some(src + i * all.depth + 32 * d, all.depth - 32 * d) : _mm512_setzero_si512();
      }
      if (apart) {
        for (int64_t i = 0; i < 16; ++i) {
          __m512i values = row[i];
          if (all.dropout.threshold != 0) {
            const auto index = static_cast<uint32_t>((block * 16 + i) * all.depth + 32 * d) + all.dropout.first;
            values = _mm512_maskz_mov_epi16(kept_32(index, all.dropout), values);
          }
          _mm512_store_si512(own + d * kTile + 32 * i, values);
        }
      }
      if (all.packed == nullptr) continue;
      if (all.forward) transpose(row);
      for (int i = 0; i < 16; ++i) _mm512_store_si512(packed + d * kTile + 32 * i, row[i]);
    }
    if (all.rank > 0) project_block(all, block, apart ? own : packed, sums);
  }
  if (all.rank > 0) _tile_release();
}

// 16 packed columns (two tokens in a word) with their dropped elements zero, as left-hand tiles of 16 words.
static inline void drop_columns(const uint32_t* packed, int64_t words, const ColumnWork& all, int64_t column,
                                Bf16* tiles) {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const auto across = static_cast<uint32_t>(all.columns);
  const __m512i step = _mm512_mullo_epi32(lane, splat_word(2 * across));
  for (int64_t w = 0; w < words; w += 16) {
    for (int64_t i = 0; i < 16; ++i) {
      const uint32_t first =
          all.dropout.first + static_cast<uint32_t>(2 * w) * across + static_cast<uint32_t>(column + i);
      const __m512i even = _mm512_add_epi32(step, splat_word(first)), odd = _mm512_add_epi32(even, splat_word(across));
      const __m512i low = _mm512_maskz_mov_epi32(kept(even, all.dropout), splat_word(0xFFFFu));
      const __m512i both = _mm512_mask_or_epi32(low, kept(odd, all.dropout), low, splat_word(0xFFFF0000u));
      _mm512_store_si512(tiles + w * 32 + 32 * i, _mm512_and_si512(both, load_words(packed + i * words + w)));
    }
  }
}

// sums [column tile, rank tile] (+)= packed columns times a factor over the chunk's tokens, for the columns
// [begin, end) (begin a multiple of 16); packed holds them alone, up to the next multiple of 16.
static void column_products(const ColumnWork& all, const uint32_t* packed, int64_t begin, int64_t end, float* sums,
                            void* space) {
  const TileShape shape;
  const int64_t steps = all.words / 16, tiles = rank_tiles(all.rank);
  auto* dropped = static_cast<Bf16*>(space);  // [words, 16] words
  _tile_loadconfig(&shape);
  for (int64_t column = begin; column < end; column += 16, packed += 16 * all.words) {
    const void* left = packed;
    int64_t stride = 4 * all.words, step = 32;
    if (all.dropout.threshold != 0) {
      drop_columns(packed, all.words, all, column, dropped);
      left = dropped;
      stride = 64;
      step = kTile;
    }
    for (int64_t j = 0; j < tiles; ++j) {
      float* target = sums + (column / 16 * tiles + j) * kSum;
      const Bf16* factor = static_cast<const Bf16*>(all.factor) + j * steps * kTile;
      if (all.first) {
        _tile_zero(0);
      } else {
        _tile_loadd(0, target, 64);
      }
      _tile_zero(1);
      for (int64_t d = 0; d < steps; ++d) {
        if (d % 2 == 0) {
          _tile_loadd(4, static_cast<const Bf16*>(left) + d * step, stride);
          _tile_loadd(5, factor + d * kTile, 64);
          _tile_dpbf16ps(0, 4, 5);
        } else {
          _tile_loadd(6, static_cast<const Bf16*>(left) + d * step, stride);
          _tile_loadd(7, factor + d * kTile, 64);
          _tile_dpbf16ps(1, 6, 7);
        }
      }
      alignas(64) float odd[kSum];
      _tile_stored(0, target, 64);
      _tile_stored(1, odd, 64);
      for (int i = 0; i < kSum; i += 16) {
        _mm512_store_ps(target + i, _mm512_add_ps(_mm512_load_ps(target + i), _mm512_load_ps(odd + i)));
      }
    }
  }
  _tile_release();
}

// The sums times `scale`, rounded: out [columns, rank], or [rank, columns] if `across`.
static void write_columns(const ColumnWork& all, bool across, const float* sums, float scale, int64_t begin,
                          int64_t end, void* out) {
  const int64_t tiles = rank_tiles(all.rank);
  for (int64_t column = begin; column < end; column += 16) {
    for (int64_t j = 0; j < tiles; ++j) {
      __m512i row[16];
      const float* source = sums + (column / 16 * tiles + j) * kSum;
      for (int i = 0; i < 16; ++i) row[i] = _mm512_load_si512(source + 16 * i);
      if (across) transpose(row);
      const int64_t height = across ? all.rank - 16 * j : end - column;
      const int64_t width = lesser(16, across ? end - column : all.rank - 16 * j);
      const auto mask = static_cast<__mmask16>((1u << width) - 1);
      for (int64_t i = 0; i < lesser(16, height); ++i) {
        Bf16* target =
            static_cast<Bf16*>(out) + (across ? (16 * j + i) * all.columns + column : (column + i) * all.rank + 16 * j);
        const __m512 scaled = _mm512_mul_ps(_mm512_castsi512_ps(row[i]), splat(scale));
        _mm256_mask_storeu_epi16(target, mask, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(scaled)));
      }
    }
  }
}

}  // namespace qrosa::QROSA_ISA
