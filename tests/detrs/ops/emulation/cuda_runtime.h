// As much of CUDA as the kernels use, on the CPU, so that the C++ compiler can compile their very source and
// its sanitizers can watch it run. It stands in for CUDA's header of this name.
//
// Each lane is a fiber. A lane runs until it must wait for its warp: at a shuffle or __syncwarp. When all 32
// lanes have come to the same one, all go on, in an order that each launch chooses anew: lanes that lack a
// barrier between them therefore meet in the wrong order. Shared memory starts as NaN (as an integer, -1),
// and is guarded behind its end. Atomics are plain additions: this cannot show what only true parallelism
// would.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define __host__
#define __device__
#define __global__
#define __shared__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1) : x(x) {}
};
inline dim3 threadIdx, blockIdx;

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) {
  return {x, y};
}
inline float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}
inline double2 make_double2(double x, double y) {
  return {x, y};
}
inline uint2 make_uint2(unsigned x, unsigned y) {
  return {x, y};
}
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}

using std::exp, std::max, std::min;

template <class T>
T __ldg(const T* from) {
  return *from;
}
inline float __uint_as_float(uint32_t bits) {
  float number;
  std::memcpy(&number, &bits, sizeof number);
  return number;
}
template <class T>
void atomicAdd(T* to, T number) {
  *to += number;
}
inline void atomicAdd(float4* to, float4 numbers) {
  to->x += numbers.x, to->y += numbers.y, to->z += numbers.z, to->w += numbers.w;
}

namespace emulation {

constexpr int kWarpSize = 32;
constexpr size_t kStackSize = 1 << 16;
constexpr unsigned char kGuard = 0xa5;

[[noreturn]] inline void fail(const char* what, int line) {
  std::fprintf(stderr, "emulation: block %u, lane %u: %s (line %d)\n", blockIdx.x, threadIdx.x, what, line);
  std::exit(3);
}

struct Lane {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackSize]};
  bool finished = false;
  int waits_at = 0;               // the source line of the barrier; 0: it can run
  uint64_t given = 0, taken = 0;  // at the barrier it waits at; at the last one where its warp came together
};

// In which order lanes run: ascending, descending, or at random.
struct Order {
  enum Kind { ascending, descending, random } kind = ascending;
  std::minstd_rand generator;

  int pick(const std::vector<int>& ready) {
    if (kind == random) return ready[generator() % ready.size()];
    return kind == ascending ? ready.front() : ready.back();
  }
};

inline Order order;
inline std::vector<Lane> lanes;
inline std::function<void()> body;
inline ucontext_t scheduler;
inline unsigned char* shared_memory;  // main.cpp says where it is
inline size_t shared_capacity;

// A switch of stacks, of which the address sanitizer must be told.
inline const void* scheduler_stack;
inline size_t scheduler_stack_size;
inline void switch_stack(ucontext_t* from, ucontext_t* to, const void* stack, size_t size) {
#ifdef __SANITIZE_ADDRESS__
  void* saved;
  __sanitizer_start_switch_fiber(&saved, stack, size);
  swapcontext(from, to);
  __sanitizer_finish_switch_fiber(saved, nullptr, nullptr);
#else
  (void)stack, (void)size;
  swapcontext(from, to);
#endif
}

inline void run_lane() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
  body();
  lanes[threadIdx.x].finished = true;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(nullptr, scheduler_stack, scheduler_stack_size);
#endif
}

// Waits for the warp; returns what lane `partner` gave.
inline uint64_t exchange(uint64_t given, int partner, int line) {
  const unsigned me = threadIdx.x;
  lanes[me].given = given, lanes[me].waits_at = line;
  switch_stack(&lanes[me].context, &scheduler, scheduler_stack, scheduler_stack_size);
  const int first = static_cast<int>(me) / kWarpSize * kWarpSize;
  return lanes[first + partner].taken;
}

// Lets a warp go on if all its lanes wait.
inline void release(int first) {
  const int line = lanes[first].waits_at;
  for (int i = first; i < first + kWarpSize; i++) {
    if (lanes[i].finished || lanes[i].waits_at == 0) return;
    if (lanes[i].waits_at != line) fail("lanes of a warp wait at different places", lanes[i].waits_at);
  }
  for (int i = first; i < first + kWarpSize; i++) lanes[i].waits_at = 0, lanes[i].taken = lanes[i].given;
}

inline void run_block() {
  for (Lane& lane : lanes) {
    lane.finished = false, lane.waits_at = 0;
    getcontext(&lane.context);
    lane.context.uc_stack.ss_sp = lane.stack.get(), lane.context.uc_stack.ss_size = kStackSize;
    lane.context.uc_link = &scheduler;
    makecontext(&lane.context, run_lane, 0);
  }
  std::vector<int> ready;
  for (;;) {
    ready.clear();
    const Lane* waiting = nullptr;
    for (size_t i = 0; i < lanes.size(); i++) {
      if (lanes[i].waits_at != 0) waiting = &lanes[i];
      if (!lanes[i].finished && lanes[i].waits_at == 0) ready.push_back(static_cast<int>(i));
    }
    if (ready.empty() && waiting != nullptr) fail("waits for lanes that have finished", waiting->waits_at);
    if (ready.empty()) return;
    const int next = order.pick(ready);
    threadIdx.x = static_cast<unsigned>(next);
    switch_stack(&scheduler, &lanes[next].context, lanes[next].stack.get(), kStackSize);
    release(next / kWarpSize * kWarpSize);
  }
}

inline void poison_shared_memory(size_t size) {
  if (size > shared_capacity) fail("too much shared memory", 0);
#ifdef __SANITIZE_ADDRESS__
  ASAN_UNPOISON_MEMORY_REGION(shared_memory, shared_capacity);
#endif
  std::memset(shared_memory, 0xff, size);
  std::memset(shared_memory + size, kGuard, shared_capacity - size);
#ifdef __SANITIZE_ADDRESS__
  ASAN_POISON_MEMORY_REGION(shared_memory + size, shared_capacity - size);
#endif
}

inline void check_guard(size_t size) {
#ifndef __SANITIZE_ADDRESS__
  for (size_t i = size; i < shared_capacity; i++)
    if (shared_memory[i] != kGuard) fail("wrote behind the end of shared memory", 0);
#else
  (void)size;
#endif
}

}  // namespace emulation

inline void __syncwarp(unsigned = ~0u, int line = __builtin_LINE()) {
  emulation::exchange(0, 0, line);
}

template <class T>
T __shfl_xor_sync(unsigned, T number, int mask, int line = __builtin_LINE()) {
  uint64_t bits = 0;
  std::memcpy(&bits, &number, sizeof number);
  bits = emulation::exchange(bits, (static_cast<int>(threadIdx.x) % emulation::kWarpSize) ^ mask, line);
  std::memcpy(&number, &bits, sizeof number);
  return number;
}

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
enum cudaMemcpyKind { cudaMemcpyHostToDevice };

inline const char* cudaGetErrorString(cudaError_t) {
  return "none";
}

inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, size);
  return cudaSuccess;
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  emulation::lanes.resize(config->blockDim.x);
  emulation::body = [&] { kernel(arguments...); };
  for (blockIdx.x = 0; blockIdx.x < config->gridDim.x; blockIdx.x++) {
    emulation::poison_shared_memory(config->dynamicSmemBytes);
    emulation::run_block();
    emulation::check_guard(config->dynamicSmemBytes);
  }
  return cudaSuccess;
}
