#include "client/cpp/stream.h"

#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/cpp/call_metadata.h"
#include "client/cpp/retry.h"
#include "client/cpp/session_core.h"
#include "grpcpp/generic/generic_stub.h"

namespace structkv::client::internal {
namespace {

constexpr char kCompressMethod[] = "/structkv.v1.Compression/Compress";

absl::Status StatusOfPrompt(const v1::PromptFailure& failure) {
  absl::Status status(static_cast<absl::StatusCode>(failure.code()), failure.message());
  if (failure.has_retry_after_millis()) {
    SetPushback(static_cast<int64_t>(failure.retry_after_millis()), &status);
  }
  return status;
}

// The protocol has no message that takes a prompt back. This one the server refuses at once, with
// nothing of the prompt left.
grpc::ByteBuffer EmptyCommit(uint32_t prompt) {
  v1::CompressRequest request;
  request.set_prompt(prompt);
  request.mutable_commit();
  return wire::Encode(request);
}

}  // namespace

void Stream::Start(std::shared_ptr<grpc::Channel> channel, absl::Time deadline,
                   const std::vector<SessionCore*>& sessions) {
  channel_ = std::move(channel);
  if (deadline != absl::InfiniteFuture()) context_.set_deadline(absl::ToChronoTime(deadline));
  AddMetadata(options_.metadata, options_.labels, &context_);
  grpc::GenericStub stub(channel_);
  stub.PrepareBidiStreamingCall(&context_, kCompressMethod, grpc::StubOptions(), this);
  Outgoing* front = nullptr;
  {
    absl::MutexLock lock(&mutex_);
    for (SessionCore* session : sessions) {
      v1::CompressRequest request;
      request.set_prompt(static_cast<uint32_t>(prompts_.size()));
      *request.mutable_open() = session->open();
      prompts_.emplace_back().session = session;
      queue_.push_back({wire::Encode(request)});
    }
    sending_ = wanted_ = running_ = attached_ = prompts_.size();
    writing_ = true;
    starting_ = 1;
    front = &queue_.front();
  }
  AddHold();
  StartRead(&incoming_);
  StartFront(front);
  StartCall();
  DoneStarting();
}

// Writes

bool Stream::CanSend(const Prompt& prompt) const { return !closed_ && prompt.sending; }

bool Stream::Write(uint32_t prompt, const grpc::ByteBuffer& message, size_t bytes) {
  Outgoing* front = nullptr;
  {
    absl::MutexLock lock(&mutex_);
    Prompt& own = prompts_[prompt];
    while (CanSend(own) && in_flight_ > 0 && in_flight_ + bytes > options_.max_in_flight_bytes) {
      changed_.Wait(&mutex_);
    }
    if (!CanSend(own)) return false;
    front = Enqueue(own, message, bytes, /*last=*/false);
  }
  StartQueued(front);
  return true;
}

bool Stream::WriteNow(uint32_t prompt, const grpc::ByteBuffer& message, size_t bytes, bool last) {
  Outgoing* front = nullptr;
  {
    absl::MutexLock lock(&mutex_);
    Prompt& own = prompts_[prompt];
    if (!CanSend(own)) return false;
    front = Enqueue(own, message, bytes, last);
  }
  StartQueued(front);
  return true;
}

Stream::Outgoing* Stream::Enqueue(Prompt& prompt, std::optional<grpc::ByteBuffer> message,
                                  size_t bytes, bool last) {
  bool half_close = false;
  if (last) {
    prompt.sending = false;
    half_close = --sending_ == 0;
    changed_.SignalAll();
  }
  if (!message.has_value() && !half_close) return nullptr;
  in_flight_ += bytes;
  queue_.push_back({std::move(message), bytes, half_close});
  if (writing_ || closed_) return nullptr;
  writing_ = true;
  ++starting_;
  return &queue_.front();
}

void Stream::StartQueued(Outgoing* front) {
  if (front == nullptr) return;
  StartFront(front);
  DoneStarting();
}

void Stream::StartFront(Outgoing* front) {
  if (!front->message.has_value()) {
    StartWritesDone();
  } else if (front->last) {
    StartWriteLast(&*front->message, grpc::WriteOptions());
  } else {
    StartWrite(&*front->message);
  }
}

void Stream::OnWriteDone(bool ok) {
  Outgoing sent;  // its buffers are released outside the lock
  Outgoing* front = nullptr;
  bool release = false;
  {
    absl::MutexLock lock(&mutex_);
    sent = std::move(queue_.front());
    queue_.pop_front();
    in_flight_ -= sent.bytes;
    if (!ok) {
      // The call is over. A paused reader would not notice by itself.
      writing_ = false;
      closed_ = true;
      paused_ = false;
      release = HoldIsOver();
    } else if (queue_.empty() || closed_) {
      writing_ = false;
    } else {
      front = &queue_.front();
    }
    changed_.SignalAll();
  }
  if (front != nullptr) StartFront(front);
  if (release) RemoveHold();
}

// Reads

void Stream::OnReadDone(bool ok) {
  bool release = false;
  if (!ok) {
    {
      absl::MutexLock lock(&mutex_);
      closed_ = true;
      release = HoldIsOver();
      changed_.SignalAll();
    }
    if (release) RemoveHold();
    return;
  }
  absl::StatusOr<wire::Response> response = wire::DecodeResponse(incoming_);
  if (response.ok()) {
    Dispatch(*std::move(response));
  } else {
    Fail(absl::DataLossError(absl::StrCat("the server sent a message that cannot be read: ",
                                          response.status().message())));
  }
  {
    absl::MutexLock lock(&mutex_);
    const size_t limit = options_.max_buffered_result_bytes;
    paused_ = limit > 0 && unread_ > limit && !closed_ && !cancelled_;
    if (paused_) return;
  }
  incoming_.Clear();
  StartRead(&incoming_);
}

void Stream::Dispatch(wire::Response response) {
  const uint32_t prompt = response.message.prompt();
  const bool last = response.message.has_summary() || response.message.has_failed();
  absl::Status fault;
  Outgoing* front = nullptr;
  bool others_run = true;
  {
    absl::MutexLock lock(&mutex_);
    if (prompt >= prompts_.size()) {
      fault = absl::DataLossError(absl::StrCat("the server broke the protocol: a message is of ",
                                               "prompt ", prompt, " of ", prompts_.size()));
    } else if (prompts_[prompt].over) {
      fault = absl::DataLossError(
          absl::StrCat("the server broke the protocol: a message came after the summary or failure",
                       " of prompt ", prompt));
    } else if (last) {
      Prompt& own = prompts_[prompt];
      own.over = true;
      others_run = --running_ > 0;
      if (own.wanted) --wanted_;
      own.wanted = false;
      // A summary that comes too early is told by what it says, once the commit is there.
      const bool stop = own.sending && (response.message.has_failed() || others_run);
      if (stop) front = Enqueue(own, std::nullopt, 0, /*last=*/true);
    }
  }
  if (!fault.ok()) return Fail(std::move(fault));
  StartQueued(front);
  With(prompt, [&](SessionCore& session) {
    if (response.message.has_failed())
      return session.OnEnd(StatusOfPrompt(response.message.failed()));
    session.OnMessage(std::move(response));
    // The status of the call is that of the prompt that is over last.
    if (last && others_run) session.OnEnd(absl::OkStatus());
  });
}

template <typename Call>
void Stream::With(uint32_t prompt, Call call) {
  SessionCore* session = nullptr;
  {
    absl::MutexLock lock(&mutex_);
    session = prompts_[prompt].session;
    if (session == nullptr) return;
    called_ = prompt;
  }
  call(*session);
  absl::MutexLock lock(&mutex_);
  called_.reset();
  changed_.SignalAll();
}

void Stream::AddUnread(size_t bytes) {
  absl::MutexLock lock(&mutex_);
  unread_ += bytes;
}

void Stream::RemoveUnread(size_t bytes) {
  {
    absl::MutexLock lock(&mutex_);
    unread_ -= bytes;
    if (!paused_ || unread_ > options_.max_buffered_result_bytes || closed_) return;
    paused_ = false;
    ++starting_;
  }
  incoming_.Clear();
  StartRead(&incoming_);
  DoneStarting();
}

// The end

void Stream::Abandon(uint32_t prompt) {
  Outgoing* front = nullptr;
  bool cancel = false;
  {
    absl::MutexLock lock(&mutex_);
    Prompt& own = prompts_[prompt];
    if (!own.wanted) return;
    own.wanted = false;
    cancel = --wanted_ == 0;
    if (cancel) {
      own.sending = false;
      changed_.SignalAll();
    } else if (CanSend(own)) {
      front = Enqueue(own, EmptyCommit(prompt), 0, /*last=*/true);
    }
  }
  StartQueued(front);
  if (cancel) Cancel();
}

void Stream::Detach(uint32_t prompt) {
  Abandon(prompt);
  {
    absl::MutexLock lock(&mutex_);
    prompts_[prompt].session = nullptr;
    while (called_ == prompt) changed_.Wait(&mutex_);
    if (--attached_ > 0 || done_) return;
  }
  Cancel();
  absl::MutexLock lock(&mutex_);
  while (!done_) changed_.Wait(&mutex_);
}

void Stream::Fail(absl::Status status) {
  {
    absl::MutexLock lock(&mutex_);
    if (fault_.ok()) fault_ = std::move(status);
  }
  context_.TryCancel();
}

void Stream::Cancel() {
  bool release = false;
  {
    absl::MutexLock lock(&mutex_);
    cancelled_ = true;  // reading goes on to the end
    if (paused_) {
      // Nobody may come to read on; the end must not wait for it.
      paused_ = false;
      closed_ = true;
      release = HoldIsOver();
    }
  }
  context_.TryCancel();
  if (release) RemoveHold();
}

bool Stream::HoldIsOver() {
  if (!closed_ || starting_ > 0 || hold_released_) return false;
  hold_released_ = true;
  return true;
}

void Stream::DoneStarting() {
  bool release = false;
  {
    absl::MutexLock lock(&mutex_);
    --starting_;
    release = HoldIsOver();
  }
  if (release) RemoveHold();
}

void Stream::OnDone(const grpc::Status& status) {
  std::deque<Outgoing> unsent;  // its buffers are released outside the lock
  absl::Status end;
  uint32_t prompts = 0;
  {
    absl::MutexLock lock(&mutex_);
    closed_ = true;
    unsent.swap(queue_);
    end = fault_.ok() ? StatusOfCall(status, context_) : fault_;
    // gRPC's answer to what comes at the very moment that a server shuts down.
    if (absl::IsCancelled(end) && !cancelled_) {
      end = absl::UnavailableError("the server cancelled the stream, as one that shuts down does");
    }
    prompts = static_cast<uint32_t>(prompts_.size());
    changed_.SignalAll();
  }
  unsent.clear();
  for (uint32_t i = 0; i < prompts; ++i) {
    With(i, [&end](SessionCore& session) { session.OnEnd(end); });
  }
  // Whoever waits for this may destroy the object as soon as the lock is free.
  absl::MutexLock lock(&mutex_);
  done_ = true;
  changed_.SignalAll();
}

}  // namespace structkv::client::internal
