// What other threads do for Python: operations that may block, and their outcomes.
#pragma once

#include <nanobind/nanobind.h>

#include <deque>
#include <functional>
#include <memory>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

namespace structkv::python {

// An operation that some thread finishes. Thread-safe.
class Pending {
 public:
  // Makes the outcome, or throws it; called with the GIL.
  using Outcome = std::function<nanobind::object()>;

  // Once; on any thread.
  void Finish(Outcome outcome);

  // Whether it finished within `seconds`. Without the GIL.
  bool Wait(double seconds);
  // Of a finished one, once. With the GIL.
  nanobind::object Result();
  // Calls `callback` without arguments once it has finished, at once where it has. With the GIL.
  void OnDone(nanobind::callable callback);

 private:
  absl::Mutex mutex_;
  bool done_ ABSL_GUARDED_BY(mutex_) = false;
  Outcome outcome_ ABSL_GUARDED_BY(mutex_);
  std::vector<std::shared_ptr<const void>> callbacks_ ABSL_GUARDED_BY(mutex_);
};

// Work that is done in order, one after the other. Thread-safe.
class Strand : public std::enable_shared_from_this<Strand> {
 public:
  void Run(std::function<void()> work);

 private:
  void Loop();

  absl::Mutex mutex_;
  bool running_ ABSL_GUARDED_BY(mutex_) = false;
  std::deque<std::function<void()>> queue_ ABSL_GUARDED_BY(mutex_);
};

// Runs `work` on a thread without the GIL, in the order of `strand`; null: at once. There are as
// many threads as there is work that blocks; one that has had none for 10 seconds ends.
std::shared_ptr<Pending> Start(const std::shared_ptr<Strand>& strand,
                               std::function<Pending::Outcome()> work);

void BindPending(nanobind::module_& module);

}  // namespace structkv::python
