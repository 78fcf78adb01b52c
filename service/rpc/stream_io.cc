#include "service/rpc/stream_io.h"

#include <utility>

#include "grpcpp/server_context.h"
#include "service/rpc/status_mapping.h"
#include "service/rpc/stream_set.h"

namespace structkv::rpc {

StreamIo::Action StreamIo::Decide() {
  if (finished_) return Action::kNone;
  if (ending_) {
    if (starting_ > 0) return Action::kNone;
    finished_ = true;
    writing_since_ = SteadyNanos();
    return Action::kFinish;
  }
  if (!writing_ && !queue_.empty()) {
    const bool last = last_queued_ && queue_.size() == 1;
    if (last && starting_ > 0) return Action::kNone;
    outgoing_ = std::move(queue_.front());
    queue_.pop_front();
    writing_ = true;
    writing_since_ = SteadyNanos();
    if (last) {
      finished_ = true;
      return Action::kWriteAndFinish;
    }
    ++starting_;
    return Action::kWrite;
  }
  if (last_queued_ && !writing_) {
    if (starting_ > 0) return Action::kNone;
    finished_ = true;
    writing_since_ = SteadyNanos();
    return Action::kFinish;
  }
  if (read_wanted_ && !reading_ && !last_queued_) {
    read_wanted_ = false;
    reading_ = true;
    reading_since_ = SteadyNanos();
    ++starting_;
    return Action::kRead;
  }
  return Action::kNone;
}

void StreamIo::Advance() {
  Action action;
  grpc::Status status;
  {
    absl::MutexLock lock(&mutex_);
    action = Decide();
    if (action == Action::kFinish) status = end_status_;
  }
  while (action != Action::kNone) {
    switch (action) {
      case Action::kRead:
        StartRead(&incoming_);
        break;
      case Action::kWrite:
        StartWrite(&outgoing_.bytes);
        break;
      case Action::kWriteAndFinish:
        StartWriteAndFinish(&outgoing_.bytes, grpc::WriteOptions(), grpc::Status::OK);
        return;
      case Action::kFinish:
        Finish(status);
        return;
      case Action::kNone:
        return;
    }
    absl::MutexLock lock(&mutex_);
    --starting_;
    action = Decide();
    if (action == Action::kFinish) status = end_status_;
  }
}

void StreamIo::WantMessage() {
  {
    absl::MutexLock lock(&mutex_);
    read_wanted_ = true;
  }
  Advance();
}

void StreamIo::Send(std::vector<OutgoingMessage> messages) {
  {
    absl::MutexLock lock(&mutex_);
    if (ending_ || last_queued_) return;
    for (OutgoingMessage& message : messages) queue_.push_back(std::move(message));
  }
  Advance();
}

void StreamIo::SendLast(const grpc::ByteBuffer& message) {
  {
    absl::MutexLock lock(&mutex_);
    if (ending_ || last_queued_) return;
    queue_.push_back({message, 0});
    last_queued_ = true;
  }
  Advance();
}

void StreamIo::SendNoMore() {
  {
    absl::MutexLock lock(&mutex_);
    if (ending_ || last_queued_) return;
    last_queued_ = true;
  }
  Advance();
}

void StreamIo::Drop(uint32_t prompt) {
  std::deque<OutgoingMessage> kept;
  std::vector<OutgoingMessage> dropped;  // released outside of the lock
  absl::MutexLock lock(&mutex_);
  for (OutgoingMessage& message : queue_) {
    if (message.prompt == prompt && message.tensor_bytes + message.elsewhere_bytes > 0) {
      dropped.push_back(std::move(message));
    } else {
      kept.push_back(std::move(message));
    }
  }
  queue_.swap(kept);
}

bool StreamIo::EndWith(const grpc::Status& status) {
  std::deque<OutgoingMessage> dropped;  // released outside of the lock
  {
    absl::MutexLock lock(&mutex_);
    if (gone_ || ending_) {
      if (!gone_ && finished_) CancelOnce(status);
      return false;
    }
    ending_ = true;
    end_status_ = status;
    dropped.swap(queue_);
    if (writing_) CancelOnce(status);
  }
  Advance();
  return true;
}

void StreamIo::CancelOnce(const grpc::Status& status) {
  if (!std::exchange(cancelled_, true)) CancelCall(context_, status);
}

void StreamIo::OnReadDone(bool ok) {
  grpc::ByteBuffer message;
  {
    absl::MutexLock lock(&mutex_);
    reading_ = false;
    reading_since_ = 0;
    message.Swap(&incoming_);
    if (ending_ || finished_) return;
  }
  if (ok) {
    OnMessage(message);
  } else {
    OnEndOfInput(context_->IsCancelled());
  }
}

void StreamIo::OnWriteDone(bool ok) {
  OutgoingMessage sent;
  {
    absl::MutexLock lock(&mutex_);
    writing_ = false;
    if (!finished_) writing_since_ = 0;
    sent = std::move(outgoing_);
    outgoing_ = OutgoingMessage();
  }
  if (!ok) {
    OnBroken();
    return;
  }
  Advance();
  if (sent.tensor_bytes > 0 || sent.ends_prompt) {
    sent.bytes.Clear();
    OnSent(sent.prompt, sent.tensor_bytes, sent.ends_prompt);
  }
}

void StreamIo::OnDone() {
  const std::shared_ptr<StreamIo> self = std::move(self_);  // lives to the end of this call
  {
    absl::MutexLock lock(&mutex_);
    gone_ = true;
  }
  OnGone();
}

grpc::Status StreamIo::end_status() const {
  absl::MutexLock lock(&mutex_);
  return end_status_;
}

int64_t StreamIo::reading_since() const {
  absl::MutexLock lock(&mutex_);
  return reading_since_;
}

int64_t StreamIo::writing_since() const {
  absl::MutexLock lock(&mutex_);
  return gone_ ? 0 : writing_since_;
}

}  // namespace structkv::rpc
