// PTX instructions by their mnemonics, dots and colons as underscores; operands in the order of the assembly text.
#pragma once
#include "cuda.h"
#include "units.h"

#define PTX DEVICE_INLINE void

DEVICE_INLINE float ptx_half(uint32_t word, int which) {
  return (float)__builtin_bit_cast(_Float16, (uint16_t)(word >> (16 * which)));
}
DEVICE_INLINE uint32_t ptx_pair(float low, float high) {
  return __builtin_bit_cast(uint16_t, (_Float16)low) | (uint32_t)__builtin_bit_cast(uint16_t, (_Float16)high) << 16;
}

#define MMA(NAME, OF)                                                                                                   \
  PTX NAME(float &d0, float &d1, float &d2, float &d3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, \
           uint32_t b1, float c0, float c1, float c2, float c3) {                                                       \
    FourFloats d = OF(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3);                                                          \
    d0 = d.x, d1 = d.y, d2 = d.z, d3 = d.w;                                                                             \
  }
MMA(ptx_mma_sync_aligned_m16n8k16_row_col_f32_f16_f16_f32, device_mma_f16)
MMA(ptx_mma_sync_aligned_m16n8k16_row_col_f32_bf16_bf16_f32, device_mma_bf16)
MMA(ptx_mma_sync_aligned_m16n8k32_row_col_f32_e4m3_e4m3_f32, device_mma_e4m3)
// Sums of integers: a kernel may keep them as int or as unsigned.
template <class Word>
PTX ptx_mma_sync_aligned_m16n8k32_row_col_s32_s8_s8_s32(Word &d0, Word &d1, Word &d2, Word &d3, uint32_t a0, uint32_t a1,
                                                        uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, Word c0,
                                                        Word c1, Word c2, Word c3) {
  FourWords d = device_mma_s8(a0, a1, a2, a3, b0, b1, (uint32_t)c0, (uint32_t)c1, (uint32_t)c2, (uint32_t)c3);
  d0 = (Word)d.x, d1 = (Word)d.y, d2 = (Word)d.z, d3 = (Word)d.w;
}

#define LOAD(SUFFIX, TRANSPOSED)                                                                 \
  PTX ptx_ldmatrix_sync_aligned_m8n8_x1_##SUFFIX(uint32_t &r0, uint32_t address) {               \
    r0 = device_load_matrices(1, TRANSPOSED, address).x;                                         \
  }                                                                                              \
  PTX ptx_ldmatrix_sync_aligned_m8n8_x2_##SUFFIX(uint32_t &r0, uint32_t &r1, uint32_t address) { \
    FourWords r = device_load_matrices(2, TRANSPOSED, address);                                  \
    r0 = r.x, r1 = r.y;                                                                          \
  }                                                                                              \
  PTX ptx_ldmatrix_sync_aligned_m8n8_x4_##SUFFIX(uint32_t &r0, uint32_t &r1, uint32_t &r2,       \
                                                 uint32_t &r3, uint32_t address) {               \
    FourWords r = device_load_matrices(4, TRANSPOSED, address);                                  \
    r0 = r.x, r1 = r.y, r2 = r.z, r3 = r.w;                                                      \
  }
LOAD(shared_b16, false)
LOAD(trans_shared_b16, true)

#define COPY(CACHE)                                                                                              \
  PTX ptx_cp_async_##CACHE##_shared_global(uint32_t to, const void *from, unsigned bytes) {                      \
    device_copy_async(device_shared_pointer(to), from, bytes, bytes);                                            \
  }                                                                                                              \
  PTX ptx_cp_async_##CACHE##_shared_global(uint32_t to, const void *from, unsigned bytes, unsigned take) {       \
    device_copy_async(device_shared_pointer(to), from, bytes, take);                                             \
  }
COPY(cg)
COPY(ca)
PTX ptx_cp_async_commit_group() { device_commit_copies(); }
PTX ptx_cp_async_wait_group(unsigned groups) { device_wait_copies(groups); }
PTX ptx_cp_async_wait_all() { device_wait_all_copies(); }

// Loads past the first cache, or through the read-only one; stores that leave the caches alone.
#define LOADS(SPELLING)                                                                                  \
  PTX ptx_ld_global_##SPELLING##v4_b32(uint32_t &a, uint32_t &b, uint32_t &c, uint32_t &d, const void *from) { \
    uint4 v = *(const uint4 *)from;                                                                      \
    a = v.x, b = v.y, c = v.z, d = v.w;                                                                  \
  }                                                                                                      \
  PTX ptx_ld_global_##SPELLING##v2_b32(uint32_t &a, uint32_t &b, const void *from) {                     \
    uint2 v = *(const uint2 *)from;                                                                      \
    a = v.x, b = v.y;                                                                                    \
  }                                                                                                      \
  PTX ptx_ld_global_##SPELLING##b32(uint32_t &a, const void *from) { a = *(const uint32_t *)from; }
LOADS()
LOADS(nc_)
LOADS(nc_L1_no_allocate_)
#define ptx_ld_global_v4_u32 ptx_ld_global_v4_b32
#define ptx_ld_global_v2_u32 ptx_ld_global_v2_b32
#define ptx_ld_global_u32 ptx_ld_global_b32
#define ptx_ld_global_nc_v4_u32 ptx_ld_global_nc_v4_b32
#define ptx_ld_global_nc_v2_u32 ptx_ld_global_nc_v2_b32
#define ptx_ld_global_nc_u32 ptx_ld_global_nc_b32
#define ptx_ld_global_nc_L1_no_allocate_v4_u32 ptx_ld_global_nc_L1_no_allocate_v4_b32
#define ptx_ld_global_nc_L1_no_allocate_v2_u32 ptx_ld_global_nc_L1_no_allocate_v2_b32
#define ptx_ld_global_nc_L1_no_allocate_u32 ptx_ld_global_nc_L1_no_allocate_b32
PTX ptx_st_global_v4_b32(void *to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) { *(uint4 *)to = {a, b, c, d}; }
PTX ptx_st_global_v2_b32(void *to, uint32_t a, uint32_t b) { *(uint2 *)to = {a, b}; }
PTX ptx_st_global_b32(void *to, uint32_t a) { *(uint32_t *)to = a; }
PTX ptx_st_shared_b32(uint32_t to, uint32_t a) { *(uint32_t *)device_shared_pointer(to) = a; }

// Bit and half-pair arithmetic.
PTX ptx_lop3_b32(uint32_t &d, uint32_t a, uint32_t b, uint32_t c, unsigned truth) {
  uint32_t result = 0;
  for (int row = 0; row < 8; row++)
    if (truth >> row & 1) result |= (row & 4 ? a : ~a) & (row & 2 ? b : ~b) & (row & 1 ? c : ~c);
  d = result;
}
PTX ptx_prmt_b32(uint32_t &d, uint32_t a, uint32_t b, uint32_t selector) {
  uint64_t both = (uint64_t)b << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; i++) {
    unsigned pick = selector >> (4 * i) & 15, byte = both >> (8 * (pick & 7)) & 255;
    result |= (pick & 8 ? (byte & 128 ? 255u : 0u) : byte) << (8 * i);
  }
  d = result;
}
PTX ptx_add_f16x2(uint32_t &d, uint32_t a, uint32_t b) { d = ptx_pair(ptx_half(a, 0) + ptx_half(b, 0), ptx_half(a, 1) + ptx_half(b, 1)); }
PTX ptx_sub_f16x2(uint32_t &d, uint32_t a, uint32_t b) { d = ptx_pair(ptx_half(a, 0) - ptx_half(b, 0), ptx_half(a, 1) - ptx_half(b, 1)); }
PTX ptx_mul_f16x2(uint32_t &d, uint32_t a, uint32_t b) { d = ptx_pair(ptx_half(a, 0) * ptx_half(b, 0), ptx_half(a, 1) * ptx_half(b, 1)); }
PTX ptx_fma_rn_f16x2(uint32_t &d, uint32_t a, uint32_t b, uint32_t c) {
  d = ptx_pair(fmaf(ptx_half(a, 0), ptx_half(b, 0), ptx_half(c, 0)), fmaf(ptx_half(a, 1), ptx_half(b, 1), ptx_half(c, 1)));
}
PTX ptx_cvt_rn_f16x2_f32(uint32_t &d, float high, float low) { d = ptx_pair(low, high); }
DEVICE_INLINE uint32_t ptx_bf16(float value) {
  uint32_t bits = __builtin_bit_cast(uint32_t, value);
  return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
PTX ptx_cvt_rn_bf16x2_f32(uint32_t &d, float high, float low) { d = ptx_bf16(low) | ptx_bf16(high) << 16; }
PTX ptx_ex2_approx_ftz_f32(float &d, float a) { d = exp2f(a); }
PTX ptx_ex2_approx_f32(float &d, float a) { d = exp2f(a); }
PTX ptx_rcp_approx_ftz_f32(float &d, float a) { d = 1.0f / a; }
PTX ptx_fma_rn_f32(float &d, float a, float b, float c) { d = fmaf(a, b, c); }
