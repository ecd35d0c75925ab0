// Which kernels run: the best that this processor and its operating system support, unless told otherwise.
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "kernels.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace qrosa {
namespace {

// Matrix tiles with bf16, for which Linux asks a process to ask first.
bool has_amx() {
#if defined(__x86_64__) && defined(__linux__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return (d & kBf16) != 0 && (d & kTiles) != 0 && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Isa find_best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();  // reads cpuid, and asks the system which registers it saves
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    if (!__builtin_cpu_supports("avx512bf16")) return Isa::kAvx512;
    return has_amx() ? Isa::kAmx : Isa::kAvx512Bf16;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    return Isa::kAvx2;
#endif
  return Isa::kPortable;
}

Isa best_isa() {
  static const Isa best = find_best_isa();
  return best;
}

Isa at_most(Isa wanted) {
  const Isa best = best_isa();
  return wanted < best ? wanted : best;
}

Isa initial_isa() {
  const char* wanted = std::getenv("QROSA_CPU_ISA");
  constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512bf16", "amx"};
  for (int i = 0; wanted != nullptr && i < 5; ++i) {
    if (std::strcmp(wanted, kNames[i]) == 0) return at_most(static_cast<Isa>(i));
  }
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
    case Isa::kAmx:
      return kAmxKernels;
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
