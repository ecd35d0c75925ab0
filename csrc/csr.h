// The sparse delta's layout, shared by the CPU and CUDA kernels: int32 row pointers, 16- or 32-bit columns, fp32
// values.
//
// Columns are uint16 where K <= 65536 and int32 above. What the arrays hold is checked where it is read, so that
// damaged indices raise an error instead of touching foreign memory.
#pragma once

#include <cstdint>

#include "nf4.h"

namespace qrosa {

constexpr int64_t kMaxUint16Columns = 65536;

struct CsrView {
  const int32_t* row_ptr;  // [N + 1], null when there is no delta
  const void* col;         // uint16 or int32 [nnz]
  const float* values;     // [nnz], null where only positions matter
  int64_t nnz;
  bool wide;  // columns are int32
};

QROSA_HD int64_t column(const CsrView& csr, int64_t index) {
  return csr.wide ? static_cast<const int32_t*>(csr.col)[index] : static_cast<const uint16_t*>(csr.col)[index];
}

// Whether row n's range lies inside the stored values.
QROSA_HD bool row_in_bounds(const CsrView& csr, int64_t row) {
  const int64_t begin = csr.row_ptr[row], end = csr.row_ptr[row + 1];
  return begin >= 0 && begin <= end && end <= csr.nnz;
}

QROSA_HD bool column_in_bounds(int64_t col, int64_t columns) { return col >= 0 && col < columns; }

}  // namespace qrosa
