// NVIDIA's driver with one card of sm_90 that takes every kernel and runs none.
#include <stddef.h>
#include <string.h>

#define ALLOWED(name) \
  int name(void) { return 0; }
#define HANDLE(name, ...)                \
  int name(__VA_ARGS__ void **made) {    \
    *made = (void *)1;                   \
    return 0;                            \
  }

int cuDriverGetVersion(int *version) {
  *version = 13000;
  return 0;
}
int cuDeviceGetCount(int *count) {
  *count = 1;
  return 0;
}
int cuDeviceGet(int *device, int number) {
  *device = number;
  return 0;
}
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == 75 ? 9 : 0;  // compute capability, major; minor
  return 0;
}
int cuMemcpyDtoDAsync_v2(void *to, const void *from, size_t bytes) {
  memcpy(to, from, bytes);
  return 0;
}
int cuGetErrorName(int error, const char **text) {
  *text = "error";
  return 0;
}
int cuGetErrorString(int error, const char **text) { return cuGetErrorName(error, text); }

HANDLE(cuModuleLoadData)
HANDLE(cuModuleGetFunction)
HANDLE(cuStreamEndCapture, void *stream,)
HANDLE(cuGraphInstantiateWithFlags)
ALLOWED(cuDeviceGetName)
ALLOWED(cuFuncSetAttribute)
ALLOWED(cuGraphDestroy)
ALLOWED(cuGraphExecDestroy)
ALLOWED(cuGraphLaunch)
ALLOWED(cuInit)
ALLOWED(cuLaunchKernel)
ALLOWED(cuLaunchKernelEx)
ALLOWED(cuModuleUnload)
ALLOWED(cuStreamBeginCapture_v2)
ALLOWED(cuTensorMapEncodeTiled)
