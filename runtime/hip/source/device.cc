// Memory, copies and streams of AMD's cards, as TVM's runtime asks for them.
#include <tvm/ffi/function.h>
#include <tvm/ffi/reflection/registry.h>
#include <tvm/ffi/string.h>
#include <tvm/runtime/device_api.h>
#include <workspace_pool.h>

#include <cstring>
#include <string>

#include "hip.h"

namespace llmc {
namespace hip {

using tvm::Device;
using tvm::runtime::DeviceAPI;
namespace ffi = tvm::ffi;

constexpr size_t kMallocAlignment = 256;  // of what hipMalloc and hipHostMalloc return, in bytes

static bool OnCard(Device device) { return device.device_type == kDLROCM; }

static bool OnHost(Device device) { return device.device_type == kDLCPU || device.device_type == kDLROCMHost; }

class DeviceApi final : public DeviceAPI {
 public:
  static DeviceApi* Global() {
    static DeviceApi* api = new DeviceApi();  // never destroyed: tensors may be released at exit
    return api;
  }

  void SetDevice(Device device) final {
    const Error error = Library::Get().hipSetDevice(device.device_id);
    if (error == kInvalidDevice) {
      TVM_FFI_THROW(RuntimeError) << "device " << device.device_id << ": HIP finds " << DeviceCount()
                                  << " AMD GPU(s), counted from 0 (HIP_VISIBLE_DEVICES hides others)";
    }
    Check(error, "hipSetDevice");
  }

  void GetAttr(Device device, tvm::runtime::DeviceAttrKind kind, ffi::Any* result) final {
    using namespace tvm::runtime;  // the kinds
    const int id = device.device_id;
    const auto attribute = [id](Attribute which) {
      int value = 0;
      LLMC_HIP(hipDeviceGetAttribute, &value, which, id);
      return value;
    };
    const auto text = [&attribute](Attribute which) { return std::to_string(attribute(which)); };
    switch (kind) {
      case DeviceAttrKind::kExist:
        *result = static_cast<int64_t>(id < DeviceCount());
        return;
      case DeviceAttrKind::kMaxThreadsPerBlock:
        *result = attribute(hip::kMaxThreadsPerBlock);
        return;
      case DeviceAttrKind::kWarpSize:
        *result = attribute(hip::kWarpSize);
        return;
      case DeviceAttrKind::kMaxSharedMemoryPerBlock:
        *result = attribute(hip::kMaxSharedMemoryPerBlock);
        return;
      case DeviceAttrKind::kComputeVersion:
        *result = ffi::String(text(kComputeCapabilityMajor) + "." + text(kComputeCapabilityMinor));
        return;
      case DeviceAttrKind::kDeviceName: {
        char name[256] = {};
        LLMC_HIP(hipDeviceGetName, name, sizeof(name) - 1, id);
        *result = ffi::String(name);
        return;
      }
      case DeviceAttrKind::kMaxClockRate:
        *result = attribute(kClockRate);
        return;
      case DeviceAttrKind::kMultiProcessorCount:
        *result = attribute(kMultiprocessorCount);
        return;
      case DeviceAttrKind::kMaxThreadDimensions:
        *result = ffi::String("[" + text(kMaxBlockDimX) + ", " + text(kMaxBlockDimY) + ", " + text(kMaxBlockDimZ) + "]");
        return;
      case DeviceAttrKind::kMaxRegistersPerBlock:
        *result = attribute(hip::kMaxRegistersPerBlock);
        return;
      case DeviceAttrKind::kGcnArch:
        *result = ffi::String(Arch(id));
        return;
      case DeviceAttrKind::kApiVersion:
        *result = Version(Library::Get().hipRuntimeGetVersion, "hipRuntimeGetVersion");
        return;
      case DeviceAttrKind::kDriverVersion:
        *result = Version(Library::Get().hipDriverGetVersion, "hipDriverGetVersion");
        return;
      case DeviceAttrKind::kL2CacheSizeBytes:
        *result = attribute(kL2CacheSize);
        return;
      case DeviceAttrKind::kTotalGlobalMemory:
        *result = static_cast<int64_t>(GetMemory(device).total);
        return;
      case DeviceAttrKind::kAvailableGlobalMemory:
        *result = static_cast<int64_t>(GetMemory(device).free);
        return;
      case DeviceAttrKind::kImagePitchAlignment:
        break;  // images are not used
    }
    *result = nullptr;
  }

  void* AllocDataSpace(Device device, size_t bytes, size_t alignment, DLDataType) final {
    if (alignment == 0 || kMallocAlignment % alignment != 0) {
      TVM_FFI_THROW(ValueError) << "expected an alignment that divides " << kMallocAlignment << ", found " << alignment;
    }
    void* memory = nullptr;
    if (device.device_type == kDLROCMHost) {
      LLMC_HIP(hipHostMalloc, &memory, bytes, 0);
      return memory;
    }
    SetDevice(device);
    const Error error = Library::Get().hipMalloc(&memory, bytes ? bytes : 1);
    if (error == kOutOfMemory) {
      const Memory memory = GetMemory(device);
      TVM_FFI_THROW(RuntimeError) << "hipMalloc: hipErrorOutOfMemory: " << bytes << " bytes were asked for, "
                                  << memory.free << " of " << memory.total << " are free on device " << device.device_id;
    }
    Check(error, "hipMalloc");
    return memory;
  }

  void FreeDataSpace(Device device, void* memory) final {
    if (device.device_type == kDLROCMHost) {
      LLMC_HIP(hipHostFree, memory);
      return;
    }
    SetDevice(device);
    LLMC_HIP(hipFree, memory);
  }

  // Scratch of compiled functions: kept from call to call, as hipMalloc and hipFree wait for the card.
  void* AllocWorkspace(Device device, size_t bytes, DLDataType) final { return Pool().AllocWorkspace(device, bytes); }

  void FreeWorkspace(Device device, void* memory) final { Pool().FreeWorkspace(device, memory); }

  TVMStreamHandle CreateStream(Device device) final {
    void* stream = nullptr;
    SetDevice(device);
    LLMC_HIP(hipStreamCreateWithFlags, &stream, kStreamNonBlocking);
    return stream;
  }

  void FreeStream(Device device, TVMStreamHandle stream) final {
    SetDevice(device);
    LLMC_HIP(hipStreamDestroy, stream);
  }

  void StreamSync(Device device, TVMStreamHandle stream) final {
    SetDevice(device);
    LLMC_HIP(hipStreamSynchronize, stream);
  }

  void SyncStreamFromTo(Device device, TVMStreamHandle from, TVMStreamHandle to) final {
    void* event = nullptr;
    SetDevice(device);
    LLMC_HIP(hipEventCreateWithFlags, &event, kEventDisableTiming);
    const Library& hip = Library::Get();
    Error error = hip.hipEventRecord(event, from);
    if (error == kSuccess) error = hip.hipStreamWaitEvent(to, event, 0);
    LLMC_HIP(hipEventDestroy, event);  // HIP keeps it until the wait is over
    Check(error, "hipStreamWaitEvent");
  }

  bool SupportsDevicePointerArithmeticsOnHost() final { return true; }

 protected:
  void CopyDataFromTo(const void* from, size_t from_offset, void* to, size_t to_offset, size_t bytes, Device source,
                      Device target, DLDataType, TVMStreamHandle stream) final {
    const char* read = static_cast<const char*>(from) + from_offset;
    char* write = static_cast<char*>(to) + to_offset;
    if (OnHost(source) && OnHost(target)) {
      std::memcpy(write, read, bytes);
      return;
    }
    CopyKind kind = kDeviceToDevice;
    if (OnCard(source) && OnHost(target)) {
      kind = kDeviceToHost;
    } else if (OnHost(source) && OnCard(target)) {
      kind = kHostToDevice;
    } else if (!OnCard(source) || !OnCard(target)) {
      TVM_FFI_THROW(ValueError) << "expected a copy between the host and AMD's cards, found one from device type "
                                << source.device_type << " to " << target.device_type;
    }
    SetDevice(OnCard(source) ? source : target);
    if (kind == kDeviceToDevice && source.device_id != target.device_id) {
      LLMC_HIP(hipMemcpyPeerAsync, write, target.device_id, read, source.device_id, bytes, stream);
    } else if (stream == nullptr) {
      LLMC_HIP(hipMemcpy, write, read, bytes, kind);
    } else {
      LLMC_HIP(hipMemcpyAsync, write, read, bytes, kind, stream);
    }
  }

 private:
  struct Memory {
    size_t free = 0, total = 0;  // bytes
  };

  Memory GetMemory(Device device) {
    Memory memory;
    SetDevice(device);
    LLMC_HIP(hipMemGetInfo, &memory.free, &memory.total);
    return memory;
  }

  static int Version(Error (*function)(int*), const char* name) {
    int version = 0;
    Check(function(&version), name);
    return version;
  }

  // Of the calling thread: functions that run side by side must not share scratch.
  static tvm::runtime::WorkspacePool& Pool() {
    static thread_local tvm::runtime::WorkspacePool pool(kDLROCM, Global());
    return pool;
  }
};

static void GetApi(ffi::PackedArgs, ffi::Any* result) {
  *result = static_cast<void*>(static_cast<DeviceAPI*>(DeviceApi::Global()));
}

TVM_FFI_STATIC_INIT_BLOCK() {
  tvm::ffi::reflection::GlobalDef()
      .def_packed("device_api.rocm", GetApi)
      .def_packed("device_api.rocm_host", GetApi);
}

}  // namespace hip
}  // namespace llmc
