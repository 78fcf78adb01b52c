#include "service/rpc/compress_reactor.h"

#include <algorithm>
#include <chrono>
#include <limits>
#include <utility>
#include <variant>

#include "absl/strings/str_cat.h"
#include "grpcpp/server_context.h"
#include "service/method/method_spec.h"
#include "service/rpc/method_codec.h"
#include "service/rpc/shard_agreement.h"
#include "service/rpc/status_mapping.h"
#include "service/session/limit.h"

namespace structkv::rpc {
namespace {

absl::Status OutOfOrder(absl::string_view came, absl::string_view due) {
  return absl::InvalidArgumentError(absl::StrCat("message `", came, "` came ", due));
}

uint32_t PromptOf(const wire::Request& request) {
  if (const auto* pieces = std::get_if<wire::Pieces>(&request)) return pieces->prompt;
  return std::get<v1::CompressRequest>(request).prompt();
}

absl::string_view MessageName(const wire::Request& request) {
  if (std::holds_alternative<wire::Pieces>(request)) return "pieces";
  switch (std::get<v1::CompressRequest>(request).message_case()) {
    case v1::CompressRequest::kOpen:
      return "open";
    case v1::CompressRequest::kPieces:
      return "pieces";
    case v1::CompressRequest::kCommit:
      return "commit";
    case v1::CompressRequest::MESSAGE_NOT_SET:
      break;
  }
  return "(none of open, pieces, commit)";
}

// Adds the pieces' sizes to `bytes`; those of ranges and transfers are what the caller says.
absl::StatusOr<session::InputMessage> ToInput(wire::Pieces pieces, uint64_t* bytes) {
  if (pieces.pieces.empty()) {
    return absl::InvalidArgumentError("pieces.pieces has 0 entries; at least 1 is allowed");
  }
  session::InputMessage message;
  message.pieces.reserve(pieces.pieces.size());
  for (wire::Piece& piece : pieces.pieces) {
    const std::optional<engine::InputTensor> tensor = DecodeTensor(piece.tensor);
    if (!tensor.has_value()) {
      return absl::InvalidArgumentError(
          absl::StrCat("pieces.tensor is ", EnumText(static_cast<v1::Tensor>(piece.tensor)),
                       " for layer ", piece.layer,
                       "; allowed: TENSOR_KEYS, TENSOR_VALUES, TENSOR_WINDOW_QUERIES, "
                       "TENSOR_WINDOW_LSE, TENSOR_SALIENCY, TENSOR_POSITIONS"));
    }
    constexpr uint64_t kMaxOffset = std::numeric_limits<int64_t>::max();
    if (piece.offset_bytes > kMaxOffset) {
      return absl::InvalidArgumentError(absl::StrCat(
          "layer ", piece.layer, ", ", std::string(engine::InputTensorName(*tensor)),
          ": pieces.offset_bytes is ", piece.offset_bytes, "; it lies outside of every tensor"));
    }
    *bytes += piece.size_bytes();
    session::InputPiece& taken = message.pieces.emplace_back();
    taken.layer = piece.layer;
    taken.tensor = *tensor;
    taken.offset_bytes = static_cast<int64_t>(piece.offset_bytes);
    taken.xxh3_64 = piece.xxh3_64;
    taken.data = std::move(piece.data);
    if (piece.range.has_value()) {
      taken.range = {piece.range->region, piece.range->offset_bytes, piece.range->size_bytes};
    }
    if (piece.transfer.has_value()) {
      taken.transfer = {std::move(piece.transfer->key), piece.transfer->size_bytes};
    }
  }
  message.owner = std::make_shared<std::vector<grpc::Slice>>(std::move(pieces.slices));
  return message;
}

std::string Seconds(absl::Duration duration) { return absl::FormatDuration(duration); }

}  // namespace

CompressReactor* CompressReactor::Start(const StreamShared* shared, PeerStreams::Place place,
                                        grpc::CallbackServerContext* context) {
  auto reactor = std::make_shared<CompressReactor>(shared, std::move(place), context);
  reactor->HoldSelf();
  shared->streams->Add(reactor);
  if (const absl::Status known = reactor->Know(); known.ok()) {
    reactor->WantMessage();
  } else {
    reactor->End(known);
  }
  return reactor.get();
}

absl::Status CompressReactor::Know() {
  absl::StatusOr<std::string> tenant = shared_->identity->TenantOf(*context());
  if (!tenant.ok()) return tenant.status();
  tenant_ = *std::move(tenant);
  absl::StatusOr<CallLabels> labels = ReadCallLabels(*context(), shared_->trace_ratio);
  if (!labels.ok()) return labels.status();
  labels_ = *std::move(labels);
  return absl::OkStatus();
}

CompressReactor::CompressReactor(const StreamShared* shared, PeerStreams::Place place,
                                 grpc::CallbackServerContext* context)
    : StreamIo(context), shared_(shared), place_(std::move(place)), begun_(SteadyNanos()) {}

std::shared_ptr<session::Session> CompressReactor::session(const Slot& slot) const {
  absl::MutexLock lock(&session_mutex_);
  return slot.session;
}

std::vector<std::shared_ptr<session::Session>> CompressReactor::AllSessions() const {
  std::vector<std::shared_ptr<session::Session>> sessions;
  absl::MutexLock lock(&session_mutex_);
  for (const auto& slot : slots_) {
    if (slot->session != nullptr) sessions.push_back(slot->session);
  }
  return sessions;
}

int64_t CompressReactor::UnansweredPulls() const {
  int64_t unanswered = 0;
  absl::MutexLock lock(&session_mutex_);
  for (const auto& slot : slots_) {
    unanswered += std::max<int64_t>(0, slot->pulls.load() - slot->layers.load());
  }
  return unanswered;
}

bool CompressReactor::OwesAnswer(const std::vector<std::shared_ptr<session::Session>>& sessions) {
  const auto any = [&sessions](session::Turn turn) {
    return std::any_of(sessions.begin(), sessions.end(),
                       [turn](const auto& each) { return each->turn() == turn; });
  };
  return any(session::Turn::kServers) && !any(session::Turn::kCallers);
}

absl::Status CompressReactor::Begin(const v1::Open& open) {
  const uint32_t count = std::max(1U, open.batch_prompt_count());
  if (count > kMaxBatchPrompts) {
    return absl::InvalidArgumentError(absl::StrCat("open.batch_prompt_count is ", count, "; 1 to ",
                                                   kMaxBatchPrompts, " are allowed"));
  }
  absl::MutexLock lock(&session_mutex_);
  for (uint32_t i = 0; i < count; ++i) slots_.push_back(std::make_unique<Slot>(i));
  unfinished_ = count;
  return absl::OkStatus();
}

void CompressReactor::OnMessage(const grpc::ByteBuffer& message) {
  absl::StatusOr<wire::Request> request = wire::DecodeRequest(message);
  if (!request.ok()) {
    End(request.status());
    return;
  }
  auto* pieces = std::get_if<wire::Pieces>(&*request);
  const auto* other = std::get_if<v1::CompressRequest>(&*request);
  const uint32_t prompt = PromptOf(*request);
  const bool opens = other != nullptr && other->has_open();
  if (slots_.empty()) {
    absl::Status begun =
        opens ? Begin(other->open()) : OutOfOrder(MessageName(*request), "first; `open` is due");
    if (!begun.ok()) {
      End(begun);
      return;
    }
  }
  if (prompt >= slots_.size()) {
    End(absl::InvalidArgumentError(absl::StrCat("prompt is ", prompt, "; the stream carries ",
                                                slots_.size(), " (open.batch_prompt_count)")));
    return;
  }
  Slot& slot = *slots_[prompt];
  slot.taking = true;
  if (slot.failed) {  // the caller may not know yet
    ReadOn(slot);
    return;
  }
  const std::string of_prompt = is_batch() ? absl::StrCat(" of prompt ", prompt) : "";
  switch (slot.phase) {
    case Phase::kOpen:
      if (opens) {
        TakeOpen(slot, other->open());
      } else {
        End(OutOfOrder(MessageName(*request), absl::StrCat("first", of_prompt, "; `open` is due")));
      }
      return;
    case Phase::kPieces:
      if (pieces != nullptr) {
        TakePieces(slot, std::move(*pieces));
      } else if (other->has_commit()) {
        TakeCommit(slot, other->commit());
      } else {
        End(OutOfOrder(MessageName(*request),
                       absl::StrCat("after `open`", of_prompt, "; `pieces` or `commit` is due")));
      }
      return;
    case Phase::kNothing:
      End(OutOfOrder(MessageName(*request),
                     absl::StrCat("after `commit`", of_prompt, "; nothing is due")));
      return;
  }
}

void CompressReactor::ReadOn(Slot& slot) {
  if (slot.taking.exchange(false)) WantMessage();
}

void CompressReactor::TakeOpen(Slot& slot, const v1::Open& open) {
  if (open.batch_prompt_count() != 0 && open.batch_prompt_count() != slots_.size()) {
    End(absl::InvalidArgumentError(
        absl::StrCat("open.batch_prompt_count is ", open.batch_prompt_count(), " of prompt ",
                     slot.index, "; the stream's first `open` said ", slots_.size())));
    return;
  }
  slot.phase = Phase::kPieces;
  if (labels_.span != nullptr) slot.timeline = std::make_shared<PromptTimeline>();
  absl::StatusOr<OpenRequest> request = DecodeOpen(open, shared_->limits.Get().max_message_bytes);
  if (!request.ok()) {
    Fail(slot, request.status());
    return;
  }
  request->transport.tenant = tenant_;
  if (!request->transport.wishes.empty()) {
    slot.wished_transport = transport::KindName(request->transport.wishes[0]);
  }
  session::SessionRequest wanted = {.spec = request->spec,
                                    .layers_in_flight = request->layers_in_flight,
                                    .idempotency_key = request->idempotency_key,
                                    .max_message_bytes = shared_->limits.Get().max_message_bytes,
                                    .shard = request->shard,
                                    .transport = request->transport};
  if (wanted.shard.has_value()) wanted.agreed = AgreedFields(open, *request);
  if (request->hold) wanted.hold = {tenant_, request->lease_millis};
  absl::StatusOr<std::shared_ptr<session::Session>> opened = shared_->sessions->Open(wanted);
  if (!opened.ok()) {
    slot.refused_by = session::LimitOf(opened.status());
    Fail(slot, opened.status(), /*at_open=*/true);
    return;
  }
  slot.max_response_bytes = request->max_response_message_bytes;
  slot.place = (*opened)->result_place();
  if (shared_->observer != nullptr) {
    slot.picture = std::make_shared<PromptPicture>((*opened)->spec().prompt_tokens);
  }
  bool ended = false;
  {
    absl::MutexLock lock(&session_mutex_);
    ended = ended_;
    if (!ended) slot.session = *opened;
  }
  if (ended) {
    (*opened)->Cancel();
    return;
  }
  SendOpened(slot, **opened);
  (*opened)->Start(Callbacks(slot, **opened));
}

void CompressReactor::SendOpened(Slot& slot, const session::Session& session) {
  const engine::PromptSpec& spec = session.spec();
  v1::CompressResponse response;
  response.set_prompt(slot.index);
  v1::Opened* opened = response.mutable_opened();
  *opened = EncodeOpened(spec);
  opened->set_session_id(session.id());
  opened->set_reserved_bytes(static_cast<uint64_t>(session.reserved_bytes()));
  opened->set_layers_in_flight(static_cast<uint32_t>(session.layers_in_flight()));
  opened->set_max_request_message_bytes(
      static_cast<uint64_t>(shared_->limits.Get().max_message_bytes));
  opened->set_backend(std::string(shared_->sessions->backend().name()));
  opened->set_transport(EncodeTransport(session.transport()));
  opened->set_transport_reason(session.transport_reason());

  slot.summary.set_transport(std::string(transport::KindName(session.transport())));
  slot.summary.set_logical_length(static_cast<uint32_t>(spec.prompt_tokens));
  slot.summary.set_kv_length(static_cast<uint32_t>(spec.largest_kept_tokens()));
  slot.summary.set_fingerprint(opened->fingerprint());
  slot.summary.set_backend(opened->backend());
  slot.summary.set_next_position(static_cast<uint32_t>(spec.next_position()));
  slot.summary.set_kv_blocks(static_cast<uint32_t>(spec.kv_blocks()));
  slot.summary.set_values_in_keys(spec.geometry.values_in_keys);

  std::vector<OutgoingMessage> messages;
  messages.push_back({.bytes = wire::Encode(response), .prompt = slot.index});
  Send(std::move(messages));
}

// The callbacks hold no share of this object: the sessions are held by it. A slot lives as long.
session::SessionCallbacks CompressReactor::Callbacks(Slot& slot, const session::Session& session) {
  const auto weak =
      std::weak_ptr<CompressReactor>(std::static_pointer_cast<CompressReactor>(shared_from_this()));
  session::SessionCallbacks callbacks;
  callbacks.ready = [weak, &slot] {
    if (auto self = weak.lock()) self->ReadOn(slot);
  };
  if (shared_->observer != nullptr) {
    callbacks.computed = [observer = shared_->observer, timeline = slot.timeline,
                          method = method::MethodName(session.spec().method.method)](
                             const session::LayerTiming& timing) {
      if (timeline != nullptr) timeline->Add(timing);
      observer->OnLayer(method, timing);
    };
  }
  callbacks.layer = [weak, &slot](engine::LayerOutput output) {
    auto self = weak.lock();
    if (self == nullptr) return;
    slot.layers.fetch_add(1, std::memory_order_relaxed);
    if (slot.picture != nullptr) slot.picture->Add(output);
    self->Queue(slot,
                BuildLayer(std::move(output), slot.max_response_bytes, slot.index, slot.place));
  };
  callbacks.pivot = [weak, &slot](engine::PivotResult result) {
    auto self = weak.lock();
    if (self == nullptr) return;
    if (slot.picture != nullptr) slot.picture->Add(result);
    self->Queue(slot, BuildPivot(std::move(result), slot.max_response_bytes, slot.index));
  };
  callbacks.pull = [weak, &slot](engine::RowPull pull) {
    auto self = weak.lock();
    if (self == nullptr) return;
    slot.pulls.fetch_add(1, std::memory_order_relaxed);
    self->Queue(slot, BuildPull(std::move(pull), slot.max_response_bytes, slot.index));
  };
  callbacks.finished = [weak, &slot](const session::SessionSummary& summary) {
    if (auto self = weak.lock()) self->SendSummary(slot, summary);
  };
  callbacks.failed = [weak, &slot](const absl::Status& status) {
    if (auto self = weak.lock()) self->Fail(slot, status);
  };
  return callbacks;
}

void CompressReactor::Queue(Slot& slot, std::vector<OutgoingMessage> messages) {
  int64_t bytes = 0;
  for (const OutgoingMessage& message : messages) {
    bytes += message.tensor_bytes + message.elsewhere_bytes;
  }
  slot.output_bytes.fetch_add(bytes, std::memory_order_relaxed);
  owed_until_.store(SteadyNanos());
  Send(std::move(messages));
}

void CompressReactor::Fail(Slot& slot, const absl::Status& status, bool at_open) {
  if (slot.timeline != nullptr) slot.timeline->End();
  const bool try_again = at_open && absl::IsResourceExhausted(status);
  const int64_t pushback = RetryPushbackMillis(status, shared_->limits.Get().retry_pushback);
  if (!is_batch()) {
    if (try_again) context()->AddTrailingMetadata(kRetryPushbackKey, std::to_string(pushback));
    End(status);
    return;
  }
  {
    absl::MutexLock lock(&session_mutex_);
    slot.status = status;
    slot.failed = true;
  }
  Drop(slot.index);
  const grpc::Status encoded = ToGrpc(status);
  v1::CompressResponse response;
  response.set_prompt(slot.index);
  response.mutable_failed()->set_code(static_cast<uint32_t>(encoded.error_code()));
  response.mutable_failed()->set_message(encoded.error_message());
  if (try_again && pushback >= 0) {
    response.mutable_failed()->set_retry_after_millis(static_cast<uint64_t>(pushback));
  }
  SendTerminal(response);
  ReadOn(slot);
}

// Of a batch the session says so, in turn with its answers.
void CompressReactor::Refuse(Slot& slot, const absl::Status& status) {
  if (!is_batch()) {
    End(status);
  } else if (auto running = session(slot)) {
    running->Fail(status);
  }
}

void CompressReactor::SendSummary(Slot& slot, const session::SessionSummary& summary) {
  v1::CompressResponse response;
  response.set_prompt(slot.index);
  v1::Summary* encoded = response.mutable_summary();
  *encoded = slot.summary;
  encoded->set_layer_count(static_cast<uint32_t>(summary.layers));
  encoded->set_input_bytes(static_cast<uint64_t>(summary.input_bytes));
  encoded->set_output_bytes(static_cast<uint64_t>(slot.output_bytes.load()));
  encoded->mutable_timing()->set_session_micros(static_cast<uint64_t>(summary.session_micros));
  encoded->mutable_timing()->set_queue_micros(static_cast<uint64_t>(summary.queue_micros));
  encoded->mutable_timing()->set_compute_micros(static_cast<uint64_t>(summary.compute_micros));
  if (summary.held.has_value()) {
    v1::HeldCache* held = encoded->mutable_held();
    held->set_handle(summary.held->handle);
    held->set_size_bytes(static_cast<uint64_t>(summary.held->size_bytes));
    held->set_lease_millis(static_cast<uint64_t>(absl::ToInt64Milliseconds(summary.held->lease)));
    absl::MutexLock lock(&session_mutex_);
    slot.held = summary.held->handle;
  }
  if (slot.timeline != nullptr) slot.timeline->End();
  SendTerminal(response);
  if (summary.held.has_value() && IsGone()) ReleaseHeld();
}

void CompressReactor::SendTerminal(const v1::CompressResponse& response) {
  const uint32_t prompt = response.prompt();
  const grpc::ByteBuffer bytes = wire::Encode(response);
  bool at_once = true;
  {
    absl::MutexLock lock(&session_mutex_);
    at_once = --unfinished_ > 0 || response.has_failed();
    if (at_once) {
      ++sending_;  // the end must not overtake it
    } else {
      last_ = bytes;
    }
  }
  if (at_once) {
    std::vector<OutgoingMessage> messages;
    messages.push_back({.bytes = bytes, .prompt = prompt, .ends_prompt = true});
    Send(std::move(messages));
    absl::MutexLock lock(&session_mutex_);
    --sending_;
  }
  EndIfDue();
}

void CompressReactor::EndIfDue() {
  std::optional<grpc::ByteBuffer> last;
  {
    absl::MutexLock lock(&session_mutex_);
    if (unfinished_ > 0 || !half_closed_ || sending_ > 0 || over_) return;
    over_ = true;
    last.swap(last_);
  }
  if (last.has_value()) {
    SendLast(*last);
  } else {
    SendNoMore();
  }
}

void CompressReactor::TakePieces(Slot& slot, wire::Pieces pieces) {
  uint64_t bytes = 0;
  absl::StatusOr<session::InputMessage> message = ToInput(std::move(pieces), &bytes);
  if (!message.ok()) {
    Refuse(slot, message.status());
    return;
  }
  slot.input_bytes.fetch_add(static_cast<int64_t>(bytes), std::memory_order_relaxed);
  if (auto running = session(slot)) running->Append(*std::move(message));
}

void CompressReactor::TakeCommit(Slot& slot, const v1::Commit& commit) {
  constexpr uint64_t kMaxBytes = std::numeric_limits<int64_t>::max();
  if (commit.input_bytes() > kMaxBytes) {
    Refuse(slot, absl::InvalidArgumentError(absl::StrCat(
                     "commit.input_bytes is ", commit.input_bytes(), "; that many never came")));
    return;
  }
  slot.phase = Phase::kNothing;
  if (auto running = session(slot)) {
    running->Commit(commit.layer_count(), static_cast<int64_t>(commit.input_bytes()));
  }
  // Reads on for other prompts and the half-close, and to notice what should not come; the session
  // must have the commit before it.
  ReadOn(slot);
}

void CompressReactor::OnEndOfInput(bool cancelled) {
  if (cancelled) {
    OnBroken();
    return;
  }
  if (slots_.empty()) {
    End(absl::InvalidArgumentError("the stream ended before `open`"));
    return;
  }
  for (const auto& slot : slots_) {
    if (slot->phase != Phase::kOpen) continue;
    End(absl::InvalidArgumentError(absl::StrCat("the stream ended before `open` of prompt ",
                                                slot->index, " of ", slots_.size())));
    return;
  }
  {
    absl::MutexLock lock(&session_mutex_);
    half_closed_ = true;
  }
  for (const auto& slot : slots_) {
    if (slot->failed) continue;
    if (auto running = session(*slot)) running->EndOfInput();
  }
  EndIfDue();
}

void CompressReactor::OnSent(uint32_t prompt, int64_t tensor_bytes, bool ends_prompt) {
  if (ends_prompt) {
    absl::MutexLock lock(&session_mutex_);
    slots_[prompt]->told = true;
  }
  if (tensor_bytes == 0) return;
  if (auto running = session(*slots_[prompt])) running->OutputSent(tensor_bytes);
}

void CompressReactor::OnBroken() {
  if (std::chrono::system_clock::now() >= context()->deadline()) {
    End(absl::DeadlineExceededError("the caller's deadline passed"));
  } else {
    End(absl::CancelledError("the caller is gone or cancelled"));
  }
}

void CompressReactor::End(const absl::Status& status) {
  std::vector<std::shared_ptr<session::Session>> running;
  {
    absl::MutexLock lock(&session_mutex_);
    ended_ = true;
    for (const auto& slot : slots_) {
      if (slot->session != nullptr) running.push_back(slot->session);
    }
  }
  for (const auto& each : running) each->Cancel(status);
  EndWith(ToGrpc(status));
}

void CompressReactor::CheckLimits(int64_t now) {
  const StreamLimits limits = shared_->limits.Get();
  const auto over = [now](int64_t since, absl::Duration limit) {
    return since != 0 && now - since > absl::ToInt64Nanoseconds(limit);
  };
  const std::vector<std::shared_ptr<session::Session>> sessions = AllSessions();
  if (OwesAnswer(sessions)) owed_until_.store(now);
  if (over(writing_since(), limits.stall)) {
    End(absl::AbortedError(absl::StrCat(
        "the caller took no results for longer than the stall limit of ", Seconds(limits.stall))));
  } else if (const int64_t reading = reading_since();
             over(reading == 0 ? 0 : std::max(reading, owed_until_.load()), limits.silence)) {
    const int64_t unanswered = UnansweredPulls();
    End(absl::DeadlineExceededError(absl::StrCat(
        "no message came for longer than the silence limit of ", Seconds(limits.silence),
        unanswered > 0 ? absl::StrCat("; the rows of ", unanswered, " layers were asked for")
                       : "")));
  } else if (over(begun_, limits.session)) {
    End(absl::DeadlineExceededError(
        absl::StrCat("the stream took longer than the limit of ", Seconds(limits.session))));
  } else {
    for (const auto& running : sessions) running->CheckPeers(limits.shard_group);
  }
}

PromptReport CompressReactor::ReportOf(const Slot* slot, const session::Session* session) const {
  PromptReport report;
  report.micros = (SteadyNanos() - begun_) / 1000;
  report.call = labels_;
  if (slot == nullptr) return report;
  report.timeline = slot->timeline;
  report.wished_transport = slot->wished_transport;
  report.refused_by = slot->refused_by;
  report.answered = slot->layers.load();
  report.input_bytes = slot->input_bytes.load();
  report.output_bytes = slot->output_bytes.load();
  if (session == nullptr) return report;
  const engine::PromptSpec& spec = session->spec();
  report.id = session->id();
  report.method = method::MethodName(spec.method.method);
  report.transport = transport::KindName(session->transport());
  report.prompt_tokens = spec.prompt_tokens;
  report.layers = spec.geometry.layers;
  report.reserved_bytes = session->reserved_bytes();
  report.picture = slot->picture;
  return report;
}

void CompressReactor::Report(std::vector<PromptReport>* prompts) const {
  absl::MutexLock lock(&session_mutex_);
  for (const auto& slot : slots_) {
    if (slot->session != nullptr && !slot->failed) {
      prompts->push_back(ReportOf(slot.get(), slot->session.get()));
    }
  }
}

void CompressReactor::TellEnd(const Slot* slot, const session::Session* session) const {
  if (shared_->log == nullptr && shared_->observer == nullptr) return;
  const PromptReport report = ReportOf(slot, session);
  grpc::Status status = end_status();
  if (slot != nullptr && slot->failed) {
    absl::MutexLock lock(&session_mutex_);
    status = ToGrpc(slot->status);
  }
  if (shared_->observer != nullptr) shared_->observer->OnPromptEnd(report, FromGrpc(status));
  if (shared_->log == nullptr || !shared_->log->sessions()) return;
  shared_->log->Write("session", {{"id", OrDash(report.id)},
                                  {"client_session", OrDash(report.call.session_id)},
                                  {"trace", OrDash(report.call.trace_id)},
                                  {"method", report.method},
                                  {"transport", report.transport},
                                  {"layers", report.answered},
                                  {"input_bytes", report.input_bytes},
                                  {"output_bytes", report.output_bytes},
                                  {"micros", report.micros},
                                  {"status", CodeName(status.error_code())},
                                  {"error", status.error_message()}});
}

bool CompressReactor::IsGone() const {
  absl::MutexLock lock(&session_mutex_);
  return gone_;
}

void CompressReactor::ReleaseHeld() {
  std::vector<std::string> held;  // handles
  {
    absl::MutexLock lock(&session_mutex_);
    for (const auto& slot : slots_) {
      if (!slot->held.empty() && !slot->told) held.push_back(slot->held);
    }
  }
  for (const std::string& handle : held) {
    // It may have expired.
    shared_->sessions->held_caches().Release(handle, tenant_).IgnoreError();
  }
}

void CompressReactor::OnGone() {
  // In a batch a prompt's summary counts once it has left, whatever becomes of the others. One that
  // comes later finds that the stream is gone.
  if (context()->IsCancelled() || !end_status().ok()) {
    {
      absl::MutexLock lock(&session_mutex_);
      gone_ = true;
    }
    ReleaseHeld();
  }
  std::vector<std::shared_ptr<session::Session>> done(slots_.size());
  {
    absl::MutexLock lock(&session_mutex_);
    ended_ = true;
    for (size_t i = 0; i < slots_.size(); ++i) done[i].swap(slots_[i]->session);
  }
  // Of a batch, prompts alone that were opened; of a stream without any, that there was one.
  CompressReport report = {.call = labels_};
  for (size_t i = 0; i < slots_.size(); ++i) {
    if (slots_[i]->phase == Phase::kOpen) continue;
    TellEnd(slots_[i].get(), done[i].get());
    ++report.prompts;
  }
  if (report.prompts == 0) TellEnd(nullptr, nullptr);
  if (shared_->observer != nullptr) {
    report.micros = (SteadyNanos() - begun_) / 1000;
    shared_->observer->OnCompressEnd(report, FromGrpc(end_status()));
  }
  for (const auto& each : done) {
    if (each != nullptr) each->Cancel();
  }
  done.clear();
  place_.reset();
  shared_->streams->Remove(this);
}

}  // namespace structkv::rpc
