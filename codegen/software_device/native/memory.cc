// Every byte that a kernel may touch: which memory it is part of, whether it was written, and by which lane last.
//
// Two accesses of the same cell by different lanes, at least one a write, race unless a barrier that both lanes pass
// stands between, or the launches differ. Blocks of one launch are never ordered. Shuffles order nothing.
#include "state.h"

namespace {

enum : uint16_t {
  MANY_OF_WARP = 1,    // several lanes of the lane's warp have read
  MANY_OF_BLOCK = 2,   // lanes of several warps have read
  MANY_BLOCKS = 4,     // lanes of several blocks have read in this launch
  ATOMIC = 8,
  PENDING = 16,        // an asynchronous copy is to land here
};

constexpr size_t PAGE = 4096;
constexpr size_t GUARD = 256 << 20;  // address space, never memory, on both sides of an allocation: a stray offset meets no other
constexpr size_t SHARED_BYTES = 512 << 10, SHARED_GAP = 1024, MAX_SHARED = 64;

Allocation **table;  // sorted by base
size_t table_count, table_room;
Allocation *cache[256];

char *shared_base;
Allocation *shared[MAX_SHARED + 1];  // the last is the dynamic one
size_t shared_used;  // of SHARED_BYTES, mapped at shared_base

// The first allocation above an address.
size_t above(const void *address) {
  size_t low = 0, high = table_count;
  while (low < high) {
    size_t middle = (low + high) / 2;
    if (table[middle]->base <= (const char *)address) low = middle + 1;
    else high = middle;
  }
  return low;
}

Allocation *find(const void *address, uint32_t place) {
  Allocation *&guess = cache[place % 256];
  if (guess && (size_t)((const char *)address - guess->base) < guess->size) return guess;
  Allocation *found = find_allocation(address);
  if (found) guess = found;
  return found;
}

size_t cell_count(const Allocation *a) { return (a->size + a->grain - 1) / a->grain; }

Cell *make_cells(size_t count) {
  Cell *cells = (Cell *)mmap(nullptr, count * sizeof(Cell), 3, 0x4022, -1, 0);
  if (cells == (Cell *)-1) abort();
  return cells;
}

void drop_cells(Allocation *a) {
  if (a->cells) munmap(a->cells, cell_count(a) * sizeof(Cell));
  a->cells = nullptr;
}

// Cells no larger than the access, so that each is accessed whole.
void refine(Allocation *a, size_t offset, size_t bytes) {
  size_t fine = (offset | bytes) & -(offset | bytes);
  if (a->cells && fine >= a->grain) return;
  Allocation before = *a;
  if (fine < a->grain) a->grain = fine;
  a->cells = make_cells(cell_count(a));
  if (!before.cells) return;
  size_t parts = before.grain / a->grain, count = cell_count(a), old = cell_count(&before);
  for (size_t i = 0; i < old; i++)
    if (before.cells[i].write.time || before.cells[i].read.time)
      for (size_t k = i * parts; k < (i + 1) * parts && k < count; k++) a->cells[k] = before.cells[i];
  drop_cells(&before);
}

// Whether an earlier access of this launch is known to come before what `lane` does now.
bool ordered(const Access &a, const Lane *lane, bool in_shared) {
  if (a.time < machine.launch_start) return true;
  if (a.flags & MANY_BLOCKS || a.time < machine.block_start) return in_shared;
  unsigned space = in_shared ? 0 : 1;
  if (a.time < machine.barrier_time[space]) return true;
  if (a.flags & MANY_OF_BLOCK) return false;
  if (a.lane == lane->index && !(a.flags & MANY_OF_WARP)) return true;
  return a.lane / machine.launch->warp == lane->warp && a.time < machine.warp_time[lane->warp][space];
}

Fault *memory_fault(int kind, uint32_t place, Lane *lane, int access, const void *address, size_t bytes, Allocation *a) {
  Fault *f = begin_fault(kind, place);
  f->thread = lane->thread;
  f->access = access;
  f->bytes = (int64_t)bytes;
  if (a) {
    f->memory = a->name;
    f->offset = (const char *)address - a->base;
    f->size = (int64_t)a->size;
  } else {
    f->offset = (int64_t)address;
  }
  return f;
}

bool race(uint32_t place, Lane *lane, int access, const void *address, size_t bytes, Allocation *a, const Access &other, int other_access) {
  Fault *f = memory_fault(other.flags & PENDING ? FAULT_COPY : FAULT_RACE, place, lane, access, address, bytes, a);
  f->other_access = other_access;
  f->other_place = other.place;
  unsigned x = machine.launch->threads.x, y = machine.launch->threads.y;
  f->other_thread = {other.lane % x, other.lane / x % y, other.lane / (x * y)};
  size_t b = machine.block_count;
  while (b > 1 && machine.block_starts[b - 1] > other.time) b--;
  uint64_t number = b - 1;
  const DeviceSize &grid = machine.launch->grid;
  if (machine.reverse) number = (uint64_t)grid.x * grid.y * grid.z - 1 - number;
  f->other_block = {(unsigned)(number % grid.x), (unsigned)(number / grid.x % grid.y), (unsigned)(number / grid.x / grid.y)};
  raise_fault();
  return false;
}

// The allocation of an access within its bounds.
Allocation *locate(Lane *lane, int access, const void *address, size_t bytes, uint32_t place) {
  Allocation *a = find(address, place);
  bool reachable = a && (a->shared || a->launch == machine.launch_start);
  if (!reachable) {
    // The nearest memory of this launch below the address: what was likely meant.
    Allocation *near = nullptr;
    for (size_t i = above(address); i-- > 0;)
      if (table[i]->shared || table[i]->launch == machine.launch_start) {
        near = table[i];
        break;
      }
    memory_fault(FAULT_BOUNDS, place, lane, access, address, bytes, near);
    raise_fault();
    return nullptr;
  }
  size_t offset = (const char *)address - a->base;
  if (offset + bytes > a->size) {
    memory_fault(FAULT_BOUNDS, place, lane, access, address, bytes, a);
    raise_fault();
    return nullptr;
  }
  size_t need = bytes >= 16 ? 16 : bytes;
  // AMD's instructions say what they need (check_alignment); elsewhere it is the access's own size.
  bool natural = machine.launch->text && (need & (need - 1)) == 0;
  if (natural && !check_alignment(address, bytes, need, place)) return nullptr;
  refine(a, offset, bytes);
  return a;
}

Access now(const Lane *lane, uint32_t place, uint16_t flags) {
  return {machine.clock, (uint16_t)lane->index, flags, place};
}

bool check_change(Lane *lane, int access, void *address, size_t bytes, uint32_t place, uint16_t flags) {
  Allocation *a = locate(lane, access, address, bytes, place);
  if (!a) return false;
  size_t first = ((char *)address - a->base) / a->grain, last = ((char *)address - a->base + bytes - 1) / a->grain;
  for (size_t i = first; i <= last; i++) {
    Cell &cell = a->cells[i];
    bool both_atomic = cell.write.flags & flags & ATOMIC;
    bool alive = !a->shared || cell.write.time >= machine.block_start;
    if (cell.write.time && alive) {
      bool landing = cell.write.flags & PENDING;
      if (landing || (!both_atomic && !ordered(cell.write, lane, a->shared)))
        return race(place, lane, access, address, bytes, a, cell.write, landing ? ACCESS_COPY : cell.write.flags & ATOMIC ? ACCESS_ATOMIC : ACCESS_WRITE);
    }
    if (cell.read.time && !ordered(cell.read, lane, a->shared))
      return race(place, lane, access, address, bytes, a, cell.read, ACCESS_READ);
    if (flags & ATOMIC && !a->initialised && (!cell.write.time || !alive)) {
      memory_fault(FAULT_UNINITIALISED, place, lane, access, address, bytes, a);
      raise_fault();
      return false;
    }
    cell.write = now(lane, place, flags);
    cell.read.time = 0;
  }
  return true;
}

Allocation *new_shared(unsigned number, size_t bytes, size_t alignment, const char *name) {
  if (!shared_base) shared_base = (char *)mmap(nullptr, SHARED_BYTES, 3, 0x4022, -1, 0);
  if (alignment < 16) alignment = 16;
  shared_used = (shared_used + SHARED_GAP + alignment - 1) / alignment * alignment;
  if (shared_used + bytes > SHARED_BYTES || number > MAX_SHARED) {
    fault(FAULT_REFUSED, 0, "more shared memory than any device has");
    return nullptr;
  }
  Allocation *a = add_allocation(shared_base + shared_used, bytes, name, true);
  shared_used += bytes;
  memset(a->base, POISON, a->size);
  return shared[number] = a;
}

}  // namespace

Allocation *find_allocation(const void *address) {
  size_t i = above(address);
  if (!i) return nullptr;
  Allocation *a = table[i - 1];
  bool inside = (size_t)((const char *)address - a->base) < (a->size ? a->size : 1);
  return inside ? a : nullptr;
}

Allocation *add_allocation(char *base, size_t size, const char *name, bool in_shared) {
  if (table_count == table_room) {
    table_room = table_room ? table_room * 2 : 256;
    table = (Allocation **)realloc(table, table_room * sizeof *table);
  }
  Allocation *a = (Allocation *)calloc(1, sizeof *a);
  a->base = base, a->size = size, a->name = name, a->shared = in_shared, a->grain = 16;
  size_t at = above(base);
  memmove(table + at + 1, table + at, (table_count - at) * sizeof *table);
  table[at] = a;
  table_count++;
  return a;
}

void drop_allocation(Allocation *a) {
  size_t at = above(a->base) - 1;
  memmove(table + at, table + at + 1, (table_count - at - 1) * sizeof *table);
  table_count--;
  drop_cells(a);
  memset(cache, 0, sizeof cache);
  if (a->map) munmap(a->map, a->map_bytes);
  free(a);
}

void begin_shared() {
  for (Allocation *&a : shared) {
    if (a) drop_allocation(a);
    a = nullptr;
  }
  shared_used = 0;
}

void poison_shared() {
  for (Allocation *a : shared)
    if (a) memset(a->base, POISON, a->size);
}

bool check_read(Lane *lane, const void *address, size_t bytes, uint32_t place) {
  Allocation *a = locate(lane, ACCESS_READ, address, bytes, place);
  if (!a) return false;
  size_t offset = (const char *)address - a->base;
  for (size_t i = offset / a->grain, last = (offset + bytes - 1) / a->grain; i <= last; i++) {
    Cell &cell = a->cells[i];
    bool written = cell.write.time && (!a->shared || cell.write.time >= machine.block_start);
    if (!written && !a->initialised) {
      memory_fault(FAULT_UNINITIALISED, place, lane, ACCESS_READ, address, bytes, a);
      raise_fault();
      return false;
    }
    bool landing = cell.write.flags & PENDING;
    if (written && (landing || !ordered(cell.write, lane, a->shared)))
      return race(place, lane, ACCESS_READ, address, bytes, a, cell.write, landing ? ACCESS_COPY : cell.write.flags & ATOMIC ? ACCESS_ATOMIC : ACCESS_WRITE);
    Access &read = cell.read;
    Access mine = now(lane, place, 0);
    bool stale = !read.time || ordered(read, lane, a->shared);
    if (!stale) {
      bool other_block = read.flags & MANY_BLOCKS || read.time < machine.block_start;
      bool same_warp = read.lane / machine.launch->warp == lane->warp;
      if (other_block) mine.flags = MANY_BLOCKS;
      else if (read.flags & MANY_OF_BLOCK || !same_warp) mine.flags = MANY_OF_BLOCK;
      else mine.flags = MANY_OF_WARP;
    }
    read = mine;
  }
  return true;
}

bool check_alignment(const void *address, size_t bytes, size_t alignment, uint32_t place) {
  if ((uintptr_t)address % alignment == 0) return true;
  memory_fault(FAULT_ALIGNMENT, place, machine.current, ACCESS_READ, address, bytes, find_allocation(address));
  raise_fault();
  return false;
}

bool check_write(Lane *lane, void *address, size_t bytes, uint32_t place, uint16_t flags) {
  return check_change(lane, flags & PENDING ? ACCESS_COPY : ACCESS_WRITE, address, bytes, place, flags);
}

bool check_atomic(Lane *lane, void *address, size_t bytes, uint32_t place) {
  return check_change(lane, ACCESS_ATOMIC, address, bytes, place, ATOMIC);
}

// An asynchronous copy, checked when it was issued, is there now.
void land(Lane *lane, void *address, size_t bytes, uint32_t place) {
  Allocation *a = find(address, place);
  size_t offset = (char *)address - a->base;
  refine(a, offset, bytes);
  for (size_t i = offset / a->grain, last = (offset + bytes - 1) / a->grain; i <= last; i++)
    a->cells[i].write = now(lane, place, 0);
}

extern "C" {

void *device_shared(unsigned number, size_t bytes, size_t alignment, const char *name) {
  Allocation *a = number < MAX_SHARED ? shared[number] : nullptr;
  return (a ? a : new_shared(number, bytes, alignment, name))->base;
}

// Shared memory that the kernel's library has room for.
void device_shared_at(unsigned number, void *address, size_t bytes, const char *name) {
  if (number >= MAX_SHARED) return fault(FAULT_REFUSED, 0, "more arrays of shared memory than any kernel should have");
  if (shared[number]) return;
  shared[number] = add_allocation((char *)address, bytes, name, true);
  memset(address, POISON, bytes);
}

void *device_dynamic_shared() {
  Allocation *a = shared[MAX_SHARED];
  if (!a) a = new_shared(MAX_SHARED, machine.launch->dynamic_shared, 1024, "dynamic shared memory");
  return a->base;
}

// An offset, past 0 so that it is no null pointer.
uint32_t device_shared_address(const void *address) {
  size_t offset = (const char *)address - shared_base;
  if (!shared_base || offset >= SHARED_BYTES) fault(FAULT_REFUSED, HERE, "an address that is not in shared memory is taken for one that is");
  return (uint32_t)offset + 16;
}

void *device_shared_pointer(uint32_t address) { return shared_base + (address - 16); }

void *device_allocate(size_t bytes) {
  size_t body = (bytes + 255) / 256 * 256, pages = (body + PAGE - 1) / PAGE * PAGE, map_bytes = pages + 2 * GUARD;
  char *map = (char *)mmap(nullptr, map_bytes, 0, 0x4022, -1, 0);
  if (map == (char *)-1) return nullptr;
  if (mprotect(map + GUARD, pages, 3)) {
    munmap(map, map_bytes);
    return nullptr;
  }
  char *base = map + GUARD + pages - body;
  memset(base, POISON, body);
  Allocation *a = add_allocation(base, bytes, "memory of no launch", false);
  a->map = map, a->map_bytes = map_bytes;
  return base;
}

void device_free(void *address) {
  Allocation *a = find_allocation(address);
  if (a && a->base == address) drop_allocation(a);
}

// The host has written these bytes.
void device_host_wrote(void *address, size_t bytes) {
  Allocation *a = bytes ? find_allocation(address) : nullptr;
  if (!a) return;
  size_t offset = (char *)address - a->base;
  if (!offset && bytes >= a->size) {
    a->initialised = true;
    return;
  }
  if (a->initialised) return;
  refine(a, offset, bytes);
  for (size_t i = offset / a->grain, last = (offset + bytes - 1) / a->grain; i <= last; i++)
    a->cells[i].write = {1, 0, 0, 0};
}

static bool watched(const void *address) { return machine.on_lane && !on_lane_stack(address); }

void device_read(const void *address, size_t bytes, uint32_t place) {
  if (watched(address)) check_read(machine.current, address, bytes, place ? place : HERE);
}

void device_write(void *address, size_t bytes, uint32_t place) {
  if (watched(address)) check_write(machine.current, address, bytes, place ? place : HERE);
}

void device_atomic(void *address, size_t bytes, uint32_t place) {
  if (watched(address)) check_atomic(machine.current, address, bytes, place ? place : HERE);
}

}  // extern "C"
