// Lanes as fibers of one thread: a launch runs one block at a time, a block one warp at a time, a warp one lane at a
// time, each until it waits for others.
#include "state.h"

Machine machine;

namespace {

constexpr size_t STACK = 256 << 10;  // a lane's, its last page a guard
char *stacks;
void *scheduler;

extern "C" void device_switch(void **save, void *to);
#if defined(__x86_64__)
constexpr int SAVED = 6;
asm(R"(
.text
.local device_switch
device_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
#elif defined(__aarch64__)
constexpr int SAVED = 20;
asm(R"(
.text
.local device_switch
device_switch:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)");
#else
#error "the software device knows how to switch stacks on x86-64 and aarch64"
#endif

void run_lane() {
  machine.launch->body(machine.launch->frame);
  machine.current->state = LANE_DONE;
  device_switch(&machine.current->stack_pointer, scheduler);
  abort();
}

void wait_as(LaneState state) {
  Lane *lane = machine.current;
  lane->state = state;
  device_switch(&lane->stack_pointer, scheduler);
}

void resume(Lane &lane) {
  machine.current = &lane;
  lane.state = LANE_READY;
  machine.on_lane = true;
  device_switch(&scheduler, lane.stack_pointer);
  machine.on_lane = false;
}

void start(Lane &lane) {
  void **top = (void **)(stacks + (lane.index + 1) * STACK - 64);
#if defined(__x86_64__)
  *--top = nullptr;  // where run_lane would return to
  *--top = (void *)run_lane;
  top -= SAVED;
  memset(top, 0, SAVED * sizeof(void *));
#else
  top -= SAVED;
  memset(top, 0, SAVED * sizeof(void *));
  top[11] = (void *)run_lane;  // x30
#endif
  lane.stack_pointer = top;
  lane.state = LANE_READY;
  lane.copy_count = lane.copy_group = 0;
}

// The lanes that wait together with `leader`, in group.present; -> one that it names and that does not take part.
Lane *gather(const Lane *leader, Group &group) {
  Lane *missing = nullptr;
  group.present = 0;
  for (unsigned i = 0; i < group.width; i++) {
    Lane *lane = group.lanes[i];
    bool same = lane->state == LANE_IN_GROUP && lane->perform == leader->perform && lane->mask == leader->mask;
    bool expected = leader->mask ? leader->mask >> i & 1 : lane->place == leader->place;
    if (same && expected) group.present |= 1ull << i;
    if (leader->mask && expected && !same && lane->state != LANE_DONE) missing = lane;
    if (lane == leader && !expected) missing = lane;
  }
  return missing;
}

// Finds lanes of a warp that can go on now: all wait for the same thing, and none of those they expect is missing.
// Lanes that went apart: those behind in the program go first, so that all meet again where their paths join.
bool next_group(Group &group) {
  uint64_t tried = 0;
  Lane *stuck = nullptr, *awaited = nullptr;
  while (true) {
    Lane *leader = nullptr;
    for (unsigned i = 0; i < group.width; i++) {
      Lane *lane = group.lanes[i];
      bool candidate = lane->state == LANE_IN_GROUP && !(tried >> i & 1);
      if (candidate && (!leader || lane->place < leader->place)) leader = lane;
    }
    if (!leader) break;
    Lane *missing = gather(leader, group);
    if (!missing) return true;
    if (!stuck) stuck = leader, awaited = missing;
    tried |= group.present | 1ull << leader->number;
  }
  if (stuck) {
    Fault *f = begin_fault(FAULT_LANES, stuck->place);
    f->thread = stuck->thread, f->other_thread = awaited->thread, f->other_block = machine.block;
    f->other_place = awaited == stuck ? 0 : awaited->place;
  }
  return false;
}

void run_warp(unsigned warp) {
  unsigned first = warp * machine.launch->warp;
  unsigned left = machine.lane_count - first;
  unsigned width = left < machine.launch->warp ? left : machine.launch->warp;
  Lane *lanes[64];
  for (unsigned i = 0; i < width; i++) lanes[i] = &machine.lanes[first + i];
  Group group{lanes, 0, width, warp};
  while (!machine.fault.kind) {
    for (unsigned k = 0; k < width; k++) {
      Lane *lane = lanes[machine.reverse ? width - 1 - k : k];
      if (lane->state == LANE_READY) resume(*lane);
      if (machine.fault.kind) return;
    }
    if (!next_group(group)) return;
    machine.current = lanes[__builtin_ctzll(group.present)];
    machine.current->perform(group);
    for (unsigned i = 0; i < width; i++)
      if (group.present >> i & 1) lanes[i]->state = LANE_READY;
  }
}

// All lanes of the block wait at one barrier: they may go on.
bool pass_barrier() {
  Lane &leader = machine.lanes[0];
  unsigned waiting = 0;
  Lane *here = nullptr, *elsewhere = nullptr;
  for (unsigned i = 0; i < machine.lane_count; i++) {
    Lane &lane = machine.lanes[i];
    waiting += lane.state == LANE_AT_BARRIER;
    if (lane.state == LANE_AT_BARRIER && !here) here = &lane;
  }
  if (!waiting) return false;
  for (unsigned i = 0; i < machine.lane_count && !elsewhere; i++) {
    Lane &lane = machine.lanes[i];
    if (lane.state != LANE_AT_BARRIER || lane.place != here->place) elsewhere = &lane;
  }
  if (elsewhere) {
    Fault *f = begin_fault(FAULT_BARRIER, here->place);
    f->thread = here->thread, f->other_thread = elsewhere->thread, f->other_block = machine.block;
    f->other_place = elsewhere->state == LANE_DONE ? 0 : elsewhere->place;
    f->detail = elsewhere->state == LANE_DONE ? "has ended" : "waits elsewhere";
    return false;
  }
  uint32_t now = ++machine.clock;
  for (unsigned s = 0; s < 2; s++)
    if (leader.spaces >> s & 1) machine.barrier_time[s] = now;
  for (unsigned i = 0; i < machine.lane_count; i++) machine.lanes[i].state = LANE_READY;
  return true;
}

void run_block() {
  machine.block_start = ++machine.clock;
  if (machine.block_count == machine.block_room) {
    machine.block_room = machine.block_room ? machine.block_room * 2 : 1024;
    machine.block_starts = (uint32_t *)realloc(machine.block_starts, machine.block_room * sizeof(uint32_t));
  }
  machine.block_starts[machine.block_count++] = machine.block_start;
  machine.clock++;
  poison_shared();
  for (unsigned i = 0; i < machine.lane_count; i++) start(machine.lanes[i]);
  do {
    for (unsigned k = 0; k < machine.warp_count && !machine.fault.kind; k++)
      run_warp(machine.reverse ? machine.warp_count - 1 - k : k);
  } while (!machine.fault.kind && pass_barrier());
}

bool prepare(const DeviceLaunch *launch) {
  uint64_t count = (uint64_t)launch->threads.x * launch->threads.y * launch->threads.z;
  uint64_t blocks = (uint64_t)launch->grid.x * launch->grid.y * launch->grid.z;
  if (!count || count > MAX_LANES || !blocks || launch->grid.y > 65535 || launch->grid.z > 65535) {
    Fault *f = begin_fault(FAULT_LAUNCH, 0);
    f->block = launch->grid, f->thread = launch->threads;
    return false;
  }
  if (!stacks) {
    stacks = (char *)mmap(nullptr, STACK * MAX_LANES, 3, 0x4022, -1, 0);  // read, write; private, anonymous, no reserve
    for (unsigned i = 0; i < MAX_LANES; i++) mprotect(stacks + i * STACK, 4096, 0);
  }
  machine.lane_count = (unsigned)count;
  machine.warp_count = ((unsigned)count + launch->warp - 1) / launch->warp;
  const DeviceSize &size = launch->threads;
  for (unsigned i = 0; i < machine.lane_count; i++) {
    Lane &lane = machine.lanes[i];
    lane.index = i, lane.warp = i / launch->warp, lane.number = i % launch->warp;
    lane.thread = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
  }
  for (int i = 0; i < launch->count; i++) {
    const DeviceArgument &argument = launch->arguments[i];
    Allocation *allocation = find_allocation(argument.data);
    if (!argument.data) continue;  // of a tensor without elements
    if (!allocation || (launch->whole_buffers && allocation->base != argument.data)) {
      Fault *f = begin_fault(FAULT_BINDING, 0);
      f->memory = argument.name;
      f->detail = allocation ? "it points into a buffer, and the device binds buffers whole" : "it is not the device's memory";
      return false;
    }
    allocation->launch = machine.launch_start;
    allocation->name = argument.name;
  }
  return true;
}

unsigned axis_of(const DeviceSize &size, unsigned axis) { return axis == 0 ? size.x : axis == 1 ? size.y : size.z; }

void (*describe)(const Fault *, char *, size_t);
void (*raise)(const char *, const char *);

}  // namespace

bool on_lane_stack(const void *address) {
  return (const char *)address >= stacks && (const char *)address < stacks + STACK * MAX_LANES;
}

uint32_t place_of(void *return_address) {
  const char *text = machine.launch->text;
  if (!text) return machine.current ? machine.current->announced : 0;
  return (uint32_t)((const char *)return_address - text - 1);  // -1: within the call
}

Fault *begin_fault(int kind, uint32_t place) {
  static Fault later;  // only the first counts
  Fault *f = machine.fault.kind ? &later : &machine.fault;
  *f = Fault{};
  f->kind = kind;
  f->lines = machine.launch->text == nullptr;
  f->place = place;
  f->kernel = machine.launch->kernel;
  f->block = machine.block;
  if (machine.current) f->thread = machine.current->thread;
  return f;
}

void raise_fault() {
  if (machine.on_lane) device_switch(&machine.current->stack_pointer, scheduler);
}

void fault(int kind, uint32_t place, const char *detail) {
  begin_fault(kind, place)->detail = detail;
  raise_fault();
}

void together(Perform perform, void *payload, uint64_t mask, uint32_t place) {
  Lane *lane = machine.current;
  lane->perform = perform, lane->payload = payload, lane->mask = mask, lane->place = place;
  wait_as(LANE_IN_GROUP);
}

extern "C" {

int device_launch(const DeviceLaunch *launch) {
  if (graphs_record(launch)) return 0;
  machine.launch = launch;
  machine.fault = Fault{};
  machine.current = nullptr;
  machine.launch_start = ++machine.clock;
  machine.block_count = 0;
  machine.block = {};
  begin_shared();
  if (prepare(launch)) {
    const DeviceSize &grid = launch->grid;
    uint64_t blocks = (uint64_t)grid.x * grid.y * grid.z;
    for (uint64_t k = 0; k < blocks && !machine.fault.kind; k++) {
      uint64_t b = machine.reverse ? blocks - 1 - k : k;
      machine.block = {(unsigned)(b % grid.x), (unsigned)(b / grid.x % grid.y), (unsigned)(b / grid.x / grid.y)};
      run_block();
    }
  }
  if (!machine.fault.kind) return 0;
  static char text[4096];
  describe(&machine.fault, text, sizeof text);
  raise("DeviceFault", text);
  return -1;
}

void device_configure(bool reverse, bool copies_early) {
  machine.reverse = reverse;
  machine.copies_early = copies_early;
}

void device_connect(void (*describe_fault)(const Fault *, char *, size_t), void (*raise_error)(const char *, const char *)) {
  describe = describe_fault;
  raise = raise_error;
}

unsigned device_thread(unsigned axis) { return axis_of(machine.current->thread, axis); }
unsigned device_block(unsigned axis) { return axis_of(machine.block, axis); }
unsigned device_threads(unsigned axis) { return axis_of(machine.launch->threads, axis); }
unsigned device_grid(unsigned axis) { return axis_of(machine.launch->grid, axis); }
unsigned device_lane() { return machine.current->number; }
unsigned device_warp() { return machine.current->warp; }

uint64_t device_present() {
  unsigned left = machine.lane_count - machine.current->warp * machine.launch->warp;
  unsigned width = left < machine.launch->warp ? left : machine.launch->warp;
  return width == 64 ? ~0ull : (1ull << width) - 1;
}

void device_barrier(unsigned spaces) {
  machine.current->place = HERE;
  machine.current->spaces = spaces;
  wait_as(LANE_AT_BARRIER);
}

void device_refuse(const char *why) { fault(FAULT_REFUSED, HERE, why); }

}  // extern "C"
