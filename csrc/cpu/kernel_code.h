// The CPU kernels, once. kernels_<instruction set>.cpp include this file with
//   DETRS_KERNELS       the KernelSet to define      DETRS_VECTOR_BYTES  how wide its vectors are
//   DETRS_NAME          its name
#include "kernels.h"
#include "simd.h"
#include "storage.h"

namespace detrs::cpu {
namespace {

// A row's samples are worked on in blocks of at most this many, as one array per quantity.
constexpr int64_t kBlock = 32;

// What the call's level shapes mean to the samples of one block; the same for every row.
template <class T>
struct alignas(64) BlockLevels {
  T width[kBlock], height[kBlock];
  Index<T> width_index[kBlock], height_index[kBlock];  // the same numbers as integers
  Index<T> start[kBlock];                              // the level's first token
  Index<T> level[kBlock];
};

// One block of one row. The corners of a sample are its four nearest pixels: 0 top left, 1 top right, 2
// bottom left, 3 bottom right.
template <class T>
struct alignas(64) Block {
  int64_t count;
  T x[kBlock], y[kBlock], weight[kBlock];  // location in [0, 1], attention weight
  T scale_x[kBlock], scale_y[kBlock];      // fused: how far an offset of 1 moves the location
  Index<T> token[4][kBlock];               // corner pixels, clamped into the level
  T factor[4][kBlock];                     // what a corner counts for: bilinear times attention
  // for the backward pass
  T left[kBlock], right[kBlock], top[kBlock], bottom[kBlock];              // bilinear factors, 0 outside
  T in_left[kBlock], in_right[kBlock], in_top[kBlock], in_bottom[kBlock];  // 1 inside, 0 outside
  T partial[4 * kBlock * lanes_of<T>()];                                   // dot before its last summation
  T dot[4][kBlock];                                                        // grad_out . value at the corner
};

template <class T>
int64_t num_blocks(const Problem<T>& problem) {
  return (problem.num_samples() + kBlock - 1) / kBlock;
}

// A thread's scratch.
template <class T>
struct Scratch {
  BlockLevels<T>* levels;  // [blocks]
  T* weights;              // fused: one row's weights, [blocks * kBlock]
  T* channels;             // one row of out or grad_out, as T

  static int64_t levels_size(const Problem<T>& problem) {
    return num_blocks(problem) * int64_t(sizeof(BlockLevels<T>) / sizeof(T));
  }
  Scratch(const Problem<T>& problem, T* memory)
      : levels(reinterpret_cast<BlockLevels<T>*>(memory)),
        weights(memory + levels_size(problem)),
        channels(weights + num_blocks(problem) * kBlock) {}
};

template <class T>
int64_t scratch_size(const Problem<T>& problem) {
  return Scratch<T>::levels_size(problem) + num_blocks(problem) * kBlock + problem.num_channels;
}

template <class T>
void prepare_scratch(const Problem<T>& problem, T* memory) {
  const Scratch<T> scratch(problem, memory);
  for (int64_t channel = 0; channel < problem.num_channels; channel++) scratch.channels[channel] = 0;
  int64_t start = 0;
  for (int64_t sample = 0; sample < num_blocks(problem) * kBlock; sample++) {
    bool real = sample < problem.num_samples();
    int64_t level = real ? sample / problem.num_points : 0;
    const int64_t* shape = problem.shapes + 2 * level;
    BlockLevels<T>& levels = scratch.levels[sample / kBlock];
    int64_t at = sample % kBlock;
    levels.height[at] = T(levels.height_index[at] = Index<T>(shape[0]));
    levels.width[at] = T(levels.width_index[at] = Index<T>(shape[1]));
    levels.start[at] = Index<T>(real ? start : 0);
    levels.level[at] = Index<T>(level);
    if ((sample + 1) % problem.num_points == 0) start += shape[0] * shape[1];
  }
}

template <class T>
inline int64_t row_number(const Problem<T>& problem, const Rows& rows, int64_t query) {
  return (rows.image * problem.num_queries + query) * problem.num_heads + rows.head;
}

// Asks for memory that will be needed soon; an address behind the end does no harm.
template <class T>
inline void prefetch(const T* from, int64_t count) {
  for (int64_t at = 0; at < count; at += 64 / sizeof(T)) __builtin_prefetch(from + at);
}

// Fused: scratch.weights = softmax of the row's logits.
template <class T>
inline void softmax_row(const Problem<T>& problem, int64_t row, const Scratch<T>& scratch) {
  constexpr int kLanes = lanes_of<T>();
  typedef typename Simd<T, kLanes>::Vector Vector;
  typedef typename Simd<Index<T>, kLanes>::Vector Indices;
  const int64_t count = problem.num_samples();
  const T* __restrict logits = problem.weights + row * count;
  T* __restrict weights = scratch.weights;
  prefetch(logits + 4 * problem.num_heads * count, count);
  for (int64_t at = 0; at < count; at++) weights[at] = logits[at];
  for (int64_t at = count; at % kLanes != 0; at++) weights[at] = logits[0] - 100;  // e^-100 adds nothing
  Vector largest = load<kLanes>(weights), sum = {};
  for (int64_t at = kLanes; at < count; at += kLanes) {
    Vector next = load<kLanes>(weights + at);
    largest = next > largest ? next : largest;
  }
  T top = largest[0];
  for (int lane = 1; lane < kLanes; lane++) top = largest[lane] > top ? largest[lane] : top;
  for (int64_t at = 0; at < count; at += kLanes) {
    Vector power = exp_negative(load<kLanes>(weights + at) - top, T(), Indices());
    store<kLanes>(weights + at, power);
    sum += power;
  }
  T total = 0;
  for (int lane = 0; lane < kLanes; lane++) total += sum[lane];
  for (int64_t at = 0; at < count; at += kLanes)
    store<kLanes>(weights + at, load<kLanes>(weights + at) / total);
}

// Where a block's samples stand: in its row, and in the tensors.
struct Place {
  int64_t row, first, count;  // the row; the block's first sample within it; how many
};

// The plain form's x, y and weight.
template <class T>
inline void load_samples(const Problem<T>& problem, const Place& place, Block<T>& block) {
  const int64_t first = place.row * problem.num_samples() + place.first;
  const T* __restrict locations = problem.locations + 2 * first;
  const T* __restrict weights = problem.weights + first;
  const int64_t rows_ahead = 4 * problem.num_heads * problem.num_samples();  // same head, four queries on
  prefetch(locations + 2 * rows_ahead, 2 * place.count);
  prefetch(weights + rows_ahead, place.count);
  for (int64_t at = 0; at < place.count; at++) {
    block.x[at] = locations[2 * at];
    block.y[at] = locations[2 * at + 1];
    block.weight[at] = weights[at];
  }
}

template <class T>
inline const T* row_reference(const Problem<T>& problem, int64_t row) {
  return problem.reference + row / problem.num_heads * problem.num_levels * problem.reference_size;
}

// The fused form's, from reference and offsets; softmax_row has been there.
template <class T>
inline void place_samples(const Problem<T>& problem, const Scratch<T>& scratch, const Place& place,
                          const BlockLevels<T>& levels, Block<T>& block) {
  const T* __restrict offsets = problem.locations + 2 * (place.row * problem.num_samples() + place.first);
  const T* __restrict reference = row_reference(problem, place.row);
  const T* __restrict weights = scratch.weights + place.first;
  const int64_t size = problem.reference_size;
  const T half_step = T(0.5) / T(problem.num_points);
  prefetch(offsets + 8 * problem.num_heads * problem.num_samples(), 2 * place.count);
  for (int64_t at = 0; at < place.count; at++) {
    const T* anchor = reference + levels.level[at] * size;
    block.scale_x[at] = size == 4 ? anchor[2] * half_step : 1 / levels.width[at];
    block.scale_y[at] = size == 4 ? anchor[3] * half_step : 1 / levels.height[at];
    block.x[at] = anchor[0] + offsets[2 * at] * block.scale_x[at];
    block.y[at] = anchor[1] + offsets[2 * at + 1] * block.scale_y[at];
    block.weight[at] = weights[at];
  }
}

// Along one axis: the two pixels beside a position, and how much each of them counts.
template <class T>
struct Neighbours {
  typedef typename Simd<T, lanes_of<T>()>::Vector Vector;
  typedef typename Simd<Index<T>, lanes_of<T>()>::Vector Indices;
  Indices before, after, in_before, in_after;
  Vector before_factor, after_factor;

  // `valid` lanes have -1 <= position < length; the others give pixel 0 with factor 0
  Neighbours(Vector position, Indices length, Indices valid) {
    const Vector zero = {};
    position = valid ? position : zero;
    Indices truncated = __builtin_convertvector(position, Indices);
    Vector back = __builtin_convertvector(truncated, Vector);
    before = truncated + (back > position);  // a true comparison is -1: this is the floor
    after = before + 1;
    Vector fraction = position - __builtin_convertvector(before, Vector);
    in_before = valid & (before >= 0);
    in_after = valid & (after < length);
    before_factor = in_before ? 1 - fraction : zero;
    after_factor = in_after ? fraction : zero;
    before = before >= 0 ? before : before - before;
    after = after < length ? after : length - 1;
  }
};

// From locations to corner tokens and factors. NaN and infinite locations fail the comparisons: they lie
// outside.
template <bool kBackward, class T>
inline void locate(const BlockLevels<T>& levels, Block<T>& block) {
  constexpr int kLanes = lanes_of<T>();
  typedef typename Neighbours<T>::Vector Vector;
  typedef typename Neighbours<T>::Indices Indices;
  const Vector zero = {}, one = zero + 1;
  for (int64_t at = 0; at < block.count; at += kLanes) {
    Vector width = load<kLanes>(levels.width + at), height = load<kLanes>(levels.height + at);
    Vector x = load<kLanes>(block.x + at) * width - T(0.5), y = load<kLanes>(block.y + at) * height - T(0.5);
    Indices valid = (x >= -one) & (x < width) & (y >= -one) & (y < height);
    Indices width_index = load<kLanes>(levels.width_index + at);
    Neighbours<T> across(x, width_index, valid);
    Neighbours<T> down(y, load<kLanes>(levels.height_index + at), valid);
    Indices start = load<kLanes>(levels.start + at);
    Indices top = start + down.before * width_index, bottom = start + down.after * width_index;
    store<kLanes>(block.token[0] + at, top + across.before);
    store<kLanes>(block.token[1] + at, top + across.after);
    store<kLanes>(block.token[2] + at, bottom + across.before);
    store<kLanes>(block.token[3] + at, bottom + across.after);
    Vector weight = load<kLanes>(block.weight + at);
    Vector above = weight * down.before_factor, below = weight * down.after_factor;
    store<kLanes>(block.factor[0] + at, above * across.before_factor);
    store<kLanes>(block.factor[1] + at, above * across.after_factor);
    store<kLanes>(block.factor[2] + at, below * across.before_factor);
    store<kLanes>(block.factor[3] + at, below * across.after_factor);
    if (!kBackward) continue;
    store<kLanes>(block.left + at, across.before_factor);
    store<kLanes>(block.right + at, across.after_factor);
    store<kLanes>(block.top + at, down.before_factor);
    store<kLanes>(block.bottom + at, down.after_factor);
    store<kLanes>(block.in_left + at, across.in_before ? one : zero);
    store<kLanes>(block.in_right + at, across.in_after ? one : zero);
    store<kLanes>(block.in_top + at, down.in_before ? one : zero);
    store<kLanes>(block.in_bottom + at, down.in_after ? one : zero);
  }
}

template <int N>
struct Width {};

// Splits the channels into runs of 32, 16, 8, 4 and 1 and calls use(Width<N>, first channel) for each.
template <class Use>
inline void for_channel_runs(int64_t num_channels, const Use& use) {
  int64_t first = 0;
  for (; first + 32 <= num_channels; first += 32) use(Width<32>(), first);
  for (; first + 16 <= num_channels; first += 16) use(Width<16>(), first);
  for (; first + 8 <= num_channels; first += 8) use(Width<8>(), first);
  for (; first + 4 <= num_channels; first += 4) use(Width<4>(), first);
  for (; first < num_channels; first++) use(Width<1>(), first);
}

template <class T, int N>
constexpr int run_lanes() {
  return N < lanes_of<T>() ? N : lanes_of<T>();
}

// out[0..N) = (or +=) sum over the block's samples and corners of factor * value
template <int N, class T>
inline void gather(Width<N>, const Block<T>& block, const T* value, int64_t stride, T* out, bool is_first) {
  constexpr int kLanes = run_lanes<T, N>(), kVectors = N / kLanes;
  typename Simd<T, kLanes>::Vector upper[kVectors] = {}, lower[kVectors] = {};  // two chains hide the latency
  for (int64_t sample = 0; sample < block.count; sample++) {
#pragma GCC unroll 2
    for (int corner = 0; corner < 2; corner++) {
      const T* above = value + block.token[corner][sample] * stride;
      const T* below = value + block.token[corner + 2][sample] * stride;
      T above_factor = block.factor[corner][sample], below_factor = block.factor[corner + 2][sample];
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; i++) upper[i] += above_factor * load<kLanes>(above + i * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; i++) lower[i] += below_factor * load<kLanes>(below + i * kLanes);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kVectors; i++) {
    auto sum = upper[i] + lower[i];
    store<kLanes>(out + i * kLanes, is_first ? sum : sum + load<kLanes>(out + i * kLanes));
  }
}

// The last summation of `partial`, into `dot`, which holds what earlier channel runs gave.
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

// grad_value += factor * grad_out, and dot = grad_out . value, at every corner
template <int N, class T>
inline void scatter(Width<N>, Block<T>& block, const HeadView<T>& head, int64_t first_channel,
                    const T* grad_out) {
  constexpr int kLanes = run_lanes<T, N>(), kVectors = N / kLanes;
  const T* __restrict value = head.value + first_channel;
  T* __restrict grad_value = head.grad_value + first_channel;
  T* __restrict partials = block.partial;
  const int64_t stride = head.stride;
  typename Simd<T, kLanes>::Vector grad[kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kVectors; i++) grad[i] = load<kLanes>(grad_out + first_channel + i * kLanes);
  for (int64_t sample = 0; sample < block.count; sample++) {
#pragma GCC unroll 4
    for (int corner = 0; corner < 4; corner++) {
      int64_t offset = block.token[corner][sample] * stride;
      T factor = block.factor[corner][sample];
      auto partial = grad[0] * load<kLanes>(value + offset);
#pragma GCC unroll 8
      for (int i = 1; i < kVectors; i++) partial += grad[i] * load<kLanes>(value + offset + i * kLanes);
      store<kLanes>(partials + (corner * kBlock + sample) * kLanes, partial);
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; i++) {
        T* to = grad_value + offset + i * kLanes;
        store<kLanes>(to, load<kLanes>(to) + factor * grad[i]);
      }
    }
  }
  finish_dots<kLanes>(block, first_channel == 0);
}

// From the corners' dots to the gradients of x, y and weight, which take the place of dot[0..3).
template <class T>
inline void differentiate(const BlockLevels<T>& levels, Block<T>& block) {
  constexpr int kLanes = lanes_of<T>();
  for (int64_t at = 0; at < block.count; at += kLanes) {
    auto get = [at](const T* from) { return load<kLanes>(from + at); };
    auto dot0 = get(block.dot[0]), dot1 = get(block.dot[1]), dot2 = get(block.dot[2]),
         dot3 = get(block.dot[3]);
    auto left = get(block.left), right = get(block.right), top = get(block.top), bottom = get(block.bottom);
    auto in_left = get(block.in_left), in_right = get(block.in_right), in_top = get(block.in_top),
         in_bottom = get(block.in_bottom), weight = get(block.weight);
    auto grad_x = top * (in_right * dot1 - in_left * dot0) + bottom * (in_right * dot3 - in_left * dot2);
    auto grad_y = left * (in_bottom * dot2 - in_top * dot0) + right * (in_bottom * dot3 - in_top * dot1);
    auto grad_weight = top * (left * dot0 + right * dot1) + bottom * (left * dot2 + right * dot3);
    store<kLanes>(block.dot[0] + at, grad_x * weight * get(levels.width));
    store<kLanes>(block.dot[1] + at, grad_y * weight * get(levels.height));
    store<kLanes>(block.dot[2] + at, grad_weight);
  }
}

template <class T>
inline void store_sample_grads(const Problem<T>& problem, const Place& place, const Block<T>& block) {
  const int64_t first = place.row * problem.num_samples() + place.first;
  T* __restrict grad_locations = problem.grad_locations + 2 * first;
  T* __restrict grad_weights = problem.grad_weights + first;
  for (int64_t at = 0; at < place.count; at++) {
    grad_locations[2 * at] = block.dot[0][at];
    grad_locations[2 * at + 1] = block.dot[1][at];
    grad_weights[at] = block.dot[2][at];
  }
}

// Fused, before store_sample_grads: the reference's gradient, and from locations' to offsets'.
template <class T>
inline void offset_grads(const Problem<T>& problem, const Place& place, const BlockLevels<T>& levels,
                         Block<T>& block) {
  const int64_t size = problem.reference_size;
  if (problem.grad_reference != nullptr) {
    const T* offsets = problem.locations + 2 * (place.row * problem.num_samples() + place.first);
    const T half_step = T(0.5) / T(problem.num_points);
    for (int64_t at = 0; at < place.count; at++) {
      T* grad = problem.grad_reference + (place.row * problem.num_levels + levels.level[at]) * size;
      grad[0] += block.dot[0][at];
      grad[1] += block.dot[1][at];
      if (size != 4) continue;
      grad[2] += block.dot[0][at] * offsets[2 * at] * half_step;
      grad[3] += block.dot[1][at] * offsets[2 * at + 1] * half_step;
    }
  }
  for (int64_t at = 0; at < place.count; at++) {
    block.dot[0][at] *= block.scale_x[at];
    block.dot[1][at] *= block.scale_y[at];
  }
}

// Fused, at the row's end: from weights' gradients to logits'.
template <class T>
inline void logit_grads(const Problem<T>& problem, int64_t row, const Scratch<T>& scratch) {
  const int64_t count = problem.num_samples();
  T* __restrict grad = problem.grad_weights + row * count;
  T mean = 0;
  for (int64_t at = 0; at < count; at++) mean += scratch.weights[at] * grad[at];
  for (int64_t at = 0; at < count; at++) grad[at] = scratch.weights[at] * (grad[at] - mean);
}

// Fills the block for each part of a row in turn and calls use(place, levels).
template <bool kBackward, class T, class Use>
inline void for_blocks(const Problem<T>& problem, int64_t row, const Scratch<T>& scratch, Block<T>& block,
                       const Use& use) {
  const bool fused = problem.reference_size != 0;
  if (fused && problem.num_samples() != 0) softmax_row(problem, row, scratch);
  for (int64_t first = 0; first < problem.num_samples(); first += kBlock) {
    int64_t left_over = problem.num_samples() - first;
    const Place place{row, first, left_over < kBlock ? left_over : kBlock};
    const BlockLevels<T>& levels = scratch.levels[first / kBlock];
    block.count = place.count;
    fused ? place_samples(problem, scratch, place, levels, block) : load_samples(problem, place, block);
    locate<kBackward>(levels, block);
    use(place, levels);
  }
}

template <class T>
void forward(const Problem<T>& problem, const HeadView<T>& head, const Rows& rows, T* memory) {
  const Scratch<T> scratch(problem, memory);
  const int64_t num_channels = problem.num_channels;
  Block<T> block = {};
  for (int64_t query = rows.first_query; query < rows.last_query; query++) {
    const int64_t row = row_number(problem, rows, query);
    for_blocks<false>(problem, row, scratch, block, [&](const Place& place, const BlockLevels<T>&) {
      for_channel_runs(num_channels, [&](auto width, int64_t channel) {
        gather(width, block, head.value + channel, head.stride, scratch.channels + channel, place.first == 0);
      });
    });
    with_storage(problem.storage, T(), [&](auto stored) {
      auto* out = static_cast<decltype(stored)*>(problem.out) + row * num_channels;
      narrow_all(scratch.channels, out, num_channels);
    });
  }
}

template <class T>
void backward(const Problem<T>& problem, const HeadView<T>& head, const Rows& rows, T* memory) {
  const Scratch<T> scratch(problem, memory);
  const int64_t num_channels = problem.num_channels;
  const bool fused = problem.reference_size != 0;
  Block<T> block = {};
  for (int64_t query = rows.first_query; query < rows.last_query; query++) {
    const int64_t row = row_number(problem, rows, query);
    with_storage(problem.storage, T(), [&](auto stored) {
      auto* grad_out = static_cast<const decltype(stored)*>(problem.grad_out) + row * num_channels;
      widen_all(grad_out, scratch.channels, num_channels);
    });
    for_blocks<true>(problem, row, scratch, block, [&](const Place& place, const BlockLevels<T>& levels) {
      for_channel_runs(num_channels, [&](auto width, int64_t channel) {
        scatter(width, block, head, channel, scratch.channels);
      });
      differentiate(levels, block);
      if (fused) offset_grads(problem, place, levels, block);
      store_sample_grads(problem, place, block);
    });
    if (fused) logit_grads(problem, row, scratch);
  }
}

// Where one head's channels of one image begin in value and grad_value, and how far apart its tokens are.
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
  return {scratch_size<T>, prepare_scratch<T>, forward<T>, backward<T>, pack<T>, unpack<T>};
}

}  // namespace

const KernelSet DETRS_KERNELS = {DETRS_NAME, table<float>(), table<double>()};

}  // namespace detrs::cpu
