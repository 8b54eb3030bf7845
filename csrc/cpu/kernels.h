// The interface between the division of work (deform_attn.cpp) and the kernels (kernel_code.h).
#pragma once

#include "../deform_attn.h"

namespace detrs::cpu {

namespace {

template <class T>
constexpr Storage storage_of() {
  return sizeof(T) == 8 ? Storage::float64 : Storage::float32;
}

constexpr int64_t bytes_of(Storage storage) {
  return storage == Storage::float64 ? 8 : storage == Storage::float32 ? 4 : 2;
}

}  // namespace

// One head of one image as a kernel reads it: the channels of token t start at element t * stride.
template <class T>
struct HeadView {
  const void* value;
  Storage storage;  // of value
  int64_t stride;
  T* grad_value;  // backward only
  int64_t grad_stride;
};

// The rows of a kernel call: a range of queries, for one head and one image.
struct Rows {
  int64_t image, head, first_query, last_query;
};

// A range of the channels of a head.
struct ChannelRange {
  int64_t first, last;
};

template <class T>
struct Kernels {
  // A thread owns a scratch buffer of this many T. It prepares it once per call, and uses it for all its
  // rows.
  int64_t (*scratch_size)(const Problem<T>&);
  void (*prepare_scratch)(const Problem<T>&, T* buffer);
  void (*forward)(const Problem<T>&, const HeadView<T>&, const Rows&, T* buffer);
  void (*backward)(const Problem<T>&, const HeadView<T>&, const Rows&, T* buffer);
  // The two halves of `backward`, which threads can compute at the same time: the gradient of value, for some
  // of the channels, and all other gradients.
  void (*value_grads)(const Problem<T>&, const HeadView<T>&, const Rows&, const ChannelRange&, T* buffer);
  void (*sample_grads)(const Problem<T>&, const HeadView<T>&, const Rows&, T* buffer);
  // pack copies one head of value to contiguous [tokens, channels] of T; unpack copies the other way, to
  // grad_value.
  void (*pack)(const Problem<T>&, int64_t image, int64_t head, T* packed);
  void (*unpack)(const Problem<T>&, int64_t image, int64_t head, const T* packed);
};

struct KernelSet {
  const char* instruction_set;
  Kernels<float> float_;
  Kernels<double> double_;
};

// kernel_code.h is compiled once for each of these.
extern const KernelSet kernels_baseline;
#if defined(__x86_64__)
extern const KernelSet kernels_avx2;
extern const KernelSet kernels_avx512;
#endif

}  // namespace detrs::cpu
