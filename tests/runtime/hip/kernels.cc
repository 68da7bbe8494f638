// What the exported kernels of the tests compute, on the host, with the arguments as the card would read them.
#include <cstdint>
#include <cstring>

// The arguments stand as in a struct, in the order of the exported kernel's.
extern "C" void scale_kernel(const char* arguments, const unsigned grid[3], const unsigned block[3], unsigned) {
  struct {
    float* from;
    float* to;
    int64_t columns;
    float factor;
    int64_t rows;
  } given;
  std::memcpy(&given, arguments, sizeof(given));
  for (unsigned y = 0; y < grid[1]; ++y) {
    for (unsigned x = 0; x < grid[0] * block[0]; ++x) {
      const int64_t at = y * given.columns + x;
      if (x < given.columns) given.to[at] = given.from[at] * given.factor;
    }
  }
}
