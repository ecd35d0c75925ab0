// Which kernels run: the best that this processor and its operating system support, unless told otherwise.
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace qrosa {
namespace {

Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();  // reads cpuid, and asks the system which registers it saves
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return __builtin_cpu_supports("avx512bf16") ? Isa::kAvx512Bf16 : Isa::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return Isa::kAvx2;
#endif
  return Isa::kPortable;
}

Isa at_most(Isa wanted) {
  const Isa best = best_isa();
  return wanted < best ? wanted : best;
}

Isa initial_isa() {
  const char* wanted = std::getenv("QROSA_CPU_ISA");
  if (wanted != nullptr && std::strcmp(wanted, "portable") == 0) return Isa::kPortable;
  if (wanted != nullptr && std::strcmp(wanted, "avx2") == 0) return at_most(Isa::kAvx2);
  return best_isa();
}

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> isa{initial_isa()};
  return isa;
}

}  // namespace

Isa current_isa() { return chosen().load(std::memory_order_relaxed); }

Isa force_isa(Isa isa) {
  chosen().store(at_most(isa), std::memory_order_relaxed);
  return current_isa();
}

const Kernels& kernels() {
#if defined(__x86_64__)
  switch (current_isa()) {
    case Isa::kAvx512Bf16:
      return kAvx512Bf16Kernels;
    case Isa::kAvx512:
      return kAvx512Kernels;
    case Isa::kAvx2:
      return kAvx2Kernels;
    default:
      break;
  }
#endif
  return kPortableKernels;
}

}  // namespace qrosa
