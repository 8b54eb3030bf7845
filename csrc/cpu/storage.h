// Converts between the dtype in memory and the type of the arithmetic (double for float64, else float).
#pragma once

#include <type_traits>

#include "kernels.h"
#include "simd.h"

namespace detrs::cpu {
namespace {

template <class To, class From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "same bits");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

template <class T>
inline T widen(T number) {
  return number;
}

inline float widen(BFloat16 number) {
  return bits_as<float>(uint32_t(number.bits) << 16);
}

inline float widen(Float16 number) {
  uint32_t sign = uint32_t(number.bits & 0x8000u) << 16;
  uint32_t magnitude = uint32_t(number.bits & 0x7fffu) << 13;
  // The exponent biases differ by 112. The product also turns subnormal float16 into normal floats.
  uint32_t finite = bits_as<uint32_t>(bits_as<float>(magnitude) * 0x1p112f);
  return bits_as<float>(sign | ((number.bits & 0x7c00u) == 0x7c00u ? magnitude | 0x7f800000u : finite));
}

// narrow rounds to nearest, ties to even.
template <class T>
inline void narrow(T number, T* to) {
  *to = number;
}

inline void narrow(float number, BFloat16* to) {
  uint32_t bits = bits_as<uint32_t>(number);
  uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to->bits = uint16_t(number != number ? 0x7fc0u : rounded);
}

inline void narrow(float number, Float16* to) {
  uint32_t bits = bits_as<uint32_t>(number), magnitude = bits & 0x7fffffffu;
  // The exponent's bias is 127 in float32 and 15 in float16: -112 << 23, plus 0xfff, and 1 for an odd last
  // bit, to round halves to even.
  uint32_t normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  // One unit in the last place of 0.5f is the smallest subnormal of float16: the addition rounds to it.
  uint32_t subnormal = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t result = magnitude < 0x38800000u ? subnormal : normal;  // 2^-14, the smallest normal number
  if (magnitude >= 0x477ff000u) result = 0x7c00u;                  // 65520, the first that rounds to infinity
  if (number != number) result = 0x7e00u;
  to->bits = uint16_t((bits >> 16 & 0x8000u) | result);
}

// Calls use(x) with an x of the type in memory.
template <class Use>
inline void with_storage(Storage, double, const Use& use) {
  use(double());
}

template <class Use>
inline void with_storage(Storage storage, float, const Use& use) {
  if (storage == Storage::float32) return use(float());
  if (storage == Storage::bfloat16) return use(BFloat16());
  use(Float16());
}

template <class Stored, class T>
inline void widen_all(const Stored* from, T* to, int64_t count) {
  for (int64_t i = 0; i < count; i++) to[i] = widen(from[i]);
}

template <class Stored, class T>
inline void narrow_all(const T* from, Stored* to, int64_t count) {
  for (int64_t i = 0; i < count; i++) narrow(from[i], to + i);
}

// Loads N numbers as vectors of T, possibly in another order. `order_like` loads N numbers of T in that same
// order, and `store_ordered` stores vectors back in the original order. Only bfloat16 is reordered: it is
// fastest to convert in pairs, even elements to one vector and odd elements to another.
template <class Stored, class T, int N>
struct Run {
  static constexpr int kLanes = N < lanes_of<T>() ? N : lanes_of<T>(), kVectors = N / kLanes;
  static constexpr bool kPairs = std::is_same_v<Stored, BFloat16> && kVectors % 2 == 0;
  typedef typename Simd<T, kLanes>::Vector Vector;
  Vector vector[kVectors];

  static inline Run load_wide(const Stored* from) {
    Run run;
    if constexpr (kPairs) {
      typedef typename Simd<uint32_t, kLanes>::Vector Bits;
      for (int i = 0; i < kVectors; i += 2) {
        const auto bits = bits_as<Bits>(load<2 * kLanes>(&from[i * kLanes].bits));
        run.vector[i] = bits_as<Vector>(bits << 16);
        run.vector[i + 1] = bits_as<Vector>(bits & 0xffff0000u);
      }
    } else if constexpr (std::is_same_v<Stored, T>) {
      for (int i = 0; i < kVectors; i++) run.vector[i] = load<kLanes>(from + i * kLanes);
    } else {
      T wide[N];
      for (int i = 0; i < N; i++) wide[i] = widen(from[i]);
      for (int i = 0; i < kVectors; i++) run.vector[i] = load<kLanes>(wide + i * kLanes);
    }
    return run;
  }

  static inline Run order_like(const T* from) {
    Run run;
    T ordered[N];
    for (int i = 0; i < N; i++) ordered[index_of(i)] = from[i];
    for (int i = 0; i < kVectors; i++) run.vector[i] = load<kLanes>(ordered + i * kLanes);
    return run;
  }

  inline void store_ordered(T* to) const {
    T ordered[N];
    for (int i = 0; i < kVectors; i++) store<kLanes>(ordered + i * kLanes, vector[i]);
    for (int i = 0; i < N; i++) to[i] = ordered[index_of(i)];
  }

 private:
  static constexpr int index_of(int i) {
    const int pair = i / (2 * kLanes) * (2 * kLanes);
    return kPairs ? pair + (i - pair) / 2 + i % 2 * kLanes : i;
  }
};

}  // namespace
}  // namespace detrs::cpu
