// The part of CUDA that the kernels use, on the CPU, so that the C++ compiler can compile their source and
// its sanitizers can check it. It replaces the CUDA header of this name.
//
// Each lane is a fiber. A lane runs until it must wait for its warp, at a shuffle or __syncwarp. When all 32
// lanes have reached the same one, all continue, in an order that differs between launches: without a barrier
// between them, lanes access memory in the wrong order. Shared memory starts as NaN (-1 as an integer), and
// its end is guarded. Atomics are plain additions: errors that need true parallelism are not found.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
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
  std::_Exit(3);  // not exit, which would free the stack that this function runs on
}

// A stack with the point at which to resume. The first switch is by setcontext, which calls run_lane.
struct Fiber {
  ucontext_t context;
  jmp_buf place;
  bool started = false;
  const void* stack = nullptr;  // for the address sanitizer
  size_t stack_size = 0;
};

struct Lane {
  Fiber fiber;
  std::unique_ptr<char[]> stack{new char[kStackSize]};
  int waits_at = 0;               // source line of the barrier; 0 while the lane runs
  uint64_t given = 0, taken = 0;  // values at this barrier; at the last completed one
};

// The order in which the lanes of a warp run: ascending, descending, or random.
struct Order {
  enum Kind { ascending, descending, random } kind = ascending;
  std::minstd_rand generator;
};

inline Order order;
inline std::vector<Lane> lanes;
inline std::vector<int> num_waiting;  // by warp
inline std::deque<int> ready;
inline std::function<void()> body;
inline Fiber scheduler;
inline int planted = 0;  // the active one of the faults that a test injected into the kernels; 0: none
inline unsigned char* shared_memory;  // set by main.cpp
inline size_t shared_capacity;

inline void switch_fiber(Fiber& from, Fiber& to) {
#ifdef __SANITIZE_ADDRESS__
  void* saved;
  __sanitizer_start_switch_fiber(&saved, to.stack, to.stack_size);
#endif
  if (_setjmp(from.place) == 0) {
    if (to.started) _longjmp(to.place, 1);
    to.started = true;
    setcontext(&to.context);
  }
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(saved, nullptr, nullptr);
#endif
}

// Puts the lanes of a warp, which has completed a barrier, at the end of the queue.
inline void let_warp_run(int first) {
  int numbers[kWarpSize];
  for (int i = 0; i < kWarpSize; i++)
    numbers[i] = first + (order.kind == Order::descending ? kWarpSize - 1 - i : i);
  if (order.kind == Order::random) std::shuffle(numbers, numbers + kWarpSize, order.generator);
  ready.insert(ready.end(), numbers, numbers + kWarpSize);
}

inline int next_lane() {
  const bool from_front = order.kind != Order::random || order.generator() % 2 == 0;
  const int lane = from_front ? ready.front() : ready.back();
  from_front ? ready.pop_front() : ready.pop_back();
  return lane;
}

inline void run_lane() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &scheduler.stack, &scheduler.stack_size);
#endif
  body();
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(nullptr, scheduler.stack, scheduler.stack_size);
#endif
  _longjmp(scheduler.place, 1);
}

// Waits for the warp; returns the value `given` of lane `partner`, or with partner -1 whether one is not 0.
inline uint64_t exchange(uint64_t given, int partner, int line) {
  const int me = static_cast<int>(threadIdx.x), warp = me / kWarpSize, first = warp * kWarpSize;
  lanes[me].given = given, lanes[me].waits_at = line;
  if (++num_waiting[warp] == kWarpSize) {
    for (int i = first; i < first + kWarpSize; i++) {
      if (lanes[i].waits_at != line) fail("lanes of a warp wait at different places", line);
      lanes[i].waits_at = 0, lanes[i].taken = lanes[i].given;
    }
    num_waiting[warp] = 0;
    let_warp_run(first);
  }
  switch_fiber(lanes[me].fiber, scheduler);
  if (partner >= 0) return lanes[first + partner].taken;
  return std::any_of(&lanes[first], &lanes[first] + kWarpSize, [](const Lane& lane) { return lane.taken; });
}

inline void run_block(unsigned num_lanes) {
  lanes.resize(num_lanes);
  scheduler.started = true;
  num_waiting.assign(num_lanes / kWarpSize, 0);
  for (Lane& lane : lanes) {
    lane.waits_at = 0;
    Fiber& fiber = lane.fiber;
    fiber.started = false, fiber.stack = lane.stack.get(), fiber.stack_size = kStackSize;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = lane.stack.get(), fiber.context.uc_stack.ss_size = kStackSize;
    makecontext(&fiber.context, run_lane, 0);
  }
  for (unsigned first = 0; first < num_lanes; first += kWarpSize) let_warp_run(static_cast<int>(first));
  while (!ready.empty()) {
    const int next = next_lane();
    threadIdx.x = static_cast<unsigned>(next);
    switch_fiber(scheduler, lanes[next].fiber);
  }
  for (size_t i = 0; i < num_lanes; i++)
    if (lanes[i].waits_at != 0) fail("lanes wait for others that have finished", lanes[i].waits_at);
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

inline bool __any_sync(unsigned, bool given, int line = __builtin_LINE()) {
  return emulation::exchange(given, -1, line);
}

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0, cudaErrorNoKernelImageForDevice = 209;

inline const char* cudaGetErrorString(cudaError_t) {
  return "none";
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  emulation::body = [&] { kernel(arguments...); };
  for (blockIdx.x = 0; blockIdx.x < config->gridDim.x; blockIdx.x++) {
    emulation::poison_shared_memory(config->dynamicSmemBytes);
    emulation::run_block(config->blockDim.x);
    emulation::check_guard(config->dynamicSmemBytes);
  }
  return cudaSuccess;
}
