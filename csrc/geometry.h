// The arithmetic of a sample, written once for all kernels: Real and Int are numbers (CUDA), or vectors with
// one element per sample (CPU).
#pragma once

#include <type_traits>

#ifdef __CUDACC__
#define DETRS_INLINE __host__ __device__ __forceinline__
#else
#define DETRS_INLINE inline __attribute__((always_inline))
#endif

namespace detrs {
namespace {  // compiled once per CPU instruction set: the linker must not merge the copies

template <class To, class From>
DETRS_INLINE To convert_to(From number) {
  if constexpr (std::is_arithmetic_v<From>) {
    return static_cast<To>(number);
  } else {
#ifndef __CUDACC__
    return __builtin_convertvector(number, To);
#endif
  }
}

// Along one axis, across or down: the two pixels beside a coordinate, their factors of linear interpolation,
// and whether they exist. Coordinates are in pixels; pixel i has its center at i.
template <class Real, class Int>
struct Neighbors {
  Int before, after;                 // columns or lines of pixels, clamped into the level
  Real before_factor, after_factor;  // 0 outside the level
  Real before_inside, after_inside;  // 1 inside, 0 outside

  Neighbors() = default;
  // `valid` is true for -1 <= coordinate < length. Other coordinates, and NaN, give pixel 0 with factor 0.
  template <class Mask>
  DETRS_INLINE Neighbors(Real coordinate, Int length, Mask valid) {
    const Real zero = {}, one = zero + 1;
    const Int first = {};
    // Before the conversion: a huge number or NaN to int is undefined behavior.
    coordinate = valid ? coordinate : zero;
    const Int truncated = convert_to<Int>(coordinate);
    // Conversion rounds towards 0; this makes it floor, for coordinates between -1 and 0.
    before = convert_to<Real>(truncated) > coordinate ? truncated - 1 : truncated;
    after = before + 1;
    const Real fraction = coordinate - convert_to<Real>(before);
    before_inside = before >= 0 ? one : zero;
    before_inside = valid ? before_inside : zero;
    after_inside = after < length ? one : zero;
    after_inside = valid ? after_inside : zero;
    before_factor = before_inside * (1 - fraction);
    after_factor = after_inside * fraction;
    // Clamped, so that the kernels can read every corner without a branch.
    before = before < 0 ? first : before;
    after = after < length ? after : length - 1;
  }
};

// The sides of a level, as Real and as Int, and its first token.
template <class Real, class Int>
struct LevelSize {
  Real width, height;
  Int width_index, height_index, start;
};

// The corners of a sample: the four pixels around its location. 0 top left, 1 top right, 2 bottom left,
// 3 bottom right.
template <class Real, class Int>
struct Corners {
  Neighbors<Real, Int> across, down;
  Int token[4];  // clamped into the level

  Corners() = default;
  // (x, y) is the location, in [0, 1] of the level.
  static DETRS_INLINE Corners at(Real x, Real y, const LevelSize<Real, Int>& level) {
    // The first pixel begins at location 0, half a pixel before its center.
    const Real half = (Real() + 1) / 2;
    const Real across = x * level.width - half, down = y * level.height - half;
    const auto valid = ((across >= -1) & (across < level.width)) & ((down >= -1) & (down < level.height));
    return Corners({across, level.width_index, valid}, {down, level.height_index, valid}, level);
  }

  // A mask: whether the corner is inside the level.
  DETRS_INLINE auto inside(int corner) const {
    return ((corner & 2 ? down.after_inside : down.before_inside) > 0) &
           ((corner & 1 ? across.after_inside : across.before_inside) > 0);
  }

  // 0 outside the level.
  DETRS_INLINE Real bilinear_factor(int corner) const {
    return (corner & 2 ? down.after_factor : down.before_factor) *
           (corner & 1 ? across.after_factor : across.before_factor);
  }

 private:
  DETRS_INLINE Corners(Neighbors<Real, Int> across, Neighbors<Real, Int> down,
                       const LevelSize<Real, Int>& level)
      : across(across), down(down) {
    const Int top = level.start + down.before * level.width_index;
    const Int bottom = level.start + down.after * level.width_index;
    token[0] = top + across.before, token[1] = top + across.after;
    token[2] = bottom + across.before, token[3] = bottom + across.after;
  }
};

template <class Real>
struct SampleGrads {
  Real x, y, weight;
};

// Applies the product rule: from `dot`, grad_out . value at each corner, to the gradients of location and
// weight. NaN is not hidden, and does not come from outside: the token of a corner outside is that of one
// inside, unless the whole sample is outside, which has no gradient.
template <class Real, class Int>
DETRS_INLINE SampleGrads<Real> differentiate(const Corners<Real, Int>& corners, const Real (&dot)[4],
                                             Real weight, const LevelSize<Real, Int>& level) {
  const Neighbors<Real, Int>&across = corners.across, &down = corners.down;
  const Real zero = {};
  const auto is_outside = across.before_inside + across.after_inside == 0;
  Real along_top = across.after_inside * dot[1] - across.before_inside * dot[0];
  Real along_bottom = across.after_inside * dot[3] - across.before_inside * dot[2];
  Real along_left = down.after_inside * dot[2] - down.before_inside * dot[0];
  Real along_right = down.after_inside * dot[3] - down.before_inside * dot[1];
  Real top = across.before_factor * dot[0] + across.after_factor * dot[1];
  Real bottom = across.before_factor * dot[2] + across.after_factor * dot[3];
  Real x = (down.before_factor * along_top + down.after_factor * along_bottom) * weight * level.width;
  Real y = (across.before_factor * along_left + across.after_factor * along_right) * weight * level.height;
  Real of_weight = down.before_factor * top + down.after_factor * bottom;
  return {is_outside ? zero : x, is_outside ? zero : y, is_outside ? zero : of_weight};
}

}  // namespace
}  // namespace detrs
