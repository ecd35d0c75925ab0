// RMSNorm over the rows of a matrix and the gate of a feed-forward block: their arguments, shared by CPU and CUDA.
#pragma once

#include <cstdint>

namespace qrosa {

// Rows of x [rows, width], each divided by its root mean square: y = (offset + weight) x rstd. dy null: forward, which
// writes y to `out` and 1 / rms to `rstd`; else backward, which reads `rstd` and writes dx to `out`.
struct NormWork {
  const void *x, *weight, *dy;
  float* rstd;  // [rows]
  void* out;
  int64_t rows, width;
  float eps, offset;
  bool rounds;  // x rstd is rounded to x's type before the weight multiplies it
};

// y = act(gate) up, rows of gate and up `stride` elements apart, all others dense. dy null: forward.
struct GateWork {
  const void *gate, *up, *dy;
  void *out, *dup;  // forward y; backward dgate and dup
  int64_t rows, columns, gate_stride, up_stride;
  bool gelu;  // by the tanh formula; else silu
};

// Both activations are g sigmoid(s): silu has s = g, gelu s = 2 sqrt(2 / pi) (g + 0.044715 g^3), because
// (1 + tanh u) / 2 = sigmoid(2 u).
constexpr float kGeluScale = 1.5957691216057308f, kGeluCube = 0.044715f;

}  // namespace qrosa
