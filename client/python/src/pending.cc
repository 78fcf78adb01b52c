#include "pending.h"

#include <algorithm>
#include <thread>
#include <utility>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "interpreter.h"

namespace structkv::python {
namespace {

constexpr absl::Duration kIdle = absl::Seconds(10);

class Threads {
 public:
  void Run(std::function<void()> work) {
    absl::MutexLock lock(&mutex_);
    queue_.push_back(std::move(work));
    if (idle_ >= queue_.size()) {
      changed_.Signal();
    } else {
      std::thread([this] { Loop(); }).detach();
    }
  }

 private:
  void Loop() {
    while (true) {
      std::function<void()> work;
      {
        absl::MutexLock lock(&mutex_);
        const absl::Time end = absl::Now() + kIdle;
        ++idle_;
        while (queue_.empty() && !changed_.WaitWithDeadline(&mutex_, end)) {
        }
        --idle_;
        if (queue_.empty()) return;
        work = std::move(queue_.front());
        queue_.pop_front();
      }
      work();
    }
  }

  absl::Mutex mutex_;
  absl::CondVar changed_;
  size_t idle_ ABSL_GUARDED_BY(mutex_) = 0;
  std::deque<std::function<void()>> queue_ ABSL_GUARDED_BY(mutex_);
};

// Never destroyed: threads may come after the end of main().
Threads& TheThreads() {
  static auto* const threads = new Threads;
  return *threads;
}

void Call(const std::vector<std::shared_ptr<const void>>& callbacks) {
  for (const auto& callback : callbacks) {
    nb::handle(static_cast<PyObject*>(const_cast<void*>(callback.get())))();
  }
}

}  // namespace

void Pending::Finish(Outcome outcome) {
  std::vector<std::shared_ptr<const void>> callbacks;
  {
    absl::MutexLock lock(&mutex_);
    outcome_ = std::move(outcome);
    done_ = true;
    callbacks.swap(callbacks_);
  }
  if (!callbacks.empty()) Post([callbacks = std::move(callbacks)] { Call(callbacks); });
}

bool Pending::Wait(double seconds) {
  absl::MutexLock lock(&mutex_);
  return mutex_.AwaitWithTimeout(absl::Condition(&done_), absl::Seconds(seconds));
}

nb::object Pending::Result() {
  Outcome outcome;
  {
    absl::MutexLock lock(&mutex_);
    outcome = std::move(outcome_);
    outcome_ = nullptr;
  }
  if (outcome == nullptr) throw nb::value_error("the operation runs, or its result was taken");
  return outcome();
}

void Pending::OnDone(nb::callable callback) {
  std::shared_ptr<const void> kept = KeepAlive(std::move(callback));
  {
    absl::MutexLock lock(&mutex_);
    if (!done_) {
      callbacks_.push_back(std::move(kept));
      return;
    }
  }
  Call({kept});
}

void Strand::Run(std::function<void()> work) {
  {
    absl::MutexLock lock(&mutex_);
    queue_.push_back(std::move(work));
    if (std::exchange(running_, true)) return;
  }
  TheThreads().Run([self = shared_from_this()] { self->Loop(); });
}

void Strand::Loop() {
  while (true) {
    std::function<void()> work;
    {
      absl::MutexLock lock(&mutex_);
      if (queue_.empty()) {
        running_ = false;
        return;
      }
      work = std::move(queue_.front());
      queue_.pop_front();
    }
    work();
  }
}

std::shared_ptr<Pending> Start(const std::shared_ptr<Strand>& strand,
                               std::function<Pending::Outcome()> work) {
  RefuseEnded();
  auto pending = std::make_shared<Pending>();
  auto run = [pending, work = std::move(work)] { pending->Finish(work()); };
  if (strand != nullptr) {
    strand->Run(std::move(run));
  } else {
    TheThreads().Run(std::move(run));
  }
  return pending;
}

void BindPending(nb::module_& module) {
  using Handle = Held<Pending>;
  nb::class_<Handle>(module, "Pending", "An operation that another thread finishes.")
      .def(
          "wait", [](const Handle& self, double seconds) { return self->Wait(seconds); },
          nb::arg("seconds"), nb::call_guard<WithoutGil>(), "Whether it finished within `seconds`.")
      .def(
          "result", [](const Handle& self) { return self->Result(); },
          nb::sig("def result(self) -> typing.Any"), "The outcome of a finished one; once.")
      .def(
          "on_done",
          [](const Handle& self, nb::callable callback) { self->OnDone(std::move(callback)); },
          nb::arg("callback"),
          nb::sig("def on_done(self, callback: typing.Callable[[], None]) -> None"),
          "Calls `callback` once it has finished, on a thread of the library.");
}

}  // namespace structkv::python
