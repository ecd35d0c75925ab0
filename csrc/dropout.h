// Dropout as a pure function of a seed and an element's index (qrosa/ops/dropout.py says why and holds the same
// function).
#pragma once

#include <cstdint>

#include "nf4.h"

namespace qrosa {

struct DropoutKeys {
  uint32_t first, second;
};

// One round of splitmix64.
QROSA_HD DropoutKeys dropout_keys(int64_t seed) {
  uint64_t state = static_cast<uint64_t>(seed) + 0x9E3779B97F4A7C15ull;
  state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9ull;
  state = (state ^ (state >> 27)) * 0x94D049BB133111EBull;
  state ^= state >> 31;
  return {static_cast<uint32_t>(state), static_cast<uint32_t>(state >> 32)};
}

QROSA_HD uint32_t dropout_threshold(double p) { return static_cast<uint32_t>(p * 4294967296.0); }

// Element `index` stays when its hash reaches the threshold.
QROSA_HD uint32_t dropout_hash(uint32_t index, DropoutKeys keys) {
  uint32_t hash = index ^ keys.first;
  hash = (hash ^ (hash >> 16)) * 0x85EBCA6Bu + keys.second;
  hash = (hash ^ (hash >> 13)) * 0xC2B2AE35u;
  return hash ^ (hash >> 16);
}

}  // namespace qrosa
