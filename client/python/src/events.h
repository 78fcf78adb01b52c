// When a session's events may be taken by Python.
#pragma once

#include <cstddef>
#include <memory>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "pending.h"

namespace structkv::python {

// Counts the events that wait in the library's session, which alone holds them and stops reading
// where they are too many; nothing here waits. Thread-safe. What the library has ready may be taken
// once everything was released that the library had let go of before (interpreter.h, Post): who has
// a layer's answer finds the memory of its tensors free.
class Events : public std::enable_shared_from_this<Events> {
 public:
  // From the library:
  // The prompt was admitted. What ended before was another attempt.
  void Begin();
  // One more event, but for the summary.
  void Add();
  // The summary or a failure.
  void End();

  // Whether the session's NextEvent() may be called, which then does not wait for the server. Each
  // event may be taken once; after the end any number.
  bool Take();
  // Finishes once Take() would be true.
  std::shared_ptr<Pending> Ready();

 private:
  void Say() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  absl::Mutex mutex_;
  bool begun_ ABSL_GUARDED_BY(mutex_) = false;
  bool ended_ ABSL_GUARDED_BY(mutex_) = false;
  size_t count_ ABSL_GUARDED_BY(mutex_) = 0;
  std::shared_ptr<Pending> ready_ ABSL_GUARDED_BY(mutex_);  // null: nobody asked
};

}  // namespace structkv::python
