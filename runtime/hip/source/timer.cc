// Time on the card itself, between two events of the current stream.
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/reflection/registry.h>
#include <tvm/runtime/timer.h>

#include "hip.h"

namespace llmc {
namespace hip {

class Timer final : public tvm::runtime::TimerNode {
 public:
  explicit Timer(tvm::Device device) : device_(device.device_id) {
    LLMC_HIP(hipSetDevice, device_);
    LLMC_HIP(hipEventCreateWithFlags, &start_, 0);
    LLMC_HIP(hipEventCreateWithFlags, &stop_, 0);
  }

  ~Timer() {  // errors are dropped: a destructor can't tell anyone
    const Library& hip = Library::Find();
    if (start_) hip.hipEventDestroy(start_);
    if (stop_) hip.hipEventDestroy(stop_);
  }

  void Start() final { LLMC_HIP(hipEventRecord, start_, TVMFFIEnvGetStream(kDLROCM, device_)); }

  void Stop() final { LLMC_HIP(hipEventRecord, stop_, TVMFFIEnvGetStream(kDLROCM, device_)); }

  int64_t SyncAndGetElapsedNanos() final {
    float milliseconds = 0;
    LLMC_HIP(hipEventSynchronize, stop_);
    LLMC_HIP(hipEventElapsedTime, &milliseconds, start_, stop_);
    return static_cast<int64_t>(milliseconds * 1e6);
  }

  TVM_FFI_DECLARE_OBJECT_INFO_FINAL("llmc.hip.Timer", Timer, tvm::runtime::TimerNode);

 private:
  int device_;
  void* start_ = nullptr;
  void* stop_ = nullptr;
};

TVM_FFI_STATIC_INIT_BLOCK() {
  tvm::ffi::reflection::GlobalDef().def("runtime.timer.rocm", [](tvm::Device device) {
    return tvm::runtime::Timer(tvm::ffi::make_object<Timer>(device));
  });
}

}  // namespace hip
}  // namespace llmc
