// Where the CUDA kernels keep each element: spans, tiles in shared memory, and the fragments of the tensor cores.
//
// Shared memory has 32 banks of 4 bytes and serves a warp's 16-byte accesses eight lanes at a time, so eight lanes must
// meet eight different 16-byte columns ("slots", address / 16 mod 8). The maps below are pure functions of indices, the
// same on the host: tests walk them exhaustively, and run the kernels themselves on the CPU (tests/ops/emulator).
#pragma once

#include <cstdint>

#include "nf4.h"

namespace qrosa {

constexpr int kWarpSize = 32;
constexpr int kPieceBytes = 16;  // one vector load or store

QROSA_HD int64_t ceil_div(int64_t value, int64_t by) { return (value + by - 1) / by; }

// ---- dequantising: a warp turns a span of the flat array into values, 32 codes (16 bytes) a lane -------------------

constexpr int kSpan = 1024;
constexpr int kLaneCodes = kSpan / kWarpSize;
constexpr int kMinVectorBlockShift = 5;  // a lane's 32 codes share one absmax

// Code i (0..7) of a little-endian 4-byte word of codes: the high nibble of a byte comes first.
QROSA_HD int word_code(uint32_t word, int i) {
  return static_cast<int>(word >> (8 * (i >> 1) + 4 * ((i & 1) ^ 1))) & 15;
}

// Lanes write runs of 32 elements and read runs of 16 bytes; both meet eight slots. Maps a 16-byte piece to its place.
QROSA_HD int swizzle_piece(int piece) { return piece ^ ((piece >> 3) & 7); }

// Byte offset of an element in a swizzled span.
QROSA_HD int span_offset(int element, int element_bytes) {
  const int byte = element * element_bytes;
  return swizzle_piece(byte / kPieceBytes) * kPieceBytes + byte % kPieceBytes;
}

// ---- dense tiles of dY^T X: 128 rows of dY^T by 128 columns of X, 32 tokens a stage ---------------------------------

constexpr int kTileRows = 128, kTileColumns = 128, kStageTokens = 32, kStages = 3;
constexpr int kTileThreads = 256;                            // 8 warps, 2 along the rows by 4 along the columns
constexpr int kWarpRows = 64, kWarpColumns = 32;             // each warp's share of the tile
constexpr int kTilePieces = kTileColumns * 2 / kPieceBytes;  // 16-byte pieces of one token's row: 16
constexpr int kStageBytes = kStageTokens * kTileColumns * 2;
constexpr int kProductPitch = 136;  // floats between rows of a product kept in shared memory; 8 mod 32, see above

// Byte offset of a 16-byte piece of one token in a stage [32 tokens, 128 columns]; 8 tokens at one piece meet 8 slots.
QROSA_HD int stage_offset(int token, int piece) { return (token * kTilePieces + (piece ^ (token & 7))) * kPieceBytes; }

// Which 8 x 8 matrix row a lane addresses in a transposing load of four: its token and column within a 16 x 16 block.
struct MatrixRow {
  int token, column;
};
// dY^T as operand A: matrices are (rows 0-7, tokens 0-7), (rows 8-15, tokens 0-7), then the same at tokens 8-15.
QROSA_HD MatrixRow operand_a_row(int lane) { return {((lane >> 4) & 1) * 8 + (lane & 7), ((lane >> 3) & 1) * 8}; }
// X as operand B of two 8-column products: (tokens 0-7, columns 0-7), (tokens 8-15, columns 0-7), then columns 8-15.
QROSA_HD MatrixRow operand_b_row(int lane) { return {((lane >> 3) & 1) * 8 + (lane & 7), ((lane >> 4) & 1) * 8}; }

// Row and column of accumulator i (0..3) of an m16n8 product.
QROSA_HD int accumulator_row(int lane, int i) { return (lane >> 2) + 8 * (i >> 1); }
QROSA_HD int accumulator_column(int lane, int i) { return 2 * (lane & 3) + (i & 1); }

// ---- gathered dot products: columns of X and rows of dY^T held token-major, 64 tokens (128 bytes) each --------------

constexpr int kGatherTokens = 64, kGatherRows = 256, kGatherThreads = 512;
constexpr int kGatherPieces = kGatherTokens * 2 / kPieceBytes;  // 8
constexpr int kGatherLineBytes = kGatherTokens * 2;
constexpr int kGatherColumnStep = 64;  // column parts are multiples of this

// An 8 x 8 block that one thread transposes while staging. Eight neighbouring threads hold the eight token groups of
// one group of columns: they load whole 32-byte sectors with their neighbours and store to eight slots.
struct StagedBlock {
  int token, line;  // first token, first column of X (or row of dY^T)
};
QROSA_HD StagedBlock staged_block(int index) { return {(index & 7) * 8, (index >> 3) * 8}; }

QROSA_HD int line_offset(int line, int piece) { return line * kGatherLineBytes + piece * kPieceBytes; }

// Which tokens entry `entry` (0..7) of a group contributes to matrix `matrix` (0..7). The order of tokens within a dot
// product is free as long as both operands agree, so each entry starts elsewhere and eight lanes meet eight slots.
QROSA_HD int gather_piece(int matrix, int entry) { return matrix ^ entry; }

// The diagonal of an 8 x 8 product: the lane that holds (entry, entry), in accumulator entry & 1.
QROSA_HD int diagonal_lane(int entry) { return entry * 4 + (entry >> 1); }

// ---- few rows of x: 16 rows of the base by 128 columns a step -------------------------------------------------------

constexpr int kDecodeTokens = 16;  // of one pass
constexpr int kDecodeRows = 16, kDecodeStep = 128, kDecodeWarps = 8;

// A lane's run of 32 columns within a step. The order of columns within a dot product is free too, so that codes and x
// are read in runs of 16 bytes: multiply step s takes a lane's columns 4 s .. 4 s + 3 as its four positions.
QROSA_HD int decode_run(int lane) { return (lane & 3) * kLaneCodes; }

}  // namespace qrosa
