// Normalizes a batch of images in one pass. The pass is bound by memory, so the default instruction set
// suffices.
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "../normalize.h"

namespace detrs::cpu {
namespace {

constexpr int64_t kChannels = 3;
constexpr int64_t kBlock = 16 * kChannels;  // numbers of a row per iteration: whole vectors, and whole pixels

// Asks for huge pages. The output is new memory: its first use would otherwise be an interrupt for every 4
// KB, which takes three times as long as the arithmetic. A kernel without huge pages refuses, which is
// harmless.
void use_huge_pages(float* begin, int64_t count) {
#ifdef __linux__
  constexpr uintptr_t kHugePage = uintptr_t(1) << 21;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = reinterpret_cast<uintptr_t>(begin + count) / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace

void normalize(const NormalizeProblem& problem) {
  // Of each number in a block, so that the inner loop has no remainder by 3
  float mean[kBlock], std[kBlock];
  for (int64_t i = 0; i < kBlock; i++)
    mean[i] = problem.mean[i % kChannels], std[i] = problem.std[i % kChannels];
  const int64_t length = problem.width * kChannels;
  use_huge_pages(problem.out, problem.num_images * problem.height * length);
  torch::stable::parallel_for(0, problem.num_images * problem.height, 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      const int64_t* size = problem.sizes + 2 * (row / problem.height);
      const int64_t inside = row % problem.height < size[0] ? size[1] * kChannels : 0;
      const uint8_t* from = problem.pixels + row * length;
      float* to = problem.out + row * length;
      int64_t at = 0;
      for (; at + kBlock <= inside; at += kBlock)
        for (int64_t i = 0; i < kBlock; i++) to[at + i] = (float(from[at + i]) - mean[i]) / std[i];
      for (int64_t i = 0; at + i < inside; i++) to[at + i] = (float(from[at + i]) - mean[i]) / std[i];
      std::fill(to + inside, to + length, 0.0f);
    }
  });
}

}  // namespace detrs::cpu
