// What other threads want a GPU's thread to do. Outlives that thread where an abort does.
#pragma once

#include <condition_variable>
#include <mutex>
#include <utility>
#include <vector>

#include "absl/functional/any_invocable.h"
#include "absl/time/time.h"

namespace structkv::nccl {

// Thread-safe.
class Inbox {
 public:
  using Job = absl::AnyInvocable<void()>;

  // Dropped, unrun, after Close.
  void Post(Job job) {
    std::lock_guard lock(mutex_);
    if (closed_) return;
    jobs_.push_back(std::move(job));
    posted_.notify_one();
  }

  // All that was posted, in order; waits for the first one up to `limit`.
  std::vector<Job> Take(absl::Duration limit) {
    std::unique_lock lock(mutex_);
    posted_.wait_for(lock, absl::ToChronoNanoseconds(limit), [this] { return !jobs_.empty(); });
    return std::exchange(jobs_, {});
  }

  // From now on nothing is taken in; what is there is dropped, and so are its callbacks.
  void Close() {
    std::vector<Job> dropped;  // destroyed without the lock
    std::lock_guard lock(mutex_);
    closed_ = true;
    dropped.swap(jobs_);
  }

 private:
  std::mutex mutex_;
  std::condition_variable posted_;
  bool closed_ = false;
  std::vector<Job> jobs_;
};

}  // namespace structkv::nccl
