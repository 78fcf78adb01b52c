// A clock that a test moves.
#pragma once

#include <chrono>
#include <mutex>

#include "service/clock.h"

namespace structkv::testkit {

// Thread-safe.
class FakeClock final : public Clock {
 public:
  Time Now() const override {
    const std::lock_guard lock(mutex_);
    return now_;
  }
  void Advance(std::chrono::milliseconds by) {
    const std::lock_guard lock(mutex_);
    now_ += by;
  }

 private:
  mutable std::mutex mutex_;
  Time now_{std::chrono::hours(1)};
};

}  // namespace structkv::testkit
