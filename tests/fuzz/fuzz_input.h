// What fuzz targets share: reading choices from the input, and checks that end the process.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>

// Aborts where a property does not hold; fuzzers and the replay program report that.
#define FUZZ_CHECK(condition)                                                            \
  do {                                                                                   \
    if (!(condition)) {                                                                  \
      std::fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #condition); \
      std::abort();                                                                      \
    }                                                                                    \
  } while (false)

namespace structkv::fuzz {

// Hands out the bytes of an input from its front; zeros after its end.
class FuzzInput {
 public:
  FuzzInput(const uint8_t* data, size_t size) : data_(data), size_(size) {}

  bool empty() const { return size_ == 0; }

  uint8_t Byte() {
    if (size_ == 0) return 0;
    --size_;
    return *data_++;
  }
  uint16_t Short() {
    const uint8_t low = Byte();
    return static_cast<uint16_t>(low | Byte() << 8);
  }
  // In [low, high], which are at most 255 apart.
  int64_t Between(int64_t low, int64_t high) { return low + Byte() % (high - low + 1); }

  // The next `size` bytes, or what is left of them.
  std::string Bytes(size_t size) {
    const size_t taken = std::min(size, size_);
    const std::string bytes(reinterpret_cast<const char*>(data_), taken);
    data_ += taken;
    size_ -= taken;
    return bytes;
  }
  std::string Rest() { return Bytes(size_); }

 private:
  const uint8_t* data_;
  size_t size_;
};

}  // namespace structkv::fuzz
