// The CUDA kernels. README.md, "On the GPU", tells how they divide the work.
#pragma once

#include "../deform_attn.h"
#include "../geometry.h"
#include "storage.cuh"

namespace detrs::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kSamplesPerLane =
    2;  // of one pass: more fill registers and shared memory, which the L1 cache wants
constexpr unsigned kWarp = 0xffffffffu;

struct Level {
  int height, width, start;
};
constexpr int kParameterLevels = 16;  // this many levels travel with the call, more in device memory

// What a kernel is given.
template <class T>
struct Call {
  Problem<T> problem;
  int num_samples;
  uint32_t blocks_per_head;  // blocks that one head's queries take
  Level levels[kParameterLevels];
  const Level* more_levels;  // all levels, in device memory, if there are more than kParameterLevels
};

// A row belongs to kLanes neighbouring lanes of a warp; each has kVector channels of it.
template <int kLanes>
constexpr int kRows = kThreads / kLanes;  // rows of a block
template <int kLanes>
constexpr int kPass = kSamplesPerLane * kLanes;  // samples of a row that are worked on at a time

template <class Number>
struct alignas(16) Four {
  Number at[4];  // by corner
};

// Shared memory: what the lane that places a sample tells the others. The spare sample at the end puts rows
// into different banks.
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

extern __shared__ __align__(16) unsigned char shared_memory[];

// This thread's row, and its place among the row's lanes.
struct Row {
  int64_t image, query, number;
  int head, lane, slot;  // `slot` numbers the block's rows
  bool exists;  // the last block has rows to spare, which do what row `number` does but write nothing

  template <int kLanes, class T>
  static __device__ __forceinline__ Row of_thread(const Call<T>& call) {
    const Problem<T>& problem = call.problem;
    const uint32_t num_heads = static_cast<uint32_t>(problem.num_heads);
    const uint32_t block = blockIdx.x / num_heads;  // heads change fastest: fewer blocks meet in one pixel
    Row row;
    row.head = static_cast<int>(blockIdx.x % num_heads);
    row.lane = static_cast<int>(threadIdx.x % kLanes), row.slot = static_cast<int>(threadIdx.x / kLanes);
    row.image = block / call.blocks_per_head;
    row.query = static_cast<int64_t>(block % call.blocks_per_head) * kRows<kLanes> + row.slot;
    row.exists = row.query < problem.num_queries;
    if (!row.exists) row.query = problem.num_queries - 1;
    row.number = (row.image * problem.num_queries + row.query) * problem.num_heads + row.head;
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

// The fused form's weights.
template <class T>
struct Softmax {
  T largest, scale;

  template <int kLanes>
  static __device__ __forceinline__ Softmax of_row(const Call<T>& call, const Row& row) {
    const T* logits = call.problem.weights + row.number * call.num_samples;
    T largest = -static_cast<T>(INFINITY), sum = 0;
    for (int sample = row.lane; sample < call.num_samples; sample += kLanes) {
      const T logit = __ldg(logits + sample);
      largest = logit > largest ? logit : largest;
    }
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
      const T other = __shfl_xor_sync(kWarp, largest, distance);
      largest = other > largest ? other : largest;
    }
    for (int sample = row.lane; sample < call.num_samples; sample += kLanes)
      sum += exp(__ldg(logits + sample) - largest);
    return {largest, 1 / sum_over_lanes<kLanes>(sum)};
  }
  __device__ __forceinline__ T weight(T logit) const { return exp(logit - largest) * scale; }
};

// One sample, as the lane that places it sees it.
template <class T>
struct Sample {
  int64_t number;  // among all rows' samples
  int level_number;
  LevelSize<T, int> level;
  Corners<T, int> corners;
  T weight, scale_x, scale_y;  // fused: how far an offset of 1 moves the location
};

template <class T>
__device__ __forceinline__ LevelSize<T, int> level_size(const Call<T>& call, int number) {
  const Level level = call.more_levels == nullptr ? call.levels[number] : call.more_levels[number];
  return {static_cast<T>(level.width), static_cast<T>(level.height), level.width, level.height, level.start};
}

template <class T>
__device__ __forceinline__ Sample<T> place(const Call<T>& call, const Row& row, const Softmax<T>& softmax,
                                           int sample) {
  const Problem<T>& problem = call.problem;
  const int64_t number = row.number * call.num_samples + sample;
  const int level_number =
      static_cast<int>(static_cast<unsigned>(sample) / static_cast<unsigned>(problem.num_points));
  const LevelSize<T, int> level = level_size(call, level_number);
  const auto given = load_pair(problem.locations + 2 * number);
  const T weight = __ldg(problem.weights + number);
  if (problem.reference_size == 0)
    return {number, level_number, level, Corners<T, int>::at(given.x, given.y, level), weight, 0, 0};
  const int64_t query = row.image * problem.num_queries + row.query;
  const T* anchor = problem.reference + (query * problem.num_levels + level_number) * problem.reference_size;
  const bool box = problem.reference_size == 4;
  const T half_step = static_cast<T>(0.5) / static_cast<T>(problem.num_points);
  const T scale_x = box ? anchor[2] * half_step : 1 / level.width;
  const T scale_y = box ? anchor[3] * half_step : 1 / level.height;
  const T x = anchor[0] + given.x * scale_x, y = anchor[1] + given.y * scale_y;
  return {number,  level_number, level, Corners<T, int>::at(x, y, level), softmax.weight(weight),
          scale_x, scale_y};
}

// Tells the row's other lanes where to read. `weight` is the sample's, or 0 where nothing may be added.
template <class T, class Shared>
__device__ __forceinline__ void announce(const Sample<T>& sample, T weight, int slot, int at,
                                         Shared& shared) {
  const Corners<T, int>& corners = sample.corners;
  Four<int> tokens;
  Four<T> factors;
#pragma unroll
  for (int corner = 0; corner < 4; corner++) {
    tokens.at[corner] = corners.token[corner];
    factors.at[corner] = corners.share(corner) * weight;
  }
  shared.tokens[slot][at] = tokens, shared.factors[slot][at] = factors;
}

// This lane's channels of the row's head, at token 0, and how far apart tokens are.
template <class Stored>
struct Channels {
  char* first;
  uint32_t stride;  // bytes

  template <class T>
  __device__ __forceinline__ Channels(const void* tensor, const Problem<T>& problem, const Row& row,
                                      int channel)
      : stride(static_cast<uint32_t>(problem.num_heads * problem.num_channels * sizeof(Stored))) {
    first = static_cast<char*>(const_cast<void*>(tensor)) + row.image * problem.num_tokens * stride +
            (row.head * problem.num_channels + channel) * static_cast<int64_t>(sizeof(Stored));
  }
  __device__ __forceinline__ Stored* at(int token) const {
    return reinterpret_cast<Stored*>(first + static_cast<uint64_t>(static_cast<uint32_t>(token)) * stride);
  }
};

template <class Stored, int kVector, int kLanes>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(const __grid_constant__ Call<Arithmetic<Stored>> call) {
  using T = Arithmetic<Stored>;
  auto& shared = *reinterpret_cast<ForwardShared<T, kLanes>*>(shared_memory);
  const Problem<T>& problem = call.problem;
  const Row row = Row::of_thread<kLanes>(call);
  const bool has_channels = row.lane * kVector < problem.num_channels;
  const int channel =
      has_channels ? row.lane * kVector : 0;  // without channels of its own it reads the first
  const Channels<Stored> value(problem.value, problem, row, channel);
  Softmax<T> softmax = {};
  if (problem.reference_size != 0) softmax = Softmax<T>::template of_row<kLanes>(call, row);

  T sums[kVector] = {};
  for (int first = 0; first < call.num_samples; first += kPass<kLanes>) {
    const int count = min(kPass<kLanes>, call.num_samples - first);
    for (int at = row.lane; at < count; at += kLanes) {
      const Sample<T> sample = place(call, row, softmax, first + at);
      announce(sample, sample.weight, row.slot, at, shared);
    }
    __syncwarp();
#pragma unroll 2
    for (int at = 0; at < count; at++) {
      const Four<int> tokens = shared.tokens[row.slot][at];
      const Four<T> factors = shared.factors[row.slot][at];
#pragma unroll
      for (int corner = 0; corner < 4; corner++) {
        T numbers[kVector];
        load(value.at(tokens.at[corner]), numbers);
#pragma unroll
        for (int i = 0; i < kVector; i++) sums[i] += factors.at[corner] * numbers[i];
      }
    }
    __syncwarp();  // before the next pass writes there
  }
  if (row.exists && has_channels)
    store(sums, static_cast<Stored*>(problem.out) + row.number * problem.num_channels + channel);
}

// Sums each corner's numbers over the row's lanes; lane i gets corner i % 4.
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

// grad_reference of this row += what `shared.dots` holds of each sample. One lane does one level, always the
// same, so that the sum has an order and needs no atomics.
template <int kLanes, class T, class Shared>
__device__ __forceinline__ void add_reference_grads(const Call<T>& call, const Row& row, int first, int count,
                                                    const Shared& shared) {
  const Problem<T>& problem = call.problem;
  const int num_points = static_cast<int>(problem.num_points);
  for (int level = row.lane; level < problem.num_levels; level += kLanes) {
    const int begin = max(level * num_points - first, 0), end = min((level + 1) * num_points - first, count);
    if (begin >= end || !row.exists) continue;
    T* grad = problem.grad_reference + (row.number * problem.num_levels + level) * problem.reference_size;
    for (int at = begin; at < end; at++) {
#pragma unroll
      for (int i = 0; i < 4; i++)
        if (i < problem.reference_size) grad[i] += shared.dots[row.slot][at].at[i];
    }
  }
}

// A sample's gradients from its dots. Returns the weight's, for the softmax.
template <class T, class Shared>
__device__ __forceinline__ T store_sample_grads(const Call<T>& call, const Row& row, const Sample<T>& sample,
                                                int at, Shared& shared) {
  const Problem<T>& problem = call.problem;
  const Four<T> dots = shared.dots[row.slot][at];
  SampleGrads<T> grads = differentiate(sample.corners, dots.at, sample.weight, sample.level);
  if (problem.grad_reference != nullptr) {
    const auto offset = load_pair(problem.locations + 2 * sample.number);
    const T half_step = static_cast<T>(0.5) / static_cast<T>(problem.num_points);
    shared.dots[row.slot][at] = {
        {grads.x, grads.y, grads.x * offset.x * half_step, grads.y * offset.y * half_step}};
  }
  if (problem.reference_size != 0) grads.x *= sample.scale_x, grads.y *= sample.scale_y;
  if (row.exists) {
    store_pair(grads.x, grads.y, problem.grad_locations + 2 * sample.number);
    problem.grad_weights[sample.number] = grads.weight;
  }
  return grads.weight;
}

// Fused, when a row is finished: from the weights' gradients to the logits'. `dot` is weights . their
// gradients.
template <int kLanes, class T>
__device__ __forceinline__ void store_logit_grads(const Call<T>& call, const Row& row,
                                                  const Softmax<T>& softmax, T dot) {
  const T mean = sum_over_lanes<kLanes>(dot);
  const int64_t first = row.number * call.num_samples;
  for (int sample = row.lane; sample < call.num_samples && row.exists; sample += kLanes) {
    const T weight = softmax.weight(__ldg(call.problem.weights + first + sample));
    T* grad = call.problem.grad_weights + first + sample;  // which this lane wrote itself
    *grad = weight * (*grad - mean);
  }
}

template <class Stored, int kVector, int kLanes>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(const __grid_constant__ Call<Arithmetic<Stored>> call) {
  using T = Arithmetic<Stored>;
  auto& shared = *reinterpret_cast<BackwardShared<T, kLanes>*>(shared_memory);
  const Problem<T>& problem = call.problem;
  const Row row = Row::of_thread<kLanes>(call);
  const bool has_channels = row.lane * kVector < problem.num_channels;
  const int channel = has_channels ? row.lane * kVector : 0;
  const Channels<Stored> value(problem.value, problem, row, channel);
  const Channels<T> grad_value(problem.grad_value, problem, row, channel);
  Softmax<T> softmax = {};
  if (problem.reference_size != 0) softmax = Softmax<T>::template of_row<kLanes>(call, row);

  T grad_out[kVector], weight_dot = 0;
  load(static_cast<const Stored*>(problem.grad_out) + row.number * problem.num_channels + channel, grad_out);
  for (int first = 0; first < call.num_samples; first += kPass<kLanes>) {
    const int count = min(kPass<kLanes>, call.num_samples - first);
    for (int at = row.lane; at < count; at += kLanes) {
      const Sample<T> sample = place(call, row, softmax, first + at);
      announce(sample, row.exists ? sample.weight : 0, row.slot, at, shared);
    }
    __syncwarp();
    for (int at = 0; at < count; at++) {
      const Four<int> tokens = shared.tokens[row.slot][at];
      const Four<T> factors = shared.factors[row.slot][at];
      T dots[4];
#pragma unroll
      for (int corner = 0; corner < 4; corner++) {
        T numbers[kVector], dot = 0;
        load(value.at(tokens.at[corner]), numbers);
#pragma unroll
        for (int i = 0; i < kVector; i++) dot += grad_out[i] * numbers[i];
        dots[corner] = has_channels ? dot : 0;
        if (has_channels && factors.at[corner] != 0)
          add(factors.at[corner], grad_out, grad_value.at(tokens.at[corner]));
      }
      const T dot = sum_corners<kLanes>(dots, row.lane);
      if (row.lane < 4) shared.dots[row.slot][at].at[row.lane] = dot;
    }
    __syncwarp();
    for (int at = row.lane; at < count; at += kLanes) {  // placed again: to keep it would cost registers
      const Sample<T> sample = place(call, row, softmax, first + at);
      weight_dot += sample.weight * store_sample_grads(call, row, sample, at, shared);
    }
    __syncwarp();
    if (problem.grad_reference != nullptr) {
      add_reference_grads<kLanes>(call, row, first, count, shared);
      __syncwarp();
    }
  }
  if (problem.reference_size != 0) store_logit_grads<kLanes>(call, row, softmax, weight_dot);
}

}  // namespace
}  // namespace detrs::cuda
