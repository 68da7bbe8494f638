// CUDA's graphs, as NVIDIA's driver offers them (CUDA Driver API, "Stream Management" and "Graph Management"): launches
// and copies are recorded instead of run, and run together later. What a driver refuses while a stream is being recorded
// (memory that is allocated or given back, copies and waits of other streams) breaks the recording here too.
//
// Workspaces, where they are pooled, are kept as TVM keeps them (src/runtime/workspace_pool.cc): by thread, the smallest
// that fits, and where none does the largest is freed for a larger one.
#include "state.h"

extern "C" {
void *device_allocate(size_t bytes);
void device_free(void *address);
void device_host_wrote(void *address, size_t bytes);
}

namespace {

enum { CUDA_SUCCESS = 0, CUDA_ERROR_LAUNCH_FAILED = 719, CUDA_ERROR_INVALID_VALUE = 1,
       CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901 };

struct Node {
  DeviceLaunch launch;  // or, without a body, a copy
  void *to;
  const void *from;
  size_t bytes;
};

struct Graph {
  Node *nodes;
  unsigned count, room;
};

bool recording;
void *recorded_stream;
const char *broken;
Graph *graph;
__thread void *current_stream;

Node &add() {
  if (graph->count == graph->room) {
    graph->room = graph->room ? 2 * graph->room : 64;
    graph->nodes = (Node *)realloc(graph->nodes, graph->room * sizeof(Node));
  }
  Node &node = graph->nodes[graph->count++];
  memset(&node, 0, sizeof node);
  return node;
}

void *kept(const void *of, size_t bytes) { return memcpy(malloc(bytes ? bytes : 1), of, bytes); }

struct Workspace {
  void *data;
  size_t size;
};
constexpr unsigned WORKSPACES = 64;
struct Pool {
  Workspace free[WORKSPACES], taken[WORKSPACES];  // free: smallest first
  unsigned free_count, taken_count;
};
bool pooled;
__thread Pool pool;

}  // namespace

// What no recorded stream allows has happened.
extern "C" void graphs_forbid(const char *what) {
  if (recording && !broken) broken = what;
}

// Whether a launch was recorded; else it is to be run.
bool graphs_record(const DeviceLaunch *launch) {
  if (!recording) return false;
  if (current_stream != recorded_stream) {
    graphs_forbid("a launch on another stream");
    return true;
  }
  Node &node = add();
  node.launch = *launch;
  node.launch.arguments = (const DeviceArgument *)kept(launch->arguments, launch->count * sizeof(DeviceArgument));
  node.launch.frame = kept(launch->frame, launch->frame_bytes);
  return true;
}

void graphs_set_stream(void *stream) { current_stream = stream; }

bool graphs_pool() { return pooled; }

void *graphs_take_workspace(size_t bytes) {
  bytes = bytes ? (bytes + 4095) / 4096 * 4096 : 4096;
  unsigned at = 0;
  while (at < pool.free_count && pool.free[at].size < bytes) at++;
  Workspace found;
  if (at < pool.free_count) {
    found = pool.free[at];
    for (unsigned i = at + 1; i < pool.free_count; i++) pool.free[i - 1] = pool.free[i];
    pool.free_count--;
  } else {
    if (pool.free_count) {
      graphs_forbid("a workspace was freed for a larger one");
      device_free(pool.free[--pool.free_count].data);
    }
    graphs_forbid("a workspace was allocated");
    found = {device_allocate(bytes), bytes};
  }
  if (pool.taken_count == WORKSPACES) abort();
  pool.taken[pool.taken_count++] = found;
  return found.data;
}

void graphs_give_workspace(void *data) {
  for (unsigned i = 0; i < pool.taken_count; i++) {
    if (pool.taken[i].data != data) continue;
    Workspace done = pool.taken[i];
    pool.taken[i] = pool.taken[--pool.taken_count];
    if (pool.free_count == WORKSPACES) abort();
    unsigned at = pool.free_count++;
    for (; at && pool.free[at - 1].size > done.size; at--) pool.free[at] = pool.free[at - 1];
    pool.free[at] = done;
    return;
  }
}

extern "C" {

// The last launch of what was recorded gets lost: what starts then is not what was recorded.
void device_forget_launch(void *of) {
  Graph *found = (Graph *)of;
  for (unsigned i = found->count; i-- > 0;)
    if (found->nodes[i].launch.body) {
      for (; i + 1 < found->count; i++) found->nodes[i] = found->nodes[i + 1];
      found->count--;
      return;
    }
}

// Workspaces are kept from call to call from now on, as on a card.
void device_pool_workspaces(bool on) { pooled = on; }

int cuStreamBeginCapture_v2(void *stream, int) {
  if (!stream || recording) return CUDA_ERROR_INVALID_VALUE;  // the default stream can't be recorded
  recording = true, recorded_stream = stream, broken = nullptr;
  graph = (Graph *)calloc(1, sizeof(Graph));
  return CUDA_SUCCESS;
}

int cuStreamEndCapture(void *stream, void **out) {
  if (!recording || stream != recorded_stream) return CUDA_ERROR_INVALID_VALUE;
  recording = false;
  *out = broken ? nullptr : graph;
  return broken ? CUDA_ERROR_STREAM_CAPTURE_INVALIDATED : CUDA_SUCCESS;
}

int cuGraphInstantiateWithFlags(void **out, void *of, unsigned long long) {
  *out = of;
  return of ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

int cuGraphLaunch(void *of, void *) {
  Graph *started = (Graph *)of;
  for (unsigned i = 0; i < started->count; i++) {
    Node &node = started->nodes[i];
    if (node.launch.body) {
      if (device_launch(&node.launch)) return CUDA_ERROR_LAUNCH_FAILED;
    } else {
      memmove(node.to, node.from, node.bytes);
      device_host_wrote(node.to, node.bytes);
    }
  }
  return CUDA_SUCCESS;
}

int cuGraphDestroy(void *) { return CUDA_SUCCESS; }  // what was made of it stands

int cuGraphExecDestroy(void *of) {
  Graph *done = (Graph *)of;
  for (unsigned i = 0; i < done->count; i++) {
    free((void *)done->nodes[i].launch.arguments);
    free(done->nodes[i].launch.frame);
  }
  free(done->nodes);
  free(done);
  return CUDA_SUCCESS;
}

int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void *stream) {
  if (recording && stream == recorded_stream) {
    Node &node = add();
    node.to = (void *)to, node.from = (const void *)from, node.bytes = bytes;
    return CUDA_SUCCESS;
  }
  graphs_forbid("a copy on another stream");
  memmove((void *)to, (const void *)from, bytes);
  device_host_wrote((void *)to, bytes);
  return CUDA_SUCCESS;
}

int cuGetErrorName(int error, const char **name) {
  *name = error == CUDA_ERROR_STREAM_CAPTURE_INVALIDATED ? (broken ? broken : "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED")
          : error == CUDA_ERROR_LAUNCH_FAILED            ? "CUDA_ERROR_LAUNCH_FAILED"
                                                         : "CUDA_ERROR_INVALID_VALUE";
  return CUDA_SUCCESS;
}

}  // extern "C"
