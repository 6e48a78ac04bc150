// Round-to-nearest quantisation of one group of weights of one column: the rule that the CPU
// kernel, the CUDA kernel and _reference.py share bit for bit. All arithmetic is float32, each
// operation rounded once.
//
//   symmetric   scale = max|w| * (1 / 7.5)    zero = 8
//   asymmetric  scale = (hi - lo) * (1 / 15)  zero = clamp(rint(-lo / scale), 0, 15)
//               lo = min(0, min w), hi = max(0, max w)
//   code = clamp(rint(w / scale) + zero, 0, 15)
//
// The scale is rounded to its storage type before it divides. A group whose scale is zero (all
// weights zero, or too small for the type) gets code = zero, so that it dequantises to 0; its zero
// point is 8 (symmetric) or 0. A NaN among the weights makes the scale NaN, so that it shows; the
// codes are then 0.
#pragma once

#include <cmath>

#include "layout.h"

namespace w4a16 {

inline constexpr float kSymmetricStep = 1.0f / 7.5f;
inline constexpr float kAsymmetricStep = 1.0f / 15.0f;

// max and min that keep a NaN, unlike fmaxf and fminf.
W4A16_HD inline float MaxOrNan(float a, float b) { return (b > a || b != b) ? b : a; }
W4A16_HD inline float MinOrNan(float a, float b) { return (b < a || b != b) ? b : a; }

// fmaxf drops a NaN, which so becomes 0; rintf rounds half to even.
W4A16_HD inline float ClampCode(float q) { return fminf(fmaxf(q, 0.0f), 15.0f); }

// `scale` is the stored scale, widened to float.
W4A16_HD inline float ZeroPoint(float lo, float scale) {
  return scale == 0.0f ? 0.0f : ClampCode(rintf(-lo / scale));
}

W4A16_HD inline int CodeOf(float w, float scale, float zero) {
  return scale == 0.0f ? static_cast<int>(zero)
                       : static_cast<int>(ClampCode(rintf(w / scale) + zero));
}

}  // namespace w4a16
