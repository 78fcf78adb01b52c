#include "client/cpp/nccl_stream.h"

#include <utility>

#include "structkv/v1/nccl_codec.h"

namespace structkv::client::internal {
namespace {

// The service's word on a stream, which comes once.
struct Word {
  absl::Mutex mutex;
  bool came ABSL_GUARDED_BY(mutex) = false;
  absl::StatusOr<uint64_t> name ABSL_GUARDED_BY(mutex) =
      absl::DeadlineExceededError("the service did not answer the NCCL hello in time");
};

}  // namespace

absl::StatusOr<std::unique_ptr<NcclStream>> NcclStream::Attach(
    std::shared_ptr<grpc::Channel> channel, nccl::Worker* worker, const nccl::Identity& identity,
    absl::Duration limit, const std::string& tenant, absl::Duration leave_limit) {
  std::unique_ptr<NcclStream> stream(new NcclStream(leave_limit));
  stream->channel_ = std::move(channel);
  const std::weak_ptr<NcclCall> weak = stream->call_;
  const auto word = std::make_shared<Word>();
  stream->pair_ = nccl::ClientPair::Start(worker, identity,
                                          {[weak](const nccl::ClientMessage& message) {
                                             if (const auto call = weak.lock()) call->Send(message);
                                           },
                                           [weak](const absl::Status&) {
                                             if (const auto call = weak.lock()) call->Finish();
                                           }},
                                          [word](const absl::StatusOr<uint64_t>& name) {
                                            absl::MutexLock lock(&word->mutex);
                                            word->came = true;
                                            word->name = name;
                                          });
  stream->call_->Start(stream->channel_.get(), stream->pair_, tenant);
  absl::StatusOr<uint64_t> name = 0;
  {
    absl::MutexLock lock(&word->mutex);
    const bool came = word->mutex.AwaitWithTimeout(absl::Condition(&word->came), limit);
    if (!came) stream->LimitLeaving(absl::ZeroDuration());  // the time is up
    name = word->name;
  }
  if (!name.ok()) return name.status();
  stream->name_ = *name;
  return stream;
}

NcclStream::~NcclStream() {
  pair_->End();
  call_->WaitUntilDone(leave_limit_);
}

void NcclCall::Start(grpc::Channel* channel, std::shared_ptr<nccl::ClientPair> pair,
                     const std::string& tenant) {
  pair_ = std::move(pair);
  if (!tenant.empty()) context_.AddMetadata("structkv-tenant", tenant);
  // The stub needs the channel for the call's start alone.
  v1::NcclTransport::NewStub(
      std::shared_ptr<grpc::Channel>(std::shared_ptr<grpc::Channel>(), channel))
      ->async()
      ->Attach(&context_, this);
  AddHold();  // writes come from other threads than gRPC's
  StartRead(&incoming_);
  StartCall();
  {
    absl::MutexLock lock(&mutex_);
    started_ = true;
  }
  Advance();
}

void NcclCall::WaitUntilDone(absl::Duration limit) {
  {
    absl::MutexLock lock(&mutex_);
    if (mutex_.AwaitWithTimeout(absl::Condition(&done_), limit)) return;
  }
  context_.TryCancel();
  absl::MutexLock lock(&mutex_);
  mutex_.Await(absl::Condition(&done_));
}

void NcclCall::Send(const nccl::ClientMessage& message) {
  {
    absl::MutexLock lock(&mutex_);
    if (finishing_) return;
    queue_.push_back(nccl::Encode(message));
  }
  Advance();
}

void NcclCall::Finish() {
  {
    absl::MutexLock lock(&mutex_);
    finishing_ = true;
  }
  Advance();
}

void NcclCall::Advance() {
  const v1::AttachRequest* next = nullptr;
  {
    absl::MutexLock lock(&mutex_);
    if (!started_ || writing_ || finished_) return;
    if (!queue_.empty()) {
      next = &queue_.front();
      writing_ = true;
    } else if (finishing_) {
      finished_ = true;
    } else {
      return;
    }
  }
  if (next != nullptr) {
    StartWrite(next);
  } else {
    StartWritesDone();
    RemoveHold();
  }
}

void NcclCall::OnReadDone(bool ok) {
  if (!ok) return Finish();  // the status comes once the hold is released
  absl::StatusOr<nccl::ServiceMessage> message = nccl::Decode(incoming_);
  if (message.ok()) {
    pair_->OnMessage(*std::move(message));
  } else {
    pair_->OnEnd(message.status());
  }
  StartRead(&incoming_);
}

void NcclCall::OnWriteDone(bool ok) {
  {
    absl::MutexLock lock(&mutex_);
    writing_ = false;
    if (ok) {
      queue_.pop_front();
    } else {
      queue_.clear();  // the stream is over
      finishing_ = true;
    }
  }
  Advance();
}

void NcclCall::OnDone(const grpc::Status& status) {
  pair_->OnEnd(
      absl::Status(static_cast<absl::StatusCode>(status.error_code()), status.error_message()));
  absl::MutexLock lock(&mutex_);  // the last touch: whoever waits destroys this
  done_ = true;
}

}  // namespace structkv::client::internal
