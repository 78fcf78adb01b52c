#include "client/cpp/session_core.h"

#include <algorithm>
#include <utility>
#include <variant>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "client/cpp/replica_set.h"
#include "client/cpp/staged_blocks.h"
#include "structkv/arena.h"
#include "structkv/sizes.h"

namespace structkv::client::internal {
namespace {

// How long sending waits for room in an arena that layers of other sessions fill. Two that each
// hold a part of it, and wait for the rest, would otherwise wait for ever.
constexpr absl::Duration kStagingPatience = absl::Seconds(10);
// How often it looks whether its own session has ended meanwhile.
constexpr absl::Duration kLook = absl::Milliseconds(50);

size_t BufferedBytes(const Event& event) {
  const auto* layer = std::get_if<LayerResult>(&event);
  if (layer == nullptr) return 0;
  return layer->positions.size() + layer->keys.size() + layer->values.size() +
         layer->saliency.size();
}

// A layer that needs none is as good as sent.
bool NeedsTensors(const v1::Opened& opened, uint32_t layer) {
  return opened.required_tensors_size() > 0 && opened.kept_tokens(static_cast<int>(layer)) > 0;
}

}  // namespace

SessionCore::SessionCore(BatchPrompt prompt, SharedPlace place, std::shared_ptr<BytesPool> pool,
                         std::shared_ptr<Stream> stream, uint32_t index)
    : open_(std::move(prompt.open)),
      options_(std::move(prompt.options)),
      place_(std::move(place)),
      pool_(std::move(pool)),
      stream_(std::move(stream)),
      index_(index),
      assembler_(
          open_, options_.allocate, pool_.get(),
          [this](uint32_t layer) { return IsSkeletonLayer(layer); }, place_.results),
      transfers_(place_.pair == nullptr ? nullptr
                                        : std::make_shared<PromptTransfers>(place_.pair)) {}

SessionCore::~SessionCore() {
  Cancel();
  DropEvents();  // of a session that had ended before
  stream_->Detach(index_);
  if (transfers_ != nullptr) transfers_->Close();
}

absl::Status SessionCore::WaitOpened() {
  absl::MutexLock lock(&mutex_);
  while (!opened_set_ && !done_) changed_.Wait(&mutex_);
  return opened_set_ ? absl::OkStatus() : *status_;
}

// Sending

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

absl::Status SessionCore::Write(const grpc::ByteBuffer& message, size_t bytes) {
  if (stream_->Write(index_, message, bytes)) return absl::OkStatus();
  absl::MutexLock lock(&mutex_);
  return EndedStatus();
}

absl::Status SessionCore::WriteNow(const grpc::ByteBuffer& message, size_t bytes) {
  if (stream_->WriteNow(index_, message, bytes)) return absl::OkStatus();
  return absl::CancelledError("the session has ended");
}

absl::Status SessionCore::Commit() {
  v1::CompressRequest request;
  request.set_prompt(index_);
  {
    absl::MutexLock lock(&mutex_);
    if (committed_) return absl::FailedPreconditionError("the prompt was committed already");
    while (!status_.has_value() && RowsAreDue()) changed_.Wait(&mutex_);
    if (status_.has_value()) return EndedStatus();
    committed_ = true;
    uint32_t layers = sent_.layers();
    for (uint32_t layer = 0; layer < open_.geometry().layer_count(); ++layer) {
      if (!NeedsTensors(opened_, layer) && !sent_.has_layer(layer)) ++layers;
    }
    request.mutable_commit()->set_layer_count(layers);
    request.mutable_commit()->set_input_bytes(sent_.bytes());
  }
  if (stream_->WriteNow(index_, wire::Encode(request), 0, /*last=*/true)) return absl::OkStatus();
  absl::MutexLock lock(&mutex_);
  return EndedStatus();
}

// What the stream brings

void SessionCore::OnMessage(wire::Response response) {
  {
    absl::MutexLock lock(&mutex_);
    if (status_.has_value()) return;  // cancelled; what still comes is of no use
  }
  const bool was_opened = assembler_.has_opened();
  absl::StatusOr<std::optional<Event>> event = assembler_.Add(std::move(response));
  if (!event.ok()) {
    Fail(event.status());
  } else if (std::optional<RowPull> pull = assembler_.TakePull()) {
    AnswerPull(*pull);
  } else if (event->has_value()) {
    if (transfers()) return DeliverInTurn(**std::move(event));
    if (auto* layer = std::get_if<LayerResult>(&**event)) {
      ReleaseHeld(layer->layer);
      if (absl::Status status = CopyToResults(layer); !status.ok()) return Fail(status);
    }
    Deliver(**std::move(event));
  } else if (!was_opened && assembler_.has_opened()) {
    opened_ = assembler_.opened();
    if (opened_.transport() == v1::TRANSPORT_UNSPECIFIED) {  // of a server without a choice
      opened_.set_transport(v1::TRANSPORT_INLINE);
    }
    if (opened_.transport_reason().empty()) opened_.set_transport_reason(place_.reason);
    if (options_.on_opened) options_.on_opened(opened_);
    absl::MutexLock lock(&mutex_);
    opened_set_ = true;
    changed_.SignalAll();
  }
}

absl::Status SessionCore::Record(const std::optional<void*>& stream) const {
  if (!stream.has_value()) return absl::OkStatus();
  if (place_.gpu == nullptr) {
    return absl::InvalidArgumentError(
        "LayerTensors.cuda_stream is set, and StreamOptions.regions are no memory of a GPU");
  }
  for (const auto& region : stream_->options().regions) {
    if (absl::Status status = region->Record(*stream); !status.ok()) return status;
  }
  return place_.gpu->Record(*stream);
}

std::shared_ptr<const GpuMemory> SessionCore::GpuOf(absl::Span<const std::byte> data) const {
  for (const auto& region : stream_->options().regions) {
    if (region->OffsetOf(data).has_value()) return region->gpu_memory();
  }
  return place_.gpu;
}

absl::StatusOr<Bytes> SessionCore::CopyToHost(absl::Span<const std::byte> data) const {
  Bytes copy = pool_->Acquire(data.size());
  const absl::Status status = GpuOf(data)->Copy(copy.data(), data.data(), data.size());
  if (!status.ok()) return status;
  return copy;
}

absl::Status SessionCore::CopyToResults(LayerResult* layer) const {
  const bool copies = place_.gpu != nullptr && opened_.transport() == v1::TRANSPORT_INLINE;
  if (!copies || place_.results.empty()) return absl::OkStatus();
  const uint64_t needed = ResultBytes(open_, opened_, open_.geometry().layer_count());
  if (needed > place_.results.size()) {
    return absl::DataLossError(
        absl::StrCat("the server broke the protocol: Opened.kept_tokens need ", needed,
                     " bytes, and what Open lets layers keep ", place_.results.size()));
  }
  for (const auto& [tensor, rows] :
       {std::pair(v1::TENSOR_KEYS, &layer->keys), std::pair(v1::TENSOR_VALUES, &layer->values)}) {
    const Bytes to(place_.results.data() + ResultOffset(open_, opened_, layer->layer, tensor),
                   rows->size(), place_.results.owner());
    const absl::Status status = place_.gpu->Copy(to.data(), rows->data(), rows->size());
    if (!status.ok()) return status;
    if (!rows->empty()) *rows = to;
  }
  return absl::OkStatus();
}

void SessionCore::HoldUntilAnswered(uint32_t layer, std::shared_ptr<const void> owner) {
  absl::MutexLock lock(&mutex_);
  // What was answered, or is over, needs it no more; the piece is refused or ignored.
  if (!status_.has_value() && !answered_.contains(layer)) owners_.emplace(layer, std::move(owner));
}

void SessionCore::ReleaseHeld(uint32_t layer) {
  std::vector<std::shared_ptr<const void>> owners;  // released outside the lock
  {
    absl::MutexLock lock(&mutex_);
    const auto [begin, end] = owners_.equal_range(layer);
    for (auto it = begin; it != end; ++it) owners.push_back(std::move(it->second));
  }
  owners.clear();
  // Who waits for room must not find the layer answered before its room is there.
  absl::MutexLock lock(&mutex_);
  owners_.erase(layer);
  answered_.insert(layer);
  answered_more_.SignalAll();
}

bool SessionCore::IsSent(uint32_t layer) const {
  const bool skeleton = skeleton_layers_.contains(layer);
  for (const int tensor : opened_.required_tensors()) {
    const auto named = static_cast<v1::Tensor>(tensor);
    const uint64_t needed = skeleton ? SkeletonTensorBytes(open_, opened_, named)
                                     : InputTensorBytes(open_, opened_, named);
    if (sent_.bytes(layer, tensor) != needed) return false;
  }
  return true;
}

bool SessionCore::RoomIsDue() const {
  return std::any_of(owners_.begin(), owners_.end(),
                     [this](const auto& held) { return IsSent(held.first); });
}

absl::StatusOr<Bytes> SessionCore::AllocateStaging(size_t size, bool wait) {
  if (place_.staging == nullptr) {
    return absl::InvalidArgumentError("there is no StreamOptions.staging to copy it to");
  }
  const Arena* const arena = place_.staging.get();
  StagedBlocks& staged = StagedBlocks::All();
  absl::Time patience = absl::InfiniteFuture();  // with the others
  while (true) {
    size_t answered = 0;
    {
      absl::MutexLock lock(&mutex_);
      answered = answered_.size();
    }
    const int64_t returned = staged.returned(arena);
    absl::StatusOr<Bytes> block = place_.staging->Allocate(size);
    if (block.ok()) return staged.Note(*std::move(block), arena, this);
    if (!wait || !absl::IsResourceExhausted(block.status())) return block;
    {
      absl::MutexLock lock(&mutex_);
      if (answered != answered_.size() || RoomIsDue()) {
        while (!status_.has_value() && answered == answered_.size()) answered_more_.Wait(&mutex_);
        if (status_.has_value()) return EndedStatus();
        continue;
      }
    }
    // No answer of this session makes room; those of others may.
    const absl::Time now = absl::Now();
    patience = std::min(patience, now + kStagingPatience);
    if (staged.WaitForOthers(arena, this, returned, std::min(patience, now + kLook))) continue;
    absl::MutexLock lock(&mutex_);
    if (status_.has_value()) return EndedStatus();
    if (absl::Now() >= patience || !staged.OthersHave(arena, this)) return block;
  }
}

void SessionCore::Deliver(Event event) {
  if (options_.on_event) return options_.on_event(std::move(event));
  const size_t bytes = BufferedBytes(event);
  bool dropped = false;
  stream_->AddUnread(bytes);
  {
    absl::MutexLock lock(&mutex_);
    if (status_.has_value()) {
      dropped = true;
    } else {
      events_.push_back(std::move(event));
      changed_.SignalAll();
    }
  }
  if (dropped) return stream_->RemoveUnread(bytes);
  if (options_.on_ready) options_.on_ready();
}

absl::StatusOr<Event> SessionCore::NextEvent() {
  if (options_.on_event) {
    return absl::FailedPreconditionError("PromptOptions.on_event takes the events");
  }
  std::optional<Event> event;
  {
    absl::MutexLock lock(&mutex_);
    while (events_.empty() && !done_) changed_.Wait(&mutex_);
    if (events_.empty()) {
      if (!status_->ok()) return *status_;
      if (std::exchange(summary_taken_, true)) {
        return absl::OutOfRangeError("the summary was read; nothing follows");
      }
      return Event(*summary_);
    }
    event = std::move(events_.front());
    events_.pop_front();
  }
  stream_->RemoveUnread(BufferedBytes(*event));
  return *std::move(event);
}

void SessionCore::DropEvents() {
  std::deque<Event> events;
  {
    absl::MutexLock lock(&mutex_);
    events.swap(events_);
  }
  size_t bytes = 0;
  for (const Event& event : events) bytes += BufferedBytes(event);
  stream_->RemoveUnread(bytes);
}

// The end

bool SessionCore::Settle(absl::Status status) {
  if (status_.has_value()) return false;
  status_ = std::move(status);
  changed_.SignalAll();
  answered_more_.SignalAll();
  return true;
}

void SessionCore::OnEnd(absl::Status status) {
  if (transfers()) {
    absl::MutexLock lock(&mutex_);
    if (ends_well_) return;
    ends_well_ = status.ok();
  }
  if (!transfers() || !status.ok()) return End(std::move(status));
  transfers_->Post([this] { DeliverArrived(); });
}

void SessionCore::End(absl::Status status) {
  std::optional<v1::Summary> summary;
  {
    absl::MutexLock lock(&mutex_);
    if (status.ok()) {
      absl::StatusOr<v1::Summary> finished = assembler_.Finish(sent_.bytes());
      status = finished.status();
      if (finished.ok()) summary = *std::move(finished);
    }
    status = AtReplica(stream_->origin(), status);
    if (summary.has_value() && summary->has_held()) {
      summary->mutable_held()->set_replica(stream_options().replica);
    }
    if (!Settle(std::move(status))) return;
    summary_ = summary;
  }
  if (summary.has_value() && options_.on_event) options_.on_event(Event(*std::move(summary)));
  Finish();
}

void SessionCore::Fail(const absl::Status& status) {
  {
    absl::MutexLock lock(&mutex_);
    if (!Settle(status)) return;
  }
  DropEvents();
  stream_->Abandon(index_);
  Finish();
}

void SessionCore::Finish() {
  std::map<uint32_t, Held> held;
  decltype(owners_) owners;
  decltype(leaving_) leaving;
  decltype(arriving_) arriving;
  absl::Status status;
  {
    absl::MutexLock lock(&mutex_);
    held.swap(held_);
    owners.swap(owners_);
    leaving.swap(leaving_);
    arriving.swap(arriving_);
    status = *status_;
  }
  held.clear();
  owners.clear();
  leaving.clear();
  arriving.clear();
  if (transfers_ != nullptr) transfers_->Withdraw();
  // The server may be at it still.
  if (shared_place() != nullptr && !place_.results.empty() && !status.ok()) {
    place_.retire(place_.results);
  }
  if (options_.on_end) options_.on_end(status);
  absl::MutexLock lock(&mutex_);
  done_ = true;
  changed_.SignalAll();
}

// The stream may be over a moment before it has said why.
absl::Status SessionCore::EndedStatus() {
  while (!done_) changed_.Wait(&mutex_);
  if (!status_->ok()) return *status_;
  return absl::FailedPreconditionError("the session has ended");
}

absl::StatusOr<v1::Summary> SessionCore::Wait() {
  absl::MutexLock lock(&mutex_);
  while (!done_) changed_.Wait(&mutex_);
  if (!status_->ok()) return *status_;
  return *summary_;
}

void SessionCore::Cancel() { Fail(absl::CancelledError("the session was cancelled")); }

}  // namespace structkv::client::internal
