// Divides the work among threads and selects the instruction set. In the backward pass, one thread computes
// grad_value of a complete (image, head), or of some of its channels: threads never write to the same memory,
// so there are no atomics, and the order of all sums is independent of the number of threads.
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
  // This variable of torch limits its own kernels; it limits these as well.
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

// Uninitialized memory, aligned to cache lines (and to the widest vectors).
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
struct ScratchBuffer : Buffer<T> {
  explicit ScratchBuffer(const Problem<T>& problem) : Buffer<T>(kernels<T>().scratch_size(problem)) {
    kernels<T>().prepare_scratch(problem, this->begin());
  }
};

template <class T>
int64_t head_size(const Problem<T>& problem) {
  return problem.num_tokens * problem.num_channels;
}

// Returns one head of value and, in the backward pass, of its gradient, in place: tokens are num_heads *
// num_channels apart.
template <class T>
HeadView<T> view_in_place(const Problem<T>& problem, int64_t image, int64_t head) {
  int64_t stride = problem.num_heads * problem.num_channels;
  int64_t offset = image * problem.num_tokens * stride + head * problem.num_channels;
  T* grad_value = problem.grad_value == nullptr ? nullptr : static_cast<T*>(problem.grad_value) + offset;
  const char* value = static_cast<const char*>(problem.value) + offset * bytes_of(problem.storage);
  return {value, problem.storage, stride, grad_value, stride};
}

// Returns whether to copy each head to contiguous memory first: only if it is read often enough to repay the
// copy. README.md, "Packing", has the measurements.
template <class T>
bool should_pack(const Problem<T>& problem) {
  const int64_t repaid =
      problem.storage == Storage::float16 ? 40 : 2;  // tokens per query; converting float16 is slow
  return repaid * problem.num_queries >= problem.num_tokens;
}

template <class T>
int64_t num_heads_of_all_images(const Problem<T>& problem) {
  return problem.num_images * problem.num_heads;
}

// Returns whether threads would have nothing to do if each computed complete heads.
template <class T>
bool has_idle_threads(const Problem<T>& problem) {
  return num_heads_of_all_images(problem) < int64_t(torch::stable::get_num_threads());
}

// Each thread packs one head at a time.
template <class T>
void forward_by_head(const Problem<T>& problem) {
  torch::stable::parallel_for(0, num_heads_of_all_images(problem), 1, [&](int64_t begin, int64_t end) {
    ScratchBuffer<T> scratch(problem);
    Buffer<T> packed(head_size(problem));
    for (int64_t task = begin; task < end; task++) {
      Rows rows{task / problem.num_heads, task % problem.num_heads, 0, problem.num_queries};
      kernels<T>().pack(problem, rows.image, rows.head, packed.begin());
      const HeadView<T> view{packed.begin(), storage_of<T>(), problem.num_channels, nullptr, 0};
      kernels<T>().forward(problem, view, rows, scratch.begin());
    }
  });
}

// Calls use(rows, scratch) for 64 queries of a head at a time, on all threads.
template <class T, class Use>
void for_queries(const Problem<T>& problem, const Use& use) {
  constexpr int64_t kQueries = 64;
  const int64_t tasks_per_head = (problem.num_queries + kQueries - 1) / kQueries;
  const int64_t num_tasks = problem.num_images * tasks_per_head * problem.num_heads;
  torch::stable::parallel_for(0, num_tasks, 1, [&](int64_t begin, int64_t end) {
    ScratchBuffer<T> scratch(problem);
    for (int64_t task = begin; task < end; task++) {
      int64_t part = task / problem.num_heads % tasks_per_head,
              last = std::min((part + 1) * kQueries, problem.num_queries);
      const Rows rows{task / problem.num_heads / tasks_per_head, task % problem.num_heads, part * kQueries,
                      last};
      use(rows, scratch.begin());
    }
  });
}

template <class T>
void forward_in_place(const Problem<T>& problem) {
  for_queries(problem, [&](const Rows& rows, T* scratch) {
    kernels<T>().forward(problem, view_in_place(problem, rows.image, rows.head), rows, scratch);
  });
}

// Copies of all heads, for threads that share them: of value, of its gradient, of both or of none.
template <class T>
class PackedHeads {
 public:
  PackedHeads(const Problem<T>& problem, bool pack_value, bool pack_grad)
      : problem_(problem),
        pack_value_(pack_value),
        pack_grad_(pack_grad),
        buffer_((pack_value + pack_grad) * num_heads_of_all_images(problem) * head_size(problem)) {
    for_heads([&](int64_t image, int64_t head) {
      if (pack_value_) kernels<T>().pack(problem_, image, head, value(image, head));
      if (pack_grad_) std::fill_n(grad(image, head), head_size(problem_), T(0));
    });
  }

  HeadView<T> view(const Rows& rows) const {
    HeadView<T> view = view_in_place(problem_, rows.image, rows.head);
    if (pack_value_)
      view.value = value(rows.image, rows.head), view.storage = storage_of<T>(),
      view.stride = problem_.num_channels;
    if (pack_grad_) view.grad_value = grad(rows.image, rows.head), view.grad_stride = problem_.num_channels;
    return view;
  }

  void unpack_grad() const {
    if (!pack_grad_) return;
    for_heads(
        [&](int64_t image, int64_t head) { kernels<T>().unpack(problem_, image, head, grad(image, head)); });
  }

 private:
  template <class Use>
  void for_heads(const Use& use) const {
    torch::stable::parallel_for(0, num_heads_of_all_images(problem_), 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; task++)
        use(task / problem_.num_heads, task % problem_.num_heads);
    });
  }
  T* value(int64_t image, int64_t head) const {
    return buffer_.begin() + (image * problem_.num_heads + head) * head_size(problem_);
  }
  T* grad(int64_t image, int64_t head) const {
    const int64_t values = pack_value_ ? num_heads_of_all_images(problem_) * head_size(problem_) : 0;
    return value(image, head) + values;
  }

  const Problem<T>& problem_;
  const bool pack_value_, pack_grad_;
  const Buffer<T> buffer_;
};

template <class T>
void forward_by_queries(const Problem<T>& problem) {
  const PackedHeads<T> packed(problem, true, false);
  for_queries(problem, [&](const Rows& rows, T* scratch) {
    kernels<T>().forward(problem, packed.view(rows), rows, scratch);
  });
}

template <class T>
void clear_grad_value(const Problem<T>& problem) {
  const int64_t token_size = problem.num_heads * problem.num_channels;
  T* grad_value = static_cast<T*>(problem.grad_value);
  torch::stable::parallel_for(
      0, problem.num_images * problem.num_tokens, 256, [&](int64_t begin, int64_t end) {
        std::fill(grad_value + begin * token_size, grad_value + end * token_size, T(0));
      });
}

// Computes the backward pass of one head. The buffers are for packed copies of value and of its gradient; if
// null, value is read, and its gradient summed, in place.
template <class T>
void backward_head(const Problem<T>& problem, const Rows& rows, T* packed_value, T* packed_grad, T* scratch) {
  HeadView<T> view = view_in_place(problem, rows.image, rows.head);
  if (packed_value != nullptr) {
    kernels<T>().pack(problem, rows.image, rows.head, packed_value);
    view.value = packed_value, view.storage = storage_of<T>(), view.stride = problem.num_channels;
  }
  if (packed_grad != nullptr) {
    std::fill_n(packed_grad, head_size(problem), T(0));
    view.grad_value = packed_grad, view.grad_stride = problem.num_channels;
  }
  kernels<T>().backward(problem, view, rows, scratch);
  if (packed_grad != nullptr) kernels<T>().unpack(problem, rows.image, rows.head, packed_grad);
}

template <class T>
void backward_by_head(const Problem<T>& problem, bool pack_value, bool pack_grad) {
  torch::stable::parallel_for(0, num_heads_of_all_images(problem), 1, [&](int64_t begin, int64_t end) {
    ScratchBuffer<T> scratch(problem);
    Buffer<T> packed((pack_value + pack_grad) * head_size(problem));
    T* packed_value = pack_value ? packed.begin() : nullptr;
    T* packed_grad = pack_grad ? packed.begin() + pack_value * head_size(problem) : nullptr;
    for (int64_t task = begin; task < end; task++) {
      Rows rows{task / problem.num_heads, task % problem.num_heads, 0, problem.num_queries};
      backward_head(problem, rows, packed_value, packed_grad, scratch.begin());
    }
  });
}

// Computes grad_value by head and channels, and then the other gradients by head and queries. All sums have
// the order of backward_by_head.
template <class T>
void backward_by_channels(const Problem<T>& problem, bool pack_value, bool pack_grad) {
  constexpr int64_t kChannels = 8;  // of a part, or a multiple
  const PackedHeads<T> packed(problem, pack_value, pack_grad);
  const int64_t num_heads = num_heads_of_all_images(problem), num_threads = torch::stable::get_num_threads();
  const int64_t most = (problem.num_channels + kChannels - 1) / kChannels;
  const int64_t wanted = std::min((num_threads + num_heads - 1) / num_heads, most);
  const int64_t channels_per_part = (most + wanted - 1) / wanted * kChannels;
  const int64_t parts_per_head = (problem.num_channels + channels_per_part - 1) / channels_per_part;
  torch::stable::parallel_for(0, num_heads * parts_per_head, 1, [&](int64_t begin, int64_t end) {
    ScratchBuffer<T> scratch(problem);
    for (int64_t task = begin; task < end; task++) {
      const int64_t head = task / parts_per_head, first = task % parts_per_head * channels_per_part;
      const Rows rows{head / problem.num_heads, head % problem.num_heads, 0, problem.num_queries};
      const ChannelRange channels{first, std::min(first + channels_per_part, problem.num_channels)};
      kernels<T>().value_grads(problem, packed.view(rows), rows, channels, scratch.begin());
    }
  });
  packed.unpack_grad();
  for_queries(problem, [&](const Rows& rows, T* scratch) {
    kernels<T>().sample_grads(problem, packed.view(rows), rows, scratch);
  });
}

}  // namespace

template <class T>
void forward(const Problem<T>& problem) {
  if (!should_pack(problem)) return forward_in_place(problem);
  has_idle_threads(problem) ? forward_by_queries(problem) : forward_by_head(problem);
}

template <class T>
void backward(const Problem<T>& problem) {
  // Half precision is always summed in a packed T: in place, every addition would round.
  const bool pack_value = should_pack(problem), pack_grad = pack_value || problem.storage != storage_of<T>();
  if (!pack_grad) clear_grad_value(problem);
  has_idle_threads(problem) ? backward_by_channels(problem, pack_value, pack_grad)
                            : backward_by_head(problem, pack_value, pack_grad);
}

const char* instruction_set() {
  return kernel_set().instruction_set;
}

template void forward(const Problem<float>&);
template void forward(const Problem<double>&);
template void backward(const Problem<float>&);
template void backward(const Problem<double>&);

}  // namespace detrs::cpu
