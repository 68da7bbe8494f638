// The device's memory, as TVM's runtime asks for it: tvm/runtime/device_api.h of TVM 0.27, without its headers.
//
// The virtual functions below stand in the order of that class; what TVM passes as a C++ object is a pointer here.
#include "state.h"

extern "C" {
void *device_allocate(size_t bytes);
void device_free(void *address);
void device_host_wrote(void *address, size_t bytes);
}

inline void *operator new(size_t, void *place) noexcept { return place; }

namespace {

struct Device {
  int32_t type, id;
};
struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct Tensor {  // DLTensor
  void *data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct Any {  // TVMFFIAny
  int32_t type, unused;
  int64_t value;
};

size_t bytes_of(int ndim, const int64_t *shape, DataType dtype) {
  size_t count = 1;
  for (int i = 0; i < ndim; i++) count *= (size_t)shape[i];
  return (count * dtype.bits * dtype.lanes + 7) / 8;
}

struct Api {
  bool arithmetic;
  explicit Api(bool host_arithmetic) : arithmetic(host_arithmetic) {}

  virtual void destroy() {}
  virtual void destroy_and_free() {}
  virtual void set_device(Device) {}
  virtual void get_attribute(Device, int kind, Any *result) {
    if (kind == 0) *result = {1, 0, 1};  // it exists; an int
  }
  virtual size_t data_size(const Tensor *t, void *) { return bytes_of(t->ndim, t->shape, t->dtype); }
  virtual void target_property(Device, const void *, Any *) {}
  virtual void *allocate(Device, size_t bytes, size_t, DataType) {
    graphs_forbid("memory was allocated");
    return device_allocate(bytes);
  }
  virtual void *allocate_shape(Device, int ndim, const int64_t *shape, DataType dtype, void *) {
    graphs_forbid("memory was allocated");
    return device_allocate(bytes_of(ndim, shape, dtype));
  }
  virtual void release(Device, void *address) {
    graphs_forbid("memory was given back");
    device_free(address);
  }
  virtual void copy_tensor(Tensor *from, Tensor *to, void *) {
    copy(from->data, from->byte_offset, to->data, to->byte_offset, bytes_of(from->ndim, from->shape, from->dtype),
         from->device, to->device, from->dtype, nullptr);
  }
  virtual void *create_stream(Device) { return malloc(1); }
  virtual void free_stream(Device, void *stream) { free(stream); }
  virtual void sync_stream(Device, void *) { graphs_forbid("a stream was waited for"); }
  virtual void set_stream(Device, void *stream) { graphs_set_stream(stream); }
  virtual void *current_stream(Device) { return nullptr; }
  virtual void sync_streams(Device, void *, void *) {}
  virtual void *allocate_workspace(Device, size_t bytes, DataType) {
    return graphs_pool() ? graphs_take_workspace(bytes) : device_allocate(bytes);
  }
  virtual void free_workspace(Device, void *address) {
    graphs_pool() ? graphs_give_workspace(address) : device_free(address);
  }
  virtual bool pointer_arithmetic_on_host() { return arithmetic; }
  virtual void copy(const void *from, size_t from_offset, void *to, size_t to_offset, size_t bytes, Device, Device,
                    DataType, void *) {
    graphs_forbid("memory was copied");
    memmove((char *)to + to_offset, (const char *)from + from_offset, bytes);
    device_host_wrote((char *)to + to_offset, bytes);
  }
};

}  // namespace

// host_arithmetic: the host may compute pointers into buffers (CUDA and HIP; not Metal).
extern "C" void *device_api(bool host_arithmetic) {
  Api *api = (Api *)malloc(sizeof(Api));
  return new ((void *)api) Api(host_arithmetic);
}
