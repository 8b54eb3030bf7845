// Vectors of the width of this compilation, by the vector extensions of the compilers.
// Everything is in an anonymous namespace: the linker must never merge a function that is compiled for
// AVX-512 with the one of the same name for an older machine. For the same reason no standard header with
// functions is included.
#pragma once

#include <cstdint>

namespace detrs::cpu {
namespace {

template <class T>
constexpr int lanes_of() {
  return DETRS_VECTOR_BYTES / sizeof(T) > 4 ? DETRS_VECTOR_BYTES / sizeof(T) : 4;
}

template <class T, int N>
struct Simd {
  typedef T Vector __attribute__((vector_size(N * sizeof(T))));
  typedef T Unaligned __attribute__((vector_size(N * sizeof(T)), aligned(alignof(T)), may_alias));
};

template <class T>
struct Simd<T, 1> {
  typedef T Vector;
  typedef T Unaligned;
};

template <class T>
struct IndexOf;  // the integer as wide as T, so that a comparison of T gives a mask for it
template <>
struct IndexOf<float> {
  typedef int32_t type;
};
template <>
struct IndexOf<double> {
  typedef int64_t type;
};
template <class T>
using Index = typename IndexOf<T>::type;

template <int N, class T>
inline typename Simd<T, N>::Vector load(const T* from) {
  return *reinterpret_cast<const typename Simd<T, N>::Unaligned*>(from);
}

template <int N, class T>
inline void store(T* to, typename Simd<T, N>::Vector values) {
  *reinterpret_cast<typename Simd<T, N>::Unaligned*>(to) = values;
}

#if defined(__clang__) || __GNUC__ >= 12
#define DETRS_SHUFFLE(T, a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define DETRS_SHUFFLE(T, a, b, i, j, k, l) \
  __builtin_shuffle(a, b, typename Simd<Index<T>, 4>::Vector{i, j, k, l})
#endif

// Sums N numbers at `from` to four partial sums.
template <int N, class T>
inline typename Simd<T, 4>::Vector fold(const T* from) {
  auto sum = load<4>(from);
  for (int lane = 4; lane < N; lane += 4) sum += load<4>(from + lane);
  return sum;
}

// Returns the sums of four consecutive runs of N numbers. Four at once, because summing up one vector is
// slow.
template <int N, class T>
inline typename Simd<T, 4>::Vector sums_of_four(const T* from) {
  auto a = fold<N>(from), b = fold<N>(from + N), c = fold<N>(from + 2 * N), d = fold<N>(from + 3 * N);
  auto ab = DETRS_SHUFFLE(T, a, b, 0, 4, 1, 5) + DETRS_SHUFFLE(T, a, b, 2, 6, 3, 7);
  auto cd = DETRS_SHUFFLE(T, c, d, 0, 4, 1, 5) + DETRS_SHUFFLE(T, c, d, 2, 6, 3, 7);
  return DETRS_SHUFFLE(T, ab, cd, 0, 1, 4, 5) + DETRS_SHUFFLE(T, ab, cd, 2, 3, 6, 7);
}

// Computes e^x for x <= 0, and NaN for NaN. Results below about 1e-38 are replaced by that number.
template <class Vector, class Indices>
inline Vector exp_negative(Vector x, float, Indices) {
  const Vector lowest = Vector{} - 87;
  x = x < lowest ? lowest : x;  // false for NaN, which is kept
  // Neither NaN nor a huge number, which a lane past the end of a row may hold, may be converted to an
  // integer: that is undefined. The result is NaN all the same, because rest is computed from x.
  const Vector bounded = x <= 0 ? x : lowest;
  // Rounds x / ln 2 to the nearest integer: conversion rounds towards 0, which is up for these numbers.
  Indices twos = __builtin_convertvector(bounded * 1.44269504f - 0.5f, Indices);
  Vector power = __builtin_convertvector(twos, Vector);
  Vector rest =
      x - power * 0.693359375f + power * 2.12194440e-4f;  // ln 2 in two parts, so that no bit of rest is lost
  Vector sum = rest * (1.0f / 5040) + 1.0f / 720;         // Taylor series; error 5e-9 for |rest| < 0.35
  sum = sum * rest + 1.0f / 120;
  sum = sum * rest + 1.0f / 24;
  sum = sum * rest + 1.0f / 6;
  sum = sum * rest + 0.5f;
  sum = sum * rest + 1;
  sum = sum * rest + 1;
  Indices bits = (twos + 127) << 23;
  Vector scale;
  __builtin_memcpy(&scale, &bits, sizeof(scale));
  return sum * scale;
}

template <class Vector, class Indices>
inline Vector exp_negative(Vector x, double, Indices) {
  for (unsigned lane = 0; lane < sizeof(Vector) / sizeof(double); lane++) x[lane] = __builtin_exp(x[lane]);
  return x;
}

}  // namespace
}  // namespace detrs::cpu
