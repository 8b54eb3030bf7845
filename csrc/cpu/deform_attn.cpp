// Divides the work among threads and picks the instruction set. A thread always does whole (image, head)
// pairs in the backward pass: nothing is shared, no atomics, and sums are taken in one order whatever the
// number of threads.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "kernels.h"

namespace detrs::cpu {
namespace {

const KernelSet& choose_kernels() {
#if defined(__x86_64__)
  // torch's own variable limits its kernels and ours alike
  const char* limit = std::getenv("ATEN_CPU_CAPABILITY");
  bool allow_avx512 = limit == nullptr || std::strcmp(limit, "avx512") == 0;
  bool allow_avx2 = allow_avx512 || std::strcmp(limit, "avx2") == 0;
  bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
  if (allow_avx512 && has_avx512) return kernels_avx512;
  if (allow_avx2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kernels_avx2;
#endif
  return kernels_baseline;
}

const KernelSet& kernel_set() {
  static const KernelSet& chosen = choose_kernels();
  return chosen;
}

template <class T>
const Kernels<T>& kernels();
template <>
const Kernels<float>& kernels() {
  return kernel_set().float_;
}
template <>
const Kernels<double>& kernels() {
  return kernel_set().double_;
}

// Room that starts on a cache line. Not cleared.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : begin_(static_cast<T*>(::operator new(sizeof(T) * count, kAlignment))) {}
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { ::operator delete(begin_, kAlignment); }
  T* begin() const { return begin_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  T* begin_;
};

template <class T>
struct Scratch : Buffer<T> {
  explicit Scratch(const Problem<T>& problem) : Buffer<T>(kernels<T>().scratch_size(problem)) {
    kernels<T>().prepare_scratch(problem, this->begin());
  }
};

template <class T>
int64_t head_size(const Problem<T>& problem) {
  return problem.num_tokens * problem.num_channels;
}

// One head's numbers where they lie, num_heads * num_channels apart.
template <class T>
HeadView<T> view_in_place(const Problem<T>& problem, int64_t image, int64_t head) {
  int64_t stride = problem.num_heads * problem.num_channels;
  int64_t offset = image * problem.num_tokens * stride + head * problem.num_channels;
  T* grad_value = problem.grad_value == nullptr ? nullptr : static_cast<T*>(problem.grad_value) + offset;
  return {static_cast<const T*>(problem.value) + offset, grad_value, stride};
}

// Whether to copy each head together before reading it: to convert it, or because it is read often enough to
// repay the copy. README.md, "Packing", has the measurements.
template <class T>
bool should_pack(const Problem<T>& problem) {
  bool stored_as_computed = problem.storage == Storage::float32 || problem.storage == Storage::float64;
  return !stored_as_computed || 2 * problem.num_queries >= problem.num_tokens;
}

template <class T>
void forward_packed(const Problem<T>& problem) {
  torch::stable::parallel_for(0, problem.num_images * problem.num_heads, 1, [&](int64_t begin, int64_t end) {
    Scratch<T> scratch(problem);
    Buffer<T> packed(head_size(problem));
    for (int64_t task = begin; task < end; task++) {
      Rows rows{task / problem.num_heads, task % problem.num_heads, 0, problem.num_queries};
      kernels<T>().pack(problem, rows.image, rows.head, packed.begin());
      HeadView<T> view{packed.begin(), nullptr, problem.num_channels};
      kernels<T>().forward(problem, view, rows, scratch.begin());
    }
  });
}

template <class T>
void forward_in_place(const Problem<T>& problem) {
  constexpr int64_t kBlock = 64;  // queries a task
  const int64_t num_blocks = (problem.num_queries + kBlock - 1) / kBlock;
  const int64_t num_tasks = problem.num_images * num_blocks * problem.num_heads;
  torch::stable::parallel_for(0, num_tasks, 1, [&](int64_t begin, int64_t end) {
    Scratch<T> scratch(problem);
    for (int64_t task = begin; task < end; task++) {
      int64_t block = task / problem.num_heads % num_blocks,
              last = std::min((block + 1) * kBlock, problem.num_queries);
      Rows rows{task / problem.num_heads / num_blocks, task % problem.num_heads, block * kBlock, last};
      kernels<T>().forward(problem, view_in_place(problem, rows.image, rows.head), rows, scratch.begin());
    }
  });
}

// The backward pass of one head; `packed` is null, or has room for its value and its grad_value.
template <class T>
void backward_head(const Problem<T>& problem, const Rows& rows, T* packed, T* scratch) {
  if (packed == nullptr) {
    kernels<T>().backward(problem, view_in_place(problem, rows.image, rows.head), rows, scratch);
    return;
  }
  T* packed_grad = packed + head_size(problem);
  kernels<T>().pack(problem, rows.image, rows.head, packed);
  std::fill_n(packed_grad, head_size(problem), T(0));
  kernels<T>().backward(problem, {packed, packed_grad, problem.num_channels}, rows, scratch);
  kernels<T>().unpack(problem, rows.image, rows.head, packed_grad);
}

}  // namespace

template <class T>
void forward(const Problem<T>& problem) {
  should_pack(problem) ? forward_packed(problem) : forward_in_place(problem);
}

template <class T>
void backward(const Problem<T>& problem) {
  const bool pack = should_pack(problem);
  torch::stable::parallel_for(0, problem.num_images * problem.num_heads, 1, [&](int64_t begin, int64_t end) {
    Scratch<T> scratch(problem);
    Buffer<T> packed(pack ? 2 * head_size(problem) : 0);
    for (int64_t task = begin; task < end; task++) {
      Rows rows{task / problem.num_heads, task % problem.num_heads, 0, problem.num_queries};
      backward_head(problem, rows, pack ? packed.begin() : nullptr, scratch.begin());
    }
  });
}

const char* instruction_set() {
  return kernel_set().instruction_set;
}

template void forward(const Problem<float>&);
template void forward(const Problem<double>&);
template void backward(const Problem<float>&);
template void backward(const Problem<double>&);

}  // namespace detrs::cpu
