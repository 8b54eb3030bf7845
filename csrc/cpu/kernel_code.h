// The CPU kernels. Each kernels_<instruction set>.cpp includes this file with
//   DETRS_KERNELS       the KernelSet to define      DETRS_VECTOR_BYTES  the width of its vectors
//   DETRS_NAME          its name
#include "../geometry.h"
#include "kernels.h"
#include "simd.h"
#include "storage.h"

namespace detrs::cpu {
namespace {

// Samples of a row are processed in blocks of at most this many, with one array per quantity: a block stays
// in the L1 cache.
constexpr int64_t kBlock = 32;

// For the loops over rows: whatever they call is inlined, and not only what the compiler takes for worth it.
// Out of line, the vectors of a sample would go through memory, which costs a quarter of the time.
#define DETRS_FLAT inline __attribute__((flatten))

// One number per sample, for as many samples as a vector holds.
template <class T>
using Numbers = typename Simd<T, lanes_of<T>()>::Vector;
template <class T>
using Indices = typename Simd<Index<T>, lanes_of<T>()>::Vector;

// Level of each sample of a block, and its size. The same for all rows: computed once per call.
template <class T>
struct alignas(64) BlockLevels {
  LevelSize<Numbers<T>, Indices<T>> size[kBlock / lanes_of<T>()];
  Index<T> level[kBlock];
};

// One block of one row. The last vector may have lanes without a sample.
template <class T>
struct alignas(64) Block {
  int64_t count;
  T x[kBlock], y[kBlock], weight[kBlock];  // location, attention weight
  T scale_x[kBlock], scale_y[kBlock];      // fused: how far an offset of 1 moves the location
  Index<T> token[4][kBlock];               // of each corner, clamped into the level
  T factor[4][kBlock];                     // of each corner: bilinear factor times attention weight
  // For the backward pass
  T partial[4 * kBlock * lanes_of<T>()];  // dot, before the lanes of each vector are summed
  T dot[4][kBlock];                       // grad_out . value at the corner
};

// The number of samples of a row, rounded up to complete blocks.
template <class T>
int64_t padded_samples(const Problem<T>& problem) {
  return (problem.num_samples() + kBlock - 1) / kBlock * kBlock;
}

// The scratch buffer of a thread.
template <class T>
struct Scratch {
  BlockLevels<T>* levels;  // [blocks]
  T* weights;              // fused: one row's weights
  T* locations_copy;       // of the last rows of the tensor; see row_inputs
  T* weights_copy;
  T* channels;  // one row of out or grad_out, as T

  static int64_t levels_size(const Problem<T>& problem) {
    return padded_samples(problem) / kBlock * int64_t(sizeof(BlockLevels<T>) / sizeof(T));
  }
  Scratch(const Problem<T>& problem, T* buffer)
      : levels(reinterpret_cast<BlockLevels<T>*>(buffer)),
        weights(buffer + levels_size(problem)),
        locations_copy(weights + padded_samples(problem)),
        weights_copy(locations_copy + 2 * padded_samples(problem)),
        channels(weights_copy + padded_samples(problem)) {}
};

template <class T>
int64_t scratch_size(const Problem<T>& problem) {
  return Scratch<T>::levels_size(problem) + 4 * padded_samples(problem) + problem.num_channels;
}

template <class T>
void prepare_scratch(const Problem<T>& problem, T* buffer) {
  const Scratch<T> scratch(problem, buffer);
  const int64_t end = scratch_size(problem);
  // Copied rows do not fill their last vector: the rest must be zeros, not uninitialized memory.
  for (int64_t at = Scratch<T>::levels_size(problem); at < end; at++) buffer[at] = 0;
  int64_t start = 0;
  for (int64_t sample = 0; sample < padded_samples(problem); sample++) {
    bool real = sample < problem.num_samples();
    int64_t level = real ? sample / problem.num_points : 0;
    const int64_t* shape = problem.shapes + 2 * level;
    BlockLevels<T>& levels = scratch.levels[sample / kBlock];
    int64_t at = sample % kBlock, lane = at % lanes_of<T>();
    auto& size = levels.size[at / lanes_of<T>()];
    size.height[lane] = T(size.height_index[lane] = Index<T>(shape[0]));
    size.width[lane] = T(size.width_index[lane] = Index<T>(shape[1]));
    size.start[lane] = Index<T>(real ? start : 0);
    levels.level[at] = Index<T>(level);
    if ((sample + 1) % problem.num_points == 0) start += shape[0] * shape[1];
  }
}

template <class T>
inline int64_t row_index(const Problem<T>& problem, const Rows& rows, int64_t query) {
  return (rows.image * problem.num_queries + query) * problem.num_heads + rows.head;
}

// Prefetches the row of a tensor that this head uses four queries later. Consecutive rows of a head are
// num_heads rows apart, which the hardware prefetcher does not predict. A prefetch past the end of the tensor
// is harmless.
template <class T>
inline void prefetch_ahead(const Problem<T>& problem, const void* tensor, int64_t row, int64_t row_bytes) {
  const char* ahead = static_cast<const char*>(tensor) + (row + 4 * problem.num_heads) * row_bytes;
  for (int64_t at = 0; at < row_bytes; at += 64) __builtin_prefetch(ahead + at);
}

// Locations and weights of a row; offsets and logits in the fused form.
template <class T>
struct RowInputs {
  const T *locations, *weights;
};

// They are read in complete vectors, beyond the end of the row. Only the last rows of the tensors have
// nothing behind them: those are copied to the scratch buffer first.
template <class T>
inline RowInputs<T> row_inputs(const Problem<T>& problem, int64_t row, const Scratch<T>& scratch) {
  const int64_t count = problem.num_samples();
  const int64_t num_rows = problem.num_images * problem.num_queries * problem.num_heads;
  const RowInputs<T> inputs{problem.locations + 2 * row * count, problem.weights + row * count};
  prefetch_ahead(problem, problem.locations, row, 2 * count * sizeof(T));
  prefetch_ahead(problem, problem.weights, row, count * sizeof(T));
  if ((num_rows - row) * count >= padded_samples(problem)) return inputs;
  for (int64_t at = 0; at < 2 * count; at++) scratch.locations_copy[at] = inputs.locations[at];
  for (int64_t at = 0; at < count; at++) scratch.weights_copy[at] = inputs.weights[at];
  return {scratch.locations_copy, scratch.weights_copy};
}

// scratch.weights = softmax of the logits of the row.
template <class T>
inline void softmax_row(const T* logits, int64_t count, const Scratch<T>& scratch) {
  constexpr int kLanes = lanes_of<T>();
  const Numbers<T> zero = {};
  Indices<T> lane_indices;
  for (int lane = 0; lane < kLanes; lane++) lane_indices[lane] = lane;
  auto keep = [&](int64_t at, Numbers<T> numbers,
                  Numbers<T> other) {  // `other` in lanes past the end of the row
    return lane_indices < Index<T>(count - at) ? numbers : other;
  };
  Numbers<T> largest = zero + logits[0], sum = {};
  for (int64_t at = 0; at < count; at += kLanes) {
    Numbers<T> next = keep(at, load<kLanes>(logits + at), largest);
    largest = next > largest ? next : largest;
  }
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int lane = 0; lane < half; lane++)
      largest[lane] = largest[lane + half] > largest[lane] ? largest[lane + half] : largest[lane];
  for (int64_t at = 0; at < count; at += kLanes) {
    Numbers<T> power = exp_negative(load<kLanes>(logits + at) - largest[0], T(), Indices<T>());
    power = keep(at, power, zero);
    store<kLanes>(scratch.weights + at, power);
    sum += power;
  }
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int lane = 0; lane < half; lane++) sum[lane] += sum[lane + half];
  const T scale = 1 / sum[0];
  for (int64_t at = 0; at < count; at += kLanes)
    store<kLanes>(scratch.weights + at, load<kLanes>(scratch.weights + at) * scale);
}

// Loads x, y and weight of a block. The compiler turns loops over a constant number of lanes into vector
// instructions.
template <class T>
inline void load_samples(const T* __restrict locations, const T* __restrict weights, Block<T>& block) {
  constexpr int kLanes = lanes_of<T>();
  for (int64_t at = 0; at < block.count; at += kLanes) {
    store<kLanes>(block.weight + at, load<kLanes>(weights + at));
    for (int lane = 0; lane < kLanes; lane++) {
      block.x[at + lane] = locations[2 * (at + lane)];
      block.y[at + lane] = locations[2 * (at + lane) + 1];
    }
  }
}

template <class T>
inline const T* row_reference(const Problem<T>& problem, int64_t row) {
  return problem.reference + row / problem.num_heads * problem.num_levels * problem.reference_size;
}

// Fused: replaces the offsets, which load_samples has put into x and y, by locations.
template <class T>
inline void compute_locations(const Problem<T>& problem, const T* reference, const BlockLevels<T>& levels,
                              Block<T>& block) {
  constexpr int kLanes = lanes_of<T>();
  const int64_t size = problem.reference_size;
  const T half_step = T(0.5) / T(problem.num_points);
  for (int64_t at = 0; at < block.count; at += kLanes) {
    auto of_level = [&](int64_t coordinate) {
      Numbers<T> numbers;
      for (int lane = 0; lane < kLanes; lane++)
        numbers[lane] = reference[levels.level[at + lane] * size + coordinate];
      return numbers;
    };
    Numbers<T> scale_x = 1 / levels.size[at / kLanes].width, scale_y = 1 / levels.size[at / kLanes].height;
    if (size == 4) scale_x = of_level(2) * half_step, scale_y = of_level(3) * half_step;
    store<kLanes>(block.scale_x + at, scale_x);
    store<kLanes>(block.scale_y + at, scale_y);
    store<kLanes>(block.x + at, of_level(0) + load<kLanes>(block.x + at) * scale_x);
    store<kLanes>(block.y + at, of_level(1) + load<kLanes>(block.y + at) * scale_y);
  }
}

// The samples of a row that are in a block.
struct SampleRange {
  int64_t row, first, count;
};

// Returns the corners of a vector of samples, starting with sample `at`.
template <class T>
inline auto corners_of(const BlockLevels<T>& levels, const Block<T>& block, int64_t at) {
  constexpr int kLanes = lanes_of<T>();
  return Corners<Numbers<T>, Indices<T>>::at(load<kLanes>(block.x + at), load<kLanes>(block.y + at),
                                             levels.size[at / kLanes]);
}

// Computes tokens and factors of the corners.
template <class T>
inline void compute_corners(const BlockLevels<T>& levels, Block<T>& block) {
  constexpr int kLanes = lanes_of<T>();
  for (int64_t at = 0; at < block.count; at += kLanes) {
    const auto corners = corners_of(levels, block, at);
    const Numbers<T> weight = load<kLanes>(block.weight + at);
    for (int corner = 0; corner < 4; corner++) {
      store<kLanes>(block.token[corner] + at, corners.token[corner]);
      store<kLanes>(block.factor[corner] + at, weight * corners.bilinear_factor(corner));
    }
  }
}

template <int N>
struct Width {};

// Splits channels into runs of 32, 16, 8, 4 and 1 and calls use(Width<N>, first channel) for each.
template <class Use>
inline void for_channel_runs(const ChannelRange& channels, const Use& use) {
  int64_t first = channels.first;
  for (; first + 32 <= channels.last; first += 32) use(Width<32>(), first);
  for (; first + 16 <= channels.last; first += 16) use(Width<16>(), first);
  for (; first + 8 <= channels.last; first += 8) use(Width<8>(), first);
  for (; first + 4 <= channels.last; first += 4) use(Width<4>(), first);
  for (; first < channels.last; first++) use(Width<1>(), first);
}

// Tells whether all of the numbers that were added are finite. Every row is checked, so adding must be fast:
// vectors, and no branch.
template <class T>
struct FiniteCheck {
  Indices<T> others = {};  // not 0 in the lanes that had NaN or infinity
  bool has_other = false;  // among the numbers beyond the last complete vector

  void add(const T* numbers, int64_t count) {
    constexpr int kLanes = lanes_of<T>();
    int64_t at = 0;
    for (; at + kLanes <= count; at += kLanes) {
      const Numbers<T> loaded = load<kLanes>(numbers + at);
      others |= loaded - loaded != 0;  // NaN or infinity minus itself is NaN
    }
    for (; at < count; at++) has_other |= numbers[at] - numbers[at] != 0;
  }
  bool all_finite() const {
    uint64_t words[sizeof(others) / sizeof(uint64_t)], any = has_other;
    __builtin_memcpy(words, &others, sizeof(others));
    for (uint64_t word : words) any |= word;
    return any == 0;
  }
};

template <class T>
inline bool all_finite(const T* numbers, int64_t count) {
  FiniteCheck<T> check;
  check.add(numbers, count);
  return check.all_finite();
}

// Calls use(sample, corner) for the corners of a block that count: all except those outside the level, where
// the token is another one. The kernels read that token all the same and multiply it by 0, which is as good
// unless it is NaN or infinite. A NaN weight counts everywhere.
template <class T, class Use>
inline void for_corners_inside(const BlockLevels<T>& levels, const Block<T>& block, const Use& use) {
  for (int64_t sample = 0; sample < block.count; sample++) {
    const int64_t first = sample / lanes_of<T>() * lanes_of<T>();
    const auto corners = corners_of(levels, block, first);
    for (int corner = 0; corner < 4; corner++)
      if (corners.inside(corner)[sample - first] || block.factor[corner][sample] != 0) use(sample, corner);
  }
}

// sums[0..N) = (or +=) sum over the block's samples and corners of factor * value
template <int N, class T, class Stored>
inline void gather(Width<N>, const Block<T>& block, const Stored* value, int64_t stride, T* sums,
                   bool is_first) {
  typedef Run<Stored, T, N> Values;
  // Two independent sums, over the top and the bottom corners, hide the latency of the additions.
  Values top_sums{}, bottom_sums{};
  for (int64_t sample = 0; sample < block.count; sample++) {
#pragma GCC unroll 2
    for (int corner = 0; corner < 2; corner++) {
      const auto top = Values::load_wide(value + block.token[corner][sample] * stride);
      const auto bottom = Values::load_wide(value + block.token[corner + 2][sample] * stride);
      T top_factor = block.factor[corner][sample], bottom_factor = block.factor[corner + 2][sample];
#pragma GCC unroll 8
      for (int i = 0; i < Values::kVectors; i++) top_sums.vector[i] += top_factor * top.vector[i];
#pragma GCC unroll 8
      for (int i = 0; i < Values::kVectors; i++) bottom_sums.vector[i] += bottom_factor * bottom.vector[i];
    }
  }
  if (!is_first) {
    const auto before = Values::order_like(sums);
    for (int i = 0; i < Values::kVectors; i++) top_sums.vector[i] += before.vector[i];
  }
#pragma GCC unroll 8
  for (int i = 0; i < Values::kVectors; i++) top_sums.vector[i] += bottom_sums.vector[i];
  top_sums.store_ordered(sums);
}

// As gather for all channels, but without the corners outside the level, and slow.
template <class T, class Stored>
inline void gather_inside(const BlockLevels<T>& levels, const Block<T>& block, const Stored* value,
                          int64_t stride, int64_t num_channels, T* sums, bool is_first) {
  for (int64_t i = 0; is_first && i < num_channels; i++) sums[i] = 0;
  for_corners_inside(levels, block, [&](int64_t sample, int corner) {
    const Stored* from = value + block.token[corner][sample] * stride;
    for (int64_t i = 0; i < num_channels; i++) sums[i] += block.factor[corner][sample] * widen(from[i]);
  });
}

// Sums the lanes of `partial` and adds them to `dot`, which holds the sums of earlier channel runs.
template <int N, class T>
inline void finish_dots(Block<T>& block, bool is_first_run) {
  for (int corner = 0; corner < 4; corner++) {
    const T* partial = block.partial + corner * kBlock * N;
    T* dot = block.dot[corner];
    if constexpr (N == 1) {
      for (int64_t at = 0; at < block.count; at++) dot[at] = partial[at] + (is_first_run ? 0 : dot[at]);
    } else {
      for (int64_t at = 0; at < block.count; at += 4) {
        auto sums = sums_of_four<N>(partial + at * N);
        store<4>(dot + at, is_first_run ? sums : sums + load<4>(dot + at));
      }
    }
  }
}

// What a backward kernel computes; see Kernels.
enum class Part { all, value, samples };

// grad_value += factor * grad_out, and dot = grad_out . value, at every corner
template <Part kPart, int N, class T, class Stored>
inline void scatter(Width<N>, Block<T>& block, const HeadView<T>& head, const Stored* __restrict value,
                    int64_t first_channel, const T* grad_out) {
  typedef Run<Stored, T, N> Values;
  constexpr int kLanes = Values::kLanes, kVectors = Values::kVectors;
  T* __restrict grad_value = head.grad_value + first_channel;
  T* __restrict partials = block.partial;
  const int64_t stride = head.stride, grad_stride = head.grad_stride, count = block.count;
  typename Simd<T, kLanes>::Vector grad[kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kVectors; i++) grad[i] = load<kLanes>(grad_out + first_channel + i * kLanes);
  const auto ordered_grad = Values::order_like(grad_out + first_channel);
  for (int64_t sample = 0; sample < count; sample++) {
#pragma GCC unroll 4
    for (int corner = 0; corner < 4; corner++) {
      const int64_t token = block.token[corner][sample], offset = token * stride;
      if constexpr (kPart != Part::value) {
        const auto values = Values::load_wide(value + offset);
        auto partial = ordered_grad.vector[0] * values.vector[0];
#pragma GCC unroll 8
        for (int i = 1; i < kVectors; i++) partial += ordered_grad.vector[i] * values.vector[i];
        store<kLanes>(partials + (corner * kBlock + sample) * kLanes, partial);
      }
      if constexpr (kPart != Part::samples) {
        // Where value is stored in the type of the gradient, both are packed or neither is: they have one
        // stride.
        T* grad_at = grad_value + (std::is_same_v<Stored, T> ? offset : token * grad_stride);
        T factor = block.factor[corner][sample];
#pragma GCC unroll 8
        for (int i = 0; i < kVectors; i++) {
          T* to = grad_at + i * kLanes;
          store<kLanes>(to, load<kLanes>(to) + factor * grad[i]);
        }
      }
    }
  }
  if constexpr (kPart != Part::value) finish_dots<kLanes>(block, first_channel == 0);
}

// As scatter, but without the corners outside the level, slow, and not inlined for the same reason as
// forward_rows_inside. `differentiate` ignores the dots of those corners.
template <Part kPart, class T, class Stored>
__attribute__((noinline, cold)) void scatter_inside(const BlockLevels<T>& levels, Block<T>& block,
                                                    const HeadView<T>& head, const Stored* value,
                                                    const ChannelRange& channels, const T* grad_out) {
  for_corners_inside(levels, block, [&](int64_t sample, int corner) {
    const int64_t token = block.token[corner][sample];
    T dot = 0;
    for (int64_t i = channels.first; i < channels.last; i++) {
      if constexpr (kPart != Part::value) dot += grad_out[i] * widen(value[token * head.stride + i]);
      if constexpr (kPart != Part::samples)
        head.grad_value[token * head.grad_stride + i] += block.factor[corner][sample] * grad_out[i];
    }
    block.dot[corner][sample] = dot;
  });
}

// Computes the gradients of x, y and weight from the dots of the corners, and stores them in dot[0..3).
template <class T>
inline void differentiate_block(const BlockLevels<T>& levels, Block<T>& block) {
  constexpr int kLanes = lanes_of<T>();
  for (int64_t at = 0; at < block.count; at += kLanes) {
    const Numbers<T> dot[] = {load<kLanes>(block.dot[0] + at), load<kLanes>(block.dot[1] + at),
                              load<kLanes>(block.dot[2] + at), load<kLanes>(block.dot[3] + at)};
    const auto grads = differentiate(corners_of(levels, block, at), dot, load<kLanes>(block.weight + at),
                                     levels.size[at / kLanes]);
    store<kLanes>(block.dot[0] + at, grads.x);
    store<kLanes>(block.dot[1] + at, grads.y);
    store<kLanes>(block.dot[2] + at, grads.weight);
  }
}

template <class T>
inline void store_sample_grads(const Problem<T>& problem, const SampleRange& range, const Block<T>& block) {
  const int64_t first = range.row * problem.num_samples() + range.first, count = range.count;
  const T* __restrict grad_x = block.dot[0], * __restrict grad_y = block.dot[1];
  T* __restrict grad_locations = problem.grad_locations + 2 * first;
  T* __restrict grad_weights = problem.grad_weights + first;
  prefetch_ahead(problem, problem.grad_locations, range.row, 2 * problem.num_samples() * sizeof(T));
  prefetch_ahead(problem, problem.grad_weights, range.row, problem.num_samples() * sizeof(T));
  for (int64_t at = 0; at < count; at++) {
    grad_locations[2 * at] = grad_x[at];
    grad_locations[2 * at + 1] = grad_y[at];
    grad_weights[at] = block.dot[2][at];
  }
}

// Fused, before store_sample_grads: computes the gradient of the reference, and that of offsets from that of
// locations.
template <class T>
inline void offset_grads(const Problem<T>& problem, const SampleRange& range, const BlockLevels<T>& levels,
                         Block<T>& block) {
  const int64_t size = problem.reference_size;
  if (problem.grad_reference != nullptr) {
    const T* offsets = problem.locations + 2 * (range.row * problem.num_samples() + range.first);
    const T half_step = T(0.5) / T(problem.num_points);
    for (int64_t at = 0; at < range.count; at++) {
      T* grad = problem.grad_reference + (range.row * problem.num_levels + levels.level[at]) * size;
      grad[0] += block.dot[0][at];
      grad[1] += block.dot[1][at];
      if (size != 4) continue;
      grad[2] += block.dot[0][at] * offsets[2 * at] * half_step;
      grad[3] += block.dot[1][at] * offsets[2 * at + 1] * half_step;
    }
  }
  for (int64_t at = 0; at < range.count; at++) {
    block.dot[0][at] *= block.scale_x[at];
    block.dot[1][at] *= block.scale_y[at];
  }
}

// Fused, at the end of a row: computes the gradients of logits from those of weights.
template <class T>
inline void logit_grads(const Problem<T>& problem, int64_t row, const Scratch<T>& scratch) {
  constexpr int kLanes = lanes_of<T>();
  const int64_t count = problem.num_samples();
  const T* __restrict weights = scratch.weights;
  T* __restrict grad = problem.grad_weights + row * count;
  T means[kLanes] = {}, mean = 0;
  int64_t at = 0;
  for (; at + kLanes <= count; at += kLanes)
    for (int lane = 0; lane < kLanes; lane++) means[lane] += weights[at + lane] * grad[at + lane];
  for (; at < count; at++) mean += weights[at] * grad[at];
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int lane = 0; lane < half; lane++) means[lane] += means[lane + half];
  mean += means[0];
  for (at = 0; at < count; at++) grad[at] = weights[at] * (grad[at] - mean);
}

// Fills the block with each part of a row in turn, and calls use(range, levels).
template <class T, class Use>
inline void for_blocks(const Problem<T>& problem, int64_t row, const Scratch<T>& scratch, Block<T>& block,
                       const Use& use) {
  const bool fused = problem.reference_size != 0;
  const int64_t count = problem.num_samples();
  const RowInputs<T> inputs = row_inputs(problem, row, scratch);
  if (fused) softmax_row(inputs.weights, count, scratch);
  const T* weights = fused ? scratch.weights : inputs.weights;
  for (int64_t first = 0; first < count; first += kBlock) {
    const SampleRange range{row, first, count - first < kBlock ? count - first : kBlock};
    const BlockLevels<T>& levels = scratch.levels[first / kBlock];
    block.count = range.count;
    load_samples(inputs.locations + 2 * first, weights + first, block);
    if (fused) compute_locations(problem, row_reference(problem, row), levels, block);
    compute_corners(levels, block);
    use(range, levels);
  }
}

template <class Stored, class T>
inline void sum_row(const Problem<T>& problem, const HeadView<T>& head, const Stored* value, int64_t row,
                    const Scratch<T>& scratch, Block<T>& block, T* sums) {
  for (int64_t i = 0; problem.num_samples() == 0 && i < problem.num_channels; i++) sums[i] = 0;
  for_blocks(problem, row, scratch, block, [&](const SampleRange& range, const BlockLevels<T>&) {
    for_channel_runs({0, problem.num_channels}, [&](auto width, int64_t channel) {
      gather(width, block, value + channel, head.stride, sums + channel, range.first == 0);
    });
  });
}

template <class T>
inline void store_row(const Problem<T>& problem, int64_t row, const T* sums) {
  with_storage(problem.storage, T(), [&](auto stored) {
    narrow_all(sums, static_cast<decltype(stored)*>(problem.out) + row * problem.num_channels,
               problem.num_channels);
  });
}

// Computes the rows again that are not finite, without the corners outside the level. Not inlined: it is
// rarely needed, and would slow down forward_rows.
template <class Stored, class T>
__attribute__((noinline, cold)) void forward_rows_inside(const Problem<T>& problem, const HeadView<T>& head,
                                                         const Rows& rows, const Scratch<T>& scratch) {
  const Stored* value = static_cast<const Stored*>(head.value);
  const int64_t num_channels = problem.num_channels;
  Block<T> block = {};
  for (int64_t query = rows.first_query; query < rows.last_query; query++) {
    const int64_t row = row_index(problem, rows, query);
    T* sums = scratch.channels;
    // Not what is stored: float16 may have overflowed, and a row must not depend on others of the same call
    sum_row(problem, head, value, row, scratch, block, sums);
    if (all_finite(sums, num_channels)) continue;
    for_blocks(problem, row, scratch, block, [&](const SampleRange& range, const BlockLevels<T>& levels) {
      gather_inside(levels, block, value, head.stride, num_channels, sums, range.first == 0);
    });
    store_row(problem, row, sums);
  }
}

template <class Stored, class T>
DETRS_FLAT void forward_rows(const Problem<T>& problem, const HeadView<T>& head, const Rows& rows,
                             T* buffer) {
  const Scratch<T> scratch(problem, buffer);
  const Stored* value = static_cast<const Stored*>(head.value);
  const int64_t num_channels = problem.num_channels;
  const bool convert = problem.storage != storage_of<T>();
  FiniteCheck<T> check;
  Block<T> block = {};
  for (int64_t query = rows.first_query; query < rows.last_query; query++) {
    const int64_t row = row_index(problem, rows, query);
    T* sums = convert ? scratch.channels : static_cast<T*>(problem.out) + row * num_channels;
    prefetch_ahead(problem, problem.out, row, num_channels * bytes_of(problem.storage));
    sum_row(problem, head, value, row, scratch, block, sums);
    check.add(sums, num_channels);
    if (convert) store_row(problem, row, sums);
  }
  if (!check.all_finite()) forward_rows_inside<Stored>(problem, head, rows, scratch);
}

template <class T>
void forward(const Problem<T>& problem, const HeadView<T>& head, const Rows& rows, T* buffer) {
  with_storage(head.storage, T(),
               [&](auto stored) { forward_rows<decltype(stored)>(problem, head, rows, buffer); });
}

template <Part kPart, class Stored, class T>
DETRS_FLAT void backward_rows(const Problem<T>& problem, const HeadView<T>& head, const Rows& rows,
                              const ChannelRange& channels, T* buffer) {
  const Scratch<T> scratch(problem, buffer);
  const Stored* value = static_cast<const Stored*>(head.value);
  const int64_t num_channels = problem.num_channels;
  const bool fused = problem.reference_size != 0, convert = problem.storage != storage_of<T>();
  Block<T> block = {};
  for (int64_t query = rows.first_query; query < rows.last_query; query++) {
    const int64_t row = row_index(problem, rows, query);
    const T* grad_out =
        convert ? scratch.channels : static_cast<const T*>(problem.grad_out) + row * num_channels;
    prefetch_ahead(problem, problem.grad_out, row, num_channels * bytes_of(problem.storage));
    if (convert) {
      with_storage(problem.storage, T(), [&](auto stored) {
        auto* given = static_cast<const decltype(stored)*>(problem.grad_out) + row * num_channels;
        widen_all(given, scratch.channels, num_channels);
      });
    }
    const bool finite = all_finite(grad_out, num_channels);
    for_blocks(problem, row, scratch, block, [&](const SampleRange& range, const BlockLevels<T>& levels) {
      if (finite) {
        for_channel_runs(channels, [&](auto width, int64_t channel) {
          scatter<kPart>(width, block, head, value + channel, channel, grad_out);
        });
      } else {
        scatter_inside<kPart>(levels, block, head, value, channels, grad_out);
      }
      if constexpr (kPart == Part::value) return;
      differentiate_block(levels, block);
      if (fused) offset_grads(problem, range, levels, block);
      store_sample_grads(problem, range, block);
    });
    if (fused && kPart != Part::value) logit_grads(problem, row, scratch);
  }
}

template <class T>
void backward(const Problem<T>& problem, const HeadView<T>& head, const Rows& rows, T* buffer) {
  with_storage(head.storage, T(), [&](auto stored) {
    backward_rows<Part::all, decltype(stored)>(problem, head, rows, {0, problem.num_channels}, buffer);
  });
}

template <class T>
void value_grads(const Problem<T>& problem, const HeadView<T>& head, const Rows& rows,
                 const ChannelRange& channels, T* buffer) {
  with_storage(head.storage, T(), [&](auto stored) {
    backward_rows<Part::value, decltype(stored)>(problem, head, rows, channels, buffer);
  });
}

template <class T>
void sample_grads(const Problem<T>& problem, const HeadView<T>& head, const Rows& rows, T* buffer) {
  with_storage(head.storage, T(), [&](auto stored) {
    backward_rows<Part::samples, decltype(stored)>(problem, head, rows, {0, problem.num_channels}, buffer);
  });
}

// Returns the first element of one head of one image in value and grad_value.
template <class T>
inline int64_t head_offset(const Problem<T>& problem, int64_t image, int64_t head) {
  return (image * problem.num_tokens * problem.num_heads + head) * problem.num_channels;
}

template <class T>
void pack(const Problem<T>& problem, int64_t image, int64_t head, T* packed) {
  const int64_t num_channels = problem.num_channels, stride = problem.num_heads * num_channels;
  with_storage(problem.storage, T(), [&](auto stored) {
    auto* value = static_cast<const decltype(stored)*>(problem.value) + head_offset(problem, image, head);
    for (int64_t token = 0; token < problem.num_tokens; token++)
      widen_all(value + token * stride, packed + token * num_channels, num_channels);
  });
}

template <class T>
void unpack(const Problem<T>& problem, int64_t image, int64_t head, const T* packed) {
  const int64_t num_channels = problem.num_channels, stride = problem.num_heads * num_channels;
  with_storage(problem.storage, T(), [&](auto stored) {
    auto* grad_value = static_cast<decltype(stored)*>(problem.grad_value) + head_offset(problem, image, head);
    for (int64_t token = 0; token < problem.num_tokens; token++)
      narrow_all(packed + token * num_channels, grad_value + token * stride, num_channels);
  });
}

template <class T>
constexpr Kernels<T> table() {
  return {scratch_size<T>, prepare_scratch<T>, forward<T>, backward<T>,
          value_grads<T>,  sample_grads<T>,    pack<T>,    unpack<T>};
}

}  // namespace

const KernelSet DETRS_KERNELS = {DETRS_NAME, table<float>(), table<double>()};

}  // namespace detrs::cpu
