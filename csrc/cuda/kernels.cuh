// The CUDA kernels. README.md, "On the GPU", describes how they divide the work.
#pragma once

#include "../deform_attn.h"
#include "../geometry.h"
#include "deform_attn.h"
#include "storage.cuh"

namespace detrs::cuda {
namespace {

constexpr int kThreads = 128;
// Blocks that a multiprocessor must be able to hold at once. This limits registers to 128, 80 and 64 per
// thread.
template <class T, int kVector>
constexpr int kBlocks = sizeof(T) == 8 ? 4
                        : kVector == 8 ? 6
                                       : 8;
// Samples that a lane loads per pass. More would take registers, and shared memory that is part of the L1
// cache.
constexpr int kSamplesPerLane = 2;
constexpr unsigned kWarp = 0xffffffffu;

template <class T>
struct Level {
  int height, width, start;
  T pixel_height, pixel_width;  // 1 / height and 1 / width
};

// Parameters of a kernel: the problem, and numbers that the host computes once. The kernels would otherwise
// compute them in every thread, or in loops.
template <class T>
struct Call {
  Problem<T> problem;
  int num_samples, num_points;
  uint32_t blocks_per_head;  // blocks for the queries of one head and image
  uint32_t token_stride;     // elements from one token to the next
  int64_t image_stride;      // elements from one image to the next
  T half_step;               // fused, boxes: 1 / 2 / num_points
  Level<T> levels[kMaxLevels];
};

// A row belongs to kLanes neighboring lanes of a warp; each lane has kVector of its channels.
template <int kLanes>
constexpr int kRows = kThreads / kLanes;  // rows per block
// Samples of a row per pass. Every pass starts at a multiple of kLanes, so that sample i always belongs to
// lane i % kLanes, as in the loops over a complete row: store_logit_grads reads without a barrier what its
// lane wrote.
template <int kLanes>
constexpr int kPass = kSamplesPerLane * kLanes;

template <class Number>
struct alignas(16) Four {
  Number at[4];  // by corner
};

// Shared memory: the lane that loads a sample passes tokens and factors of its corners to the other lanes of
// the row. The extra sample at the end shifts rows to different banks.
template <class T, int kLanes>
struct ForwardShared {
  Four<int> tokens[kRows<kLanes>][kPass<kLanes> + 1];
  Four<T> factors[kRows<kLanes>][kPass<kLanes> + 1];
};
template <class T, int kLanes>
struct BackwardShared : ForwardShared<T, kLanes> {
  Four<T> dots[kRows<kLanes>]
              [kPass<kLanes> + 1];  // grad_out . value at each corner; then gradients of reference
};

// Dynamic, although each kernel needs a constant size, so that tests/detrs/ops/emulation can define the
// array, fill it with NaN and guard its end. Bytes, because all kernels declare the same one.
extern __shared__ __align__(16) unsigned char shared_memory[];

// The row of this thread, and the index of the thread among the lanes of the row.
struct Row {
  int64_t image, query, index;  // query and index count through all images
  int head, lane, slot;         // `slot` numbers the block's rows
  // False for surplus rows of the last block. They must not return early, because all lanes of a warp have to
  // reach its barriers and shuffles: they compute the same as row `index`, and write nothing.
  bool exists;

  template <int kLanes, class T>
  static __device__ __forceinline__ Row of_thread(const Call<T>& call) {
    const Problem<T>& problem = call.problem;
    const uint32_t num_heads = static_cast<uint32_t>(problem.num_heads);
    // Heads change fastest: concurrent blocks then rarely add to the same memory.
    const uint32_t block = blockIdx.x / num_heads;
    Row row;
    row.head = static_cast<int>(blockIdx.x % num_heads);
    row.lane = static_cast<int>(threadIdx.x % kLanes), row.slot = static_cast<int>(threadIdx.x / kLanes);
    row.image = block / call.blocks_per_head;
    int64_t query = static_cast<int64_t>(block % call.blocks_per_head) * kRows<kLanes> + row.slot;
    row.exists = query < problem.num_queries;
    if (!row.exists) query = problem.num_queries - 1;
    row.query = row.image * problem.num_queries + query;
    row.index = row.query * problem.num_heads + row.head;
    return row;
  }
};

template <int kLanes, class T>
__device__ __forceinline__ T sum_over_lanes(T number) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2)
    number += __shfl_xor_sync(kWarp, number, distance);
  return number;
}

// Computes the weights of the fused form.
template <class T>
struct Softmax {
  T largest, scale;

  template <int kLanes>
  static __device__ __forceinline__ Softmax of_row(const Call<T>& call, const Row& row) {
    const T* logits = call.problem.weights + row.index * call.num_samples;
    T largest = -static_cast<T>(INFINITY), sum = 0;
#pragma unroll 2
    for (int sample = row.lane; sample < call.num_samples; sample += kLanes) {
      const T logit = __ldg(logits + sample);
      largest = logit > largest ? logit : largest;
    }
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
      const T other = __shfl_xor_sync(kWarp, largest, distance);
      largest = other > largest ? other : largest;
    }
#pragma unroll 2
    for (int sample = row.lane; sample < call.num_samples; sample += kLanes)
      sum += exp(__ldg(logits + sample) - largest);
    return {largest, 1 / sum_over_lanes<kLanes>(sum)};
  }
  __device__ __forceinline__ T weight(T logit) const { return exp(logit - largest) * scale; }
};

// One sample, in the lane that loads it.
template <class T>
struct Sample {
  int64_t index;  // among the samples of all rows
  LevelSize<T, int> level;
  Corners<T, int> corners;
  T weight, scale_x, scale_y;  // fused: how far an offset of 1 moves the location
};

template <class T>
__device__ __forceinline__ Sample<T> load_sample(const Call<T>& call, const Row& row,
                                                 const Softmax<T>& softmax, int at) {
  const Problem<T>& problem = call.problem;
  Sample<T> sample;
  const int level_index =
      static_cast<int>(static_cast<unsigned>(at) / static_cast<unsigned>(call.num_points));
  const Level<T> level = call.levels[level_index];
  sample.level = {static_cast<T>(level.width), static_cast<T>(level.height), level.width, level.height,
                  level.start};
  // Here, and not above, so that backward_kernel does not spill
  sample.index = row.index * call.num_samples + at;
  const auto given = load_pair(problem.locations + 2 * sample.index);
  sample.weight = __ldg(problem.weights + sample.index);
  T x = given.x, y = given.y;
  if (problem.reference_size != 0) {
    const T* reference =
        problem.reference + (row.query * problem.num_levels + level_index) * problem.reference_size;
    const bool box = problem.reference_size == 4;
    sample.scale_x = box ? reference[2] * call.half_step : level.pixel_width;
    sample.scale_y = box ? reference[3] * call.half_step : level.pixel_height;
    x = reference[0] + x * sample.scale_x, y = reference[1] + y * sample.scale_y;
    sample.weight = softmax.weight(sample.weight);
  }
  sample.corners = Corners<T, int>::at(x, y, sample.level);
  return sample;
}

// Passes the corners of a sample to the other lanes of the row. `weight` is that of the sample, or 0 if the
// row must add nothing. With kMarkOutside, the token of a corner outside the level becomes -1; not that of a
// NaN weight, which counts everywhere.
template <bool kMarkOutside, class T, class Shared>
__device__ __forceinline__ void store_corners(const Sample<T>& sample, T weight, int slot, int at,
                                              Shared& shared) {
  const Corners<T, int>& corners = sample.corners;
  Four<int> tokens;
  Four<T> factors;
#pragma unroll
  for (int corner = 0; corner < 4; corner++) {
    tokens.at[corner] = corners.token[corner];
    factors.at[corner] = corners.bilinear_factor(corner) * weight;
    if (kMarkOutside && !corners.inside(corner) && factors.at[corner] == 0) tokens.at[corner] = -1;
  }
  shared.tokens[slot][at] = tokens, shared.factors[slot][at] = factors;
}

// The channels of this lane, at token 0, and the distance between tokens.
template <class Stored>
struct Channels {
  char* first;
  uint32_t stride;  // bytes

  template <class T>
  __device__ __forceinline__ Channels(const void* tensor, const Call<T>& call, const Row& row, int channel)
      : stride(call.token_stride * static_cast<uint32_t>(sizeof(Stored))) {
    const int64_t head = row.head * call.problem.num_channels;
    Stored* numbers = static_cast<Stored*>(const_cast<void*>(tensor));
    first = reinterpret_cast<char*>(numbers + row.image * call.image_stride + head + channel);
  }
  __device__ __forceinline__ Stored* at(int token) const {
    return reinterpret_cast<Stored*>(first + static_cast<uint64_t>(static_cast<uint32_t>(token)) * stride);
  }
};

// Sums the samples of a row, for the channels of this lane. Corners outside the level have factor 0. Their
// token is another one: what is read there does not count, unless it is NaN or infinite and kSkipOutside is
// false.
template <bool kSkipOutside, int kLanes, int kVector, class Stored, class T, class Shared>
__device__ __forceinline__ void sum_samples(const Call<T>& call, const Row& row, const Softmax<T>& softmax,
                                            const Channels<Stored>& value, Shared& shared,
                                            T (&sums)[kVector]) {
#pragma unroll
  for (int i = 0; i < kVector; i++) sums[i] = 0;
  for (int first = 0; first < call.num_samples; first += kPass<kLanes>) {
    const int count = min(kPass<kLanes>, call.num_samples - first);
#pragma unroll 1
    for (int at = row.lane; at < count; at += kLanes) {
      const Sample<T> sample = load_sample(call, row, softmax, first + at);
      store_corners<kSkipOutside>(sample, sample.weight, row.slot, at, shared);
    }
    __syncwarp();  // all samples are in shared memory
#pragma unroll(kSkipOutside ? 1 : 2)
    for (int at = 0; at < count; at++) {
      const Four<int> tokens = shared.tokens[row.slot][at];
      const Four<T> factors = shared.factors[row.slot][at];
#pragma unroll
      for (int corner = 0; corner < 4; corner++) {
        if (kSkipOutside && tokens.at[corner] < 0) continue;
        T numbers[kVector];
        load(value.at(tokens.at[corner]), numbers);
#pragma unroll
        for (int i = 0; i < kVector; i++) sums[i] += factors.at[corner] * numbers[i];
      }
    }
    __syncwarp();  // all lanes have read them: the next pass may overwrite
  }
}

template <class Stored, int kVector, int kLanes>
__global__ void __launch_bounds__(kThreads, kBlocks<Arithmetic<Stored>, kVector>)
    forward_kernel(const __grid_constant__ Call<Arithmetic<Stored>> call) {
  using T = Arithmetic<Stored>;
  auto& shared = *reinterpret_cast<ForwardShared<T, kLanes>*>(shared_memory);
  const Problem<T>& problem = call.problem;
  const Row row = Row::of_thread<kLanes>(call);
  const bool has_channels = row.lane * kVector < problem.num_channels;
  const int channel = has_channels ? row.lane * kVector : 0;  // a lane without channels reads the first ones
  const Channels<Stored> value(problem.value, call, row, channel);
  Softmax<T> softmax = {};
  if (problem.reference_size != 0) softmax = Softmax<T>::template of_row<kLanes>(call, row);

  T sums[kVector];
  sum_samples<false, kLanes>(call, row, softmax, value, shared, sums);
  bool is_nan = false;  // as it is after 0 times NaN or infinity
#pragma unroll
  for (int i = 0; i < kVector; i++) is_nan = is_nan || sums[i] != sums[i];
  if (__any_sync(kWarp, is_nan)) sum_samples<true, kLanes>(call, row, softmax, value, shared, sums);
  if (row.exists && has_channels)
    store(sums, static_cast<Stored*>(problem.out) + row.index * problem.num_channels + channel);
}

// Sums the numbers of each corner over the lanes of the row; lane i gets corner i % 4. With 8 lanes
// this takes 4 shuffles, instead of 12 for four separate sums.
template <int kLanes, class T>
__device__ __forceinline__ T sum_corners(const T (&corner)[4], int lane) {
  const bool upper = lane & 2, odd = lane & 1;
  const T even_sum =
      (upper ? corner[2] : corner[0]) + __shfl_xor_sync(kWarp, upper ? corner[0] : corner[2], 2);
  const T odd_sum =
      (upper ? corner[3] : corner[1]) + __shfl_xor_sync(kWarp, upper ? corner[1] : corner[3], 2);
  T sum = (odd ? odd_sum : even_sum) + __shfl_xor_sync(kWarp, odd ? even_sum : odd_sum, 1);
#pragma unroll
  for (int distance = 4; distance < kLanes; distance *= 2) sum += __shfl_xor_sync(kWarp, sum, distance);
  return sum;
}

// Adds the gradients in `shared.dots` to grad_reference of this row. A level always belongs to the same lane,
// so that the sum has a fixed order and needs no atomics.
template <int kLanes, class T, class Shared>
__device__ __forceinline__ void add_reference_grads(const Call<T>& call, const Row& row, int first, int count,
                                                    const Shared& shared) {
  const Problem<T>& problem = call.problem;
#pragma unroll 1
  for (int level = row.lane; level < problem.num_levels; level += kLanes) {
    const int begin = max(level * call.num_points - first, 0),
              end = min((level + 1) * call.num_points - first, count);
    if (begin >= end || !row.exists) continue;
    Four<T> sum = {};
#pragma unroll 1
    for (int at = begin; at < end; at++) {
      const Four<T> grads = shared.dots[row.slot][at];
#pragma unroll
      for (int i = 0; i < 4; i++) sum.at[i] += grads.at[i];
    }
    T* grad = problem.grad_reference + (row.index * problem.num_levels + level) * problem.reference_size;
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (i < problem.reference_size) grad[i] += sum.at[i];
  }
}

// Computes and stores the gradients of a sample from its dots. Returns that of the weight, for the softmax.
template <class T, class Shared>
__device__ __forceinline__ T store_sample_grads(const Call<T>& call, const Row& row, const Sample<T>& sample,
                                                int at, Shared& shared) {
  const Problem<T>& problem = call.problem;
  const Four<T> dots = shared.dots[row.slot][at];
  SampleGrads<T> grads = differentiate(sample.corners, dots.at, sample.weight, sample.level);
  if (problem.grad_reference != nullptr) {
    const auto offset = load_pair(problem.locations + 2 * sample.index);
    shared.dots[row.slot][at] = {
        {grads.x, grads.y, grads.x * offset.x * call.half_step, grads.y * offset.y * call.half_step}};
  }
  if (problem.reference_size != 0) grads.x *= sample.scale_x, grads.y *= sample.scale_y;
  if (row.exists) {
    store_pair(grads.x, grads.y, problem.grad_locations + 2 * sample.index);
    problem.grad_weights[sample.index] = grads.weight;
  }
  return grads.weight;
}

// Fused, at the end of a row: computes the gradients of the logits from those of the weights. `dot` is the
// part of this lane of weights . their gradients.
template <int kLanes, class T>
__device__ __forceinline__ void store_logit_grads(const Call<T>& call, const Row& row,
                                                  const Softmax<T>& softmax, T dot) {
  const T mean = sum_over_lanes<kLanes>(dot);
  const int64_t first = row.index * call.num_samples;
#pragma unroll 1
  for (int sample = row.lane; sample < call.num_samples && row.exists; sample += kLanes) {
    const T weight = softmax.weight(__ldg(call.problem.weights + first + sample));
    T* grad = call.problem.grad_weights + first + sample;  // written by this lane, see kPass
    *grad = weight * (*grad - mean);
  }
}

template <class Stored, int kVector, int kLanes>
__global__ void __launch_bounds__(kThreads, kBlocks<Arithmetic<Stored>, kVector>)
    backward_kernel(const __grid_constant__ Call<Arithmetic<Stored>> call) {
  using T = Arithmetic<Stored>;
  auto& shared = *reinterpret_cast<BackwardShared<T, kLanes>*>(shared_memory);
  const Problem<T>& problem = call.problem;
  const Row row = Row::of_thread<kLanes>(call);
  const bool has_channels = row.lane * kVector < problem.num_channels;
  const int channel = has_channels ? row.lane * kVector : 0;
  const Channels<Stored> value(problem.value, call, row, channel);
  const Channels<T> grad_value(problem.grad_value, call, row, channel);
  Softmax<T> softmax = {};
  if (problem.reference_size != 0) softmax = Softmax<T>::template of_row<kLanes>(call, row);

  T grad_out[kVector], weight_dot = 0;
  load(static_cast<const Stored*>(problem.grad_out) + row.index * problem.num_channels + channel, grad_out);
  for (int first = 0; first < call.num_samples; first += kPass<kLanes>) {
    const int count = min(kPass<kLanes>, call.num_samples - first);
#pragma unroll 1
    for (int at = row.lane; at < count; at += kLanes) {
      const Sample<T> sample = load_sample(call, row, softmax, first + at);
      store_corners<false>(sample, row.exists ? sample.weight : 0, row.slot, at, shared);
    }
    __syncwarp();  // all samples are in shared memory
    for (int at = 0; at < count; at++) {
      const Four<int> tokens = shared.tokens[row.slot][at];
      const Four<T> factors = shared.factors[row.slot][at];
      T numbers[4][kVector], dots[4];
#pragma unroll
      for (int corner = 0; corner < 4; corner++) load(value.at(tokens.at[corner]), numbers[corner]);
      // While the loads are in flight. A factor of 0 is skipped: it belongs to a corner outside the level or
      // to a row that does not exist, and an addition of zeros takes as long as any other. Corners outside
      // are clamped to few tokens, where these additions would wait for each other. NaN is not 0, and is
      // added.
#pragma unroll
      for (int corner = 0; corner < 4; corner++) {
        if (has_channels && factors.at[corner] != 0)
          add(factors.at[corner], grad_out, grad_value.at(tokens.at[corner]));
      }
#pragma unroll
      for (int corner = 0; corner < 4; corner++) {
        T dot = 0;
#pragma unroll
        for (int i = 0; i < kVector; i++) dot += grad_out[i] * numbers[corner][i];
        dots[corner] = has_channels ? dot : 0;
      }
      const T dot = sum_corners<kLanes>(dots, row.lane);
      if (row.lane < 4) shared.dots[row.slot][at].at[row.lane] = dot;
    }
    __syncwarp();  // all dots are in shared memory
#pragma unroll 1
    for (int at = row.lane; at < count; at += kLanes) {
      // Loading it again is cheaper than keeping it in registers.
      const Sample<T> sample = load_sample(call, row, softmax, first + at);
      weight_dot += sample.weight * store_sample_grads(call, row, sample, at, shared);
    }
    if (problem.grad_reference != nullptr) {
      __syncwarp();  // gradients have replaced the dots
      add_reference_grads<kLanes>(call, row, first, count, shared);
    }
    // No barrier here: the next pass writes dots only after its first __syncwarp.
  }
  if (problem.reference_size != 0) store_logit_grads<kLanes>(call, row, softmax, weight_dot);
}

}  // namespace
}  // namespace detrs::cuda
