// RMSNorm and its gradient, a row at a time; the second pass over a row finds it in L1.
#pragma once

#include "simd.h"

namespace qrosa::QROSA_ISA {

// Four chains, and what is left over one by one: the order follows from the length alone.
template <class F, class G>
static inline float sum_over(int64_t count, F vector, G single) {
  Vec sums[4] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    for (int chain = 0; chain < 4; ++chain) sums[chain] = vector(sums[chain], i + chain * kLanes);
  }
  float rest = 0.0f;
  for (; i < count; ++i) rest += single(i);
  return sum(add(add(sums[0], sums[1]), add(sums[2], sums[3]))) + rest;
}

template <class T>
static void norm_row(const T* x, const T* weight, T* y, float* rstd, const NormWork& work) {
  const float squares = sum_over(
      work.width,
      [=](Vec sum, int64_t i) {
        const Vec values = load(x + i);
        return fma(values, values, sum);
      },
      [=](int64_t i) { return widen(x[i]) * widen(x[i]); });
  const float scale = 1.0f / __builtin_sqrtf(squares / static_cast<float>(work.width) + work.eps);
  *rstd = scale;
  const float offset = work.offset;
  if (work.rounds) {
    for (int64_t i = 0; i < work.width; ++i) {
      T rounded;
      narrow(widen(x[i]) * scale, &rounded);
      narrow(widen(rounded) * (offset + widen(weight[i])), &y[i]);
    }
  } else {
    for (int64_t i = 0; i < work.width; ++i) narrow(widen(x[i]) * scale * (offset + widen(weight[i])), &y[i]);
  }
}

// With g = (offset + weight) dy: dx = rstd (g - x rstd^2 mean(g x)).
template <class T>
static void norm_row_backward(const T* dy, const T* x, const T* weight, float rstd, T* dx, const NormWork& work) {
  const float offset = work.offset;
  const Vec offsets = splat(offset);
  const float products = sum_over(
      work.width,
      [=](Vec sum, int64_t i) { return fma(mul(load(dy + i), add(offsets, load(weight + i))), load(x + i), sum); },
      [=](int64_t i) { return widen(dy[i]) * (offset + widen(weight[i])) * widen(x[i]); });
  const float share = products / static_cast<float>(work.width) * rstd * rstd;
  for (int64_t i = 0; i < work.width; ++i) {
    narrow(rstd * (widen(dy[i]) * (offset + widen(weight[i])) - widen(x[i]) * share), &dx[i]);
  }
}

template <class T>
static void norm_rows(const NormWork& work, T* out, int64_t begin, int64_t end) {
  const T *x = static_cast<const T*>(work.x), *weight = static_cast<const T*>(work.weight);
  const T* dy = static_cast<const T*>(work.dy);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t start = row * work.width;
    if (dy == nullptr) {
      norm_row(x + start, weight, out + start, work.rstd + row, work);
    } else {
      norm_row_backward(dy + start, x + start, weight, work.rstd[row], out + start, work);
    }
  }
}

static void rms_norm(Float type, const NormWork& work, int64_t begin, int64_t end) {
  with_type(type, [&](auto* tag) { norm_rows(work, static_cast<decltype(tag)>(work.out), begin, end); });
}

}  // namespace qrosa::QROSA_ISA
