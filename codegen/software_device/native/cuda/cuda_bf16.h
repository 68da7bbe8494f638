// bfloat16 of CUDA: every operation is done in float32 and rounded to nearest even.
#pragma once
#include "cuda.h"

struct nv_bfloat16 {
  unsigned short bits;
  nv_bfloat16() = default;
  DEVICE_FUNCTION nv_bfloat16(float x) {
    uint32_t word = __builtin_bit_cast(uint32_t, x);
    bits = x != x ? 0x7fff : (unsigned short)((word + 0x7fff + (word >> 16 & 1)) >> 16);
  }
  DEVICE_FUNCTION nv_bfloat16(double x) : nv_bfloat16((float)x) {}
  DEVICE_FUNCTION nv_bfloat16(int x) : nv_bfloat16((float)x) {}
  DEVICE_FUNCTION nv_bfloat16(unsigned x) : nv_bfloat16((float)x) {}
  DEVICE_FUNCTION nv_bfloat16(long x) : nv_bfloat16((float)x) {}
  DEVICE_FUNCTION operator float() const { return __builtin_bit_cast(float, (uint32_t)bits << 16); }
  DEVICE_FUNCTION nv_bfloat16 operator-() const {
    nv_bfloat16 negated;
    negated.bits = bits ^ 0x8000;
    return negated;
  }
};
typedef nv_bfloat16 __nv_bfloat16;
struct alignas(4) nv_bfloat162 {
  nv_bfloat16 x, y;
  nv_bfloat162() = default;
  DEVICE_FUNCTION nv_bfloat162(nv_bfloat16 a, nv_bfloat16 b) : x(a), y(b) {}
};
typedef nv_bfloat162 __nv_bfloat162;

#define OPERATOR(OP)                                                                                              \
  DEVICE_INLINE nv_bfloat16 operator OP(nv_bfloat16 a, nv_bfloat16 b) { return nv_bfloat16((float)a OP(float) b); } \
  DEVICE_INLINE nv_bfloat16 &operator OP##=(nv_bfloat16 &a, nv_bfloat16 b) { return a = a OP b; }
OPERATOR(+)
OPERATOR(-)
OPERATOR(*)
OPERATOR(/)
#undef OPERATOR
#define OPERATOR(OP) \
  DEVICE_INLINE bool operator OP(nv_bfloat16 a, nv_bfloat16 b) { return (float)a OP(float) b; }
OPERATOR(<)
OPERATOR(>)
OPERATOR(<=)
OPERATOR(>=)
OPERATOR(==)
OPERATOR(!=)
#undef OPERATOR
DEVICE_INLINE bool __hgt(nv_bfloat16 a, nv_bfloat16 b) { return (float)a > (float)b; }
DEVICE_INLINE bool __hlt(nv_bfloat16 a, nv_bfloat16 b) { return (float)a < (float)b; }
DEVICE_INLINE bool __hisnan(nv_bfloat16 a) { return (float)a != (float)a; }
DEVICE_INLINE nv_bfloat16 __hmax(nv_bfloat16 a, nv_bfloat16 b) { return fmaxf((float)a, (float)b); }
DEVICE_INLINE nv_bfloat16 __hmin(nv_bfloat16 a, nv_bfloat16 b) { return fminf((float)a, (float)b); }
DEVICE_INLINE nv_bfloat16 __hfma(nv_bfloat16 a, nv_bfloat16 b, nv_bfloat16 c) { return fmaf((float)a, (float)b, (float)c); }
DEVICE_INLINE nv_bfloat16 __habs(nv_bfloat16 a) { return fabsf((float)a); }
DEVICE_INLINE float __bfloat162float(nv_bfloat16 a) { return (float)a; }
DEVICE_INLINE nv_bfloat16 __float2bfloat16(float x) { return x; }
DEVICE_INLINE nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
DEVICE_INLINE unsigned short __bfloat16_as_ushort(nv_bfloat16 x) { return x.bits; }
DEVICE_INLINE nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return __builtin_bit_cast(nv_bfloat16, bits); }
#define ONE(NAME, OF) \
  DEVICE_INLINE nv_bfloat16 NAME(nv_bfloat16 x) { return OF((float)x); }
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
