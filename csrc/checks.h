// From tensors to views, with the checks that keep kernels inside their memory. Shared by the CPU and CUDA bindings.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>

#include "csr.h"
#include "nf4.h"
#include "norm.h"

namespace qrosa {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline void check_dense(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
}

inline bool is_kernel_float(ScalarType type) {
  return type == ScalarType::BFloat16 || type == ScalarType::Half || type == ScalarType::Float;
}

inline void check_matrix(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2, name, " must be a matrix, got ", tensor.dim(), " dimensions");
  STD_TORCH_CHECK(is_kernel_float(tensor.scalar_type()), name, " must be bf16, fp16 or fp32");
  check_dense(tensor, name);
}

inline void check_same_device(const Tensor& tensor, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(tensor.is_cuda() == like.is_cuda() && tensor.get_device_index() == like.get_device_index(), name,
                  " is on another device");
}

template <typename T>
const T* checked_data(const Tensor& tensor, ScalarType type, int64_t count, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, " has the wrong dtype");
  STD_TORCH_CHECK(tensor.numel() == count, name, " must hold ", count, " values, got ", tensor.numel());
  check_dense(tensor, name);
  check_same_device(tensor, like, name);
  return static_cast<const T*>(tensor.data_ptr());
}

// The packed base of a [rows, columns] matrix; `like` names the device.
inline Nf4View nf4_view(const Tensor& codes, const Tensor& absmax, const OptionalTensor& absmax_code,
                        const OptionalTensor& absmax_scale, const OptionalTensor& absmax_offset, int64_t block_size,
                        int64_t rows, int64_t columns, const Tensor& like) {
  STD_TORCH_CHECK(block_size >= 2 && (block_size & (block_size - 1)) == 0, "block_size must be a power of two, got ",
                  block_size);
  const int64_t count = rows * columns;
  const int64_t blocks = (count + block_size - 1) / block_size;
  Nf4View view{};
  while ((int64_t{1} << view.block_shift) < block_size) ++view.block_shift;
  view.codes = checked_data<uint8_t>(codes, ScalarType::Byte, (count + 1) / 2, like, "codes");
  const bool nested = absmax_code.has_value();
  STD_TORCH_CHECK(nested == absmax_scale.has_value() && nested == absmax_offset.has_value(),
                  "absmax_code, absmax_scale and absmax_offset come together or not at all");
  if (!nested) {
    view.absmax = checked_data<float>(absmax, ScalarType::Float, blocks, like, "absmax");
    return view;
  }
  const int64_t groups = (blocks + (1 << kNestedShift) - 1) >> kNestedShift;
  view.absmax_q = checked_data<uint8_t>(absmax, ScalarType::Byte, blocks, like, "absmax");
  view.absmax_code = checked_data<float>(*absmax_code, ScalarType::Float, 256, like, "absmax_code");
  view.absmax_scale = checked_data<float>(*absmax_scale, ScalarType::Float, groups, like, "absmax_scale");
  view.absmax_offset = checked_data<float>(*absmax_offset, ScalarType::Float, 1, like, "absmax_offset");
  return view;
}

inline CsrView csr_view(const Tensor& row_ptr, const Tensor& col, const OptionalTensor& values, int64_t rows,
                        int64_t columns, const Tensor& like) {
  CsrView view{};
  view.wide = columns > kMaxUint16Columns;
  view.nnz = col.numel();
  STD_TORCH_CHECK(view.nnz <= INT32_MAX, "col holds ", view.nnz, " positions, more than int32 row pointers can count");
  view.row_ptr = checked_data<int32_t>(row_ptr, ScalarType::Int, rows + 1, like, "row_ptr");
  view.col = checked_data<void>(col, view.wide ? ScalarType::Int : ScalarType::UInt16, view.nnz, like, "col");
  if (values.has_value()) {
    view.values = checked_data<float>(*values, ScalarType::Float, view.nnz, like, "values");
  }
  return view;
}

inline CsrView optional_csr_view(const OptionalTensor& row_ptr, const OptionalTensor& col, const OptionalTensor& values,
                                 int64_t rows, int64_t columns, const Tensor& like) {
  const bool present = row_ptr.has_value();
  STD_TORCH_CHECK(present == col.has_value() && present == values.has_value(),
                  "row_ptr, col and values come together or not at all");
  return present ? csr_view(*row_ptr, *col, values, rows, columns, like) : CsrView{};
}

// x [..., d] with its weight [d]; the caller adds what is written and, for backward, read.
inline NormWork norm_work(const Tensor& x, const Tensor& weight, double offset) {
  STD_TORCH_CHECK(x.dim() >= 1 && is_kernel_float(x.scalar_type()), "x must be bf16, fp16 or fp32 [..., d]");
  check_dense(x, "x");
  NormWork work{};
  work.width = x.size(x.dim() - 1);
  work.rows = work.width > 0 ? x.numel() / work.width : 0;
  work.x = x.data_ptr();
  work.weight = checked_data<void>(weight, x.scalar_type(), work.width, x, "weight");
  work.offset = static_cast<float>(offset);
  return work;
}

// gate and up [T, f] of one type, rows a stride apart.
inline GateWork gate_work(const Tensor& gate, const Tensor& up, bool gelu) {
  STD_TORCH_CHECK(gate.dim() == 2 && up.dim() == 2 && gate.size(0) == up.size(0) && gate.size(1) == up.size(1),
                  "gate and up must be matrices of one shape");
  STD_TORCH_CHECK(is_kernel_float(gate.scalar_type()), "gate must be bf16, fp16 or fp32");
  STD_TORCH_CHECK(gate.scalar_type() == up.scalar_type(), "gate and up differ in dtype");
  STD_TORCH_CHECK(gate.numel() == 0 || (gate.stride(1) == 1 && up.stride(1) == 1), "rows of gate and up must be dense");
  check_same_device(up, gate, "up");
  GateWork work{};
  work.gate = gate.data_ptr();
  work.up = up.data_ptr();
  work.rows = gate.size(0);
  work.columns = gate.size(1);
  work.gate_stride = gate.stride(0);
  work.up_stride = up.stride(0);
  work.gelu = gelu;
  return work;
}

}  // namespace qrosa
