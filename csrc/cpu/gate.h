// The gate of a feed-forward block, act(gate) up, and its gradient; plain loops that every compiler turns into vectors.
#pragma once

#include "simd.h"

namespace qrosa::QROSA_ISA {

// e^x within 2 units in the last place, without a branch or a table: x = n ln 2 + r, a polynomial in r, n into the
// exponent. Below -87 the smallest normal number stands for the result.
static inline float exponential(float x) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest whole number in the low bits
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float shifted = x * 1.44269504088896f + kMagic;
  const float n = shifted - kMagic;
  float r = x - n * 0.693359375f;  // ln 2 in two parts, the first exact in few bits
  r = r - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return bits_float(float_bits(p) + (float_bits(shifted) << 23));
}

struct Activation {
  float share;  // sigmoid(s), see norm.h
  float slope;  // of the activation g sigmoid(s)
};

template <bool kGelu>
static inline Activation activation(float g) {
  const float cube = kGeluCube * g * g;
  const float s = kGelu ? kGeluScale * (g + cube * g) : g;
  const float other = exponential(-s), share = 1.0f / (1.0f + other);
  const float rise = kGelu ? kGeluScale * (1.0f + 3.0f * cube) : 1.0f;
  return {share, share + g * rise * (share * (other * share))};
}

template <bool kGelu, class T>
static void gate_row(const T* gate, const T* up, T* y, int64_t columns) {
  for (int64_t i = 0; i < columns; ++i) {
    const float g = widen(gate[i]);
    T rounded;
    narrow(g * activation<kGelu>(g).share, &rounded);
    narrow(widen(rounded) * widen(up[i]), &y[i]);
  }
}

template <bool kGelu, class T>
static void gate_row_backward(const T* dy, const T* gate, const T* up, T* dgate, T* dup, int64_t columns) {
  for (int64_t i = 0; i < columns; ++i) {
    const float g = widen(gate[i]), gradient = widen(dy[i]);
    const Activation active = activation<kGelu>(g);
    narrow(gradient * widen(up[i]) * active.slope, &dgate[i]);
    narrow(gradient * (g * active.share), &dup[i]);
  }
}

template <bool kGelu, class T>
static void gate_rows(const GateWork& work, T* out, int64_t begin, int64_t end) {
  const T *gate = static_cast<const T*>(work.gate), *up = static_cast<const T*>(work.up);
  const T* dy = static_cast<const T*>(work.dy);
  T* dup = static_cast<T*>(work.dup);
  for (int64_t row = begin; row < end; ++row) {
    const T *g = gate + row * work.gate_stride, *u = up + row * work.up_stride;
    const int64_t start = row * work.columns;
    if (dy == nullptr) {
      gate_row<kGelu>(g, u, out + start, work.columns);
    } else {
      gate_row_backward<kGelu>(dy + start, g, u, out + start, dup + start, work.columns);
    }
  }
}

static void gate(Float type, const GateWork& work, int64_t begin, int64_t end) {
  with_type(type, [&](auto* tag) {
    auto* out = static_cast<decltype(tag)>(work.out);
    work.gelu ? gate_rows<true>(work, out, begin, end) : gate_rows<false>(work, out, begin, end);
  });
}

}  // namespace qrosa::QROSA_ISA
