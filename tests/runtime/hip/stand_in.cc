// A stand-in for libamdhip64.so: its cards' memory is the host's, filled with 0xAB, and every call is logged.
//
// A stream's work is done when somebody waits for it, and not before, so that a missing wait shows. A launched kernel runs
// as a function of the same name in the library HIP_STAND_IN_KERNELS, if it has one:
//   extern "C" void NAME(const char* arguments, const unsigned grid[3], const unsigned block[3], unsigned shared)
// or as the software device's function of that name, if HIP_STAND_IN_SIGNATURES has a line for it: the name, and a letter
// for each argument (p: pointer, l: int64, i: int32, f: float32). Where the process has the software device, memory is
// its own.
//
// HIP_STAND_IN_LOG      file that calls are appended to
// HIP_STAND_IN_DEVICES  how many cards there are (2)
// HIP_STAND_IN_ARCH     their architecture (gfx942:sramecc+:xnack-)
// HIP_STAND_IN_FAIL     NAME=CODE: that function returns the error
#include <dlfcn.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#define HIP extern "C" __attribute__((visibility("default"))) int

namespace {

struct Stream;

struct Event {
  Stream* stream = nullptr;
  std::chrono::steady_clock::time_point at;
};

struct Stream {
  std::vector<std::function<void()>> queue;
  void Drain() {
    for (auto work = std::exchange(queue, {}); auto& one : work) one();
  }
};

int current = 0;
long live = 0;  // allocations

const char* Env(const char* name, const char* otherwise) {
  const char* value = std::getenv(name);
  return value ? value : otherwise;
}

int Devices() { return std::atoi(Env("HIP_STAND_IN_DEVICES", "2")); }

template <typename... T>
void Log(const char* format, T... values) {
  FILE* file = std::fopen(Env("HIP_STAND_IN_LOG", "/dev/null"), "a");
  if constexpr (sizeof...(values) == 0) {
    std::fputs(format, file);
  } else {
    std::fprintf(file, format, values...);
  }
  std::fputc('\n', file);
  std::fclose(file);
}

// The error that this function is to fail with, or 0.
int Fails(const char* function) {
  const std::string wanted = Env("HIP_STAND_IN_FAIL", "");
  const size_t equals = wanted.find('=');
  return wanted.substr(0, equals) == function ? std::atoi(wanted.c_str() + equals + 1) : 0;
}

// Now, or when the stream is waited for.
void Do(void* stream, std::function<void()> work) {
  if (stream) {
    static_cast<Stream*>(stream)->queue.push_back(std::move(work));
  } else {
    work();
  }
}

// TVMFFIAny, by which the software device's functions take arguments.
struct Any {
  int32_t type = 0, unused = 0;
  union {
    int64_t integer = 0;
    double number;
  };
};

// The arguments as they lie in memory, each at a multiple of its own size, and then the launch.
std::vector<Any> Unpack(const std::string& letters, const std::string& arguments, const unsigned launch[7]) {
  std::vector<Any> values;
  size_t at = 0;
  for (const char letter : letters) {
    const size_t size = letter == 'p' || letter == 'l' ? 8 : 4;
    at = (at + size - 1) / size * size;
    Any value;
    if (letter == 'f') {
      float number;
      std::memcpy(&number, &arguments.at(at), sizeof(number));
      value.number = number;
    } else {
      std::memcpy(&value.integer, &arguments.at(at), size);
    }
    values.push_back(value);
    at += size;
  }
  for (int i = 0; i < 7; ++i) values.emplace_back().integer = launch[i];
  return values;
}

const std::map<std::string, std::string>& Signatures() {
  static const std::map<std::string, std::string> found = [] {
    std::map<std::string, std::string> signatures;
    std::ifstream file(Env("HIP_STAND_IN_SIGNATURES", "/dev/null"));
    for (std::string name, letters; file >> name >> letters;) signatures[name] = letters;
    return signatures;
  }();
  return found;
}

// What a launch does: nothing where nobody knows the kernel.
void Run(const std::string& name, const std::string& arguments, const unsigned launch[7]) {
  static void* library = dlopen(Env("HIP_STAND_IN_KERNELS", "none"), RTLD_NOW);
  const auto signature = Signatures().find(name);
  if (signature != Signatures().end()) {
    using Entry = int (*)(void*, const Any*, int32_t, Any*);
    const Entry entry = reinterpret_cast<Entry>(dlsym(library, ("__tvm_ffi_" + name).c_str()));
    const std::vector<Any> values = Unpack(signature->second, arguments, launch);
    Any result;
    if (!entry || entry(nullptr, values.data(), static_cast<int32_t>(values.size()), &result)) std::abort();
  } else if (library) {
    using Kernel = void (*)(const char*, const unsigned*, const unsigned*, unsigned);
    const Kernel kernel = reinterpret_cast<Kernel>(dlsym(library, name.c_str()));
    if (kernel) kernel(arguments.data(), launch, launch + 3, launch[6]);
  }
}

// A function of the software device, if the process has it open.
template <typename Function>
Function* Device(const char* name) {
  return reinterpret_cast<Function*>(dlsym(RTLD_DEFAULT, name));
}

int Malloc(void** memory, size_t bytes) {
  *memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  std::memset(*memory, 0xAB, bytes);
  ++live;
  return 0;
}

}  // namespace

#define FAIL_IF_TOLD()                                  \
  if (const int error = Fails(__func__)) return error;

HIP hipGetDeviceCount(int* count) {
  *count = Devices();
  return *count ? 0 : 100;
}

HIP hipSetDevice(int device) {
  if (!Devices()) return 100;
  if (device < 0 || device >= Devices()) return 101;
  current = device;
  return 0;
}

HIP hipGetDevice(int* device) {
  *device = current;
  return 0;
}

HIP hipDeviceGetAttribute(int* value, int attribute, int) {
  *value = 1000 + attribute;
  return 0;
}

HIP hipGetDevicePropertiesR0600(char* properties, int) {
  std::strcpy(properties + 1160, Env("HIP_STAND_IN_ARCH", "gfx942:sramecc+:xnack-"));
  return 0;
}

HIP hipDeviceGetName(char* name, int size, int) {
  std::snprintf(name, size, "a stand-in");
  return 0;
}

HIP hipMemGetInfo(size_t* free, size_t* total) {
  *free = 3ULL << 30;
  *total = 4ULL << 30;
  return 0;
}

HIP hipRuntimeGetVersion(int* version) {
  *version = 60443484;
  return 0;
}

HIP hipDriverGetVersion(int* version) {
  *version = 60443485;
  return 0;
}

HIP hipMalloc(void** memory, size_t bytes) {
  FAIL_IF_TOLD();
  Log("hipMalloc %zu on %d", bytes, current);
  if (auto* allocate = Device<void*(size_t)>("device_allocate")) {
    ++live;
    *memory = allocate(bytes);
    return *memory ? 0 : 2;
  }
  return Malloc(memory, bytes);
}

HIP hipFree(void* memory) {
  auto* release = Device<void(void*)>("device_free");
  (release ? release : std::free)(memory);
  Log("hipFree, %ld left", --live);
  return 0;
}

HIP hipHostMalloc(void** memory, size_t bytes, unsigned) {
  Log("hipHostMalloc %zu", bytes);
  return Malloc(memory, bytes);
}

HIP hipHostFree(void* memory) {
  std::free(memory);
  Log("hipHostFree, %ld left", --live);
  return 0;
}

HIP hipMemcpy(void* to, const void* from, size_t bytes, int kind) {
  FAIL_IF_TOLD();
  Log("hipMemcpy %zu kind %d on %d", bytes, kind, current);
  std::memcpy(to, from, bytes);
  if (auto* wrote = Device<void(void*, size_t)>("device_host_wrote")) wrote(to, bytes);
  return 0;
}

HIP hipMemcpyAsync(void* to, const void* from, size_t bytes, int kind, void* stream) {
  Log("hipMemcpyAsync %zu kind %d on %d", bytes, kind, current);
  Do(stream, [=] { std::memcpy(to, from, bytes); });
  return 0;
}

HIP hipMemcpyPeerAsync(void* to, int target, const void* from, int source, size_t bytes, void* stream) {
  Log("hipMemcpyPeerAsync %zu from %d to %d", bytes, source, target);
  Do(stream, [=] { std::memcpy(to, from, bytes); });
  return 0;
}

HIP hipStreamCreateWithFlags(void** stream, unsigned flags) {
  Log("hipStreamCreateWithFlags %u on %d", flags, current);
  *stream = new Stream;
  return 0;
}

HIP hipStreamDestroy(void* stream) {
  static_cast<Stream*>(stream)->Drain();
  delete static_cast<Stream*>(stream);
  Log("hipStreamDestroy");
  return 0;
}

HIP hipStreamSynchronize(void* stream) {
  FAIL_IF_TOLD();
  if (stream) static_cast<Stream*>(stream)->Drain();
  return 0;
}

HIP hipStreamWaitEvent(void* stream, void* event, unsigned) {
  Log("hipStreamWaitEvent");
  Stream* before = static_cast<Event*>(event)->stream;
  Do(stream, [=] {
    if (before) before->Drain();
  });
  return 0;
}

HIP hipEventCreateWithFlags(void** event, unsigned flags) {
  Log("hipEventCreateWithFlags %u on %d", flags, current);
  *event = new Event;
  return 0;
}

HIP hipEventDestroy(void* event) {
  Log("hipEventDestroy");
  delete static_cast<Event*>(event);
  return 0;
}

HIP hipEventRecord(void* event, void* stream) {
  static_cast<Event*>(event)->stream = static_cast<Stream*>(stream);
  static_cast<Event*>(event)->at = std::chrono::steady_clock::now();
  return 0;
}

HIP hipEventSynchronize(void* event) {
  if (Stream* stream = static_cast<Event*>(event)->stream) stream->Drain();
  return 0;
}

#ifndef WITHOUT_ELAPSED_TIME
HIP hipEventElapsedTime(float* milliseconds, void* start, void* stop) {
  *milliseconds =
      std::chrono::duration<float, std::milli>(static_cast<Event*>(stop)->at - static_cast<Event*>(start)->at).count();
  return 0;
}
#endif

HIP hipModuleLoadData(void** module, const void* image) {
  FAIL_IF_TOLD();
  uint16_t machine;
  std::memcpy(&machine, static_cast<const char*>(image) + 18, 2);
  if (std::memcmp(image, "\x7f" "ELF", 4) || machine != 224) return 200;  // EM_AMDGPU
  Log("hipModuleLoadData on %d", current);
  *module = &live;
  return 0;
}

HIP hipModuleUnload(void*) {
  Log("hipModuleUnload on %d", current);
  return 0;
}

HIP hipModuleGetFunction(void** function, void*, const char* name) {
  FAIL_IF_TOLD();
  Log("hipModuleGetFunction %s on %d", name, current);
  *function = new std::string(name);
  return 0;
}

HIP hipModuleLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                          unsigned block_y, unsigned block_z, unsigned shared, void* stream, void** parameters,
                          void** extra) {
  FAIL_IF_TOLD();
  const auto is = [&extra](int at, size_t what) { return extra[at] == reinterpret_cast<void*>(what); };
  if (parameters || !is(0, 1) || !is(2, 2) || !is(4, 3)) return 1;
  const std::string name = *static_cast<std::string*>(function);
  const std::string arguments(static_cast<char*>(extra[1]), *static_cast<size_t*>(extra[3]));
  Log("hipModuleLaunchKernel %s grid %u %u %u block %u %u %u shared %u, %zu bytes on %d", name.c_str(), grid_x, grid_y,
      grid_z, block_x, block_y, block_z, shared, arguments.size(), current);
  Do(stream, [=] {
    const unsigned launch[] = {grid_x, grid_y, grid_z, block_x, block_y, block_z, shared};
    Run(name, arguments, launch);
  });
  return 0;
}

extern "C" __attribute__((visibility("default"))) const char* hipGetErrorName(int error) {
  return error == 2     ? "hipErrorOutOfMemory"
         : error == 100 ? "hipErrorNoDevice"
         : error == 209 ? "hipErrorNoBinaryForGpu"
         : error == 719 ? "hipErrorLaunchFailure"
                        : "hipErrorUnknown";
}

extern "C" __attribute__((visibility("default"))) const char* hipGetErrorString(int) { return "as told"; }
