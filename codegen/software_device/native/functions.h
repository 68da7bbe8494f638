// Functions of the C library that kernels call.
#pragma once
extern "C" {
#define ONE(NAME) float NAME##f(float) __attribute__((const)); double NAME(double) __attribute__((const));
#define TWO(NAME) float NAME##f(float, float) __attribute__((const)); double NAME(double, double) __attribute__((const));
ONE(exp) ONE(exp2) ONE(exp10) ONE(expm1) ONE(log) ONE(log2) ONE(log10) ONE(log1p) ONE(sqrt) ONE(cbrt)
ONE(sin) ONE(cos) ONE(tan) ONE(asin) ONE(acos) ONE(atan) ONE(sinh) ONE(cosh) ONE(tanh) ONE(asinh) ONE(acosh) ONE(atanh)
ONE(erf) ONE(erfc) ONE(floor) ONE(ceil) ONE(trunc) ONE(round) ONE(rint) ONE(nearbyint) ONE(fabs)
TWO(pow) TWO(fmod) TWO(fmax) TWO(fmin) TWO(copysign) TWO(nextafter) TWO(hypot) TWO(atan2)
float fmaf(float, float, float) __attribute__((const));
double fma(double, double, double) __attribute__((const));
float ldexpf(float, int) __attribute__((const));
double ldexp(double, int) __attribute__((const));
#undef ONE
#undef TWO
}
