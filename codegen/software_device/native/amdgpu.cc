// What AMD's instructions do that LLVM's IR for this machine does not: called from kernels that rocm.py has rewritten.
#include "functions.h"
#include "state.h"

extern "C" {

// The line of what the running lane does next.
void device_at(uint32_t line) { machine.current->announced = line; }

// Of an access: bytes, the alignment that the instruction promises, its line.
void device_load(const void *address, size_t bytes, size_t alignment, uint32_t line) {
  if (on_lane_stack(address)) return;
  if (check_alignment(address, bytes, alignment, line)) check_read(machine.current, address, bytes, line);
}
void device_store(void *address, size_t bytes, size_t alignment, uint32_t line) {
  if (on_lane_stack(address)) return;
  if (check_alignment(address, bytes, alignment, line)) check_write(machine.current, address, bytes, line);
}
void device_atomic_at(void *address, size_t bytes, size_t alignment, uint32_t line) {
  if (on_lane_stack(address)) return;
  if (check_alignment(address, bytes, alignment, line)) check_atomic(machine.current, address, bytes, line);
}

// ds_bpermute: a lane's number in bytes of a register. The hardware wraps it around; here it must be a lane's.
uint32_t device_permute(int32_t lane, uint32_t value) { return (uint32_t)device_shuffle(value, lane % 4 ? -1 : lane / 4, 0); }

uint32_t device_first_lane(uint32_t value) {
  uint64_t present = device_ballot(true, 0);
  return (uint32_t)device_shuffle(value, __builtin_ctzll(present), 0);
}

// Lanes below this one whose bits are set, of the first 32 and of the others.
int32_t device_count_low(uint32_t mask, int32_t base) {
  unsigned lane = device_lane();
  return base + __builtin_popcount(lane >= 32 ? mask : mask & ((1u << lane) - 1));
}
int32_t device_count_high(uint32_t mask, int32_t base) {
  unsigned lane = device_lane();
  return base + (lane > 32 ? __builtin_popcount(mask & ((1u << (lane - 32)) - 1)) : 0);
}

float device_rcp(float x) { return 1.0f / x; }
float device_rsq(float x) { return 1.0f / sqrtf(x); }
float device_exp2(float x) { return exp2f(x); }
float device_log(float x) { return log2f(x); }
float device_sqrt(float x) { return sqrtf(x); }
// In turns, not radians.
float device_sin(float x) { return sinf(x * 6.2831853f); }
float device_cos(float x) { return cosf(x * 6.2831853f); }

#define OCML(NAME) \
  float __ocml_##NAME##_f32(float x) { return NAME##f(x); }
OCML(exp) OCML(exp2) OCML(log) OCML(log2) OCML(sqrt) OCML(sin) OCML(cos) OCML(tan) OCML(tanh) OCML(erf) OCML(floor)
OCML(ceil) OCML(trunc) OCML(round) OCML(fabs)
float __ocml_rsqrt_f32(float x) { return 1.0f / sqrtf(x); }
float __ocml_pow_f32(float x, float y) { return powf(x, y); }

}  // extern "C"
