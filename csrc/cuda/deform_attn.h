// The interface for library.cpp. It includes no CUDA header, because library.cpp is compiled by the C++
// compiler.
#pragma once

#include "../deform_attn.h"

namespace detrs::cuda {

// Levels are kernel parameters, of which there are 4 KB: a graph capture records them by value.
constexpr int kMaxLevels = 32;

// Launch the kernels on a CUDA stream (a cudaStream_t) of the current device, and return without waiting for
// them. All pointers are to device memory and aligned to 16 bytes, except `shapes`, which is in host memory.
// grad_value is of type T for every storage, since gradients are summed there; it and grad_reference must be
// zero before the call. num_channels is a multiple of 4, from 4 to 128, and num_levels at most kMaxLevels.
// Throw std::runtime_error with the message of CUDA.
template <class T>
void forward(const Problem<T>& problem, void* stream);

template <class T>
void backward(const Problem<T>& problem, void* stream);

}  // namespace detrs::cuda
