// Keeps the process alive where bytes of a mapped file are gone: a file that shrinks, or whose
// memory cannot be had, answers an access with SIGBUS.
#pragma once

#include <cstddef>
#include <utility>

#include "absl/status/statusor.h"

namespace structkv::transport {

// Watches one mapped range. Whoever touches a byte of it that is gone gets zeros for the whole
// range from then on, and hit() says so. Move-only. Destroy it before the range is unmapped, and
// while nobody touches the range.
class BusGuard {
 public:
  // Ranges at once, in the process.
  static constexpr int kMaxRanges = 8192;

  // `data` is page-aligned. RESOURCE_EXHAUSTED beyond kMaxRanges.
  static absl::StatusOr<BusGuard> Watch(void* data, size_t size);

  BusGuard(BusGuard&& other) noexcept : slot_(std::exchange(other.slot_, -1)) {}
  BusGuard& operator=(BusGuard&&) = delete;
  ~BusGuard();

  bool hit() const;

 private:
  explicit BusGuard(int slot) : slot_(slot) {}
  int slot_;
};

}  // namespace structkv::transport
