// Calls to the outside, queued under a lock and made without it.
#pragma once

#include <deque>
#include <mutex>
#include <utility>

#include "absl/functional/any_invocable.h"

namespace structkv::nccl {

// Thread-safe. An object that calls others back keeps one: what it calls may call it again, at once
// and on the same thread, as gRPC does.
class Outbox {
 public:
  using Call = absl::AnyInvocable<void()>;

  // Under the owner's lock: calls are made in the order in which they were added.
  void Add(Call call) {
    std::lock_guard lock(mutex_);
    calls_.push_back(std::move(call));
  }

  // Without the owner's lock, after each time that it was held. Makes all calls, unless another
  // thread, or an outer call of this one, is at it: that one then makes them.
  void Run() {
    std::unique_lock lock(mutex_);
    if (running_) return;
    running_ = true;
    while (!calls_.empty()) {
      Call call = std::move(calls_.front());
      calls_.pop_front();
      lock.unlock();
      call();
      call = nullptr;  // what it holds may do anything when it goes
      lock.lock();
    }
    running_ = false;
  }

 private:
  std::mutex mutex_;
  bool running_ = false;
  std::deque<Call> calls_;
};

}  // namespace structkv::nccl
