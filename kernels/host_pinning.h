// How host memory is made such that a device copies from it by itself.
#pragma once

#include <cstdint>
#include <functional>

namespace structkv {

// The functions are thread-safe and may outlive the backend that they are of.
struct HostPinning {
  // What is smaller gains nothing by it.
  int64_t least_bytes = 0;
  // Pins whole pages and says whether they are pinned now; they can be used either way. Null:
  // nothing can be pinned.
  std::function<bool(void* data, int64_t bytes)> pin;
  // Takes back what was pinned at `data`, before any of its pages go back to the system.
  std::function<void(void* data)> unpin;
};

}  // namespace structkv
