#include "kernels/streaming_copy.h"

#include <algorithm>
#include <cstddef>
#include <vector>

#include "gtest/gtest.h"

namespace structkv {
namespace {

constexpr std::byte kGuard{0xA5};

std::vector<std::byte> Pattern(size_t size) {
  std::vector<std::byte> bytes(size);
  for (size_t i = 0; i < size; ++i) bytes[i] = static_cast<std::byte>(i * 131 + i / 251);
  return bytes;
}

// Every place of both ends in a cache line, and lengths around those at which the way changes.
TEST(StreamingCopy, CopiesExactlyWhatItIsGiven) {
  constexpr size_t kRoom = 128;
  const std::vector<std::byte> source = Pattern(3 * 8192);
  for (const size_t size : {size_t{0}, size_t{1}, size_t{63}, size_t{2047}, size_t{2048},
                            size_t{2049}, size_t{2111}, size_t{4096}, size_t{8192 + 17}}) {
    for (size_t from = 0; from < 64; from += 7) {
      for (size_t to = 0; to < 64; ++to) {
        std::vector<std::byte> out(size + 2 * kRoom, kGuard);
        StreamingCopy(out.data() + to, source.data() + from, size);
        FinishStreamingCopies();
        ASSERT_TRUE(std::equal(source.begin() + static_cast<ptrdiff_t>(from),
                               source.begin() + static_cast<ptrdiff_t>(from + size),
                               out.begin() + static_cast<ptrdiff_t>(to)))
            << size << " bytes from " << from << " to " << to;
        const auto is_guard = [](std::byte byte) { return byte == kGuard; };
        ASSERT_TRUE(std::all_of(out.begin(), out.begin() + static_cast<ptrdiff_t>(to), is_guard));
        ASSERT_TRUE(
            std::all_of(out.begin() + static_cast<ptrdiff_t>(to + size), out.end(), is_guard))
            << size << " bytes from " << from << " to " << to;
      }
    }
  }
}

}  // namespace
}  // namespace structkv
