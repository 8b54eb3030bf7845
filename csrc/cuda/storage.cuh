// Converts between the dtype in memory and the type of the arithmetic. Loads and stores are 16 bytes wide, or
// 8 for half precision with a number of channels that is not a multiple of 8.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace detrs::cuda {
namespace {

template <class Stored>
struct ArithmeticOf {
  using Type = float;
};
template <>
struct ArithmeticOf<double> {
  using Type = double;
};
template <class Stored>
using Arithmetic = typename ArithmeticOf<Stored>::Type;

// A 32-bit word holds two numbers, the first in the low half.
__device__ __forceinline__ void widen(__nv_bfloat16, uint32_t word, float* numbers) {
  numbers[0] = __uint_as_float(word << 16);
  numbers[1] = __uint_as_float(word & 0xffff0000u);
}
__device__ __forceinline__ void widen(__half, uint32_t word, float* numbers) {
  numbers[0] = __half2float(__ushort_as_half(static_cast<unsigned short>(word)));
  numbers[1] = __half2float(__ushort_as_half(static_cast<unsigned short>(word >> 16)));
}
__device__ __forceinline__ uint32_t narrow(__nv_bfloat16, float first, float second) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(first)) |
         static_cast<uint32_t>(__bfloat16_as_ushort(__float2bfloat16_rn(second))) << 16;
}
__device__ __forceinline__ uint32_t narrow(__half, float first, float second) {
  return __half_as_ushort(__float2half_rn(first)) |
         static_cast<uint32_t>(__half_as_ushort(__float2half_rn(second))) << 16;
}

__device__ __forceinline__ void load(const float* from, float (&numbers)[4]) {
  const float4 loaded = __ldg(reinterpret_cast<const float4*>(from));
  numbers[0] = loaded.x, numbers[1] = loaded.y, numbers[2] = loaded.z, numbers[3] = loaded.w;
}
__device__ __forceinline__ void load(const double* from, double (&numbers)[4]) {
  const double2 first = __ldg(reinterpret_cast<const double2*>(from));
  const double2 second = __ldg(reinterpret_cast<const double2*>(from) + 1);
  numbers[0] = first.x, numbers[1] = first.y, numbers[2] = second.x, numbers[3] = second.y;
}
template <class Half>
__device__ __forceinline__ void load(const Half* from, float (&numbers)[8]) {
  const uint4 loaded = __ldg(reinterpret_cast<const uint4*>(from));
  widen(Half(), loaded.x, numbers), widen(Half(), loaded.y, numbers + 2);
  widen(Half(), loaded.z, numbers + 4), widen(Half(), loaded.w, numbers + 6);
}
template <class Half>
__device__ __forceinline__ void load(const Half* from, float (&numbers)[4]) {
  const uint2 loaded = __ldg(reinterpret_cast<const uint2*>(from));
  widen(Half(), loaded.x, numbers), widen(Half(), loaded.y, numbers + 2);
}

__device__ __forceinline__ void store(const float (&numbers)[4], float* to) {
  *reinterpret_cast<float4*>(to) = make_float4(numbers[0], numbers[1], numbers[2], numbers[3]);
}
__device__ __forceinline__ void store(const double (&numbers)[4], double* to) {
  reinterpret_cast<double2*>(to)[0] = make_double2(numbers[0], numbers[1]);
  reinterpret_cast<double2*>(to)[1] = make_double2(numbers[2], numbers[3]);
}
template <class Half>
__device__ __forceinline__ void store(const float (&numbers)[8], Half* to) {
  *reinterpret_cast<uint4*>(to) =
      make_uint4(narrow(Half(), numbers[0], numbers[1]), narrow(Half(), numbers[2], numbers[3]),
                 narrow(Half(), numbers[4], numbers[5]), narrow(Half(), numbers[6], numbers[7]));
}
template <class Half>
__device__ __forceinline__ void store(const float (&numbers)[4], Half* to) {
  *reinterpret_cast<uint2*>(to) =
      make_uint2(narrow(Half(), numbers[0], numbers[1]), narrow(Half(), numbers[2], numbers[3]));
}

// to[0..N) += factor * numbers, atomically. From sm_90 on, one instruction adds four floats.
template <int N>
__device__ __forceinline__ void add(float factor, const float (&numbers)[N], float* to) {
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    const float4 sum = make_float4(factor * numbers[i], factor * numbers[i + 1], factor * numbers[i + 2],
                                   factor * numbers[i + 3]);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    // Atomic for each component only, which suffices: they are independent sums.
    atomicAdd(reinterpret_cast<float4*>(to + i), sum);
#else
    atomicAdd(to + i, sum.x), atomicAdd(to + i + 1, sum.y);
    atomicAdd(to + i + 2, sum.z), atomicAdd(to + i + 3, sum.w);
#endif
  }
}
template <int N>
__device__ __forceinline__ void add(double factor, const double (&numbers)[N], double* to) {
#pragma unroll
  for (int i = 0; i < N; i++) atomicAdd(to + i, factor * numbers[i]);
}

// x and y, which are adjacent in memory.
__device__ __forceinline__ float2 load_pair(const float* from) {
  return __ldg(reinterpret_cast<const float2*>(from));
}
__device__ __forceinline__ double2 load_pair(const double* from) {
  return __ldg(reinterpret_cast<const double2*>(from));
}
__device__ __forceinline__ void store_pair(float x, float y, float* to) {
  *reinterpret_cast<float2*>(to) = make_float2(x, y);
}
__device__ __forceinline__ void store_pair(double x, double y, double* to) {
  *reinterpret_cast<double2*>(to) = make_double2(x, y);
}

}  // namespace
}  // namespace detrs::cuda
