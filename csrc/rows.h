// Finding the delta's entries inside a piece of the flat [N * K] array. Shared by the CUDA kernels and their CPU tests.
//
// CSR order is the order of flat positions, so the entries of any contiguous piece are one contiguous range of indices.
// Damaged row pointers or columns give a wrong range, never one outside the stored entries: kernels cannot raise
// without a host sync, so they stay inside their memory and skip what lies outside the matrix.
#pragma once

#include <cstdint>

#include "csr.h"

namespace qrosa {

// First entry of `row` whose column is at least `target`, within [0, nnz].
QROSA_HD int64_t row_lower_bound(const CsrView& csr, int64_t row, int64_t target) {
  if (!row_in_bounds(csr, row)) return 0;
  int64_t low = csr.row_ptr[row], high = csr.row_ptr[row + 1];
  while (low < high) {
    const int64_t middle = (low + high) >> 1;
    if (column(csr, middle) < target) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// How many entries lie before flat position `element` of an [N, K] matrix; `element` may be N * K.
QROSA_HD int64_t entries_before(const CsrView& csr, int64_t element, int64_t rows, int64_t columns) {
  const int64_t row = element / columns;
  return row < rows ? row_lower_bound(csr, row, element - row * columns) : csr.nnz;
}

// The row in [first, last] that holds entry `index`.
QROSA_HD int64_t entry_row(const CsrView& csr, int64_t index, int64_t first, int64_t last) {
  while (first < last) {
    const int64_t middle = (first + last + 1) >> 1;
    if (csr.row_ptr[middle] <= index) {
      first = middle;
    } else {
      last = middle - 1;
    }
  }
  return first;
}

}  // namespace qrosa
