// Products with W_eff = deq + S that never write W_eff to memory, on AMX matrix tiles (bf16 in, fp32 sums).
//
//   forward    Y [T, N] = X W_eff^T + left right^T + bias     left [T, r], right = B [N, r]
//   backward  dX [T, K] = dY W_eff + left right               left [T, r], right = A [r, K]
//
// A thread owns panels of up to 512 rows (forward) or columns (backward) of W_eff. It decodes 256 deep pieces of a
// panel straight into tile order (256 KB: the L2 cache) and multiplies each with all tokens, whose tiles were packed
// once for all threads: 32 tokens of a piece's depth (16 KB) stay in the nearest cache while the piece passes by.
// (Other sizes of panel and depth were measured: smaller panels read the tokens from L3 too often, deeper pieces push
// the tokens out of L1.) The low-rank part is one more piece: r more steps of depth. Sums stay in fp32 until they are
// written, rounded once.
//
// A tile is 16 rows of 64 bytes. A product C [16, 16] += A [16, 32] B takes B with pairs of depth side by side.
// Forward, W_eff is the left operand, as decoded, and X is transposed by word; backward, W_eff is the right one, two
// decoded rows interleaved.
#pragma once

#include <type_traits>

#include "dequant_add.h"
#include "sddmm.h"

namespace qrosa::QROSA_ISA {

constexpr int kTile = 512;   // bf16 numbers in a tile
constexpr int kSum = 256;    // fp32 numbers in a tile of sums
constexpr int kUnit = 64;    // rows or columns of W_eff that work is split by
constexpr int kPanel = 512;  // and that a thread works on at once, at most
constexpr int kDepth = 256;  // of a decoded piece
constexpr int kDepthTiles = kDepth / 32;

struct alignas(64) TileShape {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Sums of two weight tiles by two token tiles over `steps` tiles of depth. sums: w0t0, w0t1, w1t0, w1t1.
template <bool kWeightsLeft>
static inline void multiply_tiles(const Bf16* w0, const Bf16* w1, const Bf16* t0, const Bf16* t1, int64_t steps,
                                  float* sums, bool first) {
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums, 64);
    _tile_loadd(1, sums + kSum, 64);
    _tile_loadd(2, sums + 2 * kSum, 64);
    _tile_loadd(3, sums + 3 * kSum, 64);
  }
  for (int64_t step = 0; step < steps; ++step) {
    _tile_loadd(4, w0 + step * kTile, 64);
    _tile_loadd(5, w1 + step * kTile, 64);
    _tile_loadd(6, t0 + step * kTile, 64);
    _tile_loadd(7, t1 + step * kTile, 64);
    if constexpr (kWeightsLeft) {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    } else {
      _tile_dpbf16ps(0, 6, 4);
      _tile_dpbf16ps(1, 7, 4);
      _tile_dpbf16ps(2, 6, 5);
      _tile_dpbf16ps(3, 7, 5);
    }
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + kSum, 64);
  _tile_stored(2, sums + 2 * kSum, 64);
  _tile_stored(3, sums + 3 * kSum, 64);
}

// `count` of 32 bf16 numbers.
static inline __m512i load_some(const Bf16* p, int64_t count) {
  if (count >= 32) return _mm512_loadu_si512(p);
  return _mm512_maskz_loadu_epi16(count > 0 ? (1u << count) - 1 : 0u, p);
}

// One tile of tokens: 16 rows of src (of which `rows` exist), 32 columns (of which `columns` exist).
static inline void pack_token_tile(bool forward, const Bf16* src, int64_t stride, int64_t rows, int64_t columns,
                                   Bf16* tile) {
  __m512i row[16];
  for (int i = 0; i < 16; ++i) row[i] = i < rows ? load_some(src + i * stride, columns) : _mm512_setzero_si512();
  if (forward) transpose(row);
  for (int i = 0; i < 16; ++i) _mm512_store_si512(tile + 32 * i, row[i]);
}

// Which of the elements at 16 indices stay.
static inline __mmask16 kept(__m512i index, const Dropout& dropout) {
  __m512i hash = _mm512_xor_si512(index, splat_word(dropout.keys.first));
  hash = _mm512_mullo_epi32(_mm512_xor_si512(hash, _mm512_srli_epi32(hash, 16)), splat_word(0x85EBCA6Bu));
  hash = _mm512_add_epi32(hash, splat_word(dropout.keys.second));
  hash = _mm512_mullo_epi32(_mm512_xor_si512(hash, _mm512_srli_epi32(hash, 13)), splat_word(0xC2B2AE35u));
  hash = _mm512_xor_si512(hash, _mm512_srli_epi32(hash, 16));
  return _mm512_cmpge_epu32_mask(hash, splat_word(dropout.threshold));
}

// Which of the 32 elements from `first` on stay.
static inline __mmask32 kept_32(uint32_t first, const Dropout& dropout) {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i low = _mm512_add_epi32(lane, splat_word(first)), high = _mm512_add_epi32(low, splat_word(16));
  return _mm512_kunpackw(kept(high, dropout), kept(low, dropout));
}

// A position of a decoded piece in tile order: forward (row, depth), backward (depth, column).
static inline int64_t left_place(int64_t row, int64_t depth) {
  return ((row / 16) * kDepthTiles + depth / 32) * kTile + (row % 16) * 32 + depth % 32;
}
static inline int64_t right_place(int64_t depth, int64_t column) {
  // Interleaving leaves words 8l..8l+3 of 32 columns in one tile and 8l+4..8l+7 in the next.
  const int64_t c = column % 32, tile = (column / 32) * 2 + (c % 8) / 4, word = (c / 8) * 4 + c % 4;
  return (tile * kDepthTiles + depth / 32) * kTile + (depth % 32) / 2 * 32 + 2 * word + depth % 2;
}

static inline void store_pair(Bf16* piece, int64_t depth, int64_t half, __m512i upper, __m512i lower) {
  Bf16* target = piece + (half * 2 * kDepthTiles + depth / 32) * kTile + (depth % 32) / 2 * 32;
  _mm512_store_si512(target, _mm512_unpacklo_epi16(upper, lower));
  _mm512_store_si512(target + kDepthTiles * kTile, _mm512_unpackhi_epi16(upper, lower));
}

static inline __m128i load_codes(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }

// Stored values of the delta, an array a field.
struct Patches {
  int32_t *row, *column;
  float* value;
};

// What one thread works on.
struct PanelWork {
  const MatmulWork& all;
  int64_t start, wide;  // first row (forward) or column (backward) of the panel, and how many; wide is a multiple of 64
  Bf16* piece;          // [kPanel * kDepth]
};

// Sorts the stored values of the rows [begin, end) by key(column) in [0, keys), rows ascending within a key: ends[i] is
// where key i's patches end. A piece then takes its values in one run; looking for each row's few values in each piece
// would cost a mispredicted branch a row. False: an index lies outside the matrix.
template <class Key>
static bool sort_patches(const MatmulWork& all, int64_t begin, int64_t end, int64_t keys, Key key, int64_t* ends,
                         const Patches& patches) {
  for (int64_t i = 0; i <= keys; ++i) ends[i] = 0;
  for (int64_t row = begin; row < end; ++row) {
    if (!row_in_bounds(all.csr, row)) return false;
    for (int64_t i = all.csr.row_ptr[row]; i < all.csr.row_ptr[row + 1]; ++i) {
      const int64_t col = column(all.csr, i);
      if (!column_in_bounds(col, all.columns)) return false;
      ++ends[key(col) + 1];
    }
  }
  for (int64_t i = 0; i < keys; ++i) ends[i + 1] += ends[i];
  for (int64_t row = begin; row < end; ++row) {  // moves each key's begin to its end
    for (int64_t i = all.csr.row_ptr[row]; i < all.csr.row_ptr[row + 1]; ++i) {
      const int64_t col = column(all.csr, i);
      const int64_t at = ends[key(col)]++;
      patches.row[at] = static_cast<int32_t>(row);
      patches.column[at] = static_cast<int32_t>(col);
      patches.value[at] = all.csr.values[i];
    }
  }
  return true;
}

// Rows of the panel, `depth` columns of them from `from` on, into left tiles.
static void decode_left(const PanelWork& work, int64_t from, int64_t depth) {
  const MatmulWork& all = work.all;
  for (int64_t n = 0; n < work.wide; ++n) {
    const int64_t row = work.start + n;
    for (int64_t k = 0; k < depth; k += 64) {
      Bf16* target = work.piece + left_place(n, k);
      if (row >= all.features) {
        _mm512_store_si512(target, _mm512_setzero_si512());
        _mm512_store_si512(target + kTile, _mm512_setzero_si512());
        continue;
      }
      const int64_t element = row * all.columns + from + k;
      const Lut<Bf16> lut(block_absmax(all.nf4, element >> 6));
      const uint8_t* codes = all.nf4.codes + element / 2;
      _mm512_store_si512(target, lut.look_up(load_codes(codes)));
      _mm512_store_si512(target + kTile, lut.look_up(load_codes(codes + 16)));
    }
  }
}

static inline void decode_64(const MatmulWork& all, int64_t row, int64_t column0, __m512i* out) {
  if (row >= all.features) {
    out[0] = out[1] = _mm512_setzero_si512();
    return;
  }
  const int64_t element = row * all.columns + column0;
  const Lut<Bf16> lut(block_absmax(all.nf4, element >> 6));
  out[0] = lut.look_up(load_codes(all.nf4.codes + element / 2));
  out[1] = lut.look_up(load_codes(all.nf4.codes + element / 2 + 16));
}

// Columns of the panel, `depth` rows of them from `from` on, into right tiles; depth is padded to 32 with zeros.
static void decode_right(const PanelWork& work, int64_t from, int64_t depth) {
  const MatmulWork& all = work.all;
  for (int64_t n = 0; n < round_up(depth, 32); n += 2) {
    for (int64_t k = 0; k < work.wide; k += 64) {
      __m512i upper[2], lower[2];
      decode_64(all, from + n, work.start + k, upper);
      decode_64(all, from + n + 1, work.start + k, lower);
      store_pair(work.piece, n, k / 32, upper[0], lower[0]);
      store_pair(work.piece, n, k / 32 + 1, upper[1], lower[1]);
    }
  }
}

// Bytes of an array at 16 places, as words; reads whole aligned words, so nothing beyond a page of the array.
static inline __m512i gather_bytes(const uint8_t* bytes, __m512i place) {
  const auto address = reinterpret_cast<uintptr_t>(bytes);
  const __m512i at = _mm512_add_epi32(place, splat_word(static_cast<uint32_t>(address % 4)));
  const __m512i words =
      _mm512_i32gather_epi32(_mm512_srli_epi32(at, 2), reinterpret_cast<const int*>(address / 4 * 4), 4);
  const __m512i shift = _mm512_slli_epi32(_mm512_and_si512(at, splat_word(3)), 3);
  return _mm512_and_si512(_mm512_srlv_epi32(words, shift), splat_word(255));
}

// The absmax of 16 blocks, in the same two roundings as block_absmax.
static inline __m512 gather_absmax(const Nf4View& nf4, __m512i block) {
  if (nf4.absmax != nullptr) return _mm512_i32gather_ps(block, nf4.absmax, 4);
  const __m512 code = _mm512_i32gather_ps(gather_bytes(nf4.absmax_q, block), nf4.absmax_code, 4);
  const __m512 scale = _mm512_i32gather_ps(_mm512_srli_epi32(block, kNestedShift), nf4.absmax_scale, 4);
  return _mm512_add_ps(_mm512_mul_ps(code, scale), splat(*nf4.absmax_offset));
}

// Writes deq + S, rounded once, for up to 16 patches from `at` on into a piece that begins at (row0, column0).
static inline void apply_patches(const MatmulWork& all, const Patches& patches, int64_t at, int64_t count, int64_t row0,
                                 int64_t column0, Bf16* piece) {
  const auto mask = static_cast<__mmask16>(count >= 16 ? 0xFFFF : (1u << count) - 1);
  const __m512i row = _mm512_maskz_loadu_epi32(mask, patches.row + at);
  const __m512i col = _mm512_maskz_loadu_epi32(mask, patches.column + at);
  const __m512i element =
      _mm512_add_epi32(_mm512_mullo_epi32(row, splat_word(static_cast<uint32_t>(all.columns))), col);
  const __m512i byte = gather_bytes(all.nf4.codes, _mm512_srli_epi32(element, 1));
  const __m512i low = _mm512_slli_epi32(_mm512_andnot_si512(element, splat_word(1)), 2);  // the even one lies high
  const __m512i code = _mm512_and_si512(_mm512_srlv_epi32(byte, low), splat_word(15));
  const __m512 dense = _mm512_mul_ps(_mm512_permutexvar_ps(code, _mm512_load_ps(kTable)),
                                     gather_absmax(all.nf4, _mm512_srli_epi32(element, 6)));
  alignas(64) int32_t n[16], k[16];
  alignas(32) uint16_t bits[16];
  const __m512 sum = _mm512_add_ps(dense, _mm512_maskz_loadu_ps(mask, patches.value + at));
  _mm256_store_si256(reinterpret_cast<__m256i*>(bits), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(sum)));
  _mm512_store_si512(n, _mm512_sub_epi32(row, splat_word(static_cast<uint32_t>(row0))));
  _mm512_store_si512(k, _mm512_sub_epi32(col, splat_word(static_cast<uint32_t>(column0))));
  for (int64_t i = 0; i < lesser(16, count); ++i) {
    piece[all.forward ? left_place(n[i], k[i]) : right_place(n[i], k[i])].bits = bits[i];
  }
}

// A piece of the low-rank factor: rows of B [N, r] forward, columns of A [r, K] backward.
static void copy_factor(const PanelWork& work, int64_t from, int64_t depth) {
  const MatmulWork& all = work.all;
  const auto* factor = static_cast<const Bf16*>(all.right);
  if (all.forward) {
    for (int64_t n = 0; n < work.wide; ++n) {
      const bool inside = work.start + n < all.features;
      for (int64_t r = 0; r < depth; r += 32) {
        _mm512_store_si512(work.piece + left_place(n, r),
                           load_some(factor + (work.start + n) * all.rank + from + r, inside ? depth - r : 0));
      }
    }
    return;
  }
  for (int64_t r = 0; r < round_up(depth, 32); r += 2) {
    for (int64_t half = 0; half < work.wide / 32; ++half) {
      const Bf16* source = factor + (from + r) * all.columns + work.start + 32 * half;
      store_pair(work.piece, r, half, load_some(source, r < depth ? 32 : 0),
                 load_some(source + all.columns, r + 1 < depth ? 32 : 0));
    }
  }
}

// The decoded piece times all tokens.
static void multiply_piece(const PanelWork& work, const void* packed, int64_t depth_tiles, int64_t from, int64_t depth,
                           bool first, float* sums) {
  const MatmulWork& all = work.all;
  const int64_t steps = (depth + 31) / 32;
  for (int64_t pair = 0; pair < (all.tokens + 31) / 32; ++pair) {
    const Bf16* t0 = static_cast<const Bf16*>(packed) + (2 * pair * depth_tiles + from / 32) * kTile;
    for (int64_t w = 0; w < work.wide / 16; w += 2, sums += 4 * kSum) {
      const Bf16* w0 = work.piece + w * kDepthTiles * kTile;
      if (all.forward) {
        multiply_tiles<true>(w0, w0 + kDepthTiles * kTile, t0, t0 + depth_tiles * kTile, steps, sums, first);
      } else {
        multiply_tiles<false>(w0, w0 + kDepthTiles * kTile, t0, t0 + depth_tiles * kTile, steps, sums, first);
      }
    }
  }
}

static inline void store_some(Bf16* p, __m512i values, int64_t count) {
  _mm512_mask_storeu_epi16(p, count >= 32 ? ~__mmask32{0} : (1u << count) - 1, values);
}

// Sums of 32 tokens by 32 features: each token's line is a transposed tile row. 16 tokens of `half`.
static void write_forward(const MatmulWork& all, const float* sums, int64_t token, int64_t feature) {
  const int64_t wide = all.features - feature;
  if (wide <= 0) return;
  __m512 bias[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  if (all.bias != nullptr) {
    for (int i = 0; i < 2; ++i) {
      const int64_t left = wide - 16 * i;
      bias[i] = _mm512_maskz_loadu_ps(left >= 16 ? 0xFFFF
                                      : left > 0 ? (1u << left) - 1
                                                 : 0,
                                      all.bias + feature + 16 * i);
    }
  }
  for (int half = 0; half < 2; ++half) {
    __m512i row[2][16];
    for (int w = 0; w < 2; ++w) {
      for (int i = 0; i < 16; ++i) row[w][i] = _mm512_load_si512(sums + (2 * w + half) * kSum + 16 * i);
      transpose(row[w]);
    }
    for (int i = 0; i < 16; ++i) {
      const int64_t t = token + 16 * half + i;
      if (t >= all.tokens) return;
      const __m512 low = _mm512_add_ps(_mm512_castsi512_ps(row[0][i]), bias[0]);
      const __m512 high = _mm512_add_ps(_mm512_castsi512_ps(row[1][i]), bias[1]);
      store_some(static_cast<Bf16*>(all.out) + t * all.features + feature,
                 reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)), wide);
    }
  }
}

// Sums of 32 tokens by 32 columns, plus the kept ones among `extra` (null: none).
static void write_backward(const MatmulWork& all, const float* sums, const float* extra, int64_t token,
                           int64_t column0) {
  const __m512i order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
  const __m512i place = _mm512_set_epi32(27, 26, 25, 24, 19, 18, 17, 16, 11, 10, 9, 8, 3, 2, 1, 0);
  for (int64_t i = 0; i < 32 && token + i < all.tokens; ++i) {
    const int64_t at = (i / 16) * kSum + (i % 16) * 16;
    __m512 low = _mm512_load_ps(sums + at), high = _mm512_load_ps(sums + at + 2 * kSum);
    if (extra != nullptr) {
      const auto first = all.dropout.first + static_cast<uint32_t>((token + i) * all.columns + column0);
      const __m512i index = _mm512_add_epi32(place, splat_word(first));
      low = _mm512_mask_add_ps(low, kept(index, all.dropout), low, _mm512_load_ps(extra + at));
      high = _mm512_mask_add_ps(high, kept(_mm512_add_epi32(index, splat_word(4)), all.dropout), high,
                                _mm512_load_ps(extra + at + 2 * kSum));
    }
    const auto both = _mm512_cvtne2ps_pbh(high, low);
    _mm512_storeu_si512(static_cast<Bf16*>(all.out) + (token + i) * all.columns + column0,
                        _mm512_permutexvar_epi64(order, reinterpret_cast<__m512i>(both)));
  }
}

// Writes a panel's sums. The low-rank product joins here where a dropout mask stands between it and dX.
static void write_panel(const PanelWork& work, const void* packed_left, const float* sums) {
  const MatmulWork& all = work.all;
  const bool masked = all.rank > 0 && all.dropout.threshold != 0;
  const int64_t steps = (all.rank + 31) / 32;
  alignas(64) float extra[4 * kSum];
  if (masked) copy_factor(work, 0, all.rank);
  for (int64_t pair = 0; pair < (all.tokens + 31) / 32; ++pair) {
    const Bf16* t0 = static_cast<const Bf16*>(packed_left) + 2 * pair * steps * kTile;
    for (int64_t w = 0; w < work.wide / 32; ++w, sums += 4 * kSum) {
      const int64_t token = 32 * pair, place = work.start + 32 * w;
      if (all.forward) {
        write_forward(all, sums, token, place);
        continue;
      }
      const Bf16* w0 = work.piece + 2 * w * kDepthTiles * kTile;
      if (masked) multiply_tiles<false>(w0, w0 + kDepthTiles * kTile, t0, t0 + steps * kTile, steps, extra, true);
      write_backward(all, sums, masked ? extra : nullptr, token, place);
    }
  }
}

static int64_t matmul_units(const MatmulWork& all) {
  return ((all.forward ? all.features : all.columns) + kUnit - 1) / kUnit;
}

// A thread's own memory.
struct MatmulSpace {
  Bf16* piece;        // [kPanel * kDepth]
  float* sums;        // [tokens, kPanel] in tiles
  int64_t* ends;      // of the keys of the patches
  int32_t* panel_of;  // [units]: the panel that a unit of columns belongs to, or the number of panels
  Patches patches;    // [nnz]

  // Lays the parts out from `base` on; returns the bytes.
  int64_t lay_out(const MatmulWork& all, char* base) {
    int64_t at = 0;
    const auto take = [&](auto*& part, int64_t count) {
      part = reinterpret_cast<std::remove_reference_t<decltype(part)>>(base + at);
      at += round_up(count * static_cast<int64_t>(sizeof(*part)), 64);
    };
    take(piece, kPanel * kDepth);
    take(sums, round_up(all.tokens, 32) * kPanel);
    take(ends, all.columns / kUnit + 2);
    take(panel_of, all.columns / kUnit);
    take(patches.row, all.csr.nnz);
    take(patches.column, all.csr.nnz);
    take(patches.value, all.csr.nnz);
    return at;
  }
};

static int64_t matmul_workspace(const MatmulWork& all) { return MatmulSpace{}.lay_out(all, nullptr); }

// The panels of the units [begin, end), of equal width: a narrow last one would starve.
struct Panels {
  int64_t begin, units, count;
  Panels(int64_t first, int64_t last)
      : begin(first), units(last - first), count((units * kUnit + kPanel - 1) / kPanel) {}
  int64_t unit(int64_t panel) const { return begin + panel * units / count; }  // the first one
};

// The delta inside a panel's pieces: a key is a piece of columns (forward) or a panel (backward).
static bool sort_forward(const MatmulWork& all, int64_t start, int64_t wide, const MatmulSpace& space) {
  if (all.csr.row_ptr == nullptr) return true;
  return sort_patches(
      all, start, lesser(start + wide, all.features), (all.columns + kDepth - 1) / kDepth,
      [](int64_t col) { return col / kDepth; }, space.ends, space.patches);
}
static bool sort_backward(const MatmulWork& all, const Panels& panels, const MatmulSpace& space) {
  if (all.csr.row_ptr == nullptr) return true;
  for (int64_t unit = 0; unit < all.columns / kUnit; ++unit) space.panel_of[unit] = static_cast<int32_t>(panels.count);
  for (int64_t panel = 0; panel < panels.count; ++panel) {
    for (int64_t unit = panels.unit(panel); unit < panels.unit(panel + 1); ++unit) {
      space.panel_of[unit] = static_cast<int32_t>(panel);
    }
  }
  return sort_patches(
      all, 0, all.features, panels.count + 1, [&](int64_t col) { return space.panel_of[col / kUnit]; }, space.ends,
      space.patches);
}

// One panel: decode a piece, add the delta, multiply it with all tokens.
static void multiply_panel(const PanelWork& work, const void* packed, const void* packed_left, int64_t panel,
                           const MatmulSpace& space) {
  const MatmulWork& all = work.all;
  const bool delta = all.csr.row_ptr != nullptr;
  const int64_t depth = all.forward ? all.columns : all.features;
  int64_t at = delta && !all.forward && panel > 0 ? space.ends[panel - 1] : 0;  // forward sorts for each panel
  for (int64_t from = 0; from < depth; from += kDepth) {
    const int64_t deep = lesser(kDepth, depth - from);
    int64_t stop = at;  // the patches of this piece: [at, stop)
    if (all.forward) {
      decode_left(work, from, deep);
      if (delta) stop = space.ends[from / kDepth];
    } else {
      decode_right(work, from, deep);
      while (delta && stop < space.ends[panel] && space.patches.row[stop] < from + deep) ++stop;
    }
    for (; at < stop; at += lesser(16, stop - at)) {
      apply_patches(all, space.patches, at, stop - at, all.forward ? work.start : from, all.forward ? from : work.start,
                    work.piece);
    }
    multiply_piece(work, packed, (depth + 31) / 32, from, deep, from == 0, space.sums);
  }
  for (int64_t from = 0; from < all.rank && all.dropout.threshold == 0; from += kDepth) {
    const int64_t deep = lesser(kDepth, all.rank - from);
    copy_factor(work, from, deep);
    multiply_piece(work, packed_left, (all.rank + 31) / 32, from, deep, false, space.sums);
  }
  write_panel(work, packed_left, space.sums);
}

// The units [begin, end), with `base` of matmul_workspace() bytes; false: a bad index.
static bool matmul(const MatmulWork& all, const void* packed, const void* packed_left, int64_t begin, int64_t end,
                   void* base) {
  const TileShape shape;
  const Panels panels(begin, end);
  MatmulSpace space;
  space.lay_out(all, static_cast<char*>(base));
  bool sound = all.forward || sort_backward(all, panels, space);
  _tile_loadconfig(&shape);
  for (int64_t panel = 0; panel < panels.count && sound; ++panel) {
    const int64_t start = panels.unit(panel) * kUnit, wide = panels.unit(panel + 1) * kUnit - start;
    sound = !all.forward || sort_forward(all, start, wide, space);
    if (sound) multiply_panel({all, start, wide, space.piece}, packed, packed_left, panel, space);
  }
  _tile_release();
  return sound;
}

}  // namespace qrosa::QROSA_ISA
