// float16 and bfloat16 for the emulation, with the conversions of the CPU kernels, which are tested
// separately.
#pragma once

#ifndef DETRS_VECTOR_BYTES
#define DETRS_VECTOR_BYTES 16
#endif
#include "cpu/storage.h"

using __half = detrs::cpu::Float16;
using __nv_bfloat16 = detrs::cpu::BFloat16;

inline __half __ushort_as_half(unsigned short bits) {
  return {bits};
}
inline unsigned short __half_as_ushort(__half number) {
  return number.bits;
}
inline float __half2float(__half number) {
  return detrs::cpu::widen(number);
}
inline __half __float2half_rn(float number) {
  __half narrowed;
  detrs::cpu::narrow(number, &narrowed);
  return narrowed;
}
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 number) {
  return number.bits;
}
inline __nv_bfloat16 __float2bfloat16_rn(float number) {
  __nv_bfloat16 narrowed;
  detrs::cpu::narrow(number, &narrowed);
  return narrowed;
}
