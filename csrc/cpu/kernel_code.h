// The CPU kernels, once. kernels_<instruction set>.cpp include this file with
//   DETRS_KERNELS       the KernelSet to define      DETRS_VECTOR_BYTES  how wide its vectors are
//   DETRS_NAME          its name
#include "kernels.h"
#include "simd.h"
#include "storage.h"

namespace detrs::cpu {
namespace {

// One row's samples, as one array per quantity, padded to whole vectors. The corners of a sample are its four
// nearest pixels: 0 top left, 1 top right, 2 bottom left, 3 bottom right.
template <class T>
struct Row {
  int64_t count, padded;
  T *width, *height;                            // of the sample's level
  Index<T>*width_index, *height_index, *start;  // the same as integers; the level's first token
  T *x, *y, *weight;                            // location in [0, 1], attention weight
  T *left, *right, *top, *bottom;               // bilinear factors, 0 for a pixel outside the level
  T *in_left, *in_right, *in_top, *in_bottom;   // 1 inside, 0 outside
  Index<T>* token[4];                           // corner pixels, clamped into the level
  T* factor[4];                                 // what a corner counts for: bilinear times attention
  T* dot[4];                                    // backward: grad_out . value at the corner
  T* partial;                                   // backward: those dots before the last summation
  T* channels;                                  // one row of out or grad_out as T

  static int64_t size(const Problem<T>& problem) {
    int64_t padded = padded_count(problem);
    return padded * (28 + 4 * lanes_of<T>()) + problem.num_channels;
  }

  Row(const Problem<T>& problem, T* scratch) : count(problem.num_samples()), padded(padded_count(problem)) {
    auto numbers = [&] { return (scratch += padded) - padded; };
    auto indices = [&] { return reinterpret_cast<Index<T>*>(numbers()); };
    width = numbers(), height = numbers();
    width_index = indices(), height_index = indices(), start = indices();
    x = numbers(), y = numbers(), weight = numbers();
    left = numbers(), right = numbers(), top = numbers(), bottom = numbers();
    in_left = numbers(), in_right = numbers(), in_top = numbers(), in_bottom = numbers();
    for (int corner = 0; corner < 4; corner++) {
      token[corner] = indices();
      factor[corner] = numbers();
      dot[corner] = numbers();
    }
    partial = scratch;
    channels = scratch + 4 * padded * lanes_of<T>();
  }

  static int64_t padded_count(const Problem<T>& problem) {
    return (problem.num_samples() + lanes_of<T>() - 1) / lanes_of<T>() * lanes_of<T>();
  }
};

template <class T>
int64_t scratch_size(const Problem<T>& problem) {
  return Row<T>::size(problem);
}

template <class T>
void prepare_scratch(const Problem<T>& problem, T* scratch) {
  Row<T> row(problem, scratch);
  __builtin_memset(scratch, 0, sizeof(T) * Row<T>::size(problem));
  int64_t start = 0;
  for (int64_t sample = 0; sample < row.padded; sample++) {
    bool real = sample < row.count;
    const int64_t* shape = problem.shapes + 2 * (real ? sample / problem.num_points : 0);
    row.height[sample] = T(row.height_index[sample] = Index<T>(shape[0]));
    row.width[sample] = T(row.width_index[sample] = Index<T>(shape[1]));
    row.start[sample] = Index<T>(real ? start : 0);
    if ((sample + 1) % problem.num_points == 0) start += shape[0] * shape[1];
  }
}

template <class T>
inline int64_t row_number(const Problem<T>& problem, const Rows& rows, int64_t query) {
  return (rows.image * problem.num_queries + query) * problem.num_heads + rows.head;
}

template <class T>
inline void load_samples(const Problem<T>& problem, int64_t row_index, const Row<T>& row) {
  const T* locations = problem.locations + row_index * row.count * 2;
  const T* weights = problem.weights + row_index * row.count;
  for (int64_t sample = 0; sample < row.count; sample++) {
    row.x[sample] = locations[2 * sample];
    row.y[sample] = locations[2 * sample + 1];
    row.weight[sample] = weights[sample];
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
inline void locate(const Row<T>& row) {
  constexpr int kLanes = lanes_of<T>();
  typedef typename Neighbours<T>::Vector Vector;
  typedef typename Neighbours<T>::Indices Indices;
  const Vector zero = {}, one = zero + 1;
  for (int64_t at = 0; at < row.padded; at += kLanes) {
    Vector width = load<kLanes>(row.width + at), height = load<kLanes>(row.height + at);
    Vector x = load<kLanes>(row.x + at) * width - T(0.5), y = load<kLanes>(row.y + at) * height - T(0.5);
    Indices valid = (x >= -one) & (x < width) & (y >= -one) & (y < height);
    Indices width_index = load<kLanes>(row.width_index + at);
    Neighbours<T> across(x, width_index, valid);
    Neighbours<T> down(y, load<kLanes>(row.height_index + at), valid);
    Indices start = load<kLanes>(row.start + at);
    Indices top = start + down.before * width_index, bottom = start + down.after * width_index;
    store<kLanes>(row.token[0] + at, top + across.before);
    store<kLanes>(row.token[1] + at, top + across.after);
    store<kLanes>(row.token[2] + at, bottom + across.before);
    store<kLanes>(row.token[3] + at, bottom + across.after);
    Vector weight = load<kLanes>(row.weight + at);
    Vector above = weight * down.before_factor, below = weight * down.after_factor;
    store<kLanes>(row.factor[0] + at, above * across.before_factor);
    store<kLanes>(row.factor[1] + at, above * across.after_factor);
    store<kLanes>(row.factor[2] + at, below * across.before_factor);
    store<kLanes>(row.factor[3] + at, below * across.after_factor);
    if (!kBackward) continue;
    store<kLanes>(row.left + at, across.before_factor);
    store<kLanes>(row.right + at, across.after_factor);
    store<kLanes>(row.top + at, down.before_factor);
    store<kLanes>(row.bottom + at, down.after_factor);
    store<kLanes>(row.in_left + at, across.in_before ? one : zero);
    store<kLanes>(row.in_right + at, across.in_after ? one : zero);
    store<kLanes>(row.in_top + at, down.in_before ? one : zero);
    store<kLanes>(row.in_bottom + at, down.in_after ? one : zero);
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

// out[0..N) = sum over samples and corners of factor * value
template <int N, class T>
inline void gather(Width<N>, const Row<T>& row, const T* __restrict value, int64_t stride,
                   T* __restrict out) {
  constexpr int kLanes = run_lanes<T, N>(), kVectors = N / kLanes;
  typename Simd<T, kLanes>::Vector upper[kVectors] = {}, lower[kVectors] = {};  // two chains hide the latency
  for (int64_t sample = 0; sample < row.count; sample++) {
    for (int corner = 0; corner < 2; corner++) {
      const T* above = value + row.token[corner][sample] * stride;
      const T* below = value + row.token[corner + 2][sample] * stride;
      T above_factor = row.factor[corner][sample], below_factor = row.factor[corner + 2][sample];
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; i++) upper[i] += above_factor * load<kLanes>(above + i * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; i++) lower[i] += below_factor * load<kLanes>(below + i * kLanes);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kVectors; i++) store<kLanes>(out + i * kLanes, upper[i] + lower[i]);
}

// partial[0..4) of each sample -> dot, adding to what earlier channel runs left there
template <int N, class T>
inline void finish_dots(const Row<T>& row, bool is_first_run) {
  for (int corner = 0; corner < 4; corner++) {
    const T* partial = row.partial + corner * row.padded * N;
    T* dot = row.dot[corner];
    if constexpr (N == 1) {
      for (int64_t at = 0; at < row.count; at++) dot[at] = partial[at] + (is_first_run ? 0 : dot[at]);
    } else {
      for (int64_t at = 0; at < row.padded; at += 4) {
        auto sums = sums_of_four<N>(partial + at * N);
        store<4>(dot + at, is_first_run ? sums : sums + load<4>(dot + at));
      }
    }
  }
}

// grad_value += factor * grad_out, and dot = grad_out . value, at every corner
template <int N, class T>
inline void scatter(Width<N>, const Row<T>& row, const HeadView<T>& head, int64_t first_channel,
                    const T* grad_out) {
  constexpr int kLanes = run_lanes<T, N>(), kVectors = N / kLanes;
  typename Simd<T, kLanes>::Vector grad[kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kVectors; i++) grad[i] = load<kLanes>(grad_out + first_channel + i * kLanes);
  for (int64_t sample = 0; sample < row.count; sample++) {
    for (int corner = 0; corner < 4; corner++) {
      int64_t offset = row.token[corner][sample] * head.stride + first_channel;
      const T* value = head.value + offset;
      T* grad_value = head.grad_value + offset;
      T factor = row.factor[corner][sample];
      auto partial = grad[0] * load<kLanes>(value);
#pragma GCC unroll 8
      for (int i = 1; i < kVectors; i++) partial += grad[i] * load<kLanes>(value + i * kLanes);
      store<kLanes>(row.partial + (corner * row.padded + sample) * kLanes, partial);
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; i++) {
        store<kLanes>(grad_value + i * kLanes, load<kLanes>(grad_value + i * kLanes) + factor * grad[i]);
      }
    }
  }
  finish_dots<kLanes>(row, first_channel == 0);
}

// From the corners' dots to the gradients of x, y and weight, which take the place of dot[0..3).
template <class T>
inline void differentiate(const Row<T>& row) {
  constexpr int kLanes = lanes_of<T>();
  auto get = [](const T* from) { return load<kLanes>(from); };
  for (int64_t at = 0; at < row.padded; at += kLanes) {
    auto dot0 = get(row.dot[0] + at), dot1 = get(row.dot[1] + at), dot2 = get(row.dot[2] + at),
         dot3 = get(row.dot[3] + at);
    auto left = get(row.left + at), right = get(row.right + at), top = get(row.top + at),
         bottom = get(row.bottom + at), weight = get(row.weight + at);
    auto in_left = get(row.in_left + at), in_right = get(row.in_right + at), in_top = get(row.in_top + at),
         in_bottom = get(row.in_bottom + at);
    auto grad_x = top * (in_right * dot1 - in_left * dot0) + bottom * (in_right * dot3 - in_left * dot2);
    auto grad_y = left * (in_bottom * dot2 - in_top * dot0) + right * (in_bottom * dot3 - in_top * dot1);
    store<kLanes>(row.dot[0] + at, grad_x * weight * get(row.width + at));
    store<kLanes>(row.dot[1] + at, grad_y * weight * get(row.height + at));
    store<kLanes>(row.dot[2] + at,
                  top * (left * dot0 + right * dot1) + bottom * (left * dot2 + right * dot3));
  }
}

template <class T>
inline void store_sample_grads(const Problem<T>& problem, int64_t row_index, const Row<T>& row) {
  T* grad_locations = problem.grad_locations + row_index * row.count * 2;
  T* grad_weights = problem.grad_weights + row_index * row.count;
  for (int64_t sample = 0; sample < row.count; sample++) {
    grad_locations[2 * sample] = row.dot[0][sample];
    grad_locations[2 * sample + 1] = row.dot[1][sample];
    grad_weights[sample] = row.dot[2][sample];
  }
}

template <class T>
void forward(const Problem<T>& problem, const HeadView<T>& head, const Rows& rows, T* scratch) {
  const Row<T> row(problem, scratch);
  const int64_t num_channels = problem.num_channels;
  for (int64_t query = rows.first_query; query < rows.last_query; query++) {
    int64_t row_index = row_number(problem, rows, query);
    load_samples(problem, row_index, row);
    locate<false>(row);
    for_channel_runs(num_channels, [&](auto width, int64_t first) {
      gather(width, row, head.value + first, head.stride, row.channels + first);
    });
    with_storage(problem.storage, T(), [&](auto stored) {
      auto* out = static_cast<decltype(stored)*>(problem.out) + row_index * num_channels;
      narrow_all(row.channels, out, num_channels);
    });
  }
}

template <class T>
void backward(const Problem<T>& problem, const HeadView<T>& head, const Rows& rows, T* scratch) {
  const Row<T> row(problem, scratch);
  const int64_t num_channels = problem.num_channels;
  for (int64_t query = rows.first_query; query < rows.last_query; query++) {
    int64_t row_index = row_number(problem, rows, query);
    with_storage(problem.storage, T(), [&](auto stored) {
      auto* grad_out = static_cast<const decltype(stored)*>(problem.grad_out) + row_index * num_channels;
      widen_all(grad_out, row.channels, num_channels);
    });
    load_samples(problem, row_index, row);
    locate<true>(row);
    for_channel_runs(num_channels,
                     [&](auto width, int64_t first) { scatter(width, row, head, first, row.channels); });
    differentiate(row);
    store_sample_grads(problem, row_index, row);
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
