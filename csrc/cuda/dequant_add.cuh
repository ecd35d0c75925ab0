// deq(Wq) + S in one pass over the flat [N * K] array: a warp decodes a span of 1024 elements into shared memory, adds
// the span's sparse values there, and writes it out.
//
// Roofline: 0.5 bytes read and 2 written (bf16) an element; nothing is read twice but the few codes under sparse
// positions. Spans of the flat array rather than rows: alignment, tails and blocks that cross rows then never depend on
// K. Going through shared memory turns runs of 32 codes a lane into stores of neighbouring 16 bytes, and is where S is
// added: the sum is formed again in fp32 from its code, so the tile can hold the output's own type.
#pragma once

#include "decode.cuh"

namespace qrosa {

constexpr int kDequantWarps = 8;

template <typename Out>
__device__ __forceinline__ void store_run(unsigned char* tile, int lane, const uint4& packed, const float* table,
                                          float absmax) {
  constexpr int kPerPiece = kPieceBytes / sizeof(Out);
#pragma unroll
  for (int piece = 0; piece < kLaneCodes / kPerPiece; ++piece) {
    float values[kPerPiece];
#pragma unroll
    for (int i = 0; i < kPerPiece; ++i) {
      const int code = piece * kPerPiece + i;
      values[i] = rounded_product(table[word_code(piece_word(packed, code / 8), code % 8)], absmax);
    }
    uint4 out;
    if constexpr (sizeof(Out) == 4) {
      out = {__float_as_uint(values[0]), __float_as_uint(values[1]), __float_as_uint(values[2]),
             __float_as_uint(values[3])};
    } else {
      out = {pack_pair<Out>(values[0], values[1]), pack_pair<Out>(values[2], values[3]),
             pack_pair<Out>(values[4], values[5]), pack_pair<Out>(values[6], values[7])};
    }
    *reinterpret_cast<uint4*>(tile + span_offset(lane * kLaneCodes + piece * kPerPiece, sizeof(Out))) = out;
  }
}

template <typename Out>
__device__ __forceinline__ Out* span_element(unsigned char* tile, int element) {
  return reinterpret_cast<Out*>(tile + span_offset(element, sizeof(Out)));
}

// Adds the sparse entries [first, last) to the span that starts at flat element `base`.
template <typename Out>
__device__ __forceinline__ void add_delta(unsigned char* tile, int lane, int64_t base, int length, int64_t first,
                                          int64_t last, const Nf4View& nf4, const CsrView& csr, const float* table,
                                          int64_t columns) {
  if (first >= last) return;
  const int64_t first_row = base / columns;
  const int64_t last_row = (base + length - 1) / columns;
  for (int64_t index = first + lane; index < last; index += kWarpSize) {
    const int64_t col = column(csr, index);
    const int64_t element = entry_row(csr, index, first_row, last_row) * columns + col;
    const int64_t place = element - base;
    if (!column_in_bounds(col, columns) || place < 0 || place >= length) continue;
    const float value = rounded_sum(nf4_element(nf4, table, element), csr.values[index]);
    *span_element<Out>(tile, static_cast<int>(place)) = from_float<Out>(value);
  }
}

// `vector`: codes and out are 16-byte aligned and blocks hold at least 32 elements.
template <typename Out>
__global__ void __launch_bounds__(kDequantWarps* kWarpSize)
    dequant_add_kernel(Nf4View nf4, CsrView csr, Out* out, int64_t rows, int64_t columns, bool vector) {
  __shared__ float table[16];
  __shared__ __align__(16) unsigned char tiles[kDequantWarps][kSpan * sizeof(Out)];
  load_table(table);
  sync_block();
  const int lane = threadIdx.x % kWarpSize;
  unsigned char* tile = tiles[threadIdx.x / kWarpSize];
  const int64_t base = (static_cast<int64_t>(blockIdx.x) * kDequantWarps + threadIdx.x / kWarpSize) * kSpan;
  const int64_t left = rows * columns - base;
  if (left <= 0) return;
  const int length = left < kSpan ? static_cast<int>(left) : kSpan;
  const bool whole = vector && length == kSpan;

  const int64_t run = base + lane * kLaneCodes;  // loads first: they overlap with the search
  uint4 packed{};
  AskedAbsmax asked{};
  if (whole) {
    packed = load_now(reinterpret_cast<const uint4*>(nf4.codes + run / 2));
    asked = ask_absmax(nf4, run >> nf4.block_shift);
  }
  int first = 0, last = 0;
  if (csr.row_ptr != nullptr) {  // even lanes search the start, odd lanes the end
    const auto bound = static_cast<int>(entries_before(csr, base + (lane & 1) * length, rows, columns));
    first = from_lane(bound, 0);
    last = from_lane(bound, 1);
  }
  if (whole) {
    store_run<Out>(tile, lane, packed, table, absmax_of(nf4, asked));
  } else {
    for (int i = lane; i < length; i += kWarpSize) {
      *span_element<Out>(tile, i) = from_float<Out>(nf4_element(nf4, table, base + i));
    }
  }
  sync_warp();
  add_delta<Out>(tile, lane, base, length, first, last, nf4, csr, table, columns);
  sync_warp();
  if (whole) {
    constexpr int kPieces = kSpan * sizeof(Out) / kPieceBytes;
    uint4* target = reinterpret_cast<uint4*>(out + base);
#pragma unroll
    for (int piece = 0; piece < kPieces; piece += kWarpSize) {
      target[piece + lane] = *reinterpret_cast<uint4*>(tile + swizzle_piece(piece + lane) * kPieceBytes);
    }
  } else {
    for (int i = lane; i < length; i += kWarpSize) out[base + i] = *span_element<Out>(tile, i);
  }
}

}  // namespace qrosa
