#include "service/rpc/write_stream.h"

#include <utility>

#include "grpcpp/server_context.h"
#include "service/rpc/status_mapping.h"
#include "service/rpc/stream_set.h"

namespace structkv::rpc {

void WriteStream::Advance() {
  {
    absl::MutexLock lock(&mutex_);
    if (busy_) return;
    busy_ = true;
  }
  while (true) {
    grpc::Status status;
    bool ends = false;
    {
      absl::MutexLock lock(&mutex_);
      if (finished_ || (writing_ && !ending_)) {
        busy_ = false;
        return;
      }
      ends = ending_;
      if (ends) {
        finished_ = true;
        busy_ = false;
        status = end_status_;
      } else {
        writing_ = true;
        woken_ = false;
      }
      writing_since_ = SteadyNanos();
    }
    if (ends) {
      Finish(status);
      return;
    }
    absl::StatusOr<WriteStep> next = Next();
    bool last = false;
    {
      absl::MutexLock lock(&mutex_);
      if (!next.ok() && !ending_) {
        ending_ = true;
        end_status_ = ToGrpc(next.status());
      }
      if (ending_) {  // perhaps meanwhile
        writing_ = false;
        continue;
      }
      if (next->kind == WriteStep::Kind::kAgain || next->kind == WriteStep::Kind::kWait) {
        writing_ = false;
        if (next->kind == WriteStep::Kind::kAgain || woken_) continue;
        writing_since_ = 0;
        busy_ = false;
        return;
      }
      outgoing_ = *std::move(next);
      last = outgoing_.kind == WriteStep::Kind::kWriteLast;
      finished_ = last;
      if (last) busy_ = false;
    }
    if (last) {
      StartWriteAndFinish(&outgoing_.bytes, grpc::WriteOptions(), grpc::Status::OK);
      return;
    }
    StartWrite(&outgoing_.bytes);
  }
}

void WriteStream::Wake() {
  {
    absl::MutexLock lock(&mutex_);
    woken_ = true;
  }
  Advance();
}

bool WriteStream::EndWith(const grpc::Status& status) {
  {
    absl::MutexLock lock(&mutex_);
    if (gone_) return false;
    const bool first = !ending_;
    if (first) {
      ending_ = true;
      end_status_ = status;
    }
    // The reader may never take what is being written.
    if ((writing_ && first) || finished_) {
      if (!std::exchange(cancelled_, true)) CancelCall(context_, status);
    }
    if (!first) return false;
  }
  Advance();
  return true;
}

void WriteStream::OnWriteDone(bool ok) {
  WriteStep sent;  // released outside of the lock
  {
    absl::MutexLock lock(&mutex_);
    sent = std::exchange(outgoing_, {});
    writing_ = false;
    if (!finished_) writing_since_ = 0;
  }
  if (ok) {
    Advance();
  } else {
    OnBroken();
  }
}

void WriteStream::OnDone() {
  const std::shared_ptr<WriteStream> self = std::move(self_);  // lives to the end of this call
  {
    absl::MutexLock lock(&mutex_);
    gone_ = true;
  }
  OnGone();
}

grpc::Status WriteStream::end_status() const {
  absl::MutexLock lock(&mutex_);
  return end_status_;
}

int64_t WriteStream::writing_since() const {
  absl::MutexLock lock(&mutex_);
  return gone_ ? 0 : writing_since_;
}

}  // namespace structkv::rpc
