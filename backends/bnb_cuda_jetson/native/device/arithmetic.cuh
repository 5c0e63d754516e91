// Division and square root in a few instructions, without the calls for rare operands that the compiler's own make. They differ from
// IEEE's in no more than the last bit, and not where the result is zero, infinite or NaN.
#pragma once

__device__ inline float divide(float a, float b) {
  float reciprocal;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(b));  // for 2^-126 <= |b| <= 2^126, and 0
  const float quotient = a * reciprocal;
  const float refined = fmaf(fmaf(-quotient, b, a), reciprocal, quotient);
  return isfinite(quotient) ? refined : quotient;
}

__device__ inline float square_root(float x) {
  float root;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(root) : "f"(x));
  return root;
}
