#include "client/cpp/session_core.h"

#include <utility>
#include <variant>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "grpcpp/generic/generic_stub.h"
#include "structkv/v1/piece_codec.h"

namespace structkv::client::internal {
namespace {

constexpr char kCompressMethod[] = "/structkv.v1.Compression/Compress";
constexpr char kPushbackKey[] = "grpc-retry-pushback-ms";

size_t BufferedBytes(const Event& event) {
  const auto* layer = std::get_if<LayerResult>(&event);
  if (layer == nullptr) return 0;
  return layer->positions.size() + layer->keys.size() + layer->values.size() +
         layer->saliency.size();
}

std::optional<int64_t> Pushback(const grpc::ClientContext& context) {
  const auto& metadata = context.GetServerTrailingMetadata();
  const auto it = metadata.find(kPushbackKey);
  if (it == metadata.end()) return std::nullopt;
  int64_t millis = 0;
  // As in gRPC's own retries: what cannot be read means "do not try again".
  if (!absl::SimpleAtoi(absl::string_view(it->second.data(), it->second.size()), &millis)) {
    return -1;
  }
  return millis;
}

absl::Status FromGrpc(const grpc::Status& status) {
  if (status.ok()) return absl::OkStatus();
  return {static_cast<absl::StatusCode>(status.error_code()), status.error_message()};
}

// A layer that needs none is as good as sent.
bool NeedsTensors(const v1::Opened& opened, uint32_t layer) {
  return opened.required_tensors_size() > 0 && opened.kept_tokens(static_cast<int>(layer)) > 0;
}

}  // namespace

SessionCore::SessionCore(v1::Open open, SessionOptions options, std::shared_ptr<BytesPool> pool)
    : open_(std::move(open)),
      options_(std::move(options)),
      pool_(std::move(pool)),
      assembler_(open_, options_.allocate, pool_.get(),
                 [this](uint32_t layer) { return IsSkeletonLayer(layer); }) {}

void SessionCore::Start(std::shared_ptr<grpc::Channel> channel, absl::Time deadline) {
  channel_ = std::move(channel);
  if (deadline != absl::InfiniteFuture()) context_.set_deadline(absl::ToChronoTime(deadline));
  for (const auto& [key, value] : options_.metadata) context_.AddMetadata(key, value);
  grpc::GenericStub stub(channel_);
  stub.PrepareBidiStreamingCall(&context_, kCompressMethod, grpc::StubOptions(), this);
  v1::CompressRequest request;
  *request.mutable_open() = open_;
  {
    absl::MutexLock lock(&mutex_);
    queue_.push_back({wire::Encode(request), 0, false});
    writing_ = true;
    starting_ = 1;
  }
  AddHold();
  StartRead(&incoming_);
  StartFront(&queue_.front());
  StartCall();
  DoneStarting();
}

void SessionCore::StartFront(Outgoing* front) {
  if (front->last) {
    StartWriteLast(&front->message, grpc::WriteOptions());
  } else {
    StartWrite(&front->message);
  }
}

bool SessionCore::HoldIsOver() {
  if (!closed_ || starting_ > 0 || hold_released_) return false;
  hold_released_ = true;
  return true;
}

void SessionCore::DoneStarting() {
  bool release = false;
  {
    absl::MutexLock lock(&mutex_);
    --starting_;
    release = HoldIsOver();
  }
  if (release) RemoveHold();
}

absl::Status SessionCore::WaitOpened() {
  absl::MutexLock lock(&mutex_);
  while (!opened_set_ && !done_) changed_.Wait(&mutex_);
  if (opened_set_) return absl::OkStatus();
  // The stream ended with OK before `opened`: FinalStatus() says so.
  return FinalStatus();
}

void SessionCore::StartEvents() {
  {
    absl::MutexLock lock(&mutex_);
    if (!options_.on_event || !paused_ || closed_) return;
    paused_ = false;
    ++starting_;
  }
  incoming_.Clear();
  StartRead(&incoming_);
  DoneStarting();
}

absl::Status SessionCore::FinalStatus() const { return status_; }

absl::Status SessionCore::CheckSending() const {
  absl::MutexLock lock(&mutex_);
  if (committed_) return absl::FailedPreconditionError("the prompt was committed already");
  return absl::OkStatus();
}

void SessionCore::NoteSent(uint32_t layer, int tensor, uint64_t begin, uint64_t end) {
  absl::MutexLock lock(&mutex_);
  sent_.Add(layer, tensor, begin, end);
}

void SessionCore::NoteSkeletonLayer(uint32_t layer) {
  absl::MutexLock lock(&mutex_);
  skeleton_layers_.insert(layer);
}

bool SessionCore::IsSkeletonLayer(uint32_t layer) const {
  absl::MutexLock lock(&mutex_);
  return skeleton_layers_.contains(layer);
}

absl::Status SessionCore::Write(const grpc::ByteBuffer& message, size_t bytes, bool last) {
  Outgoing* front = nullptr;
  {
    absl::MutexLock lock(&mutex_);
    while (!closed_ && in_flight_ > 0 && in_flight_ + bytes > options_.max_in_flight_bytes) {
      changed_.Wait(&mutex_);
    }
    if (closed_) return EndedStatus();
    front = Enqueue(message, bytes, last);
  }
  if (front == nullptr) return absl::OkStatus();
  StartFront(front);
  DoneStarting();
  return absl::OkStatus();
}

absl::Status SessionCore::WriteNow(const grpc::ByteBuffer& message, size_t bytes) {
  Outgoing* front = nullptr;
  {
    absl::MutexLock lock(&mutex_);
    if (closed_) return absl::CancelledError("the stream has ended");
    front = Enqueue(message, bytes, /*last=*/false);
  }
  if (front == nullptr) return absl::OkStatus();
  StartFront(front);
  DoneStarting();
  return absl::OkStatus();
}

SessionCore::Outgoing* SessionCore::Enqueue(const grpc::ByteBuffer& message, size_t bytes,
                                            bool last) {
  in_flight_ += bytes;
  queue_.push_back({message, bytes, last});
  if (writing_) return nullptr;
  writing_ = true;
  ++starting_;
  return &queue_.front();
}

// The reason is known once gRPC has said its last word, which follows at once.
absl::Status SessionCore::EndedStatus() {
  while (!done_) changed_.Wait(&mutex_);
  if (!status_.ok()) return status_;
  return absl::FailedPreconditionError("the stream has ended");
}

absl::Status SessionCore::Commit() {
  v1::CompressRequest request;
  {
    absl::MutexLock lock(&mutex_);
    if (committed_) return absl::FailedPreconditionError("the prompt was committed already");
    while (!closed_ && RowsAreDue()) changed_.Wait(&mutex_);
    committed_ = true;
    uint32_t layers = sent_.layers();
    for (uint32_t layer = 0; layer < open_.geometry().layer_count(); ++layer) {
      if (!NeedsTensors(opened_, layer) && !sent_.has_layer(layer)) ++layers;
    }
    request.mutable_commit()->set_layer_count(layers);
    request.mutable_commit()->set_input_bytes(sent_.bytes());
  }
  return Write(wire::Encode(request), 0, /*last=*/true);
}

void SessionCore::OnWriteDone(bool ok) {
  Outgoing sent;  // its buffers are released outside the lock
  Outgoing* front = nullptr;
  bool release = false;
  {
    absl::MutexLock lock(&mutex_);
    sent = std::move(queue_.front());
    queue_.pop_front();
    in_flight_ -= sent.bytes;
    if (!ok) {
      // The stream is over. A paused reader would not notice by itself.
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

void SessionCore::OnReadDone(bool ok) {
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
  bool read_on = true;
  absl::StatusOr<wire::Response> response = wire::DecodeResponse(incoming_);
  if (!response.ok()) {
    Fail(absl::DataLossError(absl::StrCat("the server sent a message that cannot be read: ",
                                          response.status().message())));
  } else {
    const bool was_opened = assembler_.has_opened();
    absl::StatusOr<std::optional<Event>> event = assembler_.Add(*std::move(response));
    if (!event.ok()) {
      Fail(event.status());
    } else if (std::optional<RowPull> pull = assembler_.TakePull()) {
      AnswerPull(*pull);
    } else if (event->has_value()) {
      read_on = Deliver(**std::move(event));
    } else if (!was_opened && assembler_.has_opened()) {
      absl::MutexLock lock(&mutex_);
      opened_ = assembler_.opened();
      opened_set_ = true;
      // Layers that need nothing sent are answered at once; who takes the events must know first
      // what was opened.
      paused_ = options_.on_event != nullptr && !closed_ && !cancelled_;
      read_on = !paused_;
      changed_.SignalAll();
    }
  }
  if (read_on) {
    incoming_.Clear();
    StartRead(&incoming_);
  }
}

bool SessionCore::Deliver(Event event) {
  if (options_.on_event) {
    options_.on_event(std::move(event));
    return true;
  }
  absl::MutexLock lock(&mutex_);
  buffered_ += BufferedBytes(event);
  events_.push_back(std::move(event));
  changed_.SignalAll();
  const size_t limit = options_.max_buffered_result_bytes;
  paused_ = limit > 0 && buffered_ > limit && !closed_ && !cancelled_;
  return !paused_;
}

void SessionCore::Fail(absl::Status status) {
  {
    absl::MutexLock lock(&mutex_);
    if (local_error_.ok()) local_error_ = std::move(status);
  }
  context_.TryCancel();
}

void SessionCore::OnDone(const grpc::Status& status) {
  std::optional<v1::Summary> summary;
  std::deque<Outgoing> unsent;
  std::map<uint32_t, Held> held;
  {
    absl::MutexLock lock(&mutex_);
    closed_ = true;
    unsent.swap(queue_);
    held.swap(held_);
    status_ = local_error_.ok() ? FromGrpc(status) : local_error_;
    if (status_.ok()) {
      absl::StatusOr<v1::Summary> finished = assembler_.Finish(sent_.bytes());
      status_ = finished.status();
      if (finished.ok()) summary = *std::move(finished);
    }
    pushback_millis_ = Pushback(context_);
    summary_ = summary;
  }
  if (summary.has_value() && options_.on_event) options_.on_event(Event(*std::move(summary)));
  unsent.clear();
  held.clear();
  // Whoever waits for this may destroy the object as soon as the lock is free.
  absl::MutexLock lock(&mutex_);
  done_ = true;
  changed_.SignalAll();
}

absl::StatusOr<Event> SessionCore::NextEvent() {
  if (options_.on_event) {
    return absl::FailedPreconditionError("SessionOptions.on_event takes the events");
  }
  std::optional<Event> event;
  bool resume = false;
  {
    absl::MutexLock lock(&mutex_);
    while (events_.empty() && !done_) changed_.Wait(&mutex_);
    if (!events_.empty()) {
      event = std::move(events_.front());
      events_.pop_front();
      buffered_ -= BufferedBytes(*event);
      if (paused_ && buffered_ <= options_.max_buffered_result_bytes && !closed_) {
        paused_ = false;
        resume = true;
        ++starting_;
      }
    } else if (!status_.ok()) {
      return status_;
    } else if (!summary_taken_) {
      summary_taken_ = true;
      return Event(*summary_);
    } else {
      return absl::OutOfRangeError("the summary was read; nothing follows");
    }
  }
  if (resume) {
    incoming_.Clear();
    StartRead(&incoming_);
    DoneStarting();
  }
  return *std::move(event);
}

absl::StatusOr<v1::Summary> SessionCore::Wait() {
  absl::MutexLock lock(&mutex_);
  while (!done_) changed_.Wait(&mutex_);
  if (!status_.ok()) return status_;
  return *summary_;
}

void SessionCore::Cancel() {
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

void SessionCore::Close() {
  {
    absl::MutexLock lock(&mutex_);
    if (done_) return;
  }
  Cancel();
  absl::MutexLock lock(&mutex_);
  while (!done_) changed_.Wait(&mutex_);
}

std::optional<int64_t> SessionCore::retry_pushback_millis() const {
  absl::MutexLock lock(&mutex_);
  return pushback_millis_;
}

}  // namespace structkv::client::internal
