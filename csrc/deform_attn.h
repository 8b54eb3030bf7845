// Multi-scale deformable attention: what the Python boundary (library.cpp), the division of work
// (cpu/deform_attn.cpp) and the kernels (cpu/kernel_code.h) say to each other. README.md has the whole
// picture.
#pragma once

#include <cstdint>

namespace detrs {

// How a tensor's numbers lie in memory. Arithmetic is float for all but float64, and double for that.
enum class Storage { float32, float64, bfloat16, float16 };

// One call. T is the type of the arithmetic; everything is contiguous, last index fastest.
// A "row" is one (image, query, head); a row looks at num_levels * num_points samples.
//
// There are two forms. The plain one has reference_size 0 and takes locations and weights as they are. The
// fused one has a reference point (size 2: x, y) or box (4: centre x, y, width, height) per query and level,
// and
//   location = point + offset / (level's width, height),  or  centre + offset / num_points * (box's sides /
//   2) weights  = softmax of the row's logits
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
  void* grad_value;      // backward: as value, but the CUDA kernels sum in T
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

// The instruction set that forward and backward use on this machine: "avx512", "avx2" or "baseline".
const char* instruction_set();

}  // namespace cpu
}  // namespace detrs
