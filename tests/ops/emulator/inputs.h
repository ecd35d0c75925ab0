// What the emulator's programs share: exact arrays, an NF4 matrix with a delta, gradients, and what must come out.
#pragma once

#include "../../../csrc/cuda/launch.h"
#include "../../../csrc/cuda/warp.cuh"

#include <algorithm>
#include <memory>
#include <random>
#include <set>
#include <string>

namespace qrosa {

inline std::mt19937 random_bits(7);

inline int random_below(int64_t bound) { return static_cast<int>(random_bits() % static_cast<uint64_t>(bound)); }
inline float random_value() { return static_cast<float>(random_below(2001) - 1000) / 500.0f; }

[[noreturn]] inline void wrong(const std::string& what) {
  std::fprintf(stderr, "wrong: %s\n", what.c_str());
  std::exit(1);
}

// A 16-byte aligned heap array of exactly `count` elements after `shift`, so that sanitizers see any access beyond it.
template <typename T>
class Array {
 public:
  explicit Array(int64_t count, int64_t shift = 0)
      : bytes_(static_cast<size_t>(count + shift) * sizeof(T)),
        memory_(bytes_ == 0 ? 16 : bytes_, 0),
        data_(reinterpret_cast<T*>(memory_.data()) + shift),
        count_(count) {}
  T* data() { return data_; }
  T& operator[](int64_t i) { return data_[i]; }
  int64_t size() const { return count_; }

 private:
  size_t bytes_;
  std::vector<unsigned char> memory_;
  T* data_;
  int64_t count_;
};

// An NF4 matrix and a delta, with the weight they stand for in double.
struct Base {
  int64_t rows, columns;
  Array<uint8_t> codes, absmax_q;
  Array<float> code, scale, offset, absmax;
  Array<int32_t> row_ptr;
  Array<uint16_t> col16;
  Array<int32_t> col32;
  Array<float> values;
  Nf4View nf4;
  CsrView csr;

  Base(int64_t n, int64_t k, int block_shift, bool nested, int64_t nnz, bool wide, int64_t shift = 0)
      : rows(n),
        columns(k),
        codes((n * k + 1) / 2, shift),
        absmax_q(ceil_div(n * k, int64_t{1} << block_shift)),
        code(256),
        scale(ceil_div(absmax_q.size(), 256)),
        offset(1),
        absmax(absmax_q.size()),
        row_ptr(n + 1),
        col16(wide ? 0 : nnz),
        col32(wide ? nnz : 0),
        values(nnz) {
    for (int64_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<uint8_t>(random_below(256));
    for (int64_t i = 0; i < absmax.size(); ++i) {
      absmax[i] = 1.0f + random_value() / 4;
      absmax_q[i] = static_cast<uint8_t>(random_below(256));
    }
    for (int i = 0; i < 256; ++i) code[i] = random_value();
    for (int64_t i = 0; i < scale.size(); ++i) scale[i] = random_value() / 8;
    offset[0] = 1.1f;
    nf4 = nested
              ? Nf4View{codes.data(), nullptr, absmax_q.data(), code.data(), scale.data(), offset.data(), block_shift}
              : Nf4View{codes.data(), absmax.data(), nullptr, nullptr, nullptr, nullptr, block_shift};
    std::set<int64_t> positions;
    while (static_cast<int64_t>(positions.size()) < nnz) {
      const int64_t row = random_below(3) == 0 ? n / 2 : random_below(n);  // one row much fuller than the others
      positions.insert(row * k + random_below(k));
      if (static_cast<int64_t>(positions.size()) == nnz) break;
      positions.insert(random_below(n * k));
    }
    int64_t index = 0;
    for (const int64_t position : positions) {
      row_ptr[position / k + 1]++;
      if (wide) {
        col32[index] = static_cast<int32_t>(position % k);
      } else {
        col16[index] = static_cast<uint16_t>(position % k);
      }
      values[index++] = random_value();
    }
    for (int64_t i = 0; i < n; ++i) row_ptr[i + 1] += row_ptr[i];
    csr = {row_ptr.data(), wide ? static_cast<void*>(col32.data()) : col16.data(), values.data(), nnz, wide};
    if (nnz == 0) csr = {};
  }

  float base_value(int64_t element) const {
    static const float table[16] = QROSA_NF4_TABLE;
    const int64_t block = element >> nf4.block_shift;
    return table[nibble(nf4.codes, element)] * block_absmax(nf4, block);
  }

  std::vector<float> dense() const {  // fp32, as every kernel must form it
    std::vector<float> weight(rows * columns);
    for (int64_t i = 0; i < rows * columns; ++i) weight[i] = base_value(i);
    for (int64_t n = 0; csr.row_ptr != nullptr && n < rows; ++n) {
      for (int i = csr.row_ptr[n]; i < csr.row_ptr[n + 1]; ++i) weight[n * columns + column(csr, i)] += csr.values[i];
    }
    return weight;
  }
};

template <typename T>
constexpr Float type_of() {
  return std::is_same_v<T, Bf16> ? Float::kBf16 : std::is_same_v<T, Fp16> ? Float::kFp16 : Float::kFp32;
}

template <typename T>
struct Gradients {
  Array<T> dy, x;
  int64_t tokens, rows, columns;
  std::vector<double> product, size;  // dY^T X, and the sum of the terms' magnitudes for the bound on rounding

  Gradients(int64_t t, int64_t n, int64_t k, int64_t shift)
      : dy(t * n, shift), x(t * k, shift), tokens(t), rows(n), columns(k), product(n * k), size(n * k) {
    for (int64_t i = 0; i < t * n; ++i) dy[i] = from_float<T>(random_value());
    for (int64_t i = 0; i < t * k; ++i) x[i] = from_float<T>(random_value());
    for (int64_t i = 0; i < t; ++i) {
      for (int64_t r = 0; r < n; ++r) {
        const double left = to_float(dy[i * n + r]);
        for (int64_t c = 0; c < k; ++c) {
          const double term = left * to_float(x[i * k + c]);
          product[r * k + c] += term;
          size[r * k + c] += std::fabs(term);
        }
      }
    }
  }

  Pair pair() { return {dy.data(), x.data(), tokens, rows, columns, type_of<T>()}; }

  // fp32 sums of n terms err by at most n * 2^-24 of the terms' magnitudes; kernels hold well under that.
  void compare(const std::string& what, float value, int64_t row, int64_t column, double before = 0.0,
               bool square = false) {
    const double exact = product[row * columns + column];
    const double slack = 1e-5 * (size[row * columns + column] + 1e-3);
    const double want = before + (square ? exact * exact : exact);
    const double allowed =
        square ? 2 * slack * (std::fabs(exact) + slack) + 1e-6 * std::fabs(want) : slack + 1e-6 * std::fabs(want);
    if (!(std::fabs(value - want) <= allowed)) {
      wrong(what + " [" + std::to_string(tokens) + ", " + std::to_string(rows) + ", " + std::to_string(columns) +
            "] at (" + std::to_string(row) + ", " + std::to_string(column) + "): " + std::to_string(value) + " for " +
            std::to_string(want));
    }
  }
};

}  // namespace qrosa
