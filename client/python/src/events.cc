#include "events.h"

#include <utility>
#include <variant>

#include "interpreter.h"

namespace structkv::python {
namespace {

size_t BytesOf(const client::Event& event) {
  const auto* layer = std::get_if<client::LayerResult>(&event);
  if (layer == nullptr) return 0;
  return layer->positions.size() + layer->keys.size() + layer->values.size() +
         layer->saliency.size();
}

}  // namespace

void Events::Push(client::Event event) {
  {
    absl::MutexLock lock(&mutex_);
    while (limit_bytes_ > 0 && bytes_ > limit_bytes_ && !closed_) room_.Wait(&mutex_);
    bytes_ += BytesOf(event);
  }
  Post([self = shared_from_this(), event = std::move(event)]() mutable {
    absl::MutexLock lock(&self->mutex_);
    self->events_.push_back(std::move(event));
    self->Say();
  });
}

void Events::End(absl::Status status) {
  Post([self = shared_from_this(), status = std::move(status)] {
    absl::MutexLock lock(&self->mutex_);
    self->end_ = status;
    self->Say();
  });
}

void Events::Begin() {
  Post([self = shared_from_this()] {
    absl::MutexLock lock(&self->mutex_);
    self->end_.reset();
  });
}

void Events::Close() {
  absl::MutexLock lock(&mutex_);
  closed_ = true;
  room_.SignalAll();
}

absl::StatusOr<std::optional<client::Event>> Events::Next() {
  absl::MutexLock lock(&mutex_);
  if (events_.empty()) {
    if (!end_.has_value()) return std::nullopt;
    if (!end_->ok()) return *end_;
    return absl::OutOfRangeError("the summary was read; nothing follows");
  }
  client::Event event = std::move(events_.front());
  events_.pop_front();
  bytes_ -= BytesOf(event);
  room_.SignalAll();
  return event;
}

std::shared_ptr<Pending> Events::Ready() {
  absl::MutexLock lock(&mutex_);
  if (ready_ == nullptr) ready_ = std::make_shared<Pending>();
  std::shared_ptr<Pending> ready = ready_;
  if (!events_.empty() || end_.has_value()) Say();
  return ready;
}

void Events::Say() {
  if (ready_ == nullptr) return;
  std::exchange(ready_, nullptr)->Finish([] { return nb::none(); });
}

}  // namespace structkv::python
