#include "hip.h"

#include <dlfcn.h>
#include <tvm/ffi/error.h>

#include <cstdlib>
#include <vector>

namespace llmc {
namespace hip {

// Names it goes by, the newest first. A library that the process holds already (PyTorch's wheel for ROCm brings one) is
// found by its own name before the machine's folders are searched.
static std::vector<std::string> Candidates() {
  if (const char* named = std::getenv("LLMC_HIP_LIBRARY")) return {named};
  return {"libamdhip64.so", "libamdhip64.so.7", "libamdhip64.so.6", "/opt/rocm/lib/libamdhip64.so"};
}

Library::Library() {
  void* library = nullptr;
  std::string reasons;
  for (const std::string& name : Candidates()) {
    if ((library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL))) break;
    reasons += std::string("\n  ") + dlerror();
  }
  if (!library) {
    problem =
        "expected HIP's library libamdhip64.so, found none; install ROCm's HIP runtime (6.0 or later), or name the "
        "file in the environment variable LLMC_HIP_LIBRARY. Tried:" +
        reasons;
    return;
  }
  std::string missing;
#define LLMC_HIP_RESOLVE(name, parameters)                          \
  name = reinterpret_cast<decltype(name)>(dlsym(library, #name)); \
  if (!name) missing += (missing.empty() ? "" : ", ") + std::string(#name);
  LLMC_HIP_FUNCTIONS(LLMC_HIP_RESOLVE)
#undef LLMC_HIP_RESOLVE
  hipGetErrorName = reinterpret_cast<decltype(hipGetErrorName)>(dlsym(library, "hipGetErrorName"));
  hipGetErrorString = reinterpret_cast<decltype(hipGetErrorString)>(dlsym(library, "hipGetErrorString"));
  if (!missing.empty()) problem = "libamdhip64.so lacks " + missing + "; install ROCm 6.0 or later";
}

const Library& Library::Find() {
  static const Library* library = new Library();  // never destroyed: modules may be released at exit
  return *library;
}

const Library& Library::Get() {
  const Library& library = Find();
  if (!library.problem.empty()) TVM_FFI_THROW(RuntimeError) << library.problem;
  return library;
}

static const char* Advice(Error error) {
  switch (error) {
    case kNoDevice:
      return "; check that the amdgpu driver is loaded and that you may open /dev/kfd (usually the group `render`)";
    case kNoBinaryForGpu:
      return "; compile the model for this card";
    default:
      return "";
  }
}

void Check(Error error, const char* function) {
  if (error == kSuccess || error == kDeinitialized || error == kContextIsDestroyed) return;
  const Library& library = Library::Find();
  const char* name = library.hipGetErrorName ? library.hipGetErrorName(error) : "HIP error";
  const char* text = library.hipGetErrorString ? library.hipGetErrorString(error) : "";
  TVM_FFI_THROW(RuntimeError) << function << ": " << name << " (" << error << "): " << text << Advice(error);
}

int DeviceCount() {
  const Library& library = Library::Find();
  int count = 0;
  return library.problem.empty() && library.hipGetDeviceCount(&count) == kSuccess ? count : 0;
}

std::string Arch(int device) {
  std::vector<char> properties(kPropertiesBytes + 1024);  // a later ROCm may append to them
  LLMC_HIP(hipGetDevicePropertiesR0600, properties.data(), device);
  const std::string name = properties.data() + kArchNameOffset;
  return name.substr(0, name.find(':'));
}

}  // namespace hip
}  // namespace llmc
