// Multi-scale deformable attention: the interface between the torch boundary (library.cpp), the division of
// work (cpu/deform_attn.cpp, cuda/deform_attn.cu) and the kernels. README.md has an overview.
#pragma once

#include <cstdint>

namespace detrs {

// The dtype of a tensor in memory. Arithmetic is double for float64, and float for all others.
enum class Storage { float32, float64, bfloat16, float16 };

// One call. T is the type of the arithmetic; everything is contiguous, last index fastest.
// A "row" is one (image, query, head) and reads num_levels * num_points samples.
//
// There are two forms. The plain form has reference_size 0 and takes locations and weights directly. The
// fused form has a reference per query and level, a point (size 2: x, y) or a box (size 4: center x, y,
// width, height), and computes
//   location = point + offset / (width, height) of the level
//   or       = center + offset / num_points * (width, height) of the box / 2
//   weights  = softmax of the logits of the row
template <class T>
struct Problem {
  int64_t num_images, num_tokens, num_heads, num_channels;
  int64_t num_queries, num_levels, num_points, reference_size;
  const int64_t* shapes;  // [levels, 2] (height, width)
  Storage storage;        // of value, out, grad_out, grad_value

  const void* value;   // [images, tokens, heads, channels]
  const T* reference;  // fused: [images, queries, levels, reference_size]
  const T* locations;  // [images, queries, heads, levels, points, 2] (x, y) in [0, 1]; fused: offsets
  const T* weights;    // [images, queries, heads, levels, points]; fused: logits

  void* out;             // forward:  [images, queries, heads, channels]
  const void* grad_out;  // backward: as out
  void* grad_value;      // backward: as value, but of type T on CUDA, where it is summed
  T* grad_reference;     // backward, fused: [images, queries, heads, levels, reference_size], or null
  T* grad_locations;     // backward: as locations
  T* grad_weights;       // backward: as weights

  int64_t num_samples() const { return num_levels * num_points; }
};

namespace cpu {

template <class T>
void forward(const Problem<T>& problem);

template <class T>
void backward(const Problem<T>& problem);

// Returns the instruction set that forward and backward use on this machine: "avx512", "avx2" or "baseline".
const char* instruction_set();

}  // namespace cpu
}  // namespace detrs
