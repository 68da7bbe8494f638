// Operands of the matrix units, a lane's share of each.
#pragma once
#include "machine.h"

struct Bits16 {  // a bfloat16
  uint16_t bits;
};

// Small results come back in registers, so that a kernel's own stay registers.
struct FourFloats {
  float x, y, z, w;
};
struct TwoFloats {
  float x, y;
};
struct FourWords {
  uint32_t x, y, z, w;
};

template <class T, int N, int M>
struct MatrixOperands {
  T a[N], b[N];
  float c[M];
};

// Of 8-bit integers, four a word.
template <int N, int M>
struct ByteOperands {
  uint32_t a[N], b[N];
  int32_t c[M];
};

extern "C" {
FourFloats device_mma_f16(uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, float c0, float c1,
                          float c2, float c3) DEVICE_CONVERGENT;
FourFloats device_mma_bf16(uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, float c0,
                           float c1, float c2, float c3) DEVICE_CONVERGENT;
FourWords device_mma_s8(uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, uint32_t c0,
                        uint32_t c1, uint32_t c2, uint32_t c3) DEVICE_CONVERGENT;
FourFloats device_mma_e4m3(uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, float c0,
                           float c1, float c2, float c3) DEVICE_CONVERGENT;
// ldmatrix of 1, 2 or 4 matrices, whose rows lie in shared memory.
FourWords device_load_matrices(int count, bool transposed, uint32_t row) DEVICE_CONVERGENT;
void device_mfma_f16(void *) DEVICE_CONVERGENT;
void device_mfma_bf16(void *) DEVICE_CONVERGENT;
void device_wmma11_f16(void *) DEVICE_CONVERGENT;
void device_wmma11_bf16(void *) DEVICE_CONVERGENT;
void device_wmma12_f16(void *) DEVICE_CONVERGENT;
void device_wmma12_bf16(void *) DEVICE_CONVERGENT;
void device_mfma_i8_16(void *) DEVICE_CONVERGENT;
void device_mfma_i8_32(void *) DEVICE_CONVERGENT;
void device_wmma11_iu8(void *) DEVICE_CONVERGENT;
void device_wmma12_iu8(void *) DEVICE_CONVERGENT;
TwoFloats device_multiply_8x8(float a0, float a1, float b0, float b1, float c0, float c1) DEVICE_CONVERGENT;
}
