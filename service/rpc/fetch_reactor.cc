#include "service/rpc/fetch_reactor.h"

#include <algorithm>
#include <chrono>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "grpcpp/server_context.h"
#include "grpcpp/support/proto_buffer_reader.h"
#include "service/rpc/open_decoder.h"
#include "service/rpc/status_mapping.h"

namespace structkv::rpc {
namespace {

// One message is being written while the transport may still hold the one before.
constexpr int64_t kMessagesOnTheirWay = 2;
constexpr int64_t kPageBytes = 4096;

absl::StatusOr<int64_t> MaxMessageBytes(const v1::FetchCacheRequest& request, int64_t most) {
  const int64_t longest = request.max_response_message_bytes();
  if (longest == 0) return std::min(kDefaultMessageBytes, most);
  if (longest >= kMinMessageBytes && longest <= most) return longest;
  return absl::InvalidArgumentError(absl::StrCat("max_response_message_bytes is ", longest, "; ",
                                                 kMinMessageBytes, " to ", most, " are allowed"));
}

}  // namespace

FetchReactor* FetchReactor::Start(const StreamShared* shared, PeerStreams::Place place,
                                  grpc::CallbackServerContext* context,
                                  const grpc::ByteBuffer& request) {
  auto reactor = std::make_shared<FetchReactor>(shared, std::move(place), context);
  reactor->HoldSelf();
  shared->streams->Add(reactor);
  if (absl::Status opened = reactor->Open(request); !opened.ok()) {
    reactor->End(opened);
  } else {
    reactor->Advance();
  }
  return reactor.get();
}

FetchReactor::FetchReactor(const StreamShared* shared, PeerStreams::Place place,
                           grpc::CallbackServerContext* context)
    : WriteStream(context), shared_(shared), place_(std::move(place)), begun_(SteadyNanos()) {}

absl::Status FetchReactor::Open(const grpc::ByteBuffer& bytes) {
  const absl::StatusOr<std::string> tenant = shared_->identity->TenantOf(*context());
  if (!tenant.ok()) return tenant.status();
  absl::StatusOr<CallLabels> labels = ReadCallLabels(*context(), shared_->trace_ratio);
  if (!labels.ok()) return labels.status();
  labels_ = *std::move(labels);
  // A server that drains gives away what it holds; one that ends does not begin.
  if (absl::Status ended = shared_->streams->ended(); !ended.ok()) return ended;
  grpc::ByteBuffer copy = bytes;  // shares the slices
  v1::FetchCacheRequest request;
  grpc::ProtoBufferReader reader(&copy);
  if (!reader.status().ok() || !request.ParseFromZeroCopyStream(&reader)) {
    return absl::InvalidArgumentError("the request cannot be parsed");
  }
  info_only_ = request.info_only();
  const absl::StatusOr<int64_t> longest =
      MaxMessageBytes(request, shared_->limits.Get().max_message_bytes);
  if (!longest.ok()) return longest.status();
  auto cache = shared_->sessions->held_caches().Find(request.handle(), *tenant);
  if (!cache.ok()) return cache.status();
  absl::StatusOr<session::HeldSlice> slice =
      session::HeldSlice::Make(*std::move(cache), {.first_layer = request.first_layer(),
                                                   .layer_count = request.layer_count(),
                                                   .first_kv_head = request.first_kv_head(),
                                                   .kv_head_count = request.kv_head_count()});
  if (!slice.ok()) return slice.status();
  if (request.skip_bytes() > static_cast<uint64_t>(slice->total_bytes())) {
    return absl::InvalidArgumentError(absl::StrCat("skip_bytes is ", request.skip_bytes(),
                                                   "; 0 to ", slice->total_bytes(),
                                                   " are allowed (CacheInfo.total_bytes)"));
  }
  FetchBuilder::Options options = {.max_message_bytes = *longest,
                                   .skip_bytes = static_cast<int64_t>(request.skip_bytes()),
                                   .checksums = request.checksums(),
                                   .info_only = request.info_only()};
  if (!request.info_only()) {
    absl::StatusOr<transport::Granted> granted = Negotiate(request, *slice, *tenant);
    if (!granted.ok()) return granted.status();
    options.granted = *std::move(granted);
    absl::Status reserved = options.granted.transport->Reserve();
    if (reserved.ok() && slice->strided() && !options.granted.transport->in_place()) {
      reserved = ReserveCopies(*tenant, *longest, slice->result_sizes());
    }
    if (absl::IsResourceExhausted(reserved)) {
      context()->AddTrailingMetadata(
          kRetryPushbackKey,
          std::to_string(RetryPushbackMillis(reserved, shared_->limits.Get().retry_pushback)));
    }
    if (!reserved.ok()) return reserved;
    options.on_transfer = OnTransfer();
  }
  builder_.emplace(*std::move(slice), options, &shared_->sessions->buffers(),
                   &shared_->sessions->backend());
  return absl::OkStatus();
}

absl::StatusOr<transport::Granted> FetchReactor::Negotiate(const v1::FetchCacheRequest& request,
                                                           const session::HeldSlice& slice,
                                                           const std::string& tenant) const {
  absl::StatusOr<transport::TransportRequest> wanted = DecodeTransports(request);
  if (!wanted.ok()) return wanted.status();
  wanted->tenant = tenant;
  const transport::Offers& offers = shared_->sessions->options().transports;
  for (const transport::Kind wish : wanted->wishes) {
    if (offers.count(wish) == 0 || wish == transport::Kind::kNccl || wanted->results.has_value()) {
      continue;
    }
    return absl::InvalidArgumentError(absl::StrCat("result_range is not set, and transports names ",
                                                   std::string(transport::KindName(wish)),
                                                   ", which writes there"));
  }
  return transport::Negotiate(*wanted, slice.result_sizes(), offers);
}

absl::Status FetchReactor::ReserveCopies(const std::string& tenant, int64_t max_message_bytes,
                                         const transport::PromptSizes& sizes) {
  // A message has keys and values of one layer, each in whole pages.
  const int64_t message = std::min(max_message_bytes, sizes.key_bytes + sizes.value_bytes);
  const int64_t bytes = kMessagesOnTheirWay * (message + 2 * kPageBytes);
  absl::StatusOr<session::Reservation> reservation = shared_->sessions->Reserve(tenant, bytes);
  if (!reservation.ok()) return reservation.status();
  reservation_ = *std::move(reservation);
  allowance_ = shared_->sessions->buffers().Allow(static_cast<size_t>(bytes));
  return absl::OkStatus();
}

// Puts the next layer where it is sent from, which takes its time, so on a thread that computes.
std::function<void(const absl::Status&)> FetchReactor::OnTransfer() {
  engine::Scheduler* const scheduler = &shared_->sessions->scheduler();
  const auto weak =
      std::weak_ptr<FetchReactor>(std::static_pointer_cast<FetchReactor>(shared_from_this()));
  return [weak, scheduler, lane = scheduler->NewLane()](const absl::Status& status) {
    scheduler->Post(lane, /*small=*/false, [weak, status](ParallelFor) {
      const auto self = weak.lock();
      if (self == nullptr) return;
      if (status.ok()) {
        self->Wake();
      } else {
        self->End(status);
      }
    });
  };
}

void FetchReactor::OnBroken() {
  if (std::chrono::system_clock::now() >= context()->deadline()) {
    End(absl::DeadlineExceededError("the caller's deadline passed"));
  } else {
    End(absl::CancelledError("the caller is gone or cancelled"));
  }
}

void FetchReactor::CheckLimits(int64_t now) {
  const StreamLimits limits = shared_->limits.Get();
  const int64_t writing = writing_since();
  if (writing != 0 && now - writing > absl::ToInt64Nanoseconds(limits.stall)) {
    End(absl::AbortedError(
        absl::StrCat("the caller took no results for longer than the stall limit of ",
                     absl::FormatDuration(limits.stall))));
  } else if (now - begun_ > absl::ToInt64Nanoseconds(limits.session)) {
    End(absl::DeadlineExceededError(absl::StrCat("the stream took longer than the limit of ",
                                                 absl::FormatDuration(limits.session))));
  }
}

void FetchReactor::TellEnd() const {
  const grpc::Status status = end_status();
  FetchReport report;
  report.micros = (SteadyNanos() - begun_) / 1000;
  report.info_only = info_only_;
  report.call = labels_;
  if (builder_.has_value()) {
    report.transport = transport::KindName(builder_->transport().kind());
    report.layers = builder_->slice().end_layer() - builder_->slice().first_layer();
    report.kv_heads = builder_->slice().kv_heads().count;
    report.output_bytes = builder_->sent_bytes();
  }
  if (shared_->observer != nullptr) shared_->observer->OnFetchEnd(report, FromGrpc(status));
  if (shared_->log == nullptr || !shared_->log->sessions()) return;
  shared_->log->Write("fetch", {{"client_session", OrDash(report.call.session_id)},
                                {"trace", OrDash(report.call.trace_id)},
                                {"transport", report.transport},
                                {"layers", report.layers},
                                {"kv_heads", report.kv_heads},
                                {"output_bytes", report.output_bytes},
                                {"micros", report.micros},
                                {"status", CodeName(status.error_code())},
                                {"error", status.error_message()}});
}

void FetchReactor::OnGone() {
  TellEnd();
  builder_.reset();
  allowance_.Release();
  reservation_.Release();
  place_.reset();
  shared_->streams->Remove(this);
}

}  // namespace structkv::rpc
