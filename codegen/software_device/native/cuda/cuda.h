// CUDA C++ on the software device: the language's own words, its vectors, barriers, shuffles, atomics and functions.
#pragma once
#include <stdint.h>

#include "functions.h"
#include "machine.h"

#define __device__ DEVICE_FUNCTION
#define __host__
#define __global__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __restrict__  // lanes meet in memory: nothing is one lane's alone
#define __CUDACC_VER_MAJOR__ 13
#define __CUDACC_VER_MINOR__ 0

#define threadIdx (DeviceIndex<device_thread>{})
#define blockIdx (DeviceIndex<device_block>{})
#define blockDim (DeviceIndex<device_threads>{})
#define gridDim (DeviceIndex<device_grid>{})
template <unsigned (*of)(unsigned)>
struct DeviceIndex {
  __declspec(property(get = get_x)) unsigned x;
  __declspec(property(get = get_y)) unsigned y;
  __declspec(property(get = get_z)) unsigned z;
  DEVICE_FUNCTION unsigned get_x() const { return of(0); }
  DEVICE_FUNCTION unsigned get_y() const { return of(1); }
  DEVICE_FUNCTION unsigned get_z() const { return of(2); }
};
constexpr unsigned warpSize = 32;

// Copied whole, as one access, so that its alignment and its bounds are the device's.
#define WHOLE(NAME, N, T)                                                      \
  typedef T NAME##_vector __attribute__((ext_vector_type(N)));                 \
  NAME() = default;                                                            \
  DEVICE_FUNCTION NAME(const NAME &o) { *(NAME##_vector *)this = *(const NAME##_vector *)&o; } \
  DEVICE_FUNCTION NAME &operator=(const NAME &o) {                             \
    *(NAME##_vector *)this = *(const NAME##_vector *)&o;                       \
    return *this;                                                              \
  }
#define VECTORS(T, N)                                                          \
  struct N##1 { T x; };                                                        \
  struct alignas(2 * sizeof(T)) N##2 {                                         \
    T x, y;                                                                    \
    WHOLE(N##2, 2, T)                                                          \
    DEVICE_FUNCTION N##2(T x, T y) : x(x), y(y) {}                             \
  };                                                                           \
  struct N##3 { T x, y, z; };                                                  \
  struct alignas(4 * sizeof(T) > 16 ? 16 : 4 * sizeof(T)) N##4 {               \
    T x, y, z, w;                                                              \
    WHOLE(N##4, 4, T)                                                          \
    DEVICE_FUNCTION N##4(T x, T y, T z, T w) : x(x), y(y), z(z), w(w) {}       \
  };                                                                           \
  DEVICE_INLINE N##1 make_##N##1(T x) { return {x}; }                          \
  DEVICE_INLINE N##2 make_##N##2(T x, T y) { return {x, y}; }                  \
  DEVICE_INLINE N##3 make_##N##3(T x, T y, T z) { return {x, y, z}; }          \
  DEVICE_INLINE N##4 make_##N##4(T x, T y, T z, T w) { return {x, y, z, w}; }
VECTORS(float, float)
VECTORS(signed char, char)
VECTORS(unsigned char, uchar)
VECTORS(short, short)
VECTORS(unsigned short, ushort)
VECTORS(int, int)
VECTORS(unsigned, uint)
#undef VECTORS
#undef WHOLE
// 64-bit elements: four of them are two accesses.
#define VECTORS(T, N)                                                          \
  struct alignas(16) N##2 { T x, y; };                                         \
  struct alignas(16) N##4 { T x, y, z, w; };                                   \
  DEVICE_INLINE N##2 make_##N##2(T x, T y) { return {x, y}; }                  \
  DEVICE_INLINE N##4 make_##N##4(T x, T y, T z, T w) { return {x, y, z, w}; }
VECTORS(double, double)
VECTORS(long, long)
VECTORS(unsigned long, ulong)
VECTORS(long long, longlong)
VECTORS(unsigned long long, ulonglong)
#undef VECTORS

#define __syncthreads() device_barrier(SPACE_SHARED | SPACE_GLOBAL)
DEVICE_CONVERGENT DEVICE_INLINE void __syncwarp(unsigned mask = ~0u) { device_warp_barrier(mask, SPACE_SHARED | SPACE_GLOBAL); }
DEVICE_INLINE void __threadfence() {}
DEVICE_INLINE void __threadfence_block() {}
DEVICE_INLINE unsigned __activemask() { return (unsigned)device_present(); }
DEVICE_INLINE unsigned __ballot_sync(unsigned mask, int vote) { return (unsigned)device_ballot(vote, mask); }
DEVICE_INLINE int __any_sync(unsigned mask, int vote) { return device_ballot(vote, mask) != 0; }
DEVICE_INLINE int __all_sync(unsigned mask, int vote) { return device_ballot(!vote, mask) == 0; }

template <class T>
DEVICE_INLINE T device_exchange(unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof(T));
  bits = device_shuffle(bits, source, mask);
  __builtin_memcpy(&value, &bits, sizeof(T));
  return value;
}
// CUDA wraps a lane beyond the width around; here it is a fault.
template <class T>
DEVICE_INLINE T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  int base = (int)device_lane() & ~(width - 1);
  return device_exchange(mask, value, lane < 0 || lane >= width ? -1 - lane : base + lane);
}
template <class T>
DEVICE_INLINE T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
  int own = (int)device_lane(), from = own - (int)by;
  return device_exchange(mask, value, from < (own & ~(width - 1)) ? own : from);
}
template <class T>
DEVICE_INLINE T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
  int own = (int)device_lane(), from = own + (int)by;
  return device_exchange(mask, value, from > (own | (width - 1)) ? own : from);
}
template <class T>
DEVICE_INLINE T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  int own = (int)device_lane(), from = own ^ bits;
  return device_exchange(mask, value, from > (own | (width - 1)) ? own : from);
}

#define ATOMIC(NAME, T, OF) \
  DEVICE_INLINE T NAME(T *address, T value) { return OF(address, value); }
ATOMIC(atomicAdd, float, device_atomic_add_f32)
ATOMIC(atomicAdd, int, device_atomic_add_i32)
ATOMIC(atomicAdd, unsigned, device_atomic_add_u32)
ATOMIC(atomicAdd, unsigned long long, device_atomic_add_u64)
ATOMIC(atomicMax, int, device_atomic_max_i32)
ATOMIC(atomicMax, unsigned, device_atomic_max_u32)
ATOMIC(atomicMin, int, device_atomic_min_i32)
ATOMIC(atomicMin, unsigned, device_atomic_min_u32)
ATOMIC(atomicExch, unsigned, device_atomic_exchange_u32)
#undef ATOMIC
DEVICE_INLINE unsigned atomicCAS(unsigned *address, unsigned expected, unsigned value) {
  return device_atomic_swap_u32(address, expected, value);
}

// min and max of numbers that differ in type convert as C++ does; of floats they drop NaN, as the device's do.
#define EXTREMES(T)                                                  \
  DEVICE_INLINE T max(T a, T b) { return a > b ? a : b; }            \
  DEVICE_INLINE T min(T a, T b) { return a < b ? a : b; }
EXTREMES(int)
EXTREMES(unsigned)
EXTREMES(long)
EXTREMES(unsigned long)
EXTREMES(long long)
EXTREMES(unsigned long long)
#undef EXTREMES
DEVICE_INLINE float max(float a, float b) { return fmaxf(a, b); }
DEVICE_INLINE float min(float a, float b) { return fminf(a, b); }
DEVICE_INLINE double max(double a, double b) { return fmax(a, b); }
DEVICE_INLINE double min(double a, double b) { return fmin(a, b); }
DEVICE_INLINE long long max(long long a, long b) { return a > b ? a : b; }
DEVICE_INLINE long long max(long a, long long b) { return a > b ? a : b; }
DEVICE_INLINE long long min(long long a, long b) { return a < b ? a : b; }
DEVICE_INLINE long long min(long a, long long b) { return a < b ? a : b; }
DEVICE_INLINE int abs(int x) { return x < 0 ? -x : x; }

template <class T>
DEVICE_INLINE T __ldg(const T *address) {
  return *address;
}

DEVICE_INLINE float rsqrtf(float x) { return 1.0f / sqrtf(x); }
DEVICE_INLINE double rsqrt(double x) { return 1.0 / sqrt(x); }
DEVICE_INLINE float __fdividef(float a, float b) { return a / b; }
DEVICE_INLINE float __frcp_rn(float x) { return 1.0f / x; }
DEVICE_INLINE float __expf(float x) { return expf(x); }
DEVICE_INLINE float __exp10f(float x) { return exp10f(x); }
DEVICE_INLINE float __logf(float x) { return logf(x); }
DEVICE_INLINE float __log2f(float x) { return log2f(x); }
DEVICE_INLINE float __log10f(float x) { return log10f(x); }
DEVICE_INLINE float __sinf(float x) { return sinf(x); }
DEVICE_INLINE float __cosf(float x) { return cosf(x); }
DEVICE_INLINE float __tanf(float x) { return tanf(x); }
DEVICE_INLINE float __powf(float x, float y) { return powf(x, y); }
DEVICE_INLINE float __saturatef(float x) { return fminf(fmaxf(x, 0.0f), 1.0f); }
DEVICE_INLINE bool isnan(float x) { return x != x; }
DEVICE_INLINE bool isinf(float x) { return fabsf(x) == __builtin_inff(); }
DEVICE_INLINE bool isfinite(float x) { return fabsf(x) < __builtin_inff(); }
DEVICE_INLINE float __int_as_float(int x) { return __builtin_bit_cast(float, x); }
DEVICE_INLINE float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
DEVICE_INLINE int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
DEVICE_INLINE unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
DEVICE_INLINE int __popc(unsigned x) { return __builtin_popcount(x); }
DEVICE_INLINE int __ffs(int x) { return __builtin_ffs(x); }
DEVICE_INLINE int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
#define CUDART_INF_F __builtin_inff()
#define CUDART_NAN_F __builtin_nanf("")
#define CUDART_INF __builtin_inf()

// Addresses of shared memory travel as 32 bits.
DEVICE_INLINE unsigned __cvta_generic_to_shared(const void *address) { return device_shared_address(address); }
