// Calls to the outside, queued under a lock and made without it.
#pragma once

#include <deque>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/functional/any_invocable.h"
#include "absl/synchronization/mutex.h"

namespace structkv::nccl {

// Thread-safe. An object that calls others back keeps one: what it calls may call it again, at once
// and on the same thread, as gRPC does.
class Outbox {
 public:
  using Call = absl::AnyInvocable<void()>;

  // Under the owner's lock: calls are made in the order in which they were added.
  void Add(Call call) {
    absl::MutexLock lock(&mutex_);
    calls_.push_back(std::move(call));
  }

  // Without the owner's lock, after each time that it was held. Makes all calls, unless another
  // thread, or an outer call of this one, is at it: that one then makes them.
  void Run() {
    absl::MutexLock lock(&mutex_);
    if (running_) return;
    running_ = true;
    while (!calls_.empty()) {
      Call call = std::move(calls_.front());
      calls_.pop_front();
      mutex_.Unlock();
      call();
      call = nullptr;  // what it holds may do anything when it goes
      mutex_.Lock();
    }
    running_ = false;
  }

 private:
  absl::Mutex mutex_;
  bool running_ ABSL_GUARDED_BY(mutex_) = false;
  std::deque<Call> calls_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace structkv::nccl
