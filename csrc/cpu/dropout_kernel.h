// Dropout by a hash of each element's index; plain loops that every compiler turns into vectors.
#pragma once

#include "simd.h"

namespace qrosa::QROSA_ISA {

template <class T>
static void dropout_as(const T* x, T* out, int64_t begin, int64_t end, DropoutKeys keys, uint32_t threshold,
                       float scale) {
  for (int64_t i = begin; i < end; ++i) {
    const bool keep = dropout_hash(static_cast<uint32_t>(i), keys) >= threshold;
    const float scaled = widen(x[i]) * scale;
    narrow(keep ? scaled : 0.0f, &out[i]);
  }
}

static void dropout(Float type, const void* x, void* out, int64_t begin, int64_t end, DropoutKeys keys,
                    uint32_t threshold, float scale) {
  with_type(type, [&](auto* tag) {
    dropout_as(static_cast<decltype(tag)>(const_cast<void*>(x)), static_cast<decltype(tag)>(out), begin, end, keys,
               threshold, scale);
  });
}

}  // namespace qrosa::QROSA_ISA
