// Division and square root in a few instructions, without the calls for rare operands that the compiler's own make.
#pragma once

__device__ inline float reciprocal_estimate(float x) {
  float reciprocal;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(x));  // for 2^-126 <= |x| <= 2^126, and 0
  return reciprocal;
}

// To all but the last bit, and not otherwise than IEEE's where the result is zero, infinite or NaN.
__device__ inline float divide(float a, float b) {
  const float reciprocal = reciprocal_estimate(b), quotient = a * reciprocal;
  const float refined = fmaf(fmaf(-quotient, b, a), reciprocal, quotient);
  return isfinite(quotient) ? refined : quotient;
}

// To all but the last two bits.
__device__ inline float divide_roughly(float a, float b) { return a * reciprocal_estimate(b); }

// To all but the last bit. With `kFlush`, subnormal numbers count as 0: their root is less than 2^-63.
template <bool kFlush>
__device__ inline float square_root(float x) {
  float root;
  if (kFlush) {
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(x));
  } else {
    asm("sqrt.approx.f32 %0, %1;" : "=f"(root) : "f"(x));
  }
  return root;
}
