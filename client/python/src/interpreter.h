// How threads of the library and the interpreter meet: none of the library's threads waits for the
// GIL (but for the functions of a prompt's options that are Python's), nothing runs after the
// interpreter's end, and a forked child touches nothing.
#pragma once

#include <nanobind/nanobind.h>

#include <functional>
#include <memory>
#include <thread>
#include <utility>

#include "absl/functional/function_ref.h"

namespace structkv::python {

namespace nb = nanobind;

// Runs `work` with the GIL, on a thread of its own, after all that was posted before. At and after
// the interpreter's end, and in a forked child, it never runs, and what it holds is leaked.
void Post(std::function<void()> work);

// Runs `work` with the GIL on this thread, which is one of the library's. False where the
// interpreter is at its end: then it did not run.
bool WithGil(absl::FunctionRef<void()> work);

// The interpreter's end, called with the GIL: from here on nothing runs.
void StopInterpreting();

// Whether this thread is in WithGil(). Whatever the interpreter does there, a collection of garbage
// for instance, must not wait for the library.
bool InWithGil();

// Whether this process was forked from the one that loaded the library, and has none of its
// threads.
bool Forked();
// Throws FailedPrecondition where it was, and after StopInterpreting(): nothing would ever finish.
// With the GIL.
void RefuseEnded();

// Without the GIL while it lives. A thread that comes back after StopInterpreting(), but for the
// one that called it, stays here for good: Python 3.13 and older would end it, through frames that
// cannot be unwound.
class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;
  ~WithoutGil();

 private:
  PyThreadState* const state_;
};

// Keeps `object` alive. The last copy may die on any thread.
std::shared_ptr<const void> KeepAlive(nb::object object);

// What Python's objects hold of the library: let go of without the GIL, since that may wait for
// threads, and not at all in a forked child.
template <typename T>
class Held {
 public:
  explicit Held(std::shared_ptr<T> value) : value_(std::move(value)) {}
  Held(const Held&) = default;
  Held(Held&&) noexcept = default;
  Held& operator=(const Held&) = delete;
  ~Held() { Reset(); }

  // With the GIL, which guards this object: it is empty before the GIL is given away.
  void Reset() {
    std::shared_ptr<T> value = std::move(value_);
    if (value == nullptr) return;
    if (Forked()) {
      static_cast<void>(new std::shared_ptr<T>(std::move(value)));
    } else if (InWithGil()) {
      std::thread([value = std::move(value)]() mutable { value.reset(); }).detach();
    } else {
      const WithoutGil release;
      value.reset();
    }
  }

  T* operator->() const { return value_.get(); }
  const std::shared_ptr<T>& get() const { return value_; }

 private:
  std::shared_ptr<T> value_;
};

}  // namespace structkv::python
