// What other threads want a GPU's thread to do. Outlives that thread where an abort does.
#pragma once

#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/functional/any_invocable.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

namespace structkv::nccl {

// Thread-safe.
class Inbox {
 public:
  using Job = absl::AnyInvocable<void()>;

  // Dropped, unrun, after Close.
  void Post(Job job) {
    absl::MutexLock lock(&mutex_);
    if (closed_) return;
    jobs_.push_back(std::move(job));
    posted_.Signal();
  }

  // All that was posted, in order; waits for the first one up to `limit`.
  std::vector<Job> Take(absl::Duration limit) {
    absl::MutexLock lock(&mutex_);
    if (jobs_.empty()) posted_.WaitWithTimeout(&mutex_, limit);
    return std::exchange(jobs_, {});
  }

  // From now on nothing is taken in; what is there is dropped, and so are its callbacks.
  void Close() {
    std::vector<Job> dropped;  // destroyed without the lock
    absl::MutexLock lock(&mutex_);
    closed_ = true;
    dropped.swap(jobs_);
  }

 private:
  absl::Mutex mutex_;
  absl::CondVar posted_;
  bool closed_ ABSL_GUARDED_BY(mutex_) = false;
  std::vector<Job> jobs_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace structkv::nccl
