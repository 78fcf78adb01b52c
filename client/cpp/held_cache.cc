#include "structkv/held_cache.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "client/cpp/fetch_assembler.h"
#include "client/cpp/retry.h"
#include "grpcpp/client_context.h"
#include "grpcpp/impl/rpc_method.h"
#include "grpcpp/support/sync_stream.h"
#include "structkv/client.h"
#include "structkv/v1/held_cache.grpc.pb.h"

namespace structkv::client {
namespace {

constexpr char kFetchMethod[] = "/structkv.v1.HeldCaches/FetchCache";

void Prepare(const HeldCallOptions& options, absl::Time deadline, grpc::ClientContext* context) {
  if (deadline != absl::InfiniteFuture()) context->set_deadline(absl::ToChronoTime(deadline));
  for (const auto& [key, value] : options.metadata) context->AddMetadata(key, value);
}

// One attempt: reads to the end of a stream.
absl::Status FetchOnce(const std::shared_ptr<grpc::Channel>& channel,
                       const v1::FetchCacheRequest& request, const FetchOptions& options,
                       absl::Time deadline, internal::FetchAssembler* assembler) {
  grpc::ClientContext context;
  Prepare(options, deadline, &context);
  // The generated stub's call with messages as bytes, whose tensors are then copied once.
  const grpc::internal::RpcMethod method(kFetchMethod, grpc::internal::RpcMethod::SERVER_STREAMING,
                                         channel);
  const std::unique_ptr<grpc::ClientReader<grpc::ByteBuffer>> reader(
      grpc::internal::ClientReaderFactory<grpc::ByteBuffer>::Create(channel.get(), method, &context,
                                                                    wire::Encode(request)));
  assembler->StartStream();
  absl::Status fault;
  for (grpc::ByteBuffer message; fault.ok() && reader->Read(&message); message.Clear()) {
    absl::StatusOr<wire::FetchResponse> response = wire::DecodeFetchResponse(message);
    fault = response.ok() ? assembler->Add(*response)
                          : absl::DataLossError(absl::StrCat("the server broke the protocol: ",
                                                             response.status().message()));
  }
  if (!fault.ok()) context.TryCancel();
  absl::Status ended = internal::StatusOfCall(reader->Finish(), context);
  if (!fault.ok()) return fault;
  return ended.ok() ? assembler->Finish() : ended;
}

}  // namespace

absl::StatusOr<FetchedCache> Client::FetchCache(const std::string& handle,
                                                const FetchOptions& options) {
  const absl::Time deadline = absl::Now() + options.timeout;
  FetchedCache fetched;
  internal::FetchAssembler assembler(options.allocate, pool_.get(), options.on_info,
                                     [&](LayerResult layer) {
                                       if (options.on_layer) {
                                         options.on_layer(std::move(layer));
                                       } else {
                                         fetched.layers.push_back(std::move(layer));
                                       }
                                     });
  v1::FetchCacheRequest request;
  request.set_handle(handle);
  request.set_first_layer(options.first_layer);
  request.set_layer_count(options.layer_count);
  request.set_first_kv_head(options.first_kv_head);
  request.set_kv_head_count(options.kv_head_count);
  request.set_max_response_message_bytes(options.max_message_bytes);
  request.set_checksums(options.checksums);
  for (int attempt = 1;; ++attempt) {
    const uint64_t before = assembler.received_bytes();
    request.set_skip_bytes(before);
    ++fetched.attempts;
    absl::Status status = FetchOnce(channel_, request, options, deadline, &assembler);
    if (status.ok()) break;
    if (assembler.received_bytes() > before) attempt = 1;
    const auto delay = internal::RetryDelay(options.retry, attempt, status);
    if (!delay.has_value() || absl::Now() + *delay >= deadline) return status;
    absl::SleepFor(*delay);
  }
  fetched.info = *assembler.info();
  return fetched;
}

absl::StatusOr<absl::Duration> Client::RenewCache(const std::string& handle,
                                                  std::optional<absl::Duration> lease,
                                                  const HeldCallOptions& options) {
  grpc::ClientContext context;
  Prepare(options, absl::Now() + options.timeout, &context);
  v1::RenewCacheRequest request;
  request.set_handle(handle);
  if (lease.has_value()) {
    request.set_lease_millis(
        static_cast<uint64_t>(std::max<int64_t>(0, absl::ToInt64Milliseconds(*lease))));
  }
  v1::RenewCacheResponse response;
  const grpc::Status status =
      v1::HeldCaches::NewStub(channel_)->RenewCache(&context, request, &response);
  if (!status.ok()) return internal::StatusOfCall(status, context);
  return absl::Milliseconds(static_cast<int64_t>(response.lease_millis()));
}

absl::Status Client::ReleaseCache(const std::string& handle, const HeldCallOptions& options) {
  grpc::ClientContext context;
  Prepare(options, absl::Now() + options.timeout, &context);
  v1::ReleaseCacheRequest request;
  request.set_handle(handle);
  v1::ReleaseCacheResponse response;
  return internal::StatusOfCall(
      v1::HeldCaches::NewStub(channel_)->ReleaseCache(&context, request, &response), context);
}

v1::Open OpenOf(const v1::CacheInfo& info) {
  v1::Open open;
  *open.mutable_geometry() = info.geometry();
  // A group of query heads to each KV head, as the model has them.
  const uint32_t group =
      info.geometry().query_head_count() / std::max(1U, info.geometry().kv_head_count());
  open.mutable_geometry()->set_kv_head_count(info.kv_heads().count());
  open.mutable_geometry()->set_query_head_count(group * info.kv_heads().count());
  open.set_prompt_tokens(info.logical_length());
  open.set_dtype(info.dtype());
  open.set_layout(info.layout());
  open.set_kv_scales(info.kv_scales());
  *open.mutable_method() = info.method();
  open.set_statistic(info.statistic());
  open.set_model_id(info.model_id());
  if (info.block_tokens() != 0) open.mutable_paged()->set_block_tokens(info.block_tokens());
  if (info.has_rotary()) *open.mutable_rotary() = info.rotary();
  if (info.has_attention_scale()) open.set_attention_scale(info.attention_scale());
  return open;
}

v1::Opened OpenedOf(const v1::CacheInfo& info) {
  v1::Opened opened;
  *opened.mutable_method() = info.method();
  opened.set_statistic(info.statistic());
  opened.set_fingerprint(info.fingerprint());
  if (info.has_rotary()) *opened.mutable_rotary() = info.rotary();
  for (uint32_t layer = 0; layer < info.geometry().layer_count(); ++layer) {
    const bool fetched =
        layer >= info.first_layer() && layer - info.first_layer() < info.layer_count();
    opened.add_kept_tokens(fetched ? info.kept_tokens(static_cast<int>(layer - info.first_layer()))
                                   : 0);
  }
  return opened;
}

}  // namespace structkv::client
