// Runs the CUDA kernels on a model of a block (warp_model.h) over odd shapes and compares them with plain loops.
//
//   kernels            every case        kernels NAME       one of them
#define QROSA_EMULATOR 1

#include "../../../csrc/cuda/dequant_add.cuh"
#include "../../../csrc/cuda/dequant_spmm.cuh"
#include "../../../csrc/cuda/dropout.cuh"
#include "../../../csrc/cuda/score_accumulate.cuh"
#include "../../../csrc/cuda/sddmm_gather.cuh"
#include "../../../csrc/cuda/sddmm_tile.cuh"

#include <algorithm>
#include <memory>
#include <random>
#include <set>
#include <string>

namespace qrosa {
namespace {

std::mt19937 random_bits(7);

int random_below(int64_t bound) { return static_cast<int>(random_bits() % static_cast<uint64_t>(bound)); }
float random_value() { return static_cast<float>(random_below(2001) - 1000) / 500.0f; }

[[noreturn]] void wrong(const std::string& what) {
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

struct Shape {
  int64_t rows, columns;
};

// ---- dequant_add: every element, bit for bit ------------------------------------------------------------------------

template <typename Out>
void dequant_case(Base& base, int64_t out_shift) {
  const std::vector<float> expected = base.dense();
  Array<Out> out(base.rows * base.columns, out_shift);
  const bool vector = reinterpret_cast<uintptr_t>(base.nf4.codes) % 16 == 0 &&
                      reinterpret_cast<uintptr_t>(out.data()) % 16 == 0 && base.nf4.block_shift >= kMinVectorBlockShift;
  const auto blocks = static_cast<unsigned>(ceil_div(base.rows * base.columns, kSpan * kDequantWarps));
  model::launch({blocks}, kDequantWarps * kWarpSize, 0,
                [&] { dequant_add_kernel<Out>(base.nf4, base.csr, out.data(), base.rows, base.columns, vector); });
  for (int64_t i = 0; i < out.size(); ++i) {
    const Out rounded = from_float<Out>(expected[i]);
    if (std::memcmp(&rounded, &out[i], sizeof(Out)) != 0) {
      wrong("dequant_add [" + std::to_string(base.rows) + ", " + std::to_string(base.columns) + "] element " +
            std::to_string(i));
    }
  }
}

void dequant_add() {
  const Shape shapes[] = {{1, 1}, {3, 5}, {7, 33}, {64, 128}, {5, 1024}, {13, 1000}, {300, 7}, {2, 5000}, {33, 1056}};
  for (const Shape& shape : shapes) {
    for (const bool nested : {false, true}) {
      for (const int64_t nnz : {int64_t{0}, shape.rows * shape.columns / 50 + 1}) {
        Base base(shape.rows, shape.columns, nested ? 6 : 5, nested, nnz, nested);
        dequant_case<Bf16>(base, 0);
        dequant_case<Fp16>(base, 0);
        dequant_case<float>(base, 0);
      }
    }
  }
  Base full(9, 300, 6, true, 9 * 300, false), small_blocks(20, 130, 3, false, 40, false),
      shifted(8, 512, 6, true, 50, false, 1);
  dequant_case<Bf16>(full, 0);
  dequant_case<Bf16>(small_blocks, 0);
  dequant_case<float>(shifted, 0);
  dequant_case<Fp16>(full, 3);
}

// ---- sums over tokens
// -------------------------------------------------------------------------------------------------

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

  Operands operands() {
    const bool aligned =
        reinterpret_cast<uintptr_t>(dy.data()) % 16 == 0 && reinterpret_cast<uintptr_t>(x.data()) % 16 == 0;
    return {dy.data(), x.data(), tokens, rows, columns, aligned && rows % 8 == 0 && columns % 8 == 0};
  }

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

void compare_entries(const std::string& what, auto& gradients, const CsrView& csr, Array<float>& out) {
  for (int64_t n = 0; n < gradients.rows; ++n) {
    for (int i = csr.row_ptr[n]; i < csr.row_ptr[n + 1]; ++i) gradients.compare(what, out[i], n, column(csr, i));
  }
}

template <typename T>
void gather_case(int64_t tokens, int64_t rows, int64_t columns, int64_t nnz, bool wide, const GatherPlan& plan,
                 int64_t shift) {
  Base base(rows, columns, 6, false, nnz, wide);
  Gradients<T> gradients(tokens, rows, columns, shift);
  const int64_t listed = plan.column_parts * plan.tiles * kGatherRows;
  Array<int32_t> before(listed), moved(listed), total(plan.column_parts * plan.tiles);
  Array<float> sums(plan.token_groups * nnz), out(nnz);
  const GatherIndex index{before.data(), moved.data(), total.data()};
  model::launch({static_cast<unsigned>(plan.tiles), static_cast<unsigned>(plan.column_parts)}, kGatherRows, 0,
                [&] { gather_index_kernel(base.csr, index, rows, plan.columns); });
  const Dim3 grid{static_cast<unsigned>(plan.column_parts), static_cast<unsigned>(plan.token_groups),
                  static_cast<unsigned>(plan.row_parts)};
  model::launch(grid, kGatherThreads, plan.shared_bytes(),
                [&] { gather_kernel<T>(gradients.operands(), base.csr, index, plan, sums.data()); });
  model::launch({static_cast<unsigned>(ceil_div(nnz, 256))}, 256, 0,
                [&] { gather_sum_kernel(sums.data(), out.data(), nnz, static_cast<int>(plan.token_groups)); });
  compare_entries("sddmm gathering", gradients, base.csr, out);
}

void sddmm_gather() {
  const int64_t least = (kGatherRows + kGatherColumnStep) * kGatherLineBytes;  // the smallest part: many parts
  gather_case<Bf16>(65, 40, 72, 100, false, plan_gather(65, 40, 72, 100, least, 4), 0);
  gather_case<Bf16>(1, 1, 1, 1, false, plan_gather(1, 1, 1, 1, least, 100), 0);
  gather_case<Fp16>(130, 264, 200, 900, true, plan_gather(130, 264, 200, 900, 3 * least, 1), 0);
  gather_case<Bf16>(200, 517, 131, 1500, false, plan_gather(200, 517, 131, 1500, least, 12), 0);
  gather_case<Fp16>(63, 24, 640, 77, false, plan_gather(63, 24, 640, 77, 99 * 1024 - 3072, 128), 0);
  gather_case<Bf16>(64, 16, 64, 1024, false, plan_gather(64, 16, 64, 1024, least, 1), 0);  // every position
  gather_case<Bf16>(70, 32, 96, 50, false, plan_gather(70, 32, 96, 50, least, 8), 1);      // misaligned
}

template <typename T>
void tile_case(int64_t tokens, int64_t rows, int64_t columns, int64_t nnz, int64_t shift = 0) {
  constexpr bool kWide = sizeof(T) == 4;
  constexpr int64_t kSide = kWide ? kWideTile : kTileRows;
  Base base(rows, columns, 6, false, nnz, false);
  Gradients<T> gradients(tokens, rows, columns, shift);
  const Dim3 grid{static_cast<unsigned>(ceil_div(columns, kSide)), static_cast<unsigned>(ceil_div(rows, kSide))};
  Array<float> out(nnz);
  model::launch(grid, kTileThreads, 0, [&] {
    if constexpr (kWide) {
      sddmm_wide_kernel(gradients.operands(), base.csr, out.data());
    } else {
      sddmm_tile_kernel<T>(gradients.operands(), base.csr, out.data());
    }
  });
  compare_entries("sddmm by tiles", gradients, base.csr, out);
  for (const bool square : {false, true}) {
    Array<float> stat(rows * columns);
    for (int64_t i = 0; i < rows * columns; ++i) stat[i] = 0.5f;
    const Statistic target{stat.data(), square, columns % 2 == 0};
    model::launch(grid, kTileThreads, 0, [&] {
      if constexpr (kWide) {
        score_wide_kernel(gradients.operands(), target);
      } else {
        score_kernel<T>(gradients.operands(), target);
      }
    });
    for (int64_t i = 0; i < rows * columns; ++i) {
      gradients.compare("score", stat[i], i / columns, i % columns, 0.5, square);
    }
  }
}

void tiles() {
  tile_case<Bf16>(1, 8, 8, 5);
  tile_case<Bf16>(33, 136, 264, 400);
  tile_case<Bf16>(150, 40, 72, 200);
  tile_case<Fp16>(64, 130, 129, 300);
  tile_case<Bf16>(31, 24, 16, 24 * 16);
  tile_case<Fp16>(40, 16, 48, 30, 3);
  tile_case<float>(19, 70, 67, 200);
  tile_case<float>(1, 1, 1, 1);
}

// ---- dequant_spmm
// -----------------------------------------------------------------------------------------------------

template <typename X, typename Launch>
void spmm_case(const std::string& what, int64_t tokens, int64_t rows, int64_t columns, int block_shift, bool nested,
               int64_t nnz, Launch launch) {
  Base base(rows, columns, block_shift, nested, nnz, false);
  Array<X> x(tokens * columns), y(tokens * rows);
  for (int64_t i = 0; i < x.size(); ++i) x[i] = from_float<X>(random_value());
  launch(Decode{base.nf4, base.csr, x.data(), y.data(), tokens, rows, columns});
  const std::vector<float> weight = base.dense();
  const double unit = sizeof(X) == 4 ? 0.0 : std::is_same_v<X, Bf16> ? 1.0 / 256 : 1.0 / 2048;  // half of the last bit
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t n = 0; n < rows; ++n) {
      double sum = 0.0, size = 0.0;
      for (int64_t k = 0; k < columns; ++k) {
        const double term = static_cast<double>(weight[n * columns + k]) * to_float(x[t * columns + k]);
        sum += term;
        size += std::fabs(term);
      }
      if (!(std::fabs(to_float(y[t * rows + n]) - sum) <= unit * std::fabs(sum) + 2e-5 * size + 1e-6)) {
        wrong(what + " [" + std::to_string(tokens) + ", " + std::to_string(rows) + ", " + std::to_string(columns) +
              "] at (" + std::to_string(t) + ", " + std::to_string(n) + ")");
      }
    }
  }
}

Dim3 grid_of(const Decode& in, int64_t rows, int64_t tokens) {
  return {static_cast<unsigned>(ceil_div(in.rows, rows)), static_cast<unsigned>(ceil_div(in.tokens, tokens))};
}

template <typename X, int kTokens>
void rows_case(int64_t tokens, int64_t rows, int64_t columns, int64_t nnz) {
  spmm_case<X>("spmm rows", tokens, rows, columns, 6, true, nnz, [](const Decode& in) {
    model::launch(grid_of(in, kSpmmWarps * kSpmmRows, kTokens), kSpmmThreads, 0,
                  [&] { spmm_rows_kernel<X, kTokens>(in); });
  });
}

template <typename X, int kTokenTiles>
void tensor_case(int64_t tokens, int64_t rows, int64_t columns, int64_t nnz) {
  spmm_case<X>("spmm tensor", tokens, rows, columns, 5, false, nnz, [](const Decode& in) {
    model::launch(grid_of(in, kDecodeRows, 8 * kTokenTiles), kDecodeWarps * kWarpSize, 0,
                  [&] { spmm_tensor_kernel<X, kTokenTiles>(in); });
  });
}

template <typename X>
void any_case(int64_t tokens, int64_t rows, int64_t columns, int block_shift, int64_t nnz) {
  spmm_case<X>("spmm any", tokens, rows, columns, block_shift, true, nnz, [](const Decode& in) {
    model::launch(grid_of(in, kSpmmWarps, 4), kSpmmThreads, 0, [&] { spmm_any_kernel<X>(in); });
  });
}

void dequant_spmm() {
  rows_case<Bf16, 1>(1, 37, 96, 60);
  rows_case<Fp16, 2>(2, 16, 2080, 100);
  rows_case<Bf16, 4>(4, 3, 4128, 0);
  rows_case<float, 4>(6, 5, 1120, 40);
  rows_case<float, 1>(1, 40, 32, 1);
  tensor_case<Bf16, 1>(5, 37, 96, 60);
  tensor_case<Fp16, 1>(8, 16, 1312, 300);
  tensor_case<Bf16, 2>(16, 20, 1024, 0);
  tensor_case<Fp16, 2>(21, 7, 160, 20);
  any_case<Bf16>(5, 9, 33, 6, 20);
  any_case<Fp16>(1, 1, 1, 2, 1);
  any_case<float>(3, 17, 100, 1, 0);
}

// ---- dropout
// ----------------------------------------------------------------------------------------------------------

template <typename T>
void dropout_case(int64_t count, int64_t shift, int64_t seed) {
  Array<T> x(count, shift), out(count, shift);
  for (int64_t i = 0; i < count; ++i) x[i] = from_float<T>(random_value());
  const DropoutKeys keys = dropout_keys(seed);
  const uint32_t threshold = dropout_threshold(0.3);
  const float scale = static_cast<float>(1.0 / 0.7);
  const bool vector = reinterpret_cast<uintptr_t>(x.data()) % 16 == 0;
  constexpr int64_t kPerBlock = kDropoutThreads * (16 / sizeof(T));
  model::launch({static_cast<unsigned>(ceil_div(count, kPerBlock))}, kDropoutThreads, 0,
                [&] { dropout_kernel<T>(x.data(), out.data(), count, keys, threshold, scale, vector); });
  for (int64_t i = 0; i < count; ++i) {
    const bool keep = dropout_hash(static_cast<uint32_t>(i), keys) >= threshold;
    const T want = from_float<T>(keep ? to_float(x[i]) * scale : 0.0f);
    if (std::memcmp(&want, &out[i], sizeof(T)) != 0) wrong("dropout at " + std::to_string(i));
  }
}

void dropout() {
  dropout_case<Bf16>(5000, 0, 1);
  dropout_case<Fp16>(2049, 1, -3);
  dropout_case<float>(1023, 0, int64_t{1} << 40);
}

// ---- damaged indices: any result, no access outside
// ----------------------------------------------------------------------

void damaged() {
  const int64_t rows = 40, columns = 96, nnz = 200;
  for (int round = 0; round < 6; ++round) {
    Base base(rows, columns, 6, true, nnz, round % 2 == 1);
    for (int i = 0; i < 8; ++i) {
      base.row_ptr[random_below(rows + 1)] = round < 3 ? random_below(1 << 20) - (1 << 19) : random_below(nnz);
      if (base.csr.wide) {
        base.col32[random_below(nnz)] = random_below(1 << 20) - (1 << 19);
      } else {
        base.col16[random_below(nnz)] = static_cast<uint16_t>(random_below(65536));
      }
    }
    Array<Bf16> out(rows * columns);
    model::launch({1}, kDequantWarps * kWarpSize, 0,
                  [&] { dequant_add_kernel<Bf16>(base.nf4, base.csr, out.data(), rows, columns, true); });
    Gradients<Bf16> gradients(64, rows, columns, 0);
    const GatherPlan plan = plan_gather(64, rows, columns, nnz, 99 * 1024 - 3072, 4);
    const int64_t listed = plan.column_parts * plan.tiles * kGatherRows;
    Array<int32_t> before(listed), moved(listed), total(plan.column_parts * plan.tiles);
    Array<float> sums(plan.token_groups * nnz);
    const GatherIndex index{before.data(), moved.data(), total.data()};
    model::launch({static_cast<unsigned>(plan.tiles), static_cast<unsigned>(plan.column_parts)}, kGatherRows, 0,
                  [&] { gather_index_kernel(base.csr, index, rows, plan.columns); });
    model::launch({static_cast<unsigned>(plan.column_parts), static_cast<unsigned>(plan.token_groups),
                   static_cast<unsigned>(plan.row_parts)},
                  kGatherThreads, plan.shared_bytes(),
                  [&] { gather_kernel<Bf16>(gradients.operands(), base.csr, index, plan, sums.data()); });
    Array<float> values(nnz);
    model::launch({1, 1}, kTileThreads, 0,
                  [&] { sddmm_tile_kernel<Bf16>(gradients.operands(), base.csr, values.data()); });
    Array<Bf16> x(5 * columns), y(5 * rows);
    const Decode in{base.nf4, base.csr, x.data(), y.data(), 5, rows, columns};
    model::launch(grid_of(in, kDecodeRows, 8), kDecodeWarps * kWarpSize, 0, [&] { spmm_tensor_kernel<Bf16, 1>(in); });
  }
}

}  // namespace
}  // namespace qrosa

int main(int count, char** arguments) {
  using Case = std::pair<const char*, void (*)()>;
  const Case cases[] = {
      {"dequant_add", qrosa::dequant_add},   {"sddmm_gather", qrosa::sddmm_gather}, {"tiles", qrosa::tiles},
      {"dequant_spmm", qrosa::dequant_spmm}, {"dropout", qrosa::dropout},           {"damaged", qrosa::damaged}};
  for (const bool backwards : {false, true}) {
    qrosa::model::block.backwards = backwards;
    for (const Case& one : cases) {
      if (count < 2 || std::string(arguments[1]) == one.first) {
        one.second();
        std::printf("%s %s: right\n", one.first, backwards ? "backwards" : "forwards");
      }
    }
  }
  return 0;
}
