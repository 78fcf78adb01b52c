// How often something that a peer can cause is warned of.
#pragma once

#include <atomic>
#include <cstdint>

#include "service/rpc/stream_set.h"

namespace structkv::rpc {

// Thread-safe.
class WarnLimit {
 public:
  // Whether it is time: once in ten seconds, for one of the threads that ask.
  bool IsDue() {
    const int64_t now = SteadyNanos();
    int64_t warned = warned_;
    if (warned != 0 && now - warned < kNanos) return false;
    return warned_.compare_exchange_strong(warned, now);
  }

 private:
  static constexpr int64_t kNanos = 10'000'000'000;
  std::atomic<int64_t> warned_{0};  // in SteadyNanos(); 0: never
};

}  // namespace structkv::rpc
