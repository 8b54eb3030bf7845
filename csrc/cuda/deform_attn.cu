// Chooses the kernel for a call and launches it.
#include <stdexcept>
#include <string>

#include "deform_attn.h"
#include "kernels.cuh"

namespace detrs::cuda {
namespace {

void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  std::string problem = std::string("deform_attn on CUDA: ") + cudaGetErrorString(status);
  if (status == cudaErrorNoKernelImageForDevice)
    problem += "; detrs.ops.native_status() shows the GPUs that the library was built for";
  throw std::runtime_error(problem);
}

template <class T>
Call<T> call_of(const Problem<T>& problem) {
  Call<T> call{};
  call.problem = problem;
  call.num_samples = static_cast<int>(problem.num_samples());
  call.num_points = static_cast<int>(problem.num_points);
  call.token_stride = static_cast<uint32_t>(problem.num_heads * problem.num_channels);
  call.image_stride = problem.num_tokens * problem.num_heads * problem.num_channels;
  call.half_step = static_cast<T>(0.5) / static_cast<T>(problem.num_points);
  int64_t start = 0;
  for (int64_t level = 0; level < problem.num_levels; level++) {
    const int64_t height = problem.shapes[2 * level], width = problem.shapes[2 * level + 1];
    call.levels[level] = {static_cast<int>(height), static_cast<int>(width), static_cast<int>(start),
                          1 / static_cast<T>(height), 1 / static_cast<T>(width)};
    start += height * width;
  }
  return call;
}

// How the channels of a row are divided: kVector per lane, over kLanes lanes.
template <class Stored_, int kVector_, int kLanes_>
struct Division {
  using Stored = Stored_;
  static constexpr int kVector = kVector_, kLanes = kLanes_;
};

template <class Stored, int kVector, class Use>
void divide_channels(int64_t num_channels, const Use& use) {
  if (num_channels <= 4 * kVector) return use(Division<Stored, kVector, 4>());
  if (num_channels <= 8 * kVector) return use(Division<Stored, kVector, 8>());
  if (num_channels <= 16 * kVector) return use(Division<Stored, kVector, 16>());
  if constexpr (kVector == 4) use(Division<Stored, kVector, 32>());
}

template <class Half, class Use>
void divide_half_channels(int64_t num_channels, const Use& use) {
  num_channels % 8 == 0 ? divide_channels<Half, 8>(num_channels, use) : use(Division<Half, 4, 32>());
}

template <class Use>
void with_division(const Problem<float>& problem, const Use& use) {
  if (problem.storage == Storage::float32) return divide_channels<float, 4>(problem.num_channels, use);
  if (problem.storage == Storage::bfloat16)
    return divide_half_channels<__nv_bfloat16>(problem.num_channels, use);
  divide_half_channels<__half>(problem.num_channels, use);
}

template <class Use>
void with_division(const Problem<double>&, const Use& use) {
  use(Division<double, 4, 32>());
}

template <class T, class Kernel>
void launch(const Kernel& kernel, Call<T> call, int64_t rows_per_block, size_t shared_size,
            cudaStream_t stream) {
  const Problem<T>& problem = call.problem;
  const int64_t blocks_per_head = (problem.num_queries + rows_per_block - 1) / rows_per_block;
  const int64_t num_blocks = problem.num_images * problem.num_heads * blocks_per_head;
  if (num_blocks == 0) return;  // CUDA refuses to launch an empty grid
  if (num_blocks >= int64_t(1) << 31)
    throw std::runtime_error("deform_attn on CUDA: 2^31 blocks of rows or more");
  call.blocks_per_head = static_cast<uint32_t>(blocks_per_head);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(num_blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared_size;
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, call));
}

}  // namespace

template <class T>
void forward(const Problem<T>& problem, void* stream) {
  const Call<T> call = call_of(problem);
  with_division(problem, [&](auto division) {
    using D = decltype(division);
    launch(forward_kernel<typename D::Stored, D::kVector, D::kLanes>, call, kRows<D::kLanes>,
           sizeof(ForwardShared<T, D::kLanes>), static_cast<cudaStream_t>(stream));
  });
}

template <class T>
void backward(const Problem<T>& problem, void* stream) {
  const Call<T> call = call_of(problem);
  with_division(problem, [&](auto division) {
    using D = decltype(division);
    launch(backward_kernel<typename D::Stored, D::kVector, D::kLanes>, call, kRows<D::kLanes>,
           sizeof(BackwardShared<T, D::kLanes>), static_cast<cudaStream_t>(stream));
  });
}

template void forward(const Problem<float>&, void*);
template void forward(const Problem<double>&, void*);
template void backward(const Problem<float>&, void*);
template void backward(const Problem<double>&, void*);

}  // namespace detrs::cuda
