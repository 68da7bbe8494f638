// What a kernel may ask of the machine. Kernels compiled from CUDA, Metal and AMDGPU text all come down to these calls.
#pragma once
#include <stddef.h>
#include <stdint.h>

// A call of these stands where the kernel has it: moved, copied or merged, lanes would meet at other places.
#define DEVICE_CONVERGENT __attribute__((convergent, noduplicate, nomerge))
// What a lane knows of itself never changes while it runs.
#define DEVICE_CONSTANT __attribute__((const))

// Inlined and without lines of its own: a fault names the kernel's line.
#define DEVICE_FUNCTION __attribute__((always_inline, nodebug))
// Convergent, for what wraps a barrier or a shuffle: a call that is duplicated before it is inlined has two addresses,
// at which lanes would wait for each other.
#define DEVICE_INLINE static inline DEVICE_FUNCTION __attribute__((convergent))

// Memory that a barrier orders.
enum { SPACE_SHARED = 1, SPACE_GLOBAL = 2 };

extern "C" {

struct DeviceSize {
  unsigned x, y, z;
};

struct DeviceArgument {
  void *data;
  const char *name;
};

// One launch of a kernel. body(frame) runs once for every lane.
struct DeviceLaunch {
  const char *kernel;
  DeviceSize grid, threads;
  int64_t dynamic_shared;
  unsigned warp;                    // lanes that run together: 32 or 64
  bool masks;                       // collectives name their lanes (CUDA); else those that arrive together take part
  bool whole_buffers;               // an argument is a whole allocation (Metal binds at offset 0)
  bool strict;                      // the kernel's accesses of memory are announced
  const char *text;                 // start of the kernel's library, or null if places are line numbers
  const DeviceArgument *arguments;  // tensors only
  int count;
  void (*body)(void *);
  void *frame;
  size_t frame_bytes;
};

int device_launch(const DeviceLaunch *launch);  // 0, or -1 with an error raised

unsigned device_thread(unsigned axis) DEVICE_CONSTANT;
unsigned device_block(unsigned axis) DEVICE_CONSTANT;
unsigned device_threads(unsigned axis) DEVICE_CONSTANT;
unsigned device_grid(unsigned axis) DEVICE_CONSTANT;
unsigned device_lane() DEVICE_CONSTANT;  // within its warp
unsigned device_warp() DEVICE_CONSTANT;
uint64_t device_present() DEVICE_CONSTANT;  // lanes that the warp has, a bit each

void *device_shared(unsigned number, size_t bytes, size_t alignment, const char *name);
void *device_dynamic_shared();
void device_shared_at(unsigned number, void *address, size_t bytes, const char *name);

void device_barrier(unsigned spaces) DEVICE_CONVERGENT;
void device_warp_barrier(uint64_t mask, unsigned spaces) DEVICE_CONVERGENT;

// Lane `source` of the warp gives its value; bits of at most 8 bytes.
uint64_t device_shuffle(uint64_t value, int source, uint64_t mask) DEVICE_CONVERGENT;
uint64_t device_ballot(bool vote, uint64_t mask) DEVICE_CONVERGENT;

// Announced accesses, of any size; `place` is a line, or 0 for the caller's.
void device_read(const void *address, size_t bytes, uint32_t place);
void device_write(void *address, size_t bytes, uint32_t place);
void device_atomic(void *address, size_t bytes, uint32_t place);

// A lane's step that no other comes between; -> what was there before.
float device_atomic_add_f32(float *address, float value);
int32_t device_atomic_add_i32(int32_t *address, int32_t value);
uint32_t device_atomic_add_u32(uint32_t *address, uint32_t value);
unsigned long long device_atomic_add_u64(unsigned long long *address, unsigned long long value);
int32_t device_atomic_max_i32(int32_t *address, int32_t value);
uint32_t device_atomic_max_u32(uint32_t *address, uint32_t value);
int32_t device_atomic_min_i32(int32_t *address, int32_t value);
uint32_t device_atomic_min_u32(uint32_t *address, uint32_t value);
uint32_t device_atomic_exchange_u32(uint32_t *address, uint32_t value);
uint32_t device_atomic_swap_u32(uint32_t *address, uint32_t expected, uint32_t value);

// Shared memory by a number of 32 bits, and back.
uint32_t device_shared_address(const void *address);
void *device_shared_pointer(uint32_t address);

// Asynchronous copies from global to shared memory: `bytes` are written, of which the first `take` are read.
void device_copy_async(void *to, const void *from, unsigned bytes, unsigned take);
void device_commit_copies();
void device_wait_copies(unsigned groups);  // leaves so many groups under way
void device_wait_all_copies();

// The machine cannot go on: what the kernel does has no meaning on the device.
void device_refuse(const char *why);

}  // extern "C"
