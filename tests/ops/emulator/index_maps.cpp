// Walks the index maps of csrc/tile.h, csrc/rows.h and csrc/sddmm_plan.h exhaustively: every element has one place,
// eight lanes meet eight slots of shared memory, fragments are what the PTX ISA says, every plan covers the matrix and
// fits.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <set>
#include <vector>

#include "../../../csrc/rows.h"
#include "../../../csrc/sddmm_plan.h"
#include "../../../csrc/tile.h"

namespace qrosa {
namespace {

#define CHECK(condition)                                                    \
  do {                                                                      \
    if (!(condition)) {                                                     \
      std::fprintf(stderr, "line %d: %s is false\n", __LINE__, #condition); \
      std::exit(1);                                                         \
    }                                                                       \
  } while (false)

// Whether byte offsets of eight lanes' 16-byte accesses lie in eight different slots.
template <typename Offset>
bool eight_slots(int first_lane, Offset offset) {
  std::set<int> slots;
  for (int lane = first_lane; lane < first_lane + 8; ++lane) {
    CHECK(offset(lane) % kPieceBytes == 0);
    slots.insert(offset(lane) / kPieceBytes % 8);
  }
  return slots.size() == 8;
}

void spans() {
  for (const int bytes : {2, 4}) {
    std::set<int> places;
    for (int e = 0; e < kSpan; ++e) {
      const int place = span_offset(e, bytes);
      CHECK(place % bytes == 0 && place >= 0 && place + bytes <= kSpan * bytes);
      places.insert(place);
    }
    CHECK(places.size() == static_cast<size_t>(kSpan));
    const int per_piece = kPieceBytes / bytes;
    for (int first = 0; first < kWarpSize; first += 8) {
      for (int piece = 0; piece < kLaneCodes / per_piece; ++piece) {
        CHECK(eight_slots(first, [&](int lane) { return span_offset(lane * kLaneCodes + piece * per_piece, bytes); }));
      }
      for (int piece = 0; piece < kSpan / per_piece; piece += kWarpSize) {
        CHECK(eight_slots(first, [&](int lane) { return swizzle_piece(piece + lane) * kPieceBytes; }));
      }
    }
  }
  const uint8_t codes[4] = {0x12, 0x34, 0x56, 0x78};  // as a little-endian word
  for (int i = 0; i < 8; ++i) CHECK(word_code(0x78563412u, i) == nibble(codes, i) && nibble(codes, i) == i + 1);
}

void stages() {
  std::set<int> places;
  for (int token = 0; token < kStageTokens; ++token) {
    for (int piece = 0; piece < kTilePieces; ++piece) places.insert(stage_offset(token, piece));
  }
  CHECK(places.size() == static_cast<size_t>(kStageTokens * kTilePieces));
  CHECK(*places.rbegin() + kPieceBytes == kStageBytes);
  // Filling: neighbouring threads store neighbouring pieces.
  for (int first = 0; first < kStageTokens * kTilePieces; first += 8) {
    CHECK(eight_slots(first, [](int place) { return stage_offset(place / kTilePieces, place % kTilePieces); }));
  }
  // Reading: matrix m of the four is lanes 8 m .. 8 m + 7, one stored row (token) each.
  for (int column = 0; column < kTileColumns; column += 16) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      CHECK(eight_slots(8 * matrix, [&](int lane) {
        const MatrixRow row = operand_a_row(lane);
        return stage_offset(row.token, (column + row.column) / 8);
      }));
      CHECK(eight_slots(8 * matrix, [&](int lane) {
        const MatrixRow row = operand_b_row(lane);
        return stage_offset(row.token, (column + row.column) / 8);
      }));
    }
  }
}

// What PTX ISA 9.7.15.5.8 says about mma.m16n8k16 with 16-bit operands: the element that a register's half holds.
struct Place {
  int row, column;
  bool operator==(const Place& other) const { return row == other.row && column == other.column; }
};
Place ptx_a(int lane, int i) {  // a0 .. a7, two to a register
  const int group = lane >> 2, in_group = lane % 4;
  return {(i < 2 || (i >= 4 && i < 6)) ? group : group + 8, in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0)};
}
Place ptx_b(int lane, int i) { return {(lane % 4) * 2 + (i & 1) + (i >= 2 ? 8 : 0), lane >> 2}; }
Place ptx_c(int lane, int i) { return {i < 2 ? lane >> 2 : (lane >> 2) + 8, (lane % 4) * 2 + (i & 1)}; }

// What a transposing ldmatrix gives a lane of matrix m, half h: stored row 2 (lane % 4) + h, stored column lane / 4.
void fragments() {
  for (int lane = 0; lane < kWarpSize; ++lane) {
    for (int i = 0; i < 4; ++i) {
      CHECK((ptx_c(lane, i) == Place{accumulator_row(lane, i), accumulator_column(lane, i)}));
    }
    for (int m = 0; m < 4; ++m) {
      for (int half = 0; half < 2; ++half) {
        const int source = 8 * m + 2 * (lane % 4) + half;  // the lane that gave this stored row's address
        const MatrixRow a = operand_a_row(source), b = operand_b_row(source);
        // dY is stored [token][row]: operand A's row is a stored column, its column a token.
        CHECK((ptx_a(lane, 2 * m + half) == Place{a.column + lane / 4, a.token}));
        // X is stored [token][column]: matrices 0 and 1 are the first product's B, 2 and 3 the second's.
        const Place want = ptx_b(lane, 2 * (m % 2) + half);
        CHECK((Place{b.token, b.column + lane / 4} == Place{want.row, want.column + 8 * (m / 2)}));
      }
    }
  }
  // Sums kept in shared memory: 16 lanes of an 8-byte store meet 32 banks.
  for (int first = 0; first < kWarpSize; first += 16) {
    std::set<int> banks;
    for (int lane = first; lane < first + 16; ++lane) {
      banks.insert((accumulator_row(lane, 0) * kProductPitch + accumulator_column(lane, 0)) % 32);
    }
    CHECK(banks.size() == 16);
    for (const int bank : banks) CHECK(bank % 2 == 0);
  }
}

void gathering() {
  for (int lines : {64, 256, 1536}) {  // every element of [lines, 64 tokens] staged once
    std::vector<int> seen(lines * kGatherTokens);
    for (int block = 0; block < lines * kGatherTokens / 64; ++block) {
      const StagedBlock at = staged_block(block);
      for (int c = 0; c < 8; ++c) {
        for (int t = 0; t < 8; ++t) ++seen[line_offset(at.line + c, at.token / 8) / 2 + t];
      }
    }
    for (const int count : seen) CHECK(count == 1);
  }
  for (int first = 0; first < 64; first += 8) {
    for (int c = 0; c < 8; ++c) {
      CHECK(eight_slots(first, [&](int lane) {
        const StagedBlock at = staged_block(lane);
        return line_offset(at.line + c, at.token / 8);
      }));
    }
  }
  std::mt19937 random(1);
  for (int matrix = 0; matrix < 8; ++matrix) {
    for (int round = 0; round < 100; ++round) {  // whatever lines eight entries ask for
      int lines[8];
      for (int& line : lines) line = static_cast<int>(random() % 1536);
      CHECK(eight_slots(0, [&](int entry) { return line_offset(lines[entry], gather_piece(matrix, entry)); }));
    }
  }
  for (int entry = 0; entry < 8; ++entry) {
    std::set<int> pieces;
    for (int matrix = 0; matrix < 8; ++matrix) pieces.insert(gather_piece(matrix, entry));
    CHECK(pieces.size() == 8 && *pieces.rbegin() == 7);
    const int lane = diagonal_lane(entry);
    CHECK(accumulator_row(lane, entry & 1) == entry && accumulator_column(lane, entry & 1) == entry);
    CHECK(((lane >> 2) & 1) == (entry & 1));  // the lane picks its register by its own row
  }
}

void search() {
  std::mt19937 random(3);
  for (const auto& [rows, columns] :
       std::vector<std::pair<int64_t, int64_t>>{{1, 1}, {3, 5}, {17, 9}, {40, 1}, {6, 300}}) {
    for (int percent : {0, 3, 50, 100}) {
      std::vector<int32_t> row_ptr{0};
      std::vector<uint16_t> col;
      std::vector<int64_t> flat;
      for (int64_t n = 0; n < rows; ++n) {
        for (int64_t k = 0; k < columns; ++k) {
          if (static_cast<int>(random() % 100) >= percent) continue;
          col.push_back(static_cast<uint16_t>(k));
          flat.push_back(n * columns + k);
        }
        row_ptr.push_back(static_cast<int32_t>(col.size()));
      }
      const CsrView csr{row_ptr.data(), col.data(), nullptr, static_cast<int64_t>(col.size()), false};
      for (int64_t e = 0; e <= rows * columns; ++e) {
        int64_t count = 0;
        for (const int64_t position : flat) count += position < e;
        CHECK(entries_before(csr, e, rows, columns) == count);
      }
      for (size_t i = 0; i < flat.size(); ++i) {
        CHECK(entry_row(csr, static_cast<int64_t>(i), 0, rows - 1) == flat[i] / columns);
      }
    }
  }
}

void check_plan(int64_t tokens, int64_t rows, int64_t columns, int64_t nnz, int64_t shared, int64_t processors) {
  const GatherPlan plan = plan_gather(tokens, rows, columns, nnz, shared, processors);
  CHECK(plan.shared_bytes() <= shared && plan.columns % kGatherColumnStep == 0 && plan.columns < 65536);
  CHECK(plan.column_parts * plan.columns >= columns && (plan.column_parts - 1) * plan.columns < columns);
  CHECK(plan.chunks * kGatherTokens >= tokens && plan.token_groups >= 1 && plan.token_groups <= plan.chunks);
  CHECK(plan.tiles * kGatherRows >= rows && plan.row_parts * plan.row_tiles >= plan.tiles);
  CHECK((plan.row_parts - 1) * plan.row_tiles < plan.tiles && plan.column_parts < 65536 && plan.row_parts < 65536);
  if (gather_is_cheaper(tokens, rows, columns, nnz)) {  // scratch for the sums is no more than half of a 16-bit weight
    CHECK(plan.token_groups * nnz * 4 <= rows * columns);
  }
}

void plans() {
  for (const int64_t shared : {99, 163, 227}) {
    for (const int64_t processors : {46, 128, 170}) {
      for (const int64_t tokens : {1, 63, 64, 65, 512, 2048, 16384}) {
        for (const int64_t rows : {1, 255, 257, 1024, 4096, 14336, 28672}) {
          for (const int64_t columns : {1, 65, 576, 4096, 14336, 100000}) {
            check_plan(tokens, rows, columns, rows * columns / 200 + 1, shared * 1024 - 3072, processors);
          }
        }
      }
    }
  }
}

void rule() {
  for (const int64_t tokens : {64, 2048, 16384}) {  // the usual densities gather, dense deltas go by tiles
    CHECK(gather_is_cheaper(tokens, 4096, 4096, 4096 * 4096 * 3 / 1000));
    CHECK(gather_is_cheaper(tokens, 14336, 4096, int64_t{14336} * 4096 * 6 / 1000));
    CHECK(!gather_is_cheaper(tokens, 4096, 4096, 4096 * 4096 / 20));
  }
  CHECK(!gather_is_cheaper(8, 4096, 4096, 4096 * 4096 / 40));  // short batches pad gathered lines twice as far
}

}  // namespace
}  // namespace qrosa

int main() {
  qrosa::spans();
  qrosa::stages();
  qrosa::fragments();
  qrosa::gathering();
  qrosa::search();
  qrosa::plans();
  qrosa::rule();
  std::puts("right");
  return 0;
}
