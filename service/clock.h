// Time that only goes forward, so that a test can hold it still.
#pragma once

#include <chrono>

namespace structkv {

// Thread-safe.
class Clock {
 public:
  using Time = std::chrono::steady_clock::time_point;

  virtual ~Clock() = default;
  // Monotonic.
  virtual Time Now() const = 0;
};

class SteadyClock final : public Clock {
 public:
  Time Now() const override { return std::chrono::steady_clock::now(); }
};

}  // namespace structkv
