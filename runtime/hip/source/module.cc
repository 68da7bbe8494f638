// Modules of kernels for AMD's cards: read from the bytes that TVM's exporter wrote, loaded on a card at the first
// launch there.
#include <tvm/ffi/cast.h>
#include <tvm/ffi/dtype.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/reflection/registry.h>
#include <tvm/ffi/string.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "hip.h"

namespace llmc {
namespace hip {

namespace ffi = tvm::ffi;

// Bytes as the exporter writes them: little-endian, a length is 64 bits wide and stands before what it counts.
class Reader {
 public:
  explicit Reader(const ffi::Bytes& bytes) : at_(bytes.data()), end_(bytes.data() + bytes.size()) {}

  template <typename T>
  T Number() {
    T value;
    std::memcpy(&value, Take(sizeof(T)), sizeof(T));
    return value;
  }

  uint64_t Count() { return Number<uint64_t>(); }

  std::string Text() {
    const uint64_t size = Count();
    const char* text = Take(size);
    return std::string(text, size);
  }

 private:
  const char* Take(uint64_t size) {
    if (static_cast<uint64_t>(end_ - at_) < size) {
      TVM_FFI_THROW(ValueError) << "the module of AMD kernels is damaged: expected " << size << " more bytes, found "
                                << (end_ - at_) << "; compile the model again";
    }
    const char* taken = at_;
    at_ += size;
    return taken;
  }

  const char* at_;
  const char* end_;
};

// What a launch takes behind the kernel's own arguments, in order: an axis of the grid or of the block, or the bytes
// of dynamic shared memory.
enum Slot : int { kGridX, kGridY, kGridZ, kBlockX, kBlockY, kBlockZ, kSharedBytes, kSlots };

static Slot SlotOf(const std::string& tag) {
  static const std::map<std::string, Slot> slots = {
      {"blockIdx.x", kGridX},   {"blockIdx.y", kGridY},   {"blockIdx.z", kGridZ},
      {"threadIdx.x", kBlockX}, {"threadIdx.y", kBlockY}, {"threadIdx.z", kBlockZ},
      {"tirx.use_dyn_shared_memory", kSharedBytes},
  };
  const auto found = slots.find(tag);
  if (found == slots.end()) TVM_FFI_THROW(ValueError) << "AMD's cards have no launch parameter " << tag;
  return found->second;
}

struct Signature {
  std::string name;
  std::vector<DLDataType> arguments;
  std::vector<Slot> slots;
};

// The arguments of a launch as the kernel reads them: each at a multiple of its own size, as a C struct has them.
class Arguments {
 public:
  Arguments(const Signature& kernel, const TVMFFIAny* values) {
    for (size_t i = 0; i < kernel.arguments.size(); ++i) Append(kernel, i, values[i]);
  }

  void* data() { return bytes_; }
  size_t* size() { return &size_; }

 private:
  static constexpr size_t kCapacity = 4096;  // of a kernel's arguments, in bytes

  void Append(const Signature& kernel, size_t i, const TVMFFIAny& value) {
    const DLDataType type = kernel.arguments[i];
    if (type.code == kDLOpaqueHandle) return Put(&value.v_ptr, sizeof(void*), kernel);
    if (type.lanes == 1 && type.code == kDLFloat && type.bits == 64) return Put(&value.v_float64, 8, kernel);
    if (type.lanes == 1 && type.code == kDLFloat && type.bits == 32) {
      const float narrow = static_cast<float>(value.v_float64);
      return Put(&narrow, 4, kernel);
    }
    const bool integer = type.code == kDLInt || type.code == kDLUInt || type.code == kDLBool;
    if (!integer || type.lanes != 1 || type.bits > 64) {
      TVM_FFI_THROW(TypeError) << kernel.name << ": argument " << i << " is of type " << ffi::DLDataTypeToString(type)
                               << ": expected a pointer, an integer, float32 or float64";
    }
    Put(&value.v_int64, (type.bits + 7) / 8, kernel);  // the low bytes: host and card are little-endian
  }

  void Put(const void* value, size_t size, const Signature& kernel) {
    const size_t at = (size_ + size - 1) / size * size;
    if (at + size > kCapacity) {
      TVM_FFI_THROW(ValueError) << kernel.name << ": its arguments take more than " << kCapacity << " bytes";
    }
    std::memset(bytes_ + size_, 0, at - size_);
    std::memcpy(bytes_ + at, value, size);
    size_ = at + size;
  }

  alignas(16) char bytes_[kCapacity];
  size_t size_ = 0;
};

// The architecture that a code object is for, from its metadata: "amdhsa.target" ends with its name, as in
// amdgcn-amd-amdhsa--gfx942 (LLVM, "User Guide for AMDGPU Backend", code object metadata). Empty: it doesn't say.
static std::string ArchOf(const std::string& code) {
  const size_t triple = code.find("amdgcn-amd-amdhsa-");
  const size_t start = triple == std::string::npos ? triple : code.find("gfx", triple);
  if (start == std::string::npos) return "";
  const auto in_name = [](char c) { return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9'); };
  const auto stop = std::find_if_not(code.begin() + start, code.end(), in_name);
  if (stop != code.end() && *stop == '-') return "";  // a generic target, e.g. gfx9-4-generic: HIP decides
  return std::string(code.begin() + start, stop);
}

class ModuleObj final : public ffi::ModuleObj {
 public:
  explicit ModuleObj(const ffi::Bytes& bytes) : bytes_(bytes) {
    Reader reader(bytes);
    const std::string format = reader.Text();
    if (format != "hsaco") {
      TVM_FFI_THROW(ValueError) << "expected a module of AMD kernels in the format hsaco, found " << format;
    }
    for (uint64_t count = reader.Count(); count > 0; --count) {
      const std::string key = reader.Text();
      Signature kernel;
      kernel.name = reader.Text();
      for (uint64_t i = reader.Count(); i > 0; --i) kernel.arguments.push_back(reader.Number<DLDataType>());
      for (uint64_t i = reader.Count(); i > 0; --i) kernel.slots.push_back(SlotOf(reader.Text()));
      for (uint64_t i = reader.Count(); i > 0; --i) {
        if (reader.Number<int32_t>() != 0) {
          TVM_FFI_THROW(ValueError) << kernel.name << ": AMD's cards have no tensor maps";
        }
      }
      kernels_.emplace(key, std::move(kernel));
    }
    code_ = reader.Text();
  }

  ~ModuleObj() {
    const Library& hip = Library::Find();
    for (const auto& [device, loaded] : loaded_) {  // errors are dropped: a destructor can't tell anyone
      if (hip.hipSetDevice(device) == kSuccess) hip.hipModuleUnload(loaded.module);
    }
  }

  const char* kind() const final { return "hip"; }

  int GetPropertyMask() const final { return ffi::Module::kBinarySerializable | ffi::Module::kRunnable; }

  ffi::Bytes SaveToBytes() const final { return bytes_; }

  ffi::Optional<ffi::Function> GetFunction(const ffi::String& name) final {
    const auto found = kernels_.find(name);
    if (found == kernels_.end()) return std::nullopt;
    const Signature* kernel = &found->second;
    const ffi::ObjectPtr<ffi::Object> self = ffi::GetObjectPtr<ffi::Object>(this);  // outlives its functions
    return ffi::Function::FromPacked(
        [this, self, kernel](ffi::PackedArgs arguments, ffi::Any*) { Launch(*kernel, arguments); });
  }

 private:
  struct Loaded {
    void* module = nullptr;
    std::unordered_map<std::string, void*> functions;
  };

  void Launch(const Signature& kernel, ffi::PackedArgs given) {
    const size_t own = kernel.arguments.size(), expected = own + kernel.slots.size();
    if (static_cast<size_t>(given.size()) != expected) {
      TVM_FFI_THROW(TypeError) << kernel.name << ": expected " << expected << " arguments, found " << given.size();
    }
    const TVMFFIAny* values = reinterpret_cast<const TVMFFIAny*>(given.data());
    std::array<unsigned, kSlots> launch = {1, 1, 1, 1, 1, 1, 0};
    for (size_t i = 0; i < kernel.slots.size(); ++i) {
      const int64_t value = values[own + i].v_int64;
      if (value < 0 || value > UINT32_MAX) {
        TVM_FFI_THROW(ValueError) << kernel.name << ": a launch over " << value << " blocks, threads or bytes";
      }
      launch[kernel.slots[i]] = static_cast<unsigned>(value);
    }
    if (std::find(launch.begin(), launch.begin() + kSharedBytes, 0U) != launch.begin() + kSharedBytes) {
      return;  // a loop over nothing; HIP takes no empty grid
    }
    Arguments arguments(kernel, values);
    int device = 0;
    LLMC_HIP(hipGetDevice, &device);
    void* extra[] = {LaunchParam(kBufferPointer), arguments.data(), LaunchParam(kBufferSize), arguments.size(),
                     LaunchParam(kParamEnd)};
    const Error error = Library::Get().hipModuleLaunchKernel(
        Find(device, kernel.name), launch[kGridX], launch[kGridY], launch[kGridZ], launch[kBlockX], launch[kBlockY],
        launch[kBlockZ], launch[kSharedBytes], TVMFFIEnvGetStream(kDLROCM, device), nullptr, extra);
    if (error != kSuccess) Check(error, ("hipModuleLaunchKernel of " + kernel.name).c_str());
  }

  // The kernel on a device, whose copy of the module is loaded when it is first needed.
  void* Find(int device, const std::string& name) {
    const std::lock_guard<std::mutex> lock(mutex_);
    Loaded& loaded = loaded_[device];
    if (!loaded.module) {
      const std::string built = ArchOf(code_), found = Arch(device);
      if (!built.empty() && built != found) {
        TVM_FFI_THROW(RuntimeError) << "expected a card of architecture " << built << ", which the code is for, found "
                                    << found << " (device " << device << "); compile the model for rocm:" << found;
      }
      LLMC_HIP(hipModuleLoadData, &loaded.module, code_.data());
    }
    void*& function = loaded.functions[name];
    if (!function) {
      const Error error = Library::Get().hipModuleGetFunction(&function, loaded.module, name.c_str());
      if (error != kSuccess) Check(error, ("hipModuleGetFunction of " + name).c_str());
    }
    return function;
  }

  const ffi::Bytes bytes_;
  std::unordered_map<std::string, Signature> kernels_;
  std::string code_;
  std::mutex mutex_;
  std::unordered_map<int, Loaded> loaded_;  // by device
};

static ffi::Module Load(const ffi::Bytes& bytes) { return ffi::Module(ffi::make_object<ModuleObj>(bytes)); }

// "hip" is the kind that TVM's exporter writes, "hsaco" an older name of the same bytes.
TVM_FFI_STATIC_INIT_BLOCK() {
  tvm::ffi::reflection::GlobalDef()
      .def("ffi.Module.load_from_bytes.hip", Load)
      .def("ffi.Module.load_from_bytes.hsaco", Load);
}

}  // namespace hip
}  // namespace llmc
