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

namespace structkv::rpc {
namespace {

absl::Status OutOfOrder(absl::string_view came, absl::string_view due) {
  return absl::InvalidArgumentError(absl::StrCat("message `", came, "` came ", due));
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

absl::StatusOr<session::InputMessage> ToInput(wire::Pieces pieces, int64_t* bytes) {
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
    for (const auto& run : piece.data) *bytes += static_cast<int64_t>(run.size());
    message.pieces.push_back({.layer = piece.layer,
                              .tensor = *tensor,
                              .offset_bytes = static_cast<int64_t>(piece.offset_bytes),
                              .xxh3_64 = piece.xxh3_64,
                              .data = std::move(piece.data)});
  }
  message.owner = std::make_shared<std::vector<grpc::Slice>>(std::move(pieces.slices));
  return message;
}

std::string Seconds(absl::Duration duration) { return absl::FormatDuration(duration); }

}  // namespace

CompressReactor* CompressReactor::Start(const StreamShared* shared,
                                        grpc::CallbackServerContext* context) {
  auto reactor = std::make_shared<CompressReactor>(shared, context);
  reactor->HoldSelf();
  shared->streams->Add(reactor);
  reactor->WantMessage();
  return reactor.get();
}

CompressReactor::CompressReactor(const StreamShared* shared, grpc::CallbackServerContext* context)
    : StreamIo(context), shared_(shared), begun_(SteadyNanos()) {}

std::shared_ptr<session::Session> CompressReactor::session() const {
  absl::MutexLock lock(&session_mutex_);
  return session_;
}

void CompressReactor::OnMessage(const grpc::ByteBuffer& message) {
  absl::StatusOr<wire::Request> request = wire::DecodeRequest(message);
  if (!request.ok()) {
    End(request.status());
    return;
  }
  auto* pieces = std::get_if<wire::Pieces>(&*request);
  const auto* other = std::get_if<v1::CompressRequest>(&*request);
  switch (phase_) {
    case Phase::kOpen:
      if (other != nullptr && other->has_open()) {
        TakeOpen(other->open());
      } else {
        End(OutOfOrder(MessageName(*request), "first; `open` is due"));
      }
      return;
    case Phase::kPieces:
      if (pieces != nullptr) {
        TakePieces(std::move(*pieces));
      } else if (other->has_commit()) {
        TakeCommit(other->commit());
      } else {
        End(OutOfOrder(MessageName(*request), "after `open`; `pieces` or `commit` is due"));
      }
      return;
    case Phase::kNothing:
      End(OutOfOrder(MessageName(*request), "after `commit`; nothing is due"));
      return;
  }
}

void CompressReactor::TakeOpen(const v1::Open& open) {
  absl::StatusOr<OpenRequest> request = DecodeOpen(open, shared_->limits.max_message_bytes);
  if (!request.ok()) {
    End(request.status());
    return;
  }
  session::SessionRequest wanted = {.spec = request->spec,
                                    .layers_in_flight = request->layers_in_flight,
                                    .idempotency_key = request->idempotency_key,
                                    .max_message_bytes = shared_->limits.max_message_bytes,
                                    .shard = request->shard};
  if (wanted.shard.has_value()) wanted.agreed = AgreedFields(open, *request);
  absl::StatusOr<std::shared_ptr<session::Session>> opened = shared_->sessions->Open(wanted);
  if (!opened.ok()) {
    if (absl::IsResourceExhausted(opened.status())) {
      context()->AddTrailingMetadata(
          kRetryPushbackKey,
          std::to_string(absl::ToInt64Milliseconds(shared_->limits.retry_pushback)));
    }
    End(opened.status());
    return;
  }
  max_response_bytes_ = request->max_response_message_bytes;
  phase_ = Phase::kPieces;
  bool ended = false;
  {
    absl::MutexLock lock(&session_mutex_);
    ended = ended_;
    if (!ended) session_ = *opened;
  }
  if (ended) {
    (*opened)->Cancel();
    return;
  }
  SendOpened(**opened);
  (*opened)->Start(Callbacks());
}

void CompressReactor::SendOpened(const session::Session& session) {
  const engine::PromptSpec& spec = session.spec();
  v1::CompressResponse response;
  v1::Opened* opened = response.mutable_opened();
  *opened = EncodeOpened(spec);
  opened->set_session_id(session.id());
  opened->set_reserved_bytes(static_cast<uint64_t>(session.reserved_bytes()));
  opened->set_layers_in_flight(static_cast<uint32_t>(session.layers_in_flight()));
  opened->set_max_request_message_bytes(static_cast<uint64_t>(shared_->limits.max_message_bytes));
  opened->set_backend(std::string(shared_->sessions->backend().name()));

  summary_.set_logical_length(static_cast<uint32_t>(spec.prompt_tokens));
  summary_.set_kv_length(static_cast<uint32_t>(spec.largest_kept_tokens()));
  summary_.set_fingerprint(opened->fingerprint());
  summary_.set_backend(opened->backend());
  summary_.set_transport("inline");

  std::vector<OutgoingMessage> messages;
  messages.push_back({wire::Encode(response), 0});
  Send(std::move(messages));
}

// The callbacks hold no share of this object: the session is held by it.
session::SessionCallbacks CompressReactor::Callbacks() {
  const auto weak =
      std::weak_ptr<CompressReactor>(std::static_pointer_cast<CompressReactor>(shared_from_this()));
  session::SessionCallbacks callbacks;
  callbacks.ready = [weak] {
    if (auto self = weak.lock()) self->WantMessage();
  };
  callbacks.layer = [weak](engine::LayerOutput output) {
    auto self = weak.lock();
    if (self == nullptr) return;
    self->layers_.fetch_add(1, std::memory_order_relaxed);
    self->Queue(BuildLayer(std::move(output), self->max_response_bytes_));
  };
  callbacks.pivot = [weak](engine::PivotResult result) {
    auto self = weak.lock();
    if (self != nullptr) self->Queue(BuildPivot(std::move(result), self->max_response_bytes_));
  };
  callbacks.pull = [weak](engine::RowPull pull) {
    auto self = weak.lock();
    if (self == nullptr) return;
    self->pulls_.fetch_add(1, std::memory_order_relaxed);
    self->Queue(BuildPull(std::move(pull), self->max_response_bytes_));
  };
  callbacks.finished = [weak](const session::SessionSummary& summary) {
    if (auto self = weak.lock()) self->OnAnswered(summary);
  };
  callbacks.failed = [weak](const absl::Status& status) {
    if (auto self = weak.lock()) self->End(status);
  };
  return callbacks;
}

void CompressReactor::Queue(std::vector<OutgoingMessage> messages) {
  int64_t bytes = 0;
  for (const OutgoingMessage& message : messages) bytes += message.tensor_bytes;
  output_bytes_.fetch_add(bytes, std::memory_order_relaxed);
  answered_at_.store(SteadyNanos());
  Send(std::move(messages));
}

// The summary says that the stream was as it should be, so it waits for the half-close after the
// commit: nothing can follow then.
void CompressReactor::OnAnswered(const session::SessionSummary& summary) {
  {
    absl::MutexLock lock(&session_mutex_);
    answered_ = summary;
    if (!half_closed_) return;
  }
  SendSummary(summary);
}

void CompressReactor::OnHalfClose() {
  session::SessionSummary summary;
  {
    absl::MutexLock lock(&session_mutex_);
    half_closed_ = true;
    if (!answered_.has_value()) return;
    summary = *answered_;
  }
  SendSummary(summary);
}

void CompressReactor::SendSummary(const session::SessionSummary& summary) {
  v1::CompressResponse response;
  v1::Summary* encoded = response.mutable_summary();
  *encoded = summary_;
  encoded->set_layer_count(static_cast<uint32_t>(summary.layers));
  encoded->set_input_bytes(static_cast<uint64_t>(summary.input_bytes));
  encoded->set_output_bytes(static_cast<uint64_t>(output_bytes_.load()));
  encoded->mutable_timing()->set_session_micros(static_cast<uint64_t>(summary.session_micros));
  encoded->mutable_timing()->set_queue_micros(static_cast<uint64_t>(summary.queue_micros));
  encoded->mutable_timing()->set_compute_micros(static_cast<uint64_t>(summary.compute_micros));
  SendLast(wire::Encode(response));
}

void CompressReactor::TakePieces(wire::Pieces pieces) {
  int64_t bytes = 0;
  absl::StatusOr<session::InputMessage> message = ToInput(std::move(pieces), &bytes);
  if (!message.ok()) {
    End(message.status());
    return;
  }
  input_bytes_.fetch_add(bytes, std::memory_order_relaxed);
  if (auto running = session()) running->Append(*std::move(message));
}

void CompressReactor::TakeCommit(const v1::Commit& commit) {
  constexpr uint64_t kMaxBytes = std::numeric_limits<int64_t>::max();
  if (commit.input_bytes() > kMaxBytes) {
    End(absl::InvalidArgumentError(
        absl::StrCat("commit.input_bytes is ", commit.input_bytes(), "; that many never came")));
    return;
  }
  phase_ = Phase::kNothing;
  if (auto running = session()) {
    running->Commit(commit.layer_count(), static_cast<int64_t>(commit.input_bytes()));
  }
  // Reads on for the half-close, and to notice what should not come; the session must have the
  // commit before it.
  WantMessage();
}

void CompressReactor::OnEndOfInput(bool cancelled) {
  if (cancelled) {
    OnBroken();
    return;
  }
  if (phase_ == Phase::kOpen) {
    End(absl::InvalidArgumentError("the stream ended before `open`"));
    return;
  }
  if (auto running = session()) running->EndOfInput();
  if (phase_ == Phase::kNothing) OnHalfClose();
}

void CompressReactor::OnSent(int64_t tensor_bytes) {
  if (auto running = session()) running->OutputSent(tensor_bytes);
}

void CompressReactor::OnBroken() {
  if (std::chrono::system_clock::now() >= context()->deadline()) {
    End(absl::DeadlineExceededError("the caller's deadline passed"));
  } else {
    End(absl::CancelledError("the caller is gone or cancelled"));
  }
}

void CompressReactor::End(const absl::Status& status) {
  std::shared_ptr<session::Session> running;
  {
    absl::MutexLock lock(&session_mutex_);
    ended_ = true;
    running = session_;
  }
  if (running != nullptr) running->Cancel(status);
  EndWith(ToGrpc(status));
}

void CompressReactor::CheckLimits(int64_t now) {
  const StreamLimits& limits = shared_->limits;
  const auto over = [now](int64_t since, absl::Duration limit) {
    return since != 0 && now - since > absl::ToInt64Nanoseconds(limit);
  };
  if (over(writing_since(), limits.stall)) {
    End(absl::AbortedError(absl::StrCat(
        "the caller took no results for longer than the stall limit of ", Seconds(limits.stall))));
  } else if (const int64_t reading = reading_since();
             over(reading == 0 ? 0 : std::max(reading, answered_at_.load()), limits.silence)) {
    const int64_t unanswered = pulls_.load() - layers_.load();
    End(absl::DeadlineExceededError(absl::StrCat(
        "no message came for longer than the silence limit of ", Seconds(limits.silence),
        unanswered > 0 ? absl::StrCat("; the rows of ", unanswered, " layers were asked for")
                       : "")));
  } else if (over(begun_, limits.session)) {
    End(absl::DeadlineExceededError(
        absl::StrCat("the stream took longer than the limit of ", Seconds(limits.session))));
  } else if (auto running = session()) {
    running->CheckShardGroup(limits.shard_group);
  }
}

void CompressReactor::OnGone() {
  std::shared_ptr<session::Session> done;
  {
    absl::MutexLock lock(&session_mutex_);
    ended_ = true;
    done.swap(session_);
  }
  const int64_t micros = (SteadyNanos() - begun_) / 1000;
  if (shared_->log != nullptr) {
    const grpc::Status status = end_status();
    const std::string_view method =
        done == nullptr ? "-" : method::MethodName(done->spec().method.method);
    shared_->log->Write("session", {{"id", done == nullptr ? std::string_view("-") : done->id()},
                                    {"method", method},
                                    {"layers", layers_.load()},
                                    {"input_bytes", input_bytes_.load()},
                                    {"output_bytes", output_bytes_.load()},
                                    {"micros", micros},
                                    {"status", CodeName(status.error_code())},
                                    {"error", status.error_message()}});
  }
  if (done != nullptr) done->Cancel();
  done.reset();
  shared_->streams->Remove(this);
}

}  // namespace structkv::rpc
