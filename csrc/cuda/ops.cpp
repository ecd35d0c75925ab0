// The CUDA bindings: check, pick device and stream, allocate, launch. Nothing waits for the card, so every op can be
// captured in a CUDA graph; scratch comes from torch's allocator on the current stream.
//
// Only the stable ABI is used, and libcudart is linked statically: one library serves every supported PyTorch. What
// indices hold cannot be checked here without a host sync; kernels skip what lies outside the matrix (csrc/rows.h).
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cstdlib>
#include <string>
#include <tuple>

#include "../checks.h"
#include "launch.h"
#include "start.h"

namespace qrosa {
namespace {

using torch::stable::accelerator::DeviceGuard;

constexpr int64_t kMaxSize =
    (int64_t{1} << 31) - 1024;  // of one dimension: kernels count tokens and columns in 32 bits

Float float_type(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  return type == ScalarType::BFloat16 ? Float::kBf16 : type == ScalarType::Half ? Float::kFp16 : Float::kFp32;
}

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_launch(cudaError_t error, const char* op) {
  STD_TORCH_CHECK(taken(error) == cudaSuccess, "qrosa::", op, ": ", cudaGetErrorString(error));
}

// What sddmm plans by; two attribute queries, which neither wait for the card nor disturb a capture.
Card card_of(const Tensor& tensor) {
  int shared = 0, processors = 0;
  const int device = tensor.get_device_index();
  check_launch(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "sddmm");
  check_launch(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "sddmm");
  return {shared, processors};
}

void dequant_add(const Tensor& codes, const Tensor& absmax, const OptionalTensor& absmax_code,
                 const OptionalTensor& absmax_scale, const OptionalTensor& absmax_offset, int64_t block_size,
                 const OptionalTensor& row_ptr, const OptionalTensor& col, const OptionalTensor& values, Tensor out) {
  check_matrix(out, "out");
  const int64_t rows = out.size(0), columns = out.size(1);
  const Nf4View nf4 = nf4_view(codes, absmax, absmax_code, absmax_scale, absmax_offset, block_size, rows, columns, out);
  const CsrView csr = optional_csr_view(row_ptr, col, values, rows, columns, out);
  if (rows * columns == 0) return;
  const DeviceGuard guard(out.get_device_index());
  check_launch(
      launch_dequant_add(nf4, csr, float_type(out), out.mutable_data_ptr(), rows, columns, current_stream(out)),
      "dequant_add");
}

void check_sizes(const char* name, std::initializer_list<int64_t> sizes) {
  for (const int64_t size : sizes) {
    STD_TORCH_CHECK(size < kMaxSize, name, " is too large: ", size, " of at most ", kMaxSize - 1);
  }
}

Pair checked_pair(const Tensor& dy, const Tensor& x) {
  check_matrix(dy, "dy");
  check_matrix(x, "x");
  check_same_device(dy, x, "dy");
  STD_TORCH_CHECK(dy.size(0) == x.size(0), "dy has ", dy.size(0), " rows, x has ", x.size(0));
  STD_TORCH_CHECK(dy.scalar_type() == x.scalar_type(), "dy and x differ in dtype");
  check_sizes("dy or x", {x.size(0), dy.size(1), x.size(1)});
  return {dy.const_data_ptr(), x.const_data_ptr(), x.size(0), dy.size(1), x.size(1), float_type(x)};
}

// QROSA_SDDMM=gather or tiles overrides the rule, so that both ways can be measured. Read once, when the library loads:
// reading the environment in every call would race with whoever sets a variable.
SddmmWay way_of_environment() {
  const char* value = std::getenv("QROSA_SDDMM");
  const std::string way = value == nullptr ? "" : value;
  return way == "gather" ? SddmmWay::kGather : way == "tiles" ? SddmmWay::kTiles : SddmmWay::kRule;
}

std::atomic<SddmmWay> sddmm_way_in_use{way_of_environment()};

// Forces a way when `request` names one (0 the rule, 1 gather, 2 tiles); returns the one in use.
int64_t sddmm_way(int64_t request) {
  STD_TORCH_CHECK(request >= -1 && request <= 2, "no such way to a sparse gradient: ", request);
  if (request >= 0) sddmm_way_in_use = static_cast<SddmmWay>(request);
  return static_cast<int64_t>(sddmm_way_in_use.load());
}

Tensor sddmm(const Tensor& dy, const Tensor& x, const Tensor& row_ptr, const Tensor& col) {
  const Pair pair = checked_pair(dy, x);
  const CsrView csr = csr_view(row_ptr, col, std::nullopt, pair.rows, pair.columns, x);
  const DeviceGuard guard(x.get_device_index());
  Tensor out = torch::stable::new_empty(x, {csr.nnz}, ScalarType::Float);
  if (csr.nnz == 0 || pair.rows * pair.columns == 0) return out;
  if (pair.tokens == 0) return torch::stable::zero_(out);
  const SddmmPlan plan = plan_sddmm(pair, csr.nnz, card_of(x), sddmm_way_in_use);
  const Tensor scratch = torch::stable::new_empty(x, {plan.scratch_words}, ScalarType::Int);
  check_launch(launch_sddmm(pair, csr, plan, static_cast<int32_t*>(scratch.mutable_data_ptr()),
                            static_cast<float*>(out.mutable_data_ptr()), current_stream(x)),
               "sddmm");
  return out;
}

Tensor dequant_spmm(const Tensor& x, const Tensor& codes, const Tensor& absmax, const OptionalTensor& absmax_code,
                    const OptionalTensor& absmax_scale, const OptionalTensor& absmax_offset, int64_t block_size,
                    const OptionalTensor& row_ptr, const OptionalTensor& col, const OptionalTensor& values,
                    int64_t features) {
  check_matrix(x, "x");
  const int64_t tokens = x.size(0), columns = x.size(1);
  check_sizes("x or y", {tokens, columns, features});
  const Nf4View nf4 =
      nf4_view(codes, absmax, absmax_code, absmax_scale, absmax_offset, block_size, features, columns, x);
  const CsrView csr = optional_csr_view(row_ptr, col, values, features, columns, x);
  const DeviceGuard guard(x.get_device_index());
  Tensor y = torch::stable::new_empty(x, {tokens, features});
  if (tokens * features == 0) return y;
  if (columns == 0) return torch::stable::zero_(y);
  check_launch(launch_dequant_spmm(nf4, csr, float_type(x), x.const_data_ptr(), y.mutable_data_ptr(), tokens, features,
                                   columns, current_stream(x)),
               "dequant_spmm");
  return y;
}

void score_accumulate(const Tensor& dy, const Tensor& x, Tensor stat, bool square) {
  const Pair pair = checked_pair(dy, x);
  STD_TORCH_CHECK(stat.dim() == 2 && stat.size(0) == pair.rows && stat.size(1) == pair.columns, "stat must be [",
                  pair.rows, ", ", pair.columns, "]");
  STD_TORCH_CHECK(stat.scalar_type() == ScalarType::Float, "stat must be fp32");
  check_dense(stat, "stat");
  check_same_device(stat, x, "stat");
  if (pair.tokens == 0 || pair.rows == 0 || pair.columns == 0) return;
  const DeviceGuard guard(x.get_device_index());
  check_launch(launch_score_accumulate(pair, static_cast<float*>(stat.mutable_data_ptr()), square, current_stream(x)),
               "score_accumulate");
}

Tensor dropout(const Tensor& x, double p, int64_t seed) {
  STD_TORCH_CHECK(p >= 0.0 && p < 1.0, "dropout must be in [0, 1), got ", p);
  STD_TORCH_CHECK(is_kernel_float(x.scalar_type()), "x must be bf16, fp16 or fp32");
  check_dense(x, "x");
  const DeviceGuard guard(x.get_device_index());
  Tensor out = torch::stable::empty_like(x);
  if (x.numel() == 0) return out;
  check_launch(launch_dropout(float_type(x), x.const_data_ptr(), out.mutable_data_ptr(), x.numel(), dropout_keys(seed),
                              dropout_threshold(p), static_cast<float>(1.0 / (1.0 - p)), current_stream(x)),
               "dropout");
  return out;
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps, double offset, bool rounds) {
  NormWork work = norm_work(x, weight, offset);
  check_sizes("x", {work.width});
  const DeviceGuard guard(x.get_device_index());
  Tensor y = torch::stable::empty_like(x);
  Tensor rstd = torch::stable::new_empty(x, {work.rows}, ScalarType::Float);
  work.eps = static_cast<float>(eps);
  work.rounds = rounds;
  work.out = y.mutable_data_ptr();
  work.rstd = static_cast<float*>(rstd.mutable_data_ptr());
  if (work.rows > 0) check_launch(launch_rms_norm(float_type(x), work, current_stream(x)), "rms_norm");
  return {y, rstd};
}

Tensor rms_norm_backward(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& rstd, double offset) {
  NormWork work = norm_work(x, weight, offset);
  check_sizes("x", {work.width});
  work.dy = checked_data<void>(dy, x.scalar_type(), x.numel(), x, "dy");
  work.rstd = const_cast<float*>(checked_data<float>(rstd, ScalarType::Float, work.rows, x, "rstd"));
  const DeviceGuard guard(x.get_device_index());
  Tensor dx = torch::stable::empty_like(x);
  work.out = dx.mutable_data_ptr();
  if (work.rows > 0) check_launch(launch_rms_norm(float_type(x), work, current_stream(x)), "rms_norm_backward");
  return dx;
}

Tensor gate(const Tensor& gate, const Tensor& up, bool gelu) {
  GateWork work = gate_work(gate, up, gelu);
  const DeviceGuard guard(gate.get_device_index());
  Tensor y = torch::stable::new_empty(gate, {work.rows, work.columns});
  work.out = y.mutable_data_ptr();
  if (y.numel() > 0) check_launch(launch_gate(float_type(gate), work, current_stream(gate)), "gate");
  return y;
}

std::tuple<Tensor, Tensor> gate_backward(const Tensor& dy, const Tensor& gate, const Tensor& up, bool gelu) {
  GateWork work = gate_work(gate, up, gelu);
  work.dy = checked_data<void>(dy, gate.scalar_type(), gate.numel(), gate, "dy");
  const DeviceGuard guard(gate.get_device_index());
  Tensor dgate = torch::stable::new_empty(gate, {work.rows, work.columns});
  Tensor dup = torch::stable::new_empty(gate, {work.rows, work.columns});
  work.out = dgate.mutable_data_ptr();
  work.dup = dup.mutable_data_ptr();
  if (dgate.numel() > 0) check_launch(launch_gate(float_type(gate), work, current_stream(gate)), "gate_backward");
  return {dgate, dup};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qrosa, CUDA, library) {
  library.impl("dequant_add", TORCH_BOX(&dequant_add));
  library.impl("sddmm", TORCH_BOX(&sddmm));
  library.impl("dequant_spmm", TORCH_BOX(&dequant_spmm));
  library.impl("score_accumulate", TORCH_BOX(&score_accumulate));
  library.impl("dropout", TORCH_BOX(&dropout));
  library.impl("rms_norm", TORCH_BOX(&rms_norm));
  library.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
  library.impl("gate", TORCH_BOX(&gate));
  library.impl("gate_backward", TORCH_BOX(&gate_backward));
}

STABLE_TORCH_LIBRARY_IMPL(qrosa, CompositeExplicitAutograd, library) {
  library.impl("sddmm_way", TORCH_BOX(&sddmm_way));
}

}  // namespace qrosa
