// The part of HIP's C interface that is used here, found in libamdhip64.so at run time: nothing of ROCm is needed to
// build this.
//
// Source of every declaration and number: include/hip/hip_runtime_api.h of github.com/ROCm/HIP (ROCm 6; its
// numbers are part of HIP's ABI and the same in ROCm 7).
#ifndef LLMC_RUNTIME_HIP_HIP_H_
#define LLMC_RUNTIME_HIP_HIP_H_

#include <cstddef>
#include <string>

namespace llmc {
namespace hip {

using Error = int;  // hipError_t

constexpr Error kSuccess = 0;
constexpr Error kOutOfMemory = 2;
constexpr Error kDeinitialized = 4;
constexpr Error kNoDevice = 100;
constexpr Error kInvalidDevice = 101;
constexpr Error kNoBinaryForGpu = 209;
constexpr Error kContextIsDestroyed = 709;

// hipDeviceAttribute_t
enum Attribute : int {
  kClockRate = 5,  // kHz
  kL2CacheSize = 19,
  kComputeCapabilityMajor = 23,
  kMaxBlockDimX = 26,
  kMaxBlockDimY = 27,
  kMaxBlockDimZ = 28,
  kMaxThreadsPerBlock = 56,
  kComputeCapabilityMinor = 61,
  kMultiprocessorCount = 63,
  kMaxRegistersPerBlock = 71,
  kMaxSharedMemoryPerBlock = 74,
  kWarpSize = 87,
};

// hipMemcpyKind
enum CopyKind : int { kHostToDevice = 1, kDeviceToHost = 2, kDeviceToDevice = 3 };

constexpr unsigned kStreamNonBlocking = 1;
constexpr unsigned kEventDisableTiming = 2;

// hipDeviceProp_tR0600: where gcnArchName (a string such as "gfx942:sramecc+:xnack-") stands in it, in bytes.
constexpr size_t kPropertiesBytes = 1472;
constexpr size_t kArchNameOffset = 1160;

// What `extra` of hipModuleLaunchKernel is made of: HIP_LAUNCH_PARAM_*
inline void* LaunchParam(int which) { return reinterpret_cast<void*>(static_cast<size_t>(which)); }
constexpr int kBufferPointer = 1, kBufferSize = 2, kParamEnd = 3;

// F(name, parameters) for each function; all of them return hipError_t.
#define LLMC_HIP_FUNCTIONS(F)                                                                    \
  F(hipGetDeviceCount, (int*))                                                                   \
  F(hipSetDevice, (int))                                                                         \
  F(hipGetDevice, (int*))                                                                        \
  F(hipDeviceGetAttribute, (int*, int, int))                                                     \
  F(hipGetDevicePropertiesR0600, (void*, int))                                                   \
  F(hipDeviceGetName, (char*, int, int))                                                         \
  F(hipMemGetInfo, (size_t*, size_t*))                                                           \
  F(hipRuntimeGetVersion, (int*))                                                                \
  F(hipDriverGetVersion, (int*))                                                                 \
  F(hipMalloc, (void**, size_t))                                                                 \
  F(hipFree, (void*))                                                                            \
  F(hipHostMalloc, (void**, size_t, unsigned))                                                   \
  F(hipHostFree, (void*))                                                                        \
  F(hipMemcpy, (void*, const void*, size_t, int))                                                \
  F(hipMemcpyAsync, (void*, const void*, size_t, int, void*))                                    \
  F(hipMemcpyPeerAsync, (void*, int, const void*, int, size_t, void*))                           \
  F(hipStreamCreateWithFlags, (void**, unsigned))                                                \
  F(hipStreamDestroy, (void*))                                                                   \
  F(hipStreamSynchronize, (void*))                                                               \
  F(hipStreamWaitEvent, (void*, void*, unsigned))                                                \
  F(hipEventCreateWithFlags, (void**, unsigned))                                                 \
  F(hipEventDestroy, (void*))                                                                    \
  F(hipEventRecord, (void*, void*))                                                              \
  F(hipEventSynchronize, (void*))                                                                \
  F(hipEventElapsedTime, (float*, void*, void*))                                                 \
  F(hipModuleLoadData, (void**, const void*))                                                    \
  F(hipModuleUnload, (void*))                                                                    \
  F(hipModuleGetFunction, (void**, void*, const char*))                                          \
  F(hipModuleLaunchKernel, (void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,   \
                            unsigned, void*, void**, void**))

// libamdhip64.so, opened when it is first asked for.
struct Library {
#define LLMC_HIP_DECLARE(name, parameters) Error(*name) parameters = nullptr;
  LLMC_HIP_FUNCTIONS(LLMC_HIP_DECLARE)
#undef LLMC_HIP_DECLARE
  const char* (*hipGetErrorName)(Error) = nullptr;
  const char* (*hipGetErrorString)(Error) = nullptr;
  std::string problem;  // why it can't be used; empty: it can

  // Usable or not; never throws.
  static const Library& Find();
  // Throws RuntimeError with `problem` where it can't be used.
  static const Library& Get();

 private:
  Library();
};

// Throws RuntimeError with HIP's name of the error, its text, and what to do where that is known. Errors of a process
// that is ending (HIP is gone already) are none: there is nothing left to do right.
void Check(Error error, const char* function);

// How many devices HIP finds; 0 where there is no HIP. Never throws.
int DeviceCount();

// The architecture of a device, without its features: "gfx942".
std::string Arch(int device);

// Calls one of the functions of `Library`, and checks.
#define LLMC_HIP(function, ...) \
  ::llmc::hip::Check(::llmc::hip::Library::Get().function(__VA_ARGS__), #function)

}  // namespace hip
}  // namespace llmc

#endif  // LLMC_RUNTIME_HIP_HIP_H_
