// A value that may change while others read it.
#pragma once

#include <memory>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

namespace structkv {

// Thread-safe. Copies share the value.
template <typename T>
class Live {
 public:
  Live() : Live(T{}) {}
  explicit Live(T value) : state_(std::make_shared<State>()) { Set(std::move(value)); }

  T Get() const {
    absl::MutexLock lock(&state_->mutex);
    return state_->value;
  }
  void Set(T value) {
    absl::MutexLock lock(&state_->mutex);
    state_->value = std::move(value);
  }

 private:
  struct State {
    absl::Mutex mutex;
    T value ABSL_GUARDED_BY(mutex);
  };
  std::shared_ptr<State> state_;
};

}  // namespace structkv
