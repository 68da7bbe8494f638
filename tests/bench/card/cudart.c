// A CUDA runtime whose card is this machine's memory: copies are made, events pass at once.
#include <stdlib.h>
#include <string.h>

#define ALLOWED(name) \
  int name(void) { return 0; }
#define HANDLE(name)          \
  int name(void **made) {     \
    *made = (void *)1;        \
    return 0;                 \
  }

int cudaMalloc(void **made, size_t bytes) {
  *made = aligned_alloc(512, (bytes / 512 + 1) * 512);
  memset(*made, 0, bytes);
  return 0;
}
int cudaMallocHost(void **made, size_t bytes) { return cudaMalloc(made, bytes); }
int cudaFree(void *memory) {
  free(memory);
  return 0;
}
int cudaFreeHost(void *memory) { return cudaFree(memory); }
int cudaMemcpyAsync(void *to, const void *from, size_t bytes) {
  memcpy(to, from, bytes);
  return 0;
}
int cudaMemcpyPeerAsync(void *to, int device, const void *from, int other, size_t bytes) {
  return cudaMemcpyAsync(to, from, bytes);
}
int cudaMemGetInfo(size_t *free_bytes, size_t *total) {
  *free_bytes = (size_t)1 << 28;
  *total = (size_t)1 << 30;
  return 0;
}
int cudaGetDeviceCount(int *count) {
  *count = 1;
  return 0;
}
int cudaGetDevice(int *device) {
  *device = 0;
  return 0;
}
int cudaDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == 75 ? 9 : attribute == 76 ? 0 : attribute == 10 ? 32 : 1024;  // sm_90, lanes of a warp
  return 0;
}
int cudaEventElapsedTime(float *milliseconds) {
  *milliseconds = 0;
  return 0;
}
const char *cudaGetErrorName(int error) { return "error"; }
const char *cudaGetErrorString(int error) { return "error"; }

HANDLE(cudaStreamCreate)
HANDLE(cudaStreamCreateWithFlags)
HANDLE(cudaEventCreate)
ALLOWED(cudaEventDestroy)
ALLOWED(cudaEventRecord)
ALLOWED(cudaEventSynchronize)
ALLOWED(cudaGetDeviceProperties)
ALLOWED(cudaGetLastError)
ALLOWED(cudaGraphDestroy)
ALLOWED(cudaGraphExecDestroy)
ALLOWED(cudaGraphInstantiate)
ALLOWED(cudaGraphLaunch)
ALLOWED(cudaPeekAtLastError)
ALLOWED(cudaSetDevice)
ALLOWED(cudaStreamBeginCapture)
ALLOWED(cudaStreamDestroy)
ALLOWED(cudaStreamEndCapture)
ALLOWED(cudaStreamSynchronize)
ALLOWED(cudaStreamWaitEvent)
