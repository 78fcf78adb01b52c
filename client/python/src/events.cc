#include "events.h"

#include <utility>

#include "interpreter.h"

namespace structkv::python {

void Events::Begin() {
  absl::MutexLock lock(&mutex_);
  begun_ = true;
}

void Events::Add() {
  Post([self = shared_from_this()] {
    absl::MutexLock lock(&self->mutex_);
    ++self->count_;
    self->Say();
  });
}

void Events::End() {
  {
    absl::MutexLock lock(&mutex_);
    if (!begun_) return;
  }
  Post([self = shared_from_this()] {
    absl::MutexLock lock(&self->mutex_);
    self->ended_ = true;
    self->Say();
  });
}

bool Events::Take() {
  absl::MutexLock lock(&mutex_);
  if (count_ > 0) {
    --count_;
    return true;
  }
  return ended_;
}

std::shared_ptr<Pending> Events::Ready() {
  absl::MutexLock lock(&mutex_);
  if (ready_ == nullptr) ready_ = std::make_shared<Pending>();
  std::shared_ptr<Pending> ready = ready_;
  if (count_ > 0 || ended_) Say();
  return ready;
}

void Events::Say() {
  if (ready_ == nullptr) return;
  std::exchange(ready_, nullptr)->Finish([] { return nb::none(); });
}

}  // namespace structkv::python
