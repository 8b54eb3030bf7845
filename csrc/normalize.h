// Normalization of images: the interface between the torch boundary (library.cpp) and cpu/normalize.cpp.
#pragma once

#include <cstdint>

namespace detrs {

// One batch; everything is contiguous, last index fastest.
struct NormalizeProblem {
  int64_t num_images, height, width;
  const uint8_t* pixels;    // [images, height, width, 3]
  const int64_t* sizes;     // [images, 2] (height, width) of each image without its padding
  const float *mean, *std;  // [3]
  float* out;               // as pixels
};

namespace cpu {

// out = (pixels - mean) / std, and 0 in the padding.
void normalize(const NormalizeProblem& problem);

}  // namespace cpu
}  // namespace detrs
