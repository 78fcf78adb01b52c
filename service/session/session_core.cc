#include "service/session/session_core.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "service/session/shard_group.h"

namespace structkv::session {
namespace {

int64_t Micros(std::chrono::steady_clock::duration time) {
  return std::chrono::duration_cast<std::chrono::microseconds>(time).count();
}

template <typename T>
int64_t Bytes(const std::vector<T>& values) {
  return static_cast<int64_t>(values.size() * sizeof(T));
}

}  // namespace

int64_t OutputBytes(const engine::LayerOutput& output) {
  size_t bytes = output.key_scales.size() + output.value_scales.size() + output.saliency.size();
  for (const engine::Buffer* rows : {&output.keys, &output.values}) {
    if (!rows->is_lent()) bytes += rows->size();
  }
  return Bytes(output.positions) + static_cast<int64_t>(bytes);
}

int64_t OutputBytes(const engine::PivotResult& result) {
  return Bytes(result.skeleton) + Bytes(result.centrality);
}

int64_t OutputBytes(const engine::RowPull& pull) { return Bytes(pull.positions); }

SessionCore::SessionCore(std::string id, const SessionRequest& request, const SessionPlan& plan,
                         const transport::Granted& granted, Reservation reservation,
                         const SessionHost& host, std::shared_ptr<ShardGroup> group,
                         Holding holding)
    : id_(std::move(id)),
      spec_(request.spec),
      own_spec_(OwnSpec(request)),
      group_(std::move(group)),
      shard_index_(group_ == nullptr ? 0 : request.shard->shard_index),
      plan_(plan),
      layers_in_flight_(request.layers_in_flight),
      transport_kind_(granted.transport->kind()),
      transport_reason_(granted.reason),
      host_readable_(granted.transport->host_readable()),
      in_place_(granted.transport->in_place()),
      result_place_(granted.transport->result_place()),
      host_(host),
      lane_(host.scheduler->NewLane()),
      transfer_lane_(host.scheduler->NewLane()),
      peers_(granted.transport),
      transport_(granted.transport),
      reservation_(std::move(reservation)),
      allowance_(host.buffers->Allow(static_cast<size_t>(plan.reserved_bytes))),
      holding_(std::move(holding)) {
  assembler_.emplace(&own_spec_, host_.buffers, layers_in_flight_, transport_.get());
  in_group_ = group_ != nullptr;
  if (!in_group_) prompt_.emplace(spec_, host_.backend, host_.buffers);
}

SessionCore::~SessionCore() {
  Drop();
  prompt_.reset();
  transport_.reset();
  allowance_.Release();
  reservation_.Release();
  host_.registry->Remove(id_);
}

void SessionCore::Enqueue(absl::AnyInvocable<void()> event) {
  const std::shared_ptr<SessionCore> self = shared_from_this();
  queue_.Run([this, event = std::move(event)]() mutable {
    event();
    transfers_.store(receiving_ + sending_ > 0);
    turn_.store(CurrentTurn());
  });
}

Turn SessionCore::CurrentTurn() const {
  if (!assembler_.has_value()) return Turn::kNobodys;
  // The caller may wait for the rows of one layer before it sends the next.
  return sending_ > 0 ? Turn::kServers : assembler_->turn();
}

// Events. Each may find the session ended by one before it.

void SessionCore::Start(SessionCallbacks callbacks) {
  Enqueue([this, callbacks = std::move(callbacks)]() mutable {
    if (cancelled_.load()) return;
    callbacks_ = std::move(callbacks);
    if (failed_before_start_.has_value()) {
      auto failed = std::move(callbacks_.failed);
      callbacks_ = {};
      if (failed) failed(*std::move(failed_before_start_));
      return;
    }
    state_ = State::kRunning;
    started_ = Clock::now();
    StartLayer(/*may_run_here=*/true);
    AskForMessage();
  });
}

void SessionCore::Append(InputMessage message) {
  Enqueue([this, message = std::move(message)]() mutable {
    if (ended()) return;
    if (state_ == State::kCommitted) {
      DoFail(absl::InvalidArgumentError("a message came after `commit`"));
      return;
    }
    if (!asked_) {
      DoFail(absl::InternalError("a message was handed to a session that did not ask for one"));
      return;
    }
    asked_ = false;
    if (message.pieces.empty()) {
      DoFail(absl::InvalidArgumentError("pieces: there is none in the message"));
      return;
    }
    TakeMessage({std::move(message), 0});
  });
}

void SessionCore::Commit(int64_t layers, int64_t input_bytes) {
  Enqueue([this, layers, input_bytes] {
    if (ended()) return;
    if (state_ == State::kIdle) {
      DoFail(absl::InternalError("a commit was handed to a session that was not started"));
      return;
    }
    if (state_ == State::kCommitted) {
      DoFail(absl::InvalidArgumentError("`commit` came twice"));
      return;
    }
    absl::Status status = assembler_->CheckCommit(layers, input_bytes);
    if (!status.ok()) {
      DoFail(status);
      return;
    }
    state_ = State::kCommitted;
    summary_.input_bytes = input_bytes;
    GoOn();
  });
}

void SessionCore::EndOfInput() {
  Enqueue([this] {
    if (ended() || state_ == State::kCommitted) return;
    DoFail(absl::InvalidArgumentError(absl::StrCat(
        "the stream ended before `commit`; ", assembler_->received_layers(), " of ",
        spec_.geometry.layers, " layers and ", assembler_->received_bytes(), " bytes came")));
  });
}

void SessionCore::OutputSent(int64_t bytes) {
  Enqueue([this, bytes] {
    unsent_bytes_ -= std::min(bytes, unsent_bytes_);
    if (ended()) {
      ReleaseIfFree();
    } else {
      GoOn();
    }
  });
}

void SessionCore::Fail(absl::Status status, bool replaced) {
  Enqueue([this, status = std::move(status), replaced] {
    if (ended()) return;
    replaced_ = replaced;
    DoFail(status);
  });
}

void SessionCore::Cancel(absl::Status reason) {
  cancelled_.store(true);
  stopped_.store(true);
  Enqueue([this, reason = std::move(reason)] {
    if (!ended()) {
      state_ = State::kFailed;
      Drop();
      host_.registry->ForgetKey(id_);
      LeaveGroup(reason);
    }
    callbacks_ = {};
    unsent_bytes_ = 0;
    ReleaseIfFree();
  });
}

// The group

void SessionCore::CheckPeers(absl::Duration group_limit) {
  // Not as an event: what waits for the queue must not become the caller's to do.
  if (const auto transport = peers_.lock(); transport != nullptr) {
    if (absl::Status there = transport->Check(); !there.ok()) Fail(std::move(there));
  }
  if (group_ != nullptr) group_->CheckWait(group_limit);
}

void SessionCore::TakeGroupAnswer(Answer answer) {
  Enqueue([this, answer = std::move(answer)]() mutable {
    told_room_ = false;
    OnAnswer(std::move(answer));
  });
}

void SessionCore::TellGroupFailure(LayerTiming timing) {
  Enqueue([this, timing = std::move(timing)] {
    if (!ended()) TellComputed(timing);
  });
}

void SessionCore::GroupHasFinished() {
  Enqueue([this] {
    in_group_ = false;
    if (ended()) {
      ReleaseIfFree();
    } else {
      Finish();
    }
  });
}

void SessionCore::GroupIsOver() {
  Enqueue([this] {
    in_group_ = false;
    if (ended()) ReleaseIfFree();
  });
}

// Hands over what is complete, and says when an answer is welcome.
void SessionCore::OfferLayers() {
  while (std::optional<engine::LayerInput> input = assembler_->PopComplete()) {
    group_->Offer(shard_index_, *std::move(input));
  }
  if (told_room_ || output_full()) return;
  told_room_ = true;
  group_->HasRoom(shard_index_);
}

void SessionCore::LeaveGroup(const absl::Status& reason) {
  if (!in_group_ || (replaced_ && group_->Release(this))) return;
  group_->Left(this, reason);
}

// Input

void SessionCore::TakeMessage(Parked parked) {
  std::vector<InputPiece>& pieces = parked.message.pieces;
  for (; parked.next < pieces.size(); ++parked.next) {
    const absl::StatusOr<LayerAssembler::Taken> taken =
        assembler_->Take(pieces[parked.next], stopped_);
    if (!taken.ok()) {
      parked.message = {};
      DoFail(taken.status());
      return;
    }
    if (*taken == LayerAssembler::Taken::kStopped) return;
    // A layer that this piece completed is computed while the next ones are copied.
    ReceiveLayers();
    StartLayer(/*may_run_here=*/true);
    AnswerPulled();
    if (ended()) return;
    if (*taken == LayerAssembler::Taken::kNoBuffer) {
      parked_ = std::move(parked);
      return;
    }
  }
  parked.message = {};  // its memory goes before the next message comes
  AskForMessage();
}

void SessionCore::AskForMessage() {
  owes_ready_ = true;
  if (output_full() || state_ != State::kRunning) return;
  owes_ready_ = false;
  asked_ = true;
  ready_due_ = true;
  Enqueue([this] { TellReady(); });  // the answer of a layer that was computed here goes first
}

void SessionCore::TellReady() {
  if (!std::exchange(ready_due_, false)) return;
  if (callbacks_.ready && !cancelled_.load()) callbacks_.ready();
}

// Transfers

transport::Transfers::Done SessionCore::OnTransfer(
    absl::AnyInvocable<void(const absl::Status&)> event) {
  return [self = shared_from_this(), event = std::move(event)](const absl::Status& status) mutable {
    engine::Scheduler& scheduler = *self->host_.scheduler;
    const std::shared_ptr<engine::Scheduler::Lane> lane = self->transfer_lane_;
    scheduler.Post(lane, /*small=*/true,
                   [self = std::move(self), event = std::move(event), status](ParallelFor) mutable {
                     self->Enqueue([event = std::move(event),
                                    status = std::move(status)]() mutable { event(status); });
                   });
  };
}

void SessionCore::ReceiveLayers() {
  while (const std::optional<LayerAssembler::Incoming> next = assembler_->PopIncoming()) {
    ++receiving_;
    transport_->transfers()->Receive(
        next->key, *next->input,
        OnTransfer([this, layer = next->input->layer](const absl::Status& status) {
          OnReceived(layer, status);
        }));
  }
}

void SessionCore::OnReceived(int64_t layer, const absl::Status& status) {
  --receiving_;
  if (ended()) return;
  if (!status.ok()) {
    DoFail(status);
    return;
  }
  assembler_->Arrived(layer);
  GoOn();
}

void SessionCore::SendRows(const engine::LayerOutput& output) {
  if (transport_->transfers() == nullptr || !output.keys.is_lent()) return;
  ++sending_;
  transport_->transfers()->Send(
      output, OnTransfer([this](const absl::Status& status) { OnRowsSent(status); }));
}

void SessionCore::OnRowsSent(const absl::Status& status) {
  --sending_;
  if (ended()) return;
  if (!status.ok()) {
    DoFail(status);
    return;
  }
  GoOn();
}

// Layers

void SessionCore::StartLayer(bool may_run_here) {
  if (group_ != nullptr) {
    OfferLayers();
    return;
  }
  if (output_full() || !assembler_->has_complete()) return;
  if (layer_runs_) {
    StageNext();
    return;
  }
  {
    const std::lock_guard lock(next_mutex_);
    next_ = assembler_->PopComplete();
  }
  layer_runs_ = true;
  engine::Scheduler::Job job = [self = shared_from_this(), posted = Clock::now()](
                                   ParallelFor parallel) { self->ComputeLayer(posted, parallel); };
  const bool small = plan_.layer_size == LayerSize::kSmall;
  if (may_run_here && IsForReader() && host_.scheduler->TryRunHere(lane_, small, job)) return;
  host_.scheduler->Post(lane_, small, std::move(job));
  StageNext();
}

void SessionCore::StageNext() {
  engine::LayerInput* const next = assembler_->NextComplete();
  if (next == nullptr || next->layer == staged_layer_) return;
  staged_layer_ = next->layer;
  prompt_->Stage(next);
}

bool SessionCore::IsForReader() const {
  // It must not wait for a GPU's event.
  if (!host_readable_) return false;
  // Tensors that come in messages are better taken in meanwhile.
  return plan_.layer_size == LayerSize::kSmall ||
         (plan_.layer_size == LayerSize::kMedium && in_place_);
}

void SessionCore::ComputeLayer(Clock::time_point posted, ParallelFor parallel) {
  std::optional<engine::LayerInput> input;
  {
    const std::lock_guard lock(next_mutex_);
    input.swap(next_);
  }
  if (!input.has_value()) return;  // the session ended
  const absl::Status ready = transport_->Await();
  const Clock::time_point begin = Clock::now();
  const int64_t layer = input->layer;
  Answer answer = {.output = absl::InternalError("a layer was not computed")};
  if (ready.ok()) {
    answer.output = prompt_->CompressLayer(*std::move(input), parallel);
  } else {
    answer.output = ready;
  }
  input.reset();
  if (answer.output.ok()) answer.pivot = prompt_->TakePivot();
  if (answer.pivot.has_value()) answer.skeleton = prompt_->skeleton();
  answer.timing = {.layer = layer,
                   .begun = begin,
                   .queued = absl::FromChrono(begin - posted),
                   .computed = absl::FromChrono(Clock::now() - begin),
                   .stages = prompt_->stages()};
  Enqueue([this, answer = std::move(answer)]() mutable { OnAnswer(std::move(answer)); });
}

void SessionCore::OnAnswer(Answer answer) {
  layer_runs_ = false;
  if (ended()) {
    answer = {.output = absl::CancelledError()};  // its buffers go before the reservation
    ReleaseIfFree();
    return;
  }
  absl::Status status = transport_->Check();  // of memory that is gone zeros were read
  status.Update(answer.output.status());
  if (!status.ok()) {
    answer.timing.status = status;
    TellComputed(answer.timing);
    DoFail(status);
    return;
  }
  if (answer.skeleton != nullptr) assembler_->SetSkeleton(std::move(answer.skeleton));
  queued_ += answer.timing.queued;
  computed_ += answer.timing.computed;
  if (answer.pivot.has_value()) unsent_bytes_ += OutputBytes(*answer.pivot);
  std::optional<engine::RowPull> pull;
  if (pulls()) {
    pull = WaitForRows(*std::move(answer.output));
  } else {
    TakeAnswer(&*answer.output);
    SendRows(*answer.output);
  }
  // The next layer is computed while this one is handed out.
  StartLayer(/*may_run_here=*/false);
  TellComputed(answer.timing);
  if (answer.pivot.has_value() && callbacks_.pivot && !cancelled_.load()) {
    callbacks_.pivot(*std::move(answer.pivot));
  }
  if (pull.has_value()) {
    if (callbacks_.pull && !cancelled_.load()) callbacks_.pull(*std::move(pull));
  } else if (callbacks_.layer && !cancelled_.load()) {
    callbacks_.layer(*std::move(answer.output));
  }
  GoOn();
}

void SessionCore::TellComputed(const LayerTiming& timing) {
  if (callbacks_.computed && shard_index_ == 0 && !cancelled_.load()) callbacks_.computed(timing);
}

engine::RowPull SessionCore::WaitForRows(engine::LayerOutput output) {
  engine::RowPull pull = {.layer = output.layer,
                          .kept_tokens = output.kept_tokens,
                          .keys = spec_.pulls(engine::InputTensor::kKeys),
                          .positions = output.positions};
  unsent_bytes_ += OutputBytes(pull);
  assembler_->ExpectRows(output.layer, output.kept_tokens);
  wait_for_rows_.emplace(pull.layer, std::move(output));
  return pull;
}

void SessionCore::TakeAnswer(engine::LayerOutput* output) {
  assembler_->LayerDone();
  ++summary_.layers;
  if (holding_.cache != nullptr) *output = HoldRows(std::move(*output), holding_.cache.get());
  unsent_bytes_ += OutputBytes(*output);
}

void SessionCore::AnswerPulled() {
  while (assembler_->has_rows() && !output_full()) {
    engine::LayerInput rows = *assembler_->PopRows();
    const auto waiting = wait_for_rows_.find(rows.layer);
    engine::LayerOutput output = std::move(waiting->second);
    wait_for_rows_.erase(waiting);
    absl::Status taken = engine::TakeRows(own_spec_, *host_.buffers, std::move(rows), &output);
    if (!taken.ok()) taken = absl::InternalError(taken.message());
    taken.Update(transport_->Check());
    if (!taken.ok()) {
      DoFail(taken);
      return;
    }
    TakeAnswer(&output);
    if (callbacks_.layer && !cancelled_.load()) callbacks_.layer(std::move(output));
  }
}

// Does what has become possible.
void SessionCore::GoOn() {
  AnswerPulled();
  if (ended()) return;
  StartLayer(/*may_run_here=*/false);
  if (parked_.has_value()) {
    Parked parked = *std::move(parked_);
    parked_.reset();
    TakeMessage(std::move(parked));
  } else if (owes_ready_) {
    AskForMessage();
  }
  if (state_ != State::kCommitted || summary_.layers < spec_.geometry.layers) return;
  if (sending_ > 0) return;
  if (group_ == nullptr) {
    Finish();
  } else if (!told_done_) {
    told_done_ = true;
    group_->Done(shard_index_);
  }
}

// The end

void SessionCore::Finish() {
  state_ = State::kFinished;
  stopped_.store(true);
  if (prompt_.has_value()) {
    if (const std::optional<int64_t> pivot = prompt_->ExactPivot()) {
      host_.pivot_profile->Record(spec_, *pivot);
    }
  }
  if (holding_.cache != nullptr && !cancelled_.load()) {
    HeldTicket& ticket = summary_.held.emplace();
    ticket.size_bytes = holding_.cache->size_bytes;
    ticket.lease = holding_.lease;
    ticket.handle =
        host_.held_caches->Publish(std::move(holding_.cache), holding_.tenant, holding_.lease);
  }
  Drop();
  host_.registry->ForgetKey(id_);
  summary_.queue_micros = absl::ToInt64Microseconds(queued_);
  summary_.compute_micros = absl::ToInt64Microseconds(computed_);
  summary_.session_micros = Micros(Clock::now() - started_);
  auto finished = std::move(callbacks_.finished);
  callbacks_ = {};
  ReleaseIfFree();
  if (finished && !cancelled_.load()) {
    finished(summary_);
  } else if (summary_.held.has_value()) {
    // Nobody will learn the handle. It may have expired.
    host_.held_caches->Release(summary_.held->handle, holding_.tenant).IgnoreError();
  }
}

void SessionCore::DoFail(const absl::Status& status) {
  TellReady();
  const bool started = state_ != State::kIdle;
  state_ = State::kFailed;
  stopped_.store(true);
  Drop();
  host_.registry->ForgetKey(id_);
  auto failed = std::move(callbacks_.failed);
  callbacks_ = {};
  unsent_bytes_ = 0;
  LeaveGroup(status);
  ReleaseIfFree();
  if (!started) {
    failed_before_start_ = status;
  } else if (failed && !cancelled_.load()) {
    failed(status);
  }
}

// Frees all memory but a running layer's.
void SessionCore::Drop() {
  parked_.reset();
  wait_for_rows_.clear();
  assembler_.reset();
  holding_.cache.reset();
  std::optional<engine::LayerInput> waiting;
  {
    const std::lock_guard lock(next_mutex_);
    waiting.swap(next_);
  }
  if (waiting.has_value()) layer_runs_ = false;  // its turn will find nothing to do
}

// After the end, gives the reservation back once the memory is free: no layer runs, and after a
// success all results were sent.
void SessionCore::ReleaseIfFree() {
  if (layer_runs_ || in_group_) return;
  prompt_.reset();
  if (unsent_bytes_ > 0) return;
  transport_.reset();
  allowance_.Release();
  reservation_.Release();
  host_.registry->Remove(id_);
}

}  // namespace structkv::session
