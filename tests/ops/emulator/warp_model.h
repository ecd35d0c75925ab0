// A model of a CUDA block on the CPU, good enough to run the kernels of csrc/cuda as they stand.
//
// Every thread of a block is a fiber that runs alone until it waits for its warp, and a warp runs alone until it waits
// for its block, forwards or backwards through lanes and warps: a missing barrier shows as wrong results. Matrix loads
// and tensor-core products follow the fragment layouts of the PTX ISA (9.7.15, ldmatrix and mma.m16n8k16), written here
// element by element and apart from the kernels' own index maps. Built with AddressSanitizer it also finds any access
// outside the buffers. Not modelled: time, banks, and the order of fp32 sums inside a tensor core.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __constant__
#define __shared__ static
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)
#define QROSA_DYNAMIC_SHARED(name) unsigned char* name = qrosa::model::dynamic_shared()

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace qrosa::model {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "model of a block: %s\n", what);
  std::abort();
}

enum class Wait { kNone, kWarp, kBlock, kDone };

struct Fiber {
  ucontext_t context;
  std::vector<unsigned char> stack;
  Dim3 thread;
  Wait wait = Wait::kNone;
  int operation = 0;  // what it waits in: all lanes of a warp must agree
};

struct Copy {
  void* shared;
  unsigned char bytes[16];
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<unsigned char> shared;
  std::vector<uint64_t> slots;          // one word a thread, for exchange within a warp
  std::vector<uint32_t> words;          // 8 words a thread, for matrices
  std::vector<std::vector<Copy>> open;  // copies of each thread that are not committed yet
  std::vector<std::vector<std::vector<Copy>>> committed;
  std::function<void()> body;
  ucontext_t scheduler;
  int current = 0;
  bool backwards = false;
};

inline Block block;
inline Dim3 block_index, grid_size;

inline int thread_index() { return block.current; }
inline int lane() { return block.current % 32; }
inline int warp_start() { return block.current - lane(); }
inline unsigned char* dynamic_shared() { return block.shared.data(); }

inline void wait(Wait what, int operation) {
  Fiber& fiber = block.fibers[block.current];
  fiber.wait = what;
  fiber.operation = operation;
  swapcontext(&fiber.context, &block.scheduler);
}

inline void fiber_main() {
  block.body();
  block.fibers[block.current].wait = Wait::kDone;
  swapcontext(&block.fibers[block.current].context, &block.scheduler);
}

// Lets a warp go when all its lanes have met. Returns whether they had.
inline bool release_warp(int start) {
  for (int i = start; i < start + 32; ++i) {
    if (block.fibers[i].wait != Wait::kWarp) return false;
    if (block.fibers[i].operation != block.fibers[start].operation) fail("lanes of a warp met in different operations");
  }
  for (int i = start; i < start + 32; ++i) block.fibers[i].wait = Wait::kNone;
  return true;
}

// Runs one warp as far ahead of the others as the kernel lets it: until it waits for the block or is done.
inline void run_warp(int start) {
  do {
    for (int i = 0; i < 32; ++i) {
      const int turn = start + (block.backwards ? 31 - i : i);
      if (block.fibers[turn].wait != Wait::kNone) continue;
      block.current = turn;
      swapcontext(&block.scheduler, &block.fibers[turn].context);
    }
  } while (release_warp(start));
}

// Lets the block go when everybody who is not done waits for it; returns how many there were.
inline int release_block() {
  int waiting = 0;
  for (Fiber& fiber : block.fibers) {
    if (fiber.wait == Wait::kWarp) fail("lanes wait for others of their warp that never come");
    if (fiber.wait == Wait::kBlock) {
      fiber.wait = Wait::kNone;
      ++waiting;
    }
  }
  return waiting;
}

inline void run_block(int threads) {
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = block.fibers[i];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = nullptr;
    fiber.wait = Wait::kNone;
    makecontext(&fiber.context, fiber_main, 0);
  }
  do {
    for (int start = 0; start < threads; start += 32) run_warp(block.backwards ? threads - 32 - start : start);
  } while (release_block() > 0);
}

// Runs body() for every thread of every block.
inline void launch(Dim3 grid, int threads, int64_t shared_bytes, std::function<void()> body) {
  if (threads % 32 != 0) fail("blocks must be whole warps");
  grid_size = grid;
  block.body = std::move(body);
  block.fibers.resize(threads);
  for (int i = 0; i < threads; ++i) {
    block.fibers[i].stack.resize(64 << 10);
    block.fibers[i].thread = {static_cast<unsigned>(i), 0, 0};
  }
  block.slots.assign(threads, 0);
  block.words.assign(threads * 8, 0);
  block.open.assign(threads, {});
  block.committed.assign(threads, {});
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        block_index = {x, y, z};
        block.shared.assign(shared_bytes, 0xCD);  // whatever was there before
        run_block(threads);
      }
    }
  }
}

inline float bf16_value(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

inline uint16_t bf16_bits(float value) {
  uint32_t wide;
  std::memcpy(&wide, &value, 4);
  return static_cast<uint16_t>((wide + 0x7FFFu + ((wide >> 16) & 1u)) >> 16);
}

inline float fp16_value(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const float size = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                   : std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
  return (bits & 0x8000) != 0 ? -size : size;
}

inline uint16_t fp16_bits(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float size = std::fabs(value);
  if (size == 0.0f) return sign;
  if (size >= 65520.0f) return sign | 0x7C00;
  int exponent = 0;
  std::frexp(size, &exponent);                                   // size = fraction in [0.5, 1) * 2^exponent
  const int unit = (exponent - 11 > -24 ? exponent - 11 : -24);  // the last bit's weight
  const auto steps = static_cast<uint32_t>(std::nearbyint(std::ldexp(size, -unit)));
  return static_cast<uint16_t>(sign + (unit == -24 ? steps : ((unit + 24) << 10) + steps));
}

}  // namespace qrosa::model

#define threadIdx (qrosa::model::block.fibers[qrosa::model::block.current].thread)
inline const Dim3 &blockIdx = qrosa::model::block_index, &gridDim = qrosa::model::grid_size;

template <typename T>
inline T __ldg(const T* pointer) {
  return *pointer;
}
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

namespace qrosa {

inline uint4 load_now(const uint4* from) { return *from; }
inline float load_now(const float* from) { return *from; }
inline uint32_t load_now(const uint8_t* from) { return *from; }

inline float to_float(float value) { return value; }
inline float to_float(Bf16 value) { return model::bf16_value(value.bits); }
inline float to_float(Fp16 value) { return model::fp16_value(value.bits); }

template <typename T>
inline T from_float(float value);
template <>
inline float from_float<float>(float value) {
  return value;
}
template <>
inline Bf16 from_float<Bf16>(float value) {
  return {model::bf16_bits(value)};
}
template <>
inline Fp16 from_float<Fp16>(float value) {
  return {model::fp16_bits(value)};
}

template <typename T>
inline uint32_t pack_pair(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}

inline float rounded_product(float a, float b) { return a * b; }  // built without contraction
inline float rounded_sum(float a, float b) { return a + b; }

inline void sync_warp() { model::wait(model::Wait::kWarp, 1); }
inline void sync_block() { model::wait(model::Wait::kBlock, 0); }

template <typename T>
inline T from_lane(T value, int lane) {
  static_assert(sizeof(T) <= 8);
  if (lane < 0 || lane >= 32) model::fail("no such lane");
  std::memcpy(&model::block.slots[model::thread_index()], &value, sizeof(T));
  model::wait(model::Wait::kWarp, 2);
  T result;
  std::memcpy(&result, &model::block.slots[model::warp_start() + lane], sizeof(T));
  model::wait(model::Wait::kWarp, 2);
  return result;
}

inline float warp_sum(float value) {
  for (int distance = 16; distance > 0; distance /= 2) value += from_lane(value, model::lane() ^ distance);
  return value;
}

namespace model {

// Gives each lane, of matrix m, element (row, 2 column) and (row, 2 column + 1) of the stored or the transposed matrix.
inline void load_matrices(uint32_t (&to)[4], const void* row, bool transposed) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) fail("a matrix row is not 16-byte aligned");
  block.slots[thread_index()] = reinterpret_cast<uintptr_t>(row);
  wait(Wait::kWarp, transposed ? 4 : 3);
  const int start = warp_start(), r = lane() / 4, c = 2 * (lane() % 4);
  for (int m = 0; m < 4; ++m) {
    uint32_t pair[2];
    for (int i = 0; i < 2; ++i) {
      const int stored_row = transposed ? c + i : r, stored_column = transposed ? r : c + i;
      pair[i] = reinterpret_cast<const uint16_t*>(block.slots[start + 8 * m + stored_row])[stored_column];
    }
    to[m] = pair[0] | pair[1] << 16;
  }
  wait(Wait::kWarp, transposed ? 4 : 3);
}

}  // namespace model

inline void load_matrices(uint32_t (&to)[4], const void* row) { model::load_matrices(to, row, false); }
inline void load_matrices_transposed(uint32_t (&to)[4], const void* row) { model::load_matrices(to, row, true); }

// mma.m16n8k16: of A, register i of lane l holds row l / 4 + 8 (i % 2), columns 2 (l % 4) + 8 (i / 2) and the next; of
// B, register i holds rows 2 (l % 4) + 8 i and the next of column l / 4; of C, register i holds row l / 4 + 8 (i / 2),
// column 2 (l % 4) + i % 2.
template <typename T>
inline void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  using model::block;
  uint32_t* mine = &block.words[8 * model::thread_index()];
  std::memcpy(mine, a, 16);
  mine[4] = b0;
  mine[5] = b1;
  model::wait(model::Wait::kWarp, 5);
  const uint32_t* warp = &block.words[8 * model::warp_start()];
  const auto half = [](uint32_t word, int i) {
    return to_float(T{static_cast<uint16_t>(i == 0 ? word & 0xFFFFu : word >> 16)});
  };
  for (int i = 0; i < 4; ++i) {
    const int row = model::lane() / 4 + 8 * (i / 2), column = 2 * (model::lane() % 4) + i % 2;
    for (int k = 0; k < 16; ++k) {
      const int a_lane = (row % 8) * 4 + (k % 8) / 2, a_register = row / 8 + 2 * (k / 8);
      const int b_lane = column * 4 + (k % 8) / 2, b_register = k / 8;
      sum[i] += half(warp[8 * a_lane + a_register], k % 2) * half(warp[8 * b_lane + 4 + b_register], k % 2);
    }
  }
  model::wait(model::Wait::kWarp, 5);
}

// A copy lands only when it is waited for: reading too early finds what was there before.
inline void copy_async(void* shared, const void* global, bool present) {
  model::Copy copy{shared, {}};
  if (present) std::memcpy(copy.bytes, global, 16);
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0 || (present && reinterpret_cast<uintptr_t>(global) % 16 != 0)) {
    model::fail("an asynchronous copy is not 16-byte aligned");
  }
  model::block.open[model::thread_index()].push_back(copy);
}
inline void commit_copies() {
  auto& open = model::block.open[model::thread_index()];
  model::block.committed[model::thread_index()].push_back(std::move(open));
  open.clear();
}
template <int kPending>
inline void wait_copies() {
  auto& groups = model::block.committed[model::thread_index()];
  while (groups.size() > kPending) {
    for (const model::Copy& copy : groups.front()) std::memcpy(copy.shared, copy.bytes, 16);
    groups.erase(groups.begin());
  }
}

}  // namespace qrosa
