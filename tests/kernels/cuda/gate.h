// Stops what a stream of the fake runtime runs.
#pragma once

#include <chrono>
#include <condition_variable>
#include <mutex>

#include "tests/kernels/cuda/fake_runtime.h"

namespace structkv::testing {

// Stops the first piece of work that a stream runs, until it is let go.
class Gate {
 public:
  Gate() {
    FakeCuda::SetHook([this] { Pass(); });
  }
  ~Gate() {
    FakeCuda::SetHook(nullptr);
    Open();
  }
  bool WaitUntilBlocked() {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, std::chrono::seconds(30), [this] { return blocked_; });
  }
  void Open() {
    const std::lock_guard lock(mutex_);
    open_ = true;
    changed_.notify_all();
  }

 private:
  void Pass() {
    std::unique_lock lock(mutex_);
    if (blocked_) return;
    blocked_ = true;
    changed_.notify_all();
    changed_.wait(lock, [this] { return open_; });
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  bool blocked_ = false;
  bool open_ = false;
};

}  // namespace structkv::testing
