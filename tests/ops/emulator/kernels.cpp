// Runs the CUDA kernels through their launchers on a model of a block and of the runtime, over odd shapes, and compares
// them with plain loops.
//
//   kernels            every case        kernels NAME       one of them
#include "inputs.h"

namespace qrosa {
namespace {

struct Shape {
  int64_t rows, columns;
};

constexpr int64_t kListBytes = 3072;  // of shared memory, beside the lines that a gathering block stages

void ran(cudaError_t error) {
  if (error != cudaSuccess) wrong("a launch was refused");
}

// ---- dequant_add: every element, bit for bit ------------------------------------------------------------------------

template <typename Out>
void dequant_case(Base& base, int64_t out_shift) {
  const std::vector<float> expected = base.dense();
  Array<Out> out(base.rows * base.columns, out_shift);
  ran(launch_dequant_add(base.nf4, base.csr, type_of<Out>(), out.data(), base.rows, base.columns, nullptr));
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

// ---- sums over tokens -----------------------------------------------------------------------------------------------

// The sparse gradient, with scratch of exactly the words that the plan names.
template <typename T>
void sddmm_case(int64_t tokens, int64_t rows, int64_t columns, int64_t nnz, bool wide, SddmmWay way, const Card& card,
                int64_t shift = 0) {
  Base base(rows, columns, 6, false, nnz, wide);
  Gradients<T> gradients(tokens, rows, columns, shift);
  const SddmmPlan plan = plan_sddmm(gradients.pair(), nnz, card, way);
  Array<int32_t> scratch(plan.scratch_words);
  Array<float> out(nnz);
  ran(launch_sddmm(gradients.pair(), base.csr, plan, scratch.data(), out.data(), nullptr));
  for (int64_t n = 0; n < rows; ++n) {
    for (int i = base.csr.row_ptr[n]; i < base.csr.row_ptr[n + 1]; ++i) {
      gradients.compare("sddmm", out[i], n, column(base.csr, i));
    }
  }
}

void sddmm_gather() {
  const int64_t least = (kGatherRows + kGatherColumnStep) * kGatherLineBytes;  // the smallest part: many parts
  const auto card = [](int64_t lines, int64_t processors) { return Card{lines + kListBytes, processors}; };
  constexpr SddmmWay kWay = SddmmWay::kGather;
  sddmm_case<Bf16>(65, 40, 72, 100, false, kWay, card(least, 4));
  sddmm_case<Bf16>(1, 1, 1, 1, false, kWay, card(least, 100));
  sddmm_case<Fp16>(130, 264, 200, 900, true, kWay, card(3 * least, 1));
  sddmm_case<Bf16>(200, 517, 131, 1500, false, kWay, card(least, 12));
  sddmm_case<Fp16>(63, 24, 640, 77, false, kWay, {99 * 1024, 128});
  sddmm_case<Bf16>(64, 16, 64, 1024, false, kWay, card(least, 1));   // every position
  sddmm_case<Bf16>(70, 32, 96, 50, false, kWay, card(least, 8), 1);  // misaligned
}

template <typename T>
void tile_case(int64_t tokens, int64_t rows, int64_t columns, int64_t nnz, int64_t shift = 0) {
  sddmm_case<T>(tokens, rows, columns, nnz, false, SddmmWay::kTiles, {}, shift);
  Gradients<T> gradients(tokens, rows, columns, shift);
  for (const bool square : {false, true}) {
    Array<float> stat(rows * columns);
    for (int64_t i = 0; i < rows * columns; ++i) stat[i] = 0.5f;
    ran(launch_score_accumulate(gradients.pair(), stat.data(), square, nullptr));
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

// ---- dequant_spmm ---------------------------------------------------------------------------------------------------

template <typename X>
void spmm_case(int64_t tokens, int64_t rows, int64_t columns, int block_shift, bool nested, int64_t nnz) {
  Base base(rows, columns, block_shift, nested, nnz, false);
  Array<X> x(tokens * columns), y(tokens * rows);
  for (int64_t i = 0; i < x.size(); ++i) x[i] = from_float<X>(random_value());
  ran(launch_dequant_spmm(base.nf4, base.csr, type_of<X>(), x.data(), y.data(), tokens, rows, columns, nullptr));
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
        wrong("dequant_spmm [" + std::to_string(tokens) + ", " + std::to_string(rows) + ", " + std::to_string(columns) +
              "] at (" + std::to_string(t) + ", " + std::to_string(n) + ")");
      }
    }
  }
}

void dequant_spmm() {
  spmm_case<Bf16>(1, 37, 96, 6, true, 60);  // one to four tokens, and fp32: rows
  spmm_case<Fp16>(2, 16, 2080, 6, true, 100);
  spmm_case<Bf16>(4, 3, 4128, 6, true, 0);
  spmm_case<float>(6, 5, 1120, 6, true, 40);
  spmm_case<float>(1, 40, 32, 6, true, 1);
  spmm_case<Bf16>(5, 37, 96, 5, false, 60);  // more on tensor cores
  spmm_case<Fp16>(8, 16, 1312, 5, false, 300);
  spmm_case<Bf16>(16, 20, 1024, 5, false, 0);
  spmm_case<Fp16>(21, 7, 160, 5, false, 20);
  spmm_case<Bf16>(5, 9, 33, 6, true, 20);  // any shape
  spmm_case<Fp16>(1, 1, 1, 2, true, 1);
  spmm_case<float>(3, 17, 100, 1, true, 0);
}

// A grid folded over y and z, as one of more than 65,535 blocks along y is: the same results.
void folded() {
  model::runtime.folds = true;
  spmm_case<Bf16>(21, 9, 33, 6, true, 20);
  spmm_case<float>(30, 5, 96, 6, true, 40);
  spmm_case<Fp16>(70, 7, 160, 5, false, 20);
  tile_case<Bf16>(3, 500, 24, 400);
  tile_case<float>(19, 260, 67, 200);
  model::runtime.folds = false;
}

// ---- dropout --------------------------------------------------------------------------------------------------------

template <typename T>
void dropout_case(int64_t count, int64_t shift, int64_t seed) {
  Array<T> x(count, shift), out(count, shift);
  for (int64_t i = 0; i < count; ++i) x[i] = from_float<T>(random_value());
  const DropoutKeys keys = dropout_keys(seed);
  const uint32_t threshold = dropout_threshold(0.3);
  const float scale = static_cast<float>(1.0 / 0.7);
  ran(launch_dropout(type_of<T>(), x.data(), out.data(), count, keys, threshold, scale, nullptr));
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

// ---- norms and gates ------------------------------------------------------------------------------------------------

template <typename T>
Array<T> random_array(int64_t count, int64_t shift) {
  Array<T> made(count, shift);
  for (int64_t i = 0; i < count; ++i) made[i] = from_float<T>(random_value());
  return made;
}

// `roundings` of the value to T, and errors of fp32 sums.
template <typename T>
void near(const char* what, T got, double expected, int roundings) {
  const double unit = sizeof(T) == 4 ? 0.0 : std::is_same_v<T, Bf16> ? 1.0 / 256 : 1.0 / 2048;
  if (!(std::fabs(to_float(got) - expected) <= roundings * unit * std::fabs(expected) * 1.02 + 3e-5)) wrong(what);
}

template <typename T>
void norm_case(int64_t rows, int64_t width, float offset, int64_t shift = 0) {
  Array<T> x = random_array<T>(rows * width, shift), dy = random_array<T>(rows * width, shift);
  Array<T> weight = random_array<T>(width, shift), y(rows * width, shift), dx(rows * width, shift);
  Array<float> rstd(rows);
  NormWork work{x.data(), weight.data(), nullptr, rstd.data(), y.data(), rows, width, 1e-5f, offset, offset == 0.0f};
  ran(launch_rms_norm(type_of<T>(), work, nullptr));
  work.dy = dy.data();
  work.out = dx.data();
  ran(launch_rms_norm(type_of<T>(), work, nullptr));
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t start = row * width;
    const auto factor = [&](int64_t i) { return offset + static_cast<double>(to_float(weight[i])); };
    double squares = 0.0, products = 0.0;
    for (int64_t i = 0; i < width; ++i) {
      const double value = to_float(x[start + i]);
      squares += value * value;
      products += factor(i) * to_float(dy[start + i]) * value;
    }
    const double scale = 1.0 / std::sqrt(squares / width + 1e-5);
    near("rstd", rstd[row], scale, 0);
    for (int64_t i = 0; i < width; ++i) {
      const double value = to_float(x[start + i]), gradient = factor(i) * to_float(dy[start + i]);
      near("rms_norm", y[start + i], factor(i) * value * scale, 2);
      near("rms_norm_backward", dx[start + i], scale * (gradient - value * scale * scale * products / width), 1);
    }
  }
}

void norms() {
  norm_case<Bf16>(19, 128, 0.0f);  // a warp a row
  norm_case<Fp16>(9, 1000, 1.0f);
  norm_case<float>(3, 67, 0.0f);
  norm_case<Bf16>(2, 1, 0.0f, 1);
  norm_case<Bf16>(3, 4096, 1.0f);  // a block a row
  norm_case<Fp16>(2, 1303, 0.0f);
  norm_case<float>(2, 640, 0.0f, 1);
}

template <typename T>
void gate_case(int64_t rows, int64_t columns, bool gelu, bool joined, int64_t shift = 0) {
  const int64_t stride = joined ? 2 * columns : columns;
  Array<T> gate = random_array<T>(rows * stride, shift), apart = random_array<T>(joined ? 0 : rows * columns, shift);
  Array<T> dy = random_array<T>(rows * columns, shift);
  Array<T> y(rows * columns, shift), dgate(rows * columns, shift), dup(rows * columns, shift);
  T* up = joined ? gate.data() + columns : apart.data();
  GateWork work{gate.data(), up, nullptr, y.data(), nullptr, rows, columns, stride, stride, gelu};
  ran(launch_gate(type_of<T>(), work, nullptr));
  work.dy = dy.data();
  work.out = dgate.data();
  work.dup = dup.data();
  ran(launch_gate(type_of<T>(), work, nullptr));
  for (int64_t i = 0; i < rows * columns; ++i) {
    const int64_t from = i / columns * stride + i % columns;
    const double g = to_float(gate[from]), factor = to_float(up[from]), gradient = to_float(dy[i]);
    const double scale = gelu ? std::sqrt(8.0 / std::acos(-1.0)) : 1.0, cube = gelu ? 0.044715 : 0.0;
    const double share = 1.0 / (1.0 + std::exp(-scale * (g + cube * g * g * g)));
    const double slope = share + g * scale * (1.0 + 3.0 * cube * g * g) * share * (1.0 - share);
    near("gate", y[i], g * share * factor, 2);
    near("dgate", dgate[i], gradient * factor * slope, 1);
    near("dup", dup[i], gradient * g * share, 1);
  }
}

void gates() {
  gate_case<Bf16>(5, 712, false, false);
  gate_case<Fp16>(3, 67, true, false);
  gate_case<float>(2, 130, true, true);
  gate_case<Bf16>(7, 200, true, true);
  gate_case<Fp16>(4, 33, false, true, 1);
  gate_case<float>(1, 1, false, false, 1);
}

// ---- damaged indices: any result, no access outside -----------------------------------------------------------------

void damage(Base& base, int round) {
  for (int i = 0; i < 8; ++i) {
    base.row_ptr[random_below(base.rows + 1)] =
        round < 3 ? random_below(1 << 20) - (1 << 19) : random_below(base.values.size());
    if (base.csr.wide) {
      base.col32[random_below(base.values.size())] = random_below(1 << 20) - (1 << 19);
    } else {
      base.col16[random_below(base.values.size())] = static_cast<uint16_t>(random_below(65536));
    }
  }
}

void damaged() {
  const int64_t rows = 40, columns = 96, nnz = 200;
  for (int round = 0; round < 6; ++round) {
    Base base(rows, columns, 6, true, nnz, round % 2 == 1);
    damage(base, round);
    Array<Bf16> out(rows * columns);
    ran(launch_dequant_add(base.nf4, base.csr, Float::kBf16, out.data(), rows, columns, nullptr));
    Gradients<Bf16> gradients(64, rows, columns, 0);
    for (const SddmmWay way : {SddmmWay::kGather, SddmmWay::kTiles}) {
      const SddmmPlan plan = plan_sddmm(gradients.pair(), nnz, {99 * 1024, 4}, way);
      Array<int32_t> scratch(plan.scratch_words);
      Array<float> values(nnz);
      ran(launch_sddmm(gradients.pair(), base.csr, plan, scratch.data(), values.data(), nullptr));
    }
    for (const int64_t tokens : {1, 5}) {
      Array<Bf16> x(tokens * columns), y(tokens * rows);
      ran(launch_dequant_spmm(base.nf4, base.csr, Float::kBf16, x.data(), y.data(), tokens, rows, columns, nullptr));
    }
  }
}

}  // namespace
}  // namespace qrosa

int main(int count, char** arguments) {
  using Case = std::pair<const char*, void (*)()>;
  const Case cases[] = {{"dequant_add", qrosa::dequant_add},
                        {"sddmm_gather", qrosa::sddmm_gather},
                        {"tiles", qrosa::tiles},
                        {"dequant_spmm", qrosa::dequant_spmm},
                        {"folded", qrosa::folded},
                        {"dropout", qrosa::dropout},
                        {"norms", qrosa::norms},
                        {"gates", qrosa::gates},
                        {"damaged", qrosa::damaged}};
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
