// What memory.cc, lanes.cc, units.cc and api.cc share.
#pragma once
#include "machine.h"

// Of the C library; its headers are not needed for these few.
extern "C" {
void *malloc(size_t);
void *calloc(size_t, size_t);
void *realloc(void *, size_t);
void free(void *);
void *memcpy(void *, const void *, size_t);
void *memset(void *, int, size_t);
void *memmove(void *, const void *, size_t);
void *mmap(void *, size_t, int, int, int, long);
int munmap(void *, size_t);
int mprotect(void *, size_t, int);
[[noreturn]] void abort();
}

constexpr unsigned MAX_LANES = 1024;
constexpr int POISON = 0xff;  // bytes that nothing wrote: NaN in every float format

enum FaultKind {
  FAULT_NONE,
  FAULT_BOUNDS,
  FAULT_UNINITIALISED,
  FAULT_RACE,
  FAULT_BARRIER,
  FAULT_SHUFFLE,
  FAULT_ALIGNMENT,
  FAULT_COPY,
  FAULT_BINDING,
  FAULT_LAUNCH,
  FAULT_LANES,
  FAULT_INDEX,
  FAULT_REFUSED,
};

enum AccessKind { ACCESS_READ, ACCESS_WRITE, ACCESS_ATOMIC, ACCESS_COPY };

// The first fault of a launch; Python reads it (faults.py mirrors it).
struct Fault {
  int32_t kind, access, other_access, lines;  // lines: places are line numbers
  uint64_t place, other_place;                // offsets in the kernel's library, or lines
  DeviceSize block, thread, other_block, other_thread;
  int64_t offset, bytes, size;  // of the access, in `memory` of so many bytes
  const char *kernel, *memory, *detail;
};

// When, and by whom, a cell was last accessed.
struct Access {
  uint32_t time;  // of the machine's clock; 0: never
  uint16_t lane, flags;
  uint32_t place;
};

struct Cell {
  Access write, read;
};

struct Allocation {
  char *base;
  size_t size;
  size_t grain;  // bytes of a cell: the smallest access so far
  Cell *cells;   // made at the first access
  const char *name;
  uint32_t launch;   // the last launch that it was an argument of
  bool shared;       // of a block, else global
  bool initialised;  // written whole by the host
  void *map;
  size_t map_bytes;
};

enum LaneState : uint8_t { LANE_READY, LANE_AT_BARRIER, LANE_IN_GROUP, LANE_DONE };

struct Copy {
  char *to;
  const char *from;
  unsigned bytes, take, group;
  uint32_t place;
};

struct Group;
using Perform = void (*)(Group &);

struct Lane {
  void *stack_pointer;
  LaneState state;
  unsigned index, warp, number;  // in its block; its warp; in its warp
  DeviceSize thread;
  uint32_t place;          // where it waits
  uint32_t announced;      // its line, where kernels tell it
  unsigned spaces;         // what its barrier orders
  Perform perform;         // what its group does
  void *payload;
  uint64_t mask;           // lanes that it expects, 0: those that arrive together
  Copy *copies;
  unsigned copy_count, copy_room, copy_group;
};

// Lanes of one warp that do something together.
struct Group {
  Lane **lanes;  // of the warp, by number
  uint64_t present;
  unsigned width, warp;
  bool has(int lane) const { return lane >= 0 && lane < (int)width && (present >> lane & 1); }
};

struct Machine {
  const DeviceLaunch *launch;
  Lane lanes[MAX_LANES];
  unsigned lane_count, warp_count;
  Lane *current;
  DeviceSize block;
  uint32_t clock = 1;  // 1 is when the host writes
  uint32_t launch_start, block_start, barrier_time[2];  // barrier times: shared, global
  uint32_t warp_time[MAX_LANES / 32][2];
  uint32_t *block_starts;  // of every block of the launch so far
  size_t block_count, block_room;
  bool reverse, copies_early;
  Fault fault;
  bool on_lane;  // a lane runs, not the scheduler
};

extern Machine machine;

// Records the first fault of a launch. On a lane it does not return; in a group's work it does.
Fault *begin_fault(int kind, uint32_t place);
void raise_fault();
void fault(int kind, uint32_t place, const char *detail);

// Whether an access has a meaning; records a fault if not. `lane` takes it.
bool check_read(Lane *lane, const void *address, size_t bytes, uint32_t place);
bool check_write(Lane *lane, void *address, size_t bytes, uint32_t place, uint16_t flags = 0);
bool check_alignment(const void *address, size_t bytes, size_t alignment, uint32_t place);
bool check_atomic(Lane *lane, void *address, size_t bytes, uint32_t place);
void land(Lane *lane, void *address, size_t bytes, uint32_t place);

Allocation *find_allocation(const void *address);
Allocation *add_allocation(char *base, size_t size, const char *name, bool shared);
void drop_allocation(Allocation *allocation);
bool on_lane_stack(const void *address);

// CUDA's graphs (graphs.cc): is a launch recorded; what no recorded stream allows; the streams of threads; workspaces.
bool graphs_record(const DeviceLaunch *launch);
extern "C" void graphs_forbid(const char *what);
void graphs_set_stream(void *stream);
bool graphs_pool();
void *graphs_take_workspace(size_t bytes);
void graphs_give_workspace(void *data);

void begin_shared();
void poison_shared();

uint32_t place_of(void *return_address);
#define HERE place_of(__builtin_return_address(0))

void together(Perform perform, void *payload, uint64_t mask, uint32_t place);
