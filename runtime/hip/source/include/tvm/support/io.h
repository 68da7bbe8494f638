// tvm/runtime/tensor.h of the TVM wheel includes this file, and the wheel does not bring it. Nothing here is
// ever called: it says as much of a stream as the header's inline functions name.
#ifndef TVM_SUPPORT_IO_H_
#define TVM_SUPPORT_IO_H_

#include <cstddef>

namespace tvm {
namespace support {

class Stream {
 public:
  virtual ~Stream() = default;
  virtual size_t Read(void* data, size_t size) = 0;
  virtual size_t Write(const void* data, size_t size) = 0;
  template <typename T>
  bool Read(T* value);
  template <typename T>
  bool ReadArray(T* values, size_t count);
  template <typename T>
  void Write(const T& value);
  template <typename T>
  void WriteArray(const T* values, size_t count);
};

}  // namespace support
}  // namespace tvm

#endif  // TVM_SUPPORT_IO_H_
