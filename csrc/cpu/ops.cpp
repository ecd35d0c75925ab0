// The CPU bindings: check, split among torch's threads, call the kernels.
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <tuple>
#include <vector>

#include "binding.h"

namespace qrosa {
namespace {

constexpr int64_t kDecodeStrip = 16;  // rows of the weight that a thread takes together for few rows of x
constexpr int64_t kScoreRows = 256, kScoreColumns = 512, kScoreDepth = 512;  // of a tile of the mask statistic

void dequant_add(const Tensor& codes, const Tensor& absmax, const OptionalTensor& absmax_code,
                 const OptionalTensor& absmax_scale, const OptionalTensor& absmax_offset, int64_t block_size,
                 const OptionalTensor& row_ptr, const OptionalTensor& col, const OptionalTensor& values, Tensor out) {
  check_matrix(out, "out");
  const int64_t rows = out.size(0), columns = out.size(1);
  const Nf4View nf4 = nf4_view(codes, absmax, absmax_code, absmax_scale, absmax_offset, block_size, rows, columns, out);
  const CsrView csr = optional_csr_view(row_ptr, col, values, rows, columns, out);
  void* target = out.mutable_data_ptr();
  const Float type = float_type(out);
  const Kernels& use = kernels();
  over_rows(rows, grain_rows(columns),
            [&](int64_t begin, int64_t end) { return use.dequant_rows(nf4, csr, type, target, columns, begin, end); });
}

// The leading dimensions of x are rows; y has them too.
Tensor decode(const Tensor& x, DecodeWork& work) {
  const Kernels& use = kernels();
  const auto sizes = x.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  shape.back() = work.features;
  Tensor y = torch::stable::new_empty(x, shape);
  work.type = float_type(x);
  work.x = x.data_ptr();
  work.y = y.mutable_data_ptr();
  float* prepared = shared_space.get<float>(use.decode_workspace(work));
  use.decode_prepare(work, prepared);
  // Strips of 16 rows, so that where threads meet does not change how rows are paired.
  over_rows((work.features + kDecodeStrip - 1) / kDecodeStrip, 1 + grain_rows(work.columns) / kDecodeStrip,
            [&](int64_t begin, int64_t end) {
              float* tile = tile_space.get<float>(use.decode_tile(work));
              const int64_t last = end * kDecodeStrip < work.features ? end * kDecodeStrip : work.features;
              return use.decode_rows(work, prepared, begin * kDecodeStrip, last, tile);
            });
  return y;
}

Tensor dequant_spmm(const Tensor& x, const Tensor& codes, const Tensor& absmax, const OptionalTensor& absmax_code,
                    const OptionalTensor& absmax_scale, const OptionalTensor& absmax_offset, int64_t block_size,
                    const OptionalTensor& row_ptr, const OptionalTensor& col, const OptionalTensor& values,
                    int64_t features) {
  check_matrix(x, "x");
  DecodeWork work{};
  work.tokens = x.size(0);
  work.features = features;
  work.columns = x.size(1);
  work.nf4 = nf4_view(codes, absmax, absmax_code, absmax_scale, absmax_offset, block_size, features, work.columns, x);
  work.csr = optional_csr_view(row_ptr, col, values, features, work.columns, x);
  return decode(x, work);
}

const void* low_rank_data(const Tensor& tensor, ScalarType type, int64_t rows, int64_t columns, const char* name) {
  check_matrix(tensor, name);
  STD_TORCH_CHECK(tensor.size(0) == rows && tensor.size(1) == columns, name, " must be [", rows, ", ", columns, "]");
  STD_TORCH_CHECK(tensor.scalar_type() == type, "a and b differ in dtype");
  return tensor.data_ptr();
}

// All of a layer but x and y; `like` names the device.
DecodeWork layer_work(const Tensor& like, const Nf4View& nf4, int64_t features, int64_t columns,
                      const OptionalTensor& bias, const CsrView& csr, const OptionalTensor& a, const OptionalTensor& b,
                      double scale) {
  DecodeWork work{};
  work.features = features;
  work.columns = columns;
  work.nf4 = nf4;
  work.csr = csr;
  STD_TORCH_CHECK(a.has_value() == b.has_value(), "the low-rank part needs both a and b");
  if (a.has_value()) {
    work.rank = a->size(0);
    work.scale = static_cast<float>(scale);
    work.low_rank_type = float_type(*a);
    work.a = low_rank_data(*a, a->scalar_type(), work.rank, columns, "a");
    work.b = low_rank_data(*b, a->scalar_type(), features, work.rank, "b");
  }
  if (bias.has_value()) {
    STD_TORCH_CHECK(is_kernel_float(bias->scalar_type()), "bias must be bf16, fp16 or fp32");
    work.type = float_type(*bias);
    work.bias = checked_data<void>(*bias, bias->scalar_type(), features, like, "bias");
  }
  return work;
}

Tensor decode_rows_of(const Tensor& x, DecodeWork& work) {
  STD_TORCH_CHECK(x.dim() >= 1 && is_kernel_float(x.scalar_type()), "x must be bf16, fp16 or fp32 [..., K]");
  check_dense(x, "x");
  STD_TORCH_CHECK(x.size(x.dim() - 1) == work.columns, "x has ", x.size(x.dim() - 1), " columns, the layer ",
                  work.columns);
  STD_TORCH_CHECK(work.bias == nullptr || work.type == float_type(x), "bias has the wrong dtype");
  work.tokens = work.columns > 0 ? x.numel() / work.columns : 0;
  return decode(x, work);
}

Tensor decode_linear(const Tensor& x, const Tensor& codes, const Tensor& absmax, const OptionalTensor& absmax_code,
                     const OptionalTensor& absmax_scale, const OptionalTensor& absmax_offset, int64_t block_size,
                     int64_t features, const OptionalTensor& bias, const OptionalTensor& row_ptr,
                     const OptionalTensor& col, const OptionalTensor& values, const OptionalTensor& a,
                     const OptionalTensor& b, double scale) {
  STD_TORCH_CHECK(x.dim() >= 1, "x must be [..., K]");
  check_dense(x, "x");
  const int64_t columns = x.size(x.dim() - 1);
  const Nf4View nf4 =
      nf4_view(codes, absmax, absmax_code, absmax_scale, absmax_offset, block_size, features, columns, x);
  const CsrView csr = optional_csr_view(row_ptr, col, values, features, columns, x);
  DecodeWork work = layer_work(x, nf4, features, columns, bias, csr, a, b, scale);
  return decode_rows_of(x, work);
}

// A checked layer, packed into bytes: its caller keeps the tensors, and makes a new plan when they change.
struct DecodePlan {
  uint64_t mark;
  DecodeWork work;
};
constexpr uint64_t kPlanMark = 0x71726F7361706C6EULL;

Tensor decode_plan(const Tensor& codes, const Tensor& absmax, const OptionalTensor& absmax_code,
                   const OptionalTensor& absmax_scale, const OptionalTensor& absmax_offset, int64_t block_size,
                   int64_t features, int64_t columns, const OptionalTensor& bias, const OptionalTensor& row_ptr,
                   const OptionalTensor& col, const OptionalTensor& values, const OptionalTensor& a,
                   const OptionalTensor& b, double scale) {
  const Nf4View nf4 =
      nf4_view(codes, absmax, absmax_code, absmax_scale, absmax_offset, block_size, features, columns, codes);
  const CsrView csr = optional_csr_view(row_ptr, col, values, features, columns, codes);
  const DecodePlan plan{kPlanMark, layer_work(codes, nf4, features, columns, bias, csr, a, b, scale)};
  Tensor packed = torch::stable::new_empty(codes, {static_cast<int64_t>(sizeof(plan))});
  std::memcpy(packed.mutable_data_ptr(), &plan, sizeof(plan));
  return packed;
}

Tensor decode_planned(const Tensor& x, const Tensor& packed) {
  STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Byte && packed.numel() == sizeof(DecodePlan), "not a plan");
  DecodePlan plan;
  std::memcpy(&plan, packed.data_ptr(), sizeof(plan));
  STD_TORCH_CHECK(plan.mark == kPlanMark, "not a plan");
  return decode_rows_of(x, plan.work);
}

void score_block(const Kernels& use, const Tensor& dy, const Tensor& x, float* stat, bool square, int64_t n0,
                 int64_t k0) {
  const Float type = float_type(x);
  const int64_t rows = x.size(0), features = dy.size(1), columns = x.size(1);
  const int64_t n = n0 + kScoreRows < features ? kScoreRows : features - n0;
  const int64_t k = k0 + kScoreColumns < columns ? kScoreColumns : columns - k0;
  float* tile = tile_space.get<float>(kScoreRows * kScoreColumns);
  for (int64_t i = 0; i < n * kScoreColumns; ++i) tile[i] = 0.0f;
  const int64_t most_words = use.packed_words(type, kScoreDepth);
  uint32_t* packed_dy = strip_space.get<uint32_t>(most_words * (kScoreRows + kScoreColumns + 64));
  for (int64_t start = 0; start < rows; start += kScoreDepth) {
    const int64_t depth = start + kScoreDepth < rows ? kScoreDepth : rows - start;
    const int64_t words = use.packed_words(type, depth);
    use.pack_columns(type, offset(dy.data_ptr(), start * features + n0, type), features, depth, n, packed_dy);
    use.score_tile(type, packed_dy, words, offset(x.data_ptr(), start * columns + k0, type), columns, depth, n, k,
                   packed_dy + most_words * kScoreRows, tile, kScoreColumns);
  }
  use.score_add(tile, kScoreColumns, n, k, square, stat + n0 * columns + k0, columns);
}

void score_accumulate(const Tensor& dy, const Tensor& x, Tensor stat, bool square) {
  check_pair(dy, x);
  STD_TORCH_CHECK(stat.dim() == 2 && stat.size(0) == dy.size(1) && stat.size(1) == x.size(1), "stat must be [",
                  dy.size(1), ", ", x.size(1), "]");
  STD_TORCH_CHECK(stat.scalar_type() == ScalarType::Float, "stat must be fp32");
  check_dense(stat, "stat");
  auto* target = static_cast<float*>(stat.mutable_data_ptr());
  const int64_t across = (x.size(1) + kScoreColumns - 1) / kScoreColumns;
  const int64_t blocks = across * ((dy.size(1) + kScoreRows - 1) / kScoreRows);
  const Kernels& use = kernels();
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      score_block(use, dy, x, target, square, i / across * kScoreRows, i % across * kScoreColumns);
    }
  });
}

Tensor dropout(const Tensor& x, double p, int64_t seed) {
  STD_TORCH_CHECK(p >= 0.0 && p < 1.0, "dropout must be in [0, 1), got ", p);
  STD_TORCH_CHECK(is_kernel_float(x.scalar_type()), "x must be bf16, fp16 or fp32");
  check_dense(x, "x");
  Tensor out = torch::stable::empty_like(x);
  const void* source = x.data_ptr();
  void* target = out.mutable_data_ptr();
  const Float type = float_type(x);
  const Kernels& use = kernels();
  const DropoutKeys keys = dropout_keys(seed);
  const auto scale = static_cast<float>(1.0 / (1.0 - p));
  torch::stable::parallel_for(0, x.numel(), 32768, [&](int64_t begin, int64_t end) {
    use.dropout(type, source, target, begin, end, keys, dropout_threshold(p), scale);
  });
  return out;
}

void run_norm(const Tensor& x, const NormWork& work) {
  const Kernels& use = kernels();
  const Float type = float_type(x);
  torch::stable::parallel_for(0, work.rows, grain_rows(work.width),
                              [&](int64_t begin, int64_t end) { use.rms_norm(type, work, begin, end); });
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps, double offset, bool rounds) {
  NormWork work = norm_work(x, weight, offset);
  Tensor y = torch::stable::empty_like(x);
  Tensor rstd = torch::stable::new_empty(x, {work.rows}, ScalarType::Float);
  work.eps = static_cast<float>(eps);
  work.rounds = rounds;
  work.out = y.mutable_data_ptr();
  work.rstd = static_cast<float*>(rstd.mutable_data_ptr());
  run_norm(x, work);
  return {y, rstd};
}

Tensor rms_norm_backward(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& rstd, double offset) {
  NormWork work = norm_work(x, weight, offset);
  work.dy = checked_data<void>(dy, x.scalar_type(), x.numel(), x, "dy");
  work.rstd = const_cast<float*>(checked_data<float>(rstd, ScalarType::Float, work.rows, x, "rstd"));
  Tensor dx = torch::stable::empty_like(x);
  work.out = dx.mutable_data_ptr();
  run_norm(x, work);
  return dx;
}

void run_gate(const Tensor& gate, const GateWork& work) {
  const Kernels& use = kernels();
  const Float type = float_type(gate);
  torch::stable::parallel_for(0, work.rows, grain_rows(work.columns),
                              [&](int64_t begin, int64_t end) { use.gate(type, work, begin, end); });
}

Tensor gate(const Tensor& gate, const Tensor& up, bool gelu) {
  GateWork work = gate_work(gate, up, gelu);
  Tensor y = torch::stable::new_empty(gate, {work.rows, work.columns});
  work.out = y.mutable_data_ptr();
  run_gate(gate, work);
  return y;
}

std::tuple<Tensor, Tensor> gate_backward(const Tensor& dy, const Tensor& gate, const Tensor& up, bool gelu) {
  GateWork work = gate_work(gate, up, gelu);
  work.dy = checked_data<void>(dy, gate.scalar_type(), gate.numel(), gate, "dy");
  Tensor dgate = torch::stable::new_empty(gate, {work.rows, work.columns});
  Tensor dup = torch::stable::new_empty(gate, {work.rows, work.columns});
  work.out = dgate.mutable_data_ptr();
  work.dup = dup.mutable_data_ptr();
  run_gate(gate, work);
  return {dgate, dup};
}

// Forces an instruction set when `request` names one (0 portable ... 4 AMX); returns the one in use.
int64_t cpu_isa(int64_t request) {
  STD_TORCH_CHECK(request >= -1 && request <= 4, "no such instruction set: ", request);
  return static_cast<int64_t>(request < 0 ? current_isa() : force_isa(static_cast<Isa>(request)));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qrosa, CPU, library) {
  library.impl("dequant_add", TORCH_BOX(&dequant_add));
  library.impl("dequant_spmm", TORCH_BOX(&dequant_spmm));
  library.impl("decode_linear", TORCH_BOX(&decode_linear));
  library.impl("decode_plan", TORCH_BOX(&decode_plan));
  library.impl("decode_planned", TORCH_BOX(&decode_planned));
  library.impl("score_accumulate", TORCH_BOX(&score_accumulate));
  library.impl("dropout", TORCH_BOX(&dropout));
  library.impl("rms_norm", TORCH_BOX(&rms_norm));
  library.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
  library.impl("gate", TORCH_BOX(&gate));
  library.impl("gate_backward", TORCH_BOX(&gate_backward));
}

STABLE_TORCH_LIBRARY_IMPL(qrosa, CompositeExplicitAutograd, library) { library.impl("cpu_isa", TORCH_BOX(&cpu_isa)); }

}  // namespace qrosa
