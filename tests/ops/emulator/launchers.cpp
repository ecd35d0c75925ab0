// The launchers of csrc/cuda/*.cu against the model of the runtime (cuda_runtime.h), which here only records launches:
// grids within a card's limits at any size, no error left behind, one limit of shared memory whatever the shapes.
#include "inputs.h"

namespace qrosa {
namespace {

constexpr int64_t kMost = (int64_t{1} << 31) - 1025;  // of one dimension (ops.cpp)
constexpr Card kCards[] = {{99 * 1024, 46}, {163 * 1024, 108}, {227 * 1024, 132}};
alignas(16) unsigned char memory[16];  // nothing runs, so nothing is read

void check(bool condition, const char* what) {
  if (!condition) wrong(what);
}

cudaError_t decode(Float type, int64_t tokens, int64_t rows, int64_t columns) {
  Nf4View nf4{};
  nf4.codes = memory;
  nf4.block_shift = 6;
  return launch_dequant_spmm(nf4, {}, type, memory, memory, tokens, rows, columns, nullptr);
}

cudaError_t decode_weight(int64_t rows, int64_t columns) {
  return launch_dequant_add({}, {}, Float::kBf16, memory, rows, columns, nullptr);
}

cudaError_t drop(int64_t count) { return launch_dropout(Float::kBf16, memory, memory, count, {}, 0, 1.0f, nullptr); }

cudaError_t normed(int64_t rows, int64_t width) {
  NormWork work{};
  work.rows = rows;
  work.width = width;
  return launch_rms_norm(Float::kBf16, work, nullptr);
}

cudaError_t gated(int64_t rows, int64_t columns, int64_t stride) {
  GateWork work{};
  work.rows = rows;
  work.columns = columns;
  work.gate_stride = work.up_stride = stride;
  return launch_gate(Float::kBf16, work, nullptr);
}

Pair pair_of(Float type, int64_t tokens, int64_t rows, int64_t columns) {
  return {memory, memory, tokens, rows, columns, type};
}

cudaError_t score(Float type, int64_t tokens, int64_t rows, int64_t columns) {
  return launch_score_accumulate(pair_of(type, tokens, rows, columns), reinterpret_cast<float*>(memory), true, nullptr);
}

cudaError_t gradient(Float type, int64_t tokens, int64_t rows, int64_t columns, int64_t nnz, SddmmWay way,
                     const Card& card = kCards[0]) {
  const Pair pair = pair_of(type, tokens, rows, columns);
  const SddmmPlan plan = plan_sddmm(pair, nnz, card, way);
  check(plan.gathers == (way == SddmmWay::kGather), "the plan takes another way than asked for");
  check(plan.scratch_words >= 0, "the words of scratch overflow");
  CsrView csr{};
  csr.nnz = nnz;
  return launch_sddmm(pair, csr, plan, reinterpret_cast<int32_t*>(memory), reinterpret_cast<float*>(memory), nullptr);
}

// Sizes at which one of the grid's axes would end.
void huge_sizes() {
  for (const Float type : {Float::kBf16, Float::kFp16, Float::kFp32}) {
    for (const int64_t tokens : {int64_t{1}, int64_t{5}, int64_t{262141}, int64_t{5000000}, kMost}) {
      check(decode(type, tokens, 4096, 4096) == cudaSuccess, "dequant_spmm of many tokens");
      check(decode(type, tokens, 4096, 33) == cudaSuccess, "dequant_spmm of many tokens, any shape");
    }
    check(decode(type, 1, kMost, 4096) == cudaSuccess, "dequant_spmm of many rows");
    for (const int64_t rows : {int64_t{4194241}, int64_t{8388481}, kMost}) {
      check(score(type, 64, rows, 4096) == cudaSuccess, "score_accumulate of many rows");
      check(score(type, 64, 4096, rows) == cudaSuccess, "score_accumulate of many columns");
      check(gradient(type, 64, rows, 4096, INT32_MAX, SddmmWay::kTiles) == cudaSuccess, "tiles of many rows");
    }
  }
  for (const Card& card : kCards) {
    for (const int64_t rows : {int64_t{1}, int64_t{4096}, kMost}) {
      check(gradient(Float::kBf16, kMost, rows, 64, INT32_MAX, SddmmWay::kGather, card) == cudaSuccess, "many tokens");
      check(gradient(Float::kFp16, 64, 256, rows, 1, SddmmWay::kGather, card) == cudaSuccess, "gathering many columns");
    }
  }
  check(decode_weight(kMost, 4096) == cudaSuccess, "dequant_add of 2^43 elements");
  check(drop(int64_t{1} << 40) == cudaSuccess, "dropout of 2^40 elements");
  check(normed(kMost, 64) == cudaSuccess && normed(kMost, 8192) == cudaSuccess, "a norm of many rows");
  check(gated(int64_t{1} << 27, 8192, 8192) == cudaSuccess && gated(kMost, 8192, 16384) == cudaSuccess,
        "a gate of many rows");
}

// A grid covers every piece along y, and folds only where it must.
void folds() {
  for (const int64_t tokens : {1, 4, 5, 262140, 262141, 1000000000}) {
    model::runtime.launches.clear();
    check(decode(Float::kFp32, tokens, 16, 32) == cudaSuccess, "dequant_spmm");
    const Dim3 grid = model::runtime.launches.front().grid;
    const int64_t pieces = tokens == 1 ? 1 : ceil_div(tokens, 4), blocks = int64_t{grid.y} * grid.z;
    check(blocks >= pieces && blocks < pieces + grid.z, "a grid covers its tokens");
    check(tokens > 262140 || grid.z == 1, "a grid that fits is not folded");
  }
}

// Whatever is refused, the launcher says so, and the next one finds a clean slate.
void errors_are_taken() {
  const auto refused = [](int call, auto launch) {
    model::runtime.refused = call;
    check(launch() != cudaSuccess, "a refused launch goes unnoticed");
    check(cudaPeekAtLastError() == cudaSuccess, "an error is left for the next op");
    model::runtime.refused = 0;
    check(launch() == cudaSuccess, "a launch after a refused one");
  };
  for (const Float type : {Float::kBf16, Float::kFp16, Float::kFp32}) {
    refused(1, [&] { return decode(type, 1, 64, 64); });
    refused(1, [&] { return decode(type, 8, 64, 64); });
    refused(1, [&] { return decode(type, 3, 64, 33); });
    refused(1, [&] { return score(type, 8, 64, 64); });
    refused(1, [&] { return gradient(type, 8, 64, 64, 10, SddmmWay::kTiles); });
  }
  refused(1, [] { return decode_weight(64, 64); });
  refused(1, [] { return drop(64); });
  // 1 the limit of shared memory, 2 the index, 3 the products, 4 the sum of the token groups
  for (const int call : {1, 2, 3, 4}) {
    refused(call, [] { return gradient(Float::kBf16, 4096, 64, 64, 10, SddmmWay::kGather, kCards[2]); });
  }
}

// Two threads that gather at different shapes on one card set the same limit, so neither lowers the other's.
void one_limit_of_shared_memory() {
  for (const Card& card : kCards) {
    model::runtime.limits.clear();
    model::runtime.launches.clear();
    for (const int64_t columns : {64, 300, 700, 4096, 14336}) {
      for (const int64_t tokens : {1, 64, 2048}) {
        check(gradient(Float::kBf16, tokens, 4096, columns, 4096, SddmmWay::kGather, card) == cudaSuccess, "gathering");
      }
    }
    check(model::runtime.limits.size() == 1, "one kernel asks for more shared memory");
    const std::vector<int>& limits = model::runtime.limits.begin()->second;
    std::set<int64_t> asked;
    for (const model::Launch& launch : model::runtime.launches) asked.insert(launch.shared);
    check(asked.size() > 2, "the shapes ask for different amounts");
    check(std::set<int>(limits.begin(), limits.end()).size() == 1, "the limit depends on the shapes");
    check(*asked.rbegin() <= limits.front() && limits.front() < card.shared_bytes, "the limit fits asker and card");
  }
}

// A position that the rule or the environment sends one way gets the scratch of that way.
void one_plan_a_call() {
  const Pair pair = pair_of(Float::kBf16, 2048, 4096, 4096);
  const auto words = [&](SddmmWay way, int64_t nnz) { return plan_sddmm(pair, nnz, kCards[0], way).scratch_words; };
  check(words(SddmmWay::kTiles, 1000) == 0 && words(SddmmWay::kGather, 1000) > 0, "scratch follows the way");
  check(words(SddmmWay::kRule, 4096 * 13) > 0 && words(SddmmWay::kRule, 4096 * 2048) == 0, "the rule's two ways");
  const Pair wide = pair_of(Float::kFp32, 2048, 4096, 4096);
  check(!plan_sddmm(wide, 10, kCards[0], SddmmWay::kGather).gathers, "fp32 has one way");
  // Products of three sizes of 2^31 do not turn the rule around.
  check(!gather_is_cheaper(kMost, kMost, 16, INT32_MAX) && gather_is_cheaper(kMost, kMost, kMost, INT32_MAX),
        "the rule");
}

}  // namespace
}  // namespace qrosa

int main() {
  qrosa::model::runtime.runs = false;
  qrosa::huge_sizes();
  qrosa::folds();
  qrosa::errors_are_taken();
  qrosa::one_limit_of_shared_memory();
  qrosa::one_plan_a_call();
  std::puts("right");
  return 0;
}
