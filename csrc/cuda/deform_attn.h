// What library.cpp calls. No CUDA header here: library.cpp is compiled by the C++ compiler.
#pragma once

#include "../deform_attn.h"

namespace detrs::cuda {

// Bytes of device memory that a call needs for its levels; mostly 0.
int64_t level_memory_size(int64_t num_levels);

// The calls on a CUDA stream (a cudaStream_t) of the current device. All pointers are to device memory and
// start at a multiple of 16 bytes, but `shapes`, which is the host's. grad_value is a T, whatever the
// storage: sums are taken there; it and grad_reference must be zero before. num_channels is a multiple of 4,
// at most 128. Throw std::runtime_error with CUDA's own words.
template <class T>
void forward(const Problem<T>& problem, void* level_memory, void* stream);

template <class T>
void backward(const Problem<T>& problem, void* level_memory, void* stream);

}  // namespace detrs::cuda
