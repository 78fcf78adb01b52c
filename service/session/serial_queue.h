// Runs tasks one after the other without a thread of its own.
#pragma once

#include <deque>
#include <mutex>
#include <utility>

#include "absl/functional/any_invocable.h"

namespace structkv::session {

// Thread-safe. A task that comes while another one runs is left to the thread that runs that one,
// so tasks never overlap, never nest, and run without any lock held.
class SerialQueue {
 public:
  // The caller keeps the queue alive until this returns.
  void Run(absl::AnyInvocable<void()> task) {
    std::unique_lock lock(mutex_);
    tasks_.push_back(std::move(task));
    if (running_) return;
    running_ = true;
    while (!tasks_.empty()) {
      absl::AnyInvocable<void()> next = std::move(tasks_.front());
      tasks_.pop_front();
      lock.unlock();
      next();
      next = nullptr;  // what it holds may do anything when it goes; not under the lock
      lock.lock();
    }
    running_ = false;
  }

 private:
  std::mutex mutex_;
  std::deque<absl::AnyInvocable<void()>> tasks_;
  bool running_ = false;
};

}  // namespace structkv::session
