// A session's events on their way to Python.
#pragma once

#include <cstddef>
#include <deque>
#include <memory>
#include <optional>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "pending.h"
#include "structkv/result.h"

namespace structkv::python {

// Thread-safe. What the library hands over is there to be taken once everything was released that
// the library had let go of before (interpreter.h, Post): who has a layer's answer finds the memory
// of its tensors free.
class Events : public std::enable_shared_from_this<Events> {
 public:
  // `limit_bytes`: of results that wait to be taken, before Push() waits; 0: none.
  explicit Events(size_t limit_bytes) : limit_bytes_(limit_bytes) {}

  // From the library:
  void Push(client::Event event);
  void End(absl::Status status);
  // Another attempt begins.
  void Begin();

  // Nothing waits in Push() any more.
  void Close();

  // The next event, if there is one now. What the session failed with; OUT_OF_RANGE behind the
  // summary.
  absl::StatusOr<std::optional<client::Event>> Next();
  // Finishes once Next() has something to say.
  std::shared_ptr<Pending> Ready();

 private:
  void Say() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const size_t limit_bytes_;
  absl::Mutex mutex_;
  absl::CondVar room_;
  bool closed_ ABSL_GUARDED_BY(mutex_) = false;
  size_t bytes_ ABSL_GUARDED_BY(mutex_) = 0;
  std::deque<client::Event> events_ ABSL_GUARDED_BY(mutex_);
  std::optional<absl::Status> end_ ABSL_GUARDED_BY(mutex_);
  std::shared_ptr<Pending> ready_ ABSL_GUARDED_BY(mutex_);  // null: nobody asked
};

}  // namespace structkv::python
