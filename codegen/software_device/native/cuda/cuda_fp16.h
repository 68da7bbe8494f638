// float16 of CUDA: every operation is rounded.
#pragma once
#include "cuda.h"

typedef _Float16 half;
typedef _Float16 __half;
struct alignas(4) half2 {
  half x, y;
};
typedef half2 __half2;

DEVICE_INLINE half2 make_half2(half x, half y) { return {x, y}; }
DEVICE_INLINE float __half2float(half x) { return (float)x; }
DEVICE_INLINE half __float2half(float x) { return (half)x; }
DEVICE_INLINE half __float2half_rn(float x) { return (half)x; }
DEVICE_INLINE bool __hgt(half a, half b) { return a > b; }
DEVICE_INLINE bool __hlt(half a, half b) { return a < b; }
DEVICE_INLINE bool __hisnan(half a) { return a != a; }
DEVICE_INLINE half __hmax(half a, half b) { return (half)fmaxf((float)a, (float)b); }
DEVICE_INLINE half __hmin(half a, half b) { return (half)fminf((float)a, (float)b); }
DEVICE_INLINE half __hfma(half a, half b, half c) { return (half)fmaf((float)a, (float)b, (float)c); }
DEVICE_INLINE half __habs(half a) { return (half)fabsf((float)a); }
DEVICE_INLINE unsigned short __half_as_ushort(half x) { return __builtin_bit_cast(unsigned short, x); }
DEVICE_INLINE half __ushort_as_half(unsigned short x) { return __builtin_bit_cast(half, x); }
#define ONE(NAME, OF) \
  DEVICE_INLINE half NAME(half x) { return (half)OF((float)x); }
ONE(hexp, expf)
ONE(hexp2, exp2f)
ONE(hexp10, exp10f)
ONE(hlog, logf)
ONE(hlog2, log2f)
ONE(hlog10, log10f)
ONE(hsqrt, sqrtf)
ONE(hrsqrt, rsqrtf)
ONE(hsin, sinf)
ONE(hcos, cosf)
ONE(hfloor, floorf)
ONE(hceil, ceilf)
ONE(htrunc, truncf)
ONE(hrint, rintf)
ONE(htanh, tanhf)
#undef ONE
