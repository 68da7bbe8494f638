// Where clang's -fsanitize=thread announces every access of memory, and -fsanitize=alignment,array-bounds what they find.
#include "state.h"

static bool atomic_allowed(void *address, size_t bytes, uint32_t place) {
  return !machine.launch->strict || check_atomic(machine.current, address, bytes, place);
}

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void *) {}
void __tsan_func_exit() {}

#define ACCESSES(N)                                                                 \
  void __tsan_read##N(void *p) { device_read(p, N, HERE); }                         \
  void __tsan_write##N(void *p) { device_write(p, N, HERE); }                       \
  void __tsan_unaligned_read##N(void *p) { device_read(p, N, HERE); }               \
  void __tsan_unaligned_write##N(void *p) { device_write(p, N, HERE); }             \
  void __tsan_volatile_read##N(void *p) { device_read(p, N, HERE); }                \
  void __tsan_volatile_write##N(void *p) { device_write(p, N, HERE); }              \
  void __tsan_unaligned_volatile_read##N(void *p) { device_read(p, N, HERE); }      \
  void __tsan_unaligned_volatile_write##N(void *p) { device_write(p, N, HERE); }
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)

void *__tsan_memcpy(void *to, const void *from, size_t bytes) {
  uint32_t place = HERE;
  if (bytes) device_read(from, bytes, place), device_write(to, bytes, place);
  return memmove(to, from, bytes);
}
void *__tsan_memmove(void *to, const void *from, size_t bytes) {
  uint32_t place = HERE;
  if (bytes) device_read(from, bytes, place), device_write(to, bytes, place);
  return memmove(to, from, bytes);
}
void *__tsan_memset(void *to, int value, size_t bytes) {
  if (bytes) device_write(to, bytes, HERE);
  return memset(to, value, bytes);
}

#define CHANGE(NAME, T, FRESH)                         \
  T device_atomic_##NAME(T *address, T value) {        \
    if (!atomic_allowed(address, sizeof(T), HERE)) return 0; \
    T old = *address;                                  \
    *address = FRESH;                                  \
    return old;                                        \
  }
CHANGE(add_f32, float, old + value)
CHANGE(add_i32, int32_t, (int32_t)((uint32_t)old + (uint32_t)value))
CHANGE(add_u32, uint32_t, old + value)
CHANGE(add_u64, unsigned long long, old + value)
CHANGE(max_i32, int32_t, old > value ? old : value)
CHANGE(max_u32, uint32_t, old > value ? old : value)
CHANGE(min_i32, int32_t, old < value ? old : value)
CHANGE(min_u32, uint32_t, old < value ? old : value)
CHANGE(exchange_u32, uint32_t, value)

uint32_t device_atomic_swap_u32(uint32_t *address, uint32_t expected, uint32_t value) {
  if (!atomic_allowed(address, 4, HERE)) return 0;
  uint32_t old = *address;
  if (old == expected) *address = value;
  return old;
}

void __tsan_atomic_thread_fence(int) {}
void __tsan_atomic_signal_fence(int) {}

// Of clang's -fsanitize=alignment and array-bounds: what they found, and the line.
struct UbsanPlace {
  const char *file;
  uint32_t line, column;
};

static void found(int kind, const UbsanPlace *at, const void *address, int64_t value) {
  if (!machine.on_lane || (kind == FAULT_ALIGNMENT && on_lane_stack(address))) return;
  Fault *f = begin_fault(kind, at->line);
  f->lines = true;
  f->offset = value;
  raise_fault();
}

void __ubsan_handle_type_mismatch_v1(const UbsanPlace *at, void *address) {
  if (address) found(FAULT_ALIGNMENT, at, address, (int64_t)address);
}
void __ubsan_handle_out_of_bounds(const UbsanPlace *at, uint64_t index) { found(FAULT_INDEX, at, nullptr, (int64_t)index); }

}  // extern "C"
