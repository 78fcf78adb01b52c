#include "client/cpp/fetch_call.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "client/cpp/cache_info.h"
#include "client/cpp/call_metadata.h"
#include "client/cpp/retired_blocks.h"
#include "client/cpp/retry.h"
#include "grpcpp/impl/rpc_method.h"
#include "grpcpp/support/sync_stream.h"
#include "structkv/arena.h"
#include "structkv/v1/held_cache.grpc.pb.h"

namespace structkv::client::internal {
namespace {

constexpr char kFetchMethod[] = "/structkv.v1.HeldCaches/FetchCache";
// How long NCCL may keep memory of a transfer that has failed; its aborts take less.
constexpr absl::Duration kLetGoLimit = absl::Seconds(30);

absl::Status Broken(absl::string_view text) {
  return absl::DataLossError(absl::StrCat("the server broke the protocol: ", text));
}

v1::FetchCacheRequest RequestFor(const std::string& handle, const FetchOptions& options) {
  v1::FetchCacheRequest request;
  request.set_handle(handle);
  request.set_first_layer(options.first_layer);
  request.set_layer_count(options.layer_count);
  request.set_first_kv_head(options.first_kv_head);
  request.set_kv_head_count(options.kv_head_count);
  request.set_max_response_message_bytes(options.max_message_bytes);
  request.set_checksums(options.checksums);
  return request;
}

}  // namespace

void Prepare(const HeldCallOptions& options, absl::Time deadline, grpc::ClientContext* context) {
  if (deadline != absl::InfiniteFuture()) context->set_deadline(absl::ToChronoTime(deadline));
  AddMetadata(options.metadata, options.labels, context);
}

FetchCall::FetchCall(std::shared_ptr<grpc::Channel> channel, TransportChooser* transports,
                     BytesPool* pool, const std::string& handle, const FetchOptions& options)
    : channel_(std::move(channel)),
      transports_(*transports),
      options_(options),
      tenant_(TenantOf(options.metadata)),
      deadline_(absl::Now() + options.timeout),
      request_(RequestFor(handle, options)),
      assembler_(options, pool, [this](LayerResult layer, const std::string& key) {
        if (transfers_ != nullptr) {
          transfers_->Add(std::move(layer), key);
        } else {
          HandOn(std::move(layer));
        }
      }) {}

void FetchCall::HandOn(LayerResult layer) {
  ++handed_on_;
  if (options_.on_layer) {
    options_.on_layer(std::move(layer));
  } else {
    fetched_.layers.push_back(std::move(layer));
  }
}

void FetchCall::HandOnArrived() {
  if (transfers_ == nullptr) return;
  for (LayerResult& layer : transfers_->TakeArrived()) HandOn(std::move(layer));
}

absl::Status FetchCall::Retry(absl::FunctionRef<absl::Status(bool*)> attempt) {
  for (int count = 1;; ++count) {
    bool got_on = false;
    absl::Status status = attempt(&got_on);
    if (status.ok()) return status;
    // A region that the server does not know is registered anew or, with auto and of the host, done
    // without; a pair is attached anew.
    const bool lost = absl::IsNotFound(status) && !offer_.nothing();
    const bool needed = options_.transport != TransportChoice::kAuto || offer_.gpu != nullptr;
    if (lost && unknown_ < (needed ? 1 : 2)) {
      ++unknown_;
      transports_.Forget(offer_);
      continue;
    }
    if (got_on) count = 1;
    const auto delay = RetryDelay(options_.retry, count, status);
    if (!delay.has_value() || absl::Now() + *delay >= deadline_) return status;
    absl::SleepFor(*delay);
  }
}

absl::StatusOr<FetchedCache> FetchCall::Fetch() {
  absl::Status status = Retry([this](bool* got_on) {
    const uint64_t before = assembler_.received_bytes();
    ++fetched_.attempts;
    absl::Status attempt = FetchOnce();
    *got_on = assembler_.received_bytes() > before;
    return attempt;
  });
  if (!status.ok()) return status;
  fetched_.info = *assembler_.info();
  return std::move(fetched_);
}

absl::StatusOr<v1::CacheInfo> FetchCall::Describe() {
  v1::CacheInfo info;
  absl::Status status = Retry([&](bool*) {
    absl::StatusOr<v1::CacheInfo> described = DescribeOnce();
    if (described.ok()) info = *std::move(described);
    return described.status();
  });
  if (!status.ok()) return status;
  return info;
}

absl::Status FetchCall::FetchOnce() {
  // What is received anew must not meet what NCCL may still write.
  if (abandoned_ != nullptr) {
    const absl::Duration limit = std::min(kLetGoLimit, deadline_ - absl::Now());
    if (!abandoned_->WaitUntilLetGo(limit)) {
      return absl::AbortedError(absl::StrCat("NCCL has kept the memory of an attempt that failed ",
                                             "for longer than ", absl::FormatDuration(limit)));
    }
    abandoned_ = nullptr;
  }
  if (absl::Status offered = OfferRoom(); !offered.ok()) return offered;
  absl::Status status = ReadAll();
  // What the server still writes must not meet another use of the room.
  if (!status.ok() && !offer_.regions.empty()) {
    RetiredBlocks::All().Add({room_, options_.results->region(), offer_.server, offer_.handles[0]});
  }
  return status;
}

absl::Status FetchCall::OfferRoom() {
  request_.clear_transports();
  request_.clear_regions();
  request_.clear_result_range();
  request_.clear_nccl_pair();
  OfferRequest wanted = {.choice = options_.transport,
                         .tenant = tenant_,
                         .field = "FetchOptions.results",
                         .nccl = options_.nccl,
                         .fetches = true,
                         .unknown = unknown_ >= 2};
  if (options_.results != nullptr) wanted.regions = {options_.results->region()};
  absl::StatusOr<Offer> offer = transports_.MakeOffer(wanted, deadline_);
  if (!offer.ok()) return offer.status();
  offer_ = *std::move(offer);
  if (offer_.nothing()) return absl::OkStatus();
  if (room_.empty() && assembler_.info().has_value()) {
    // A layer that has come in part lies elsewhere.
    offer_ = NoOffer("the fetch has begun without a room in FetchOptions.results");
    return absl::OkStatus();
  }
  if (room_.empty()) {
    absl::Status made = MakeRoom();
    if (!made.ok() || room_.empty()) {
      offer_ = NoOffer("");
      return made;
    }
  }
  if (!offer_.regions.empty()) {
    request_.add_transports(offer_.transport);
    request_.add_regions(offer_.handles[0]);
    request_.mutable_result_range()->set_offset_bytes(range_.offset_bytes);
    request_.mutable_result_range()->set_size_bytes(range_.size_bytes);
  }
  if (offer_.pair != nullptr) {
    request_.add_transports(v1::TRANSPORT_NCCL);
    request_.set_nccl_pair(offer_.pair->name());
  }
  // The host does not write to a GPU's memory.
  if (options_.transport == TransportChoice::kAuto && offer_.gpu == nullptr) {
    request_.add_transports(v1::TRANSPORT_INLINE);
  }
  return absl::OkStatus();
}

absl::Status FetchCall::MakeRoom() {
  const absl::StatusOr<v1::CacheInfo> info = DescribeOnce();
  if (!info.ok()) return info.status();
  absl::StatusOr<Bytes> room = options_.results->Allocate(FetchResultBytes(*info));
  if (!room.ok()) {
    return absl::Status(room.status().code(),
                        absl::StrCat("FetchOptions.results: ", room.status().message()));
  }
  if (room->empty()) return absl::OkStatus();
  room_ = *std::move(room);
  range_ = {0, *options_.results->region()->OffsetOf(room_.span()), room_.size()};
  assembler_.UseRoom(room_, range_);
  return absl::OkStatus();
}

absl::StatusOr<v1::CacheInfo> FetchCall::DescribeOnce() {
  v1::FetchCacheRequest request = request_;
  request.set_info_only(true);
  grpc::ClientContext context;
  Prepare(options_, deadline_, &context);
  const auto stub = v1::HeldCaches::NewStub(channel_);
  const auto reader = stub->FetchCache(&context, request);
  v1::FetchCacheResponse info;
  v1::FetchCacheResponse summary;
  v1::FetchCacheResponse more;
  absl::Status fault;
  if (reader->Read(&info) && !info.has_info()) {
    fault = Broken("the first message is not `info`");
  } else if (reader->Read(&summary) && (!summary.has_summary() || reader->Read(&more))) {
    fault = Broken("`info` alone was asked for");
  }
  if (!fault.ok()) context.TryCancel();
  absl::Status ended = StatusOfCall(reader->Finish(), context);
  if (fault.ok()) fault = ended;
  if (fault.ok() && !summary.has_summary()) fault = Broken("the stream ended without a summary");
  if (fault.ok()) fault = CheckCacheInfo(info.info(), options_);
  if (!fault.ok()) return fault;
  return std::move(*info.mutable_info());
}

absl::Status FetchCall::ReadAll() {
  grpc::ClientContext context;
  Prepare(options_, deadline_, &context);
  if (offer_.pair == nullptr) return ReadStream(&context);
  // A layer goes by one transfer, whole.
  if (absl::Status back = assembler_.GoBackTo(handed_on_); !back.ok()) return back;
  transfers_ = std::make_unique<FetchTransfers>(offer_.pair, [&context] { context.TryCancel(); });
  absl::Status status = EndTransfers(ReadStream(&context));
  transfers_->Abandon();
  if (!status.ok()) abandoned_ = std::move(transfers_);
  transfers_ = nullptr;
  return status;
}

absl::Status FetchCall::EndTransfers(absl::Status status) {
  if (status.ok()) {
    // They are over at the server's end.
    status = transfers_->WaitForAll(deadline_);
  } else if (absl::IsCancelled(status)) {
    // By the transfer that failed.
    if (absl::Status failed = transfers_->status(); !failed.ok()) status = failed;
  }
  HandOnArrived();
  if (status.ok()) return status;
  // Where the pair has ended it need not know yet.
  if (absl::IsUnavailable(status)) offer_.pair->MarkEnded();
  absl::Status back = assembler_.GoBackTo(handed_on_);
  return back.ok() ? status : back;
}

absl::Status FetchCall::ReadStream(grpc::ClientContext* context) {
  request_.set_skip_bytes(assembler_.received_bytes());
  // The generated stub's call with messages as bytes, whose tensors are then copied once.
  const grpc::internal::RpcMethod method(kFetchMethod, grpc::internal::RpcMethod::SERVER_STREAMING,
                                         channel_);
  const std::unique_ptr<grpc::ClientReader<grpc::ByteBuffer>> reader(
      grpc::internal::ClientReaderFactory<grpc::ByteBuffer>::Create(channel_.get(), method, context,
                                                                    wire::Encode(request_)));
  assembler_.StartStream(request_);
  absl::Status fault;
  for (grpc::ByteBuffer message; fault.ok() && reader->Read(&message); message.Clear()) {
    absl::StatusOr<wire::FetchResponse> response = wire::DecodeFetchResponse(message);
    if (!response.ok()) {
      fault = Broken(response.status().message());
      continue;
    }
    if (response->message.has_info() && response->message.info().transport_reason().empty()) {
      response->message.mutable_info()->set_transport_reason(offer_.reason);
    }
    fault = assembler_.Add(*response);
    HandOnArrived();
  }
  if (!fault.ok()) context->TryCancel();
  absl::Status ended = StatusOfCall(reader->Finish(), *context);
  if (!fault.ok()) return fault;
  return ended.ok() ? assembler_.Finish() : ended;
}

}  // namespace structkv::client::internal
