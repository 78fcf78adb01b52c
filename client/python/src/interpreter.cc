#include "interpreter.h"

#include <unistd.h>

#include <atomic>
#include <deque>
#include <mutex>
#include <shared_mutex>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "error.h"

namespace structkv::python {
namespace {

const pid_t kProcess = getpid();

// A function's Python exception has nowhere to go.
void Run(absl::FunctionRef<void()> work) {
  try {
    work();
  } catch (nb::python_error& error) {
    error.discard_as_unraisable("structkv");
  }
}

// Whether this thread is the courier, which the one that ends the interpreter waits for: it may
// come back into it until then.
thread_local bool is_courier = false;

// The thread behind Post().
class Courier {
 public:
  void Post(std::function<void()> work) {
    absl::MutexLock lock(&mutex_);
    if (!started_ && !stopped_) {
      started_ = true;
      std::thread([this] { Loop(); }).detach();
    }
    queue_.push_back(std::move(work));
    changed_.Signal();
  }

  // Without the GIL.
  void Stop() {
    absl::MutexLock lock(&mutex_);
    stopped_ = true;
    changed_.Signal();
    while (started_) changed_.Wait(&mutex_);
  }

 private:
  void Loop() {
    is_courier = true;
    {
      nb::gil_scoped_acquire acquire;
      while (Next()) {
      }
    }
    absl::MutexLock lock(&mutex_);
    started_ = false;
    changed_.SignalAll();
  }

  bool Next() {
    std::deque<std::function<void()>> due;
    {
      nb::gil_scoped_release release;
      absl::MutexLock lock(&mutex_);
      while (queue_.empty() && !stopped_) changed_.Wait(&mutex_);
      if (queue_.empty()) return false;
      due.swap(queue_);
    }
    for (std::function<void()>& work : due) {
      Run(work);
      work = nullptr;  // what it holds goes before the next one runs
    }
    return true;
  }

  absl::Mutex mutex_;
  absl::CondVar changed_;
  bool started_ ABSL_GUARDED_BY(mutex_) = false;
  bool stopped_ ABSL_GUARDED_BY(mutex_) = false;
  std::deque<std::function<void()>> queue_ ABSL_GUARDED_BY(mutex_);
};

// Never destroyed: threads may come after the end of main().
Courier& TheCourier() {
  static auto* const courier = new Courier;
  return *courier;
}

// Shared by threads that are in the interpreter, or on their way to it.
struct Gate {
  std::shared_mutex mutex;
  std::atomic<bool> closed = false;  // set under the mutex
  std::thread::id ending;            // the thread that closed it
};

Gate& TheGate() {
  static auto* const gate = new Gate;
  return *gate;
}

thread_local bool in_with_gil = false;

}  // namespace

bool InWithGil() { return in_with_gil; }

bool Forked() { return getpid() != kProcess; }

void RefuseEnded() {
  if (Forked()) {
    Throw(absl::FailedPreconditionError(
        "structkv was loaded before this process was forked; its threads are not here. Start "
        "processes with the method spawn or forkserver, or import structkv in the child"));
  }
  if (TheGate().closed) {
    Throw(absl::FailedPreconditionError("the interpreter is at its end, and structkv has stopped"));
  }
}

void Post(std::function<void()> work) {
  if (Forked()) {
    static_cast<void>(new std::function<void()>(std::move(work)));
    return;
  }
  TheCourier().Post(std::move(work));
}

bool WithGil(absl::FunctionRef<void()> work) {
  const std::shared_lock<std::shared_mutex> lock(TheGate().mutex);
  if (TheGate().closed) return false;
  const nb::gil_scoped_acquire acquire;
  in_with_gil = true;
  Run(work);
  in_with_gil = false;
  return true;
}

WithoutGil::~WithoutGil() {
  if (Forked() || in_with_gil || is_courier) {
    PyEval_RestoreThread(state_);
    return;
  }
  {
    const std::shared_lock<std::shared_mutex> lock(TheGate().mutex);
    if (!TheGate().closed || TheGate().ending == std::this_thread::get_id()) {
      PyEval_RestoreThread(state_);
      return;
    }
  }
  while (true) pause();
}

void StopInterpreting() {
  if (Forked()) return;
  const nb::gil_scoped_release release;
  {
    const std::unique_lock<std::shared_mutex> lock(TheGate().mutex);
    TheGate().ending = std::this_thread::get_id();
    TheGate().closed = true;
  }
  TheCourier().Stop();
}

std::shared_ptr<const void> KeepAlive(nb::object object) {
  return {object.release().ptr(),
          [](PyObject* pointer) { Post([pointer] { Py_DECREF(pointer); }); }};
}

}  // namespace structkv::python
