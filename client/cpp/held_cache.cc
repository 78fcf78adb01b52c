#include "structkv/held_cache.h"

#include <algorithm>

#include "absl/time/clock.h"
#include "client/cpp/fetch_call.h"
#include "client/cpp/replica_set.h"
#include "client/cpp/result_places.h"
#include "client/cpp/retry.h"
#include "grpcpp/client_context.h"
#include "structkv/client.h"
#include "structkv/v1/held_cache.grpc.pb.h"

namespace structkv::client {
namespace {

// What a replica has at least of the time, where others follow.
constexpr absl::Duration kLeastPart = absl::Seconds(1);

}  // namespace

absl::Status Client::CallHolder(
    const HeldCallOptions& options,
    absl::FunctionRef<absl::Status(internal::Replica&, absl::Time until)> call) {
  const absl::Time deadline = absl::Now() + options.timeout;
  if (!options.replica.empty()) {
    const auto replica = replicas_->At(options.replica, deadline);
    if (!replica.ok()) return replica.status();
    const bool is_only = *replica == replicas_->only();
    return internal::AtReplica(is_only ? "" : options.replica, call(**replica, deadline));
  }
  if (!replicas_->several()) return call(*replicas_->only(), deadline);
  const auto all = replicas_->All(deadline);
  if (!all.ok()) return all.status();
  absl::Status unknown;
  absl::Status failed;
  for (size_t i = 0; i < all->size(); ++i) {
    internal::Replica& replica = *(*all)[i];
    const absl::Duration left = deadline - absl::Now();
    if (left <= absl::ZeroDuration() && i > 0) break;
    const absl::Duration part = std::max(kLeastPart, left / static_cast<int64_t>(all->size() - i));
    const absl::Status status = internal::AtReplica(
        replica.address, call(replica, part < left ? absl::Now() + part : deadline));
    if (status.ok()) return status;
    // One that cannot be asked may be the one.
    (absl::IsNotFound(status) ? unknown : failed).Update(status);
    const bool may_be_elsewhere =
        absl::IsNotFound(status) || absl::IsUnavailable(status) || absl::IsDeadlineExceeded(status);
    if (!may_be_elsewhere) return status;
  }
  return failed.ok() ? unknown : failed;
}

absl::StatusOr<FetchedCache> Client::FetchCache(const std::string& handle,
                                                const FetchOptions& options) {
  const absl::Time deadline = absl::Now() + options.timeout;
  absl::StatusOr<FetchedCache> fetched;
  const absl::Status status =
      CallHolder(options, [&](internal::Replica& replica, absl::Time until) {
        FetchOptions own = options;
        const auto call = [&](absl::Time end) {
          own.timeout = end - absl::Now();
          return internal::FetchCall(replica.channel, replica.transports.get(), pool_.get(), handle,
                                     own);
        };
        // What has a part of the time is to find the holder; that one's fetch has all. Where none
        // is the holder, the last one's counts as a fetch that failed.
        if (until < deadline) {
          const absl::Status held = call(until).Describe().status();
          if (!held.ok()) return held;
        }
        fetched = call(deadline).Fetch();
        return fetched.status();
      });
  if (!status.ok()) return status;
  return fetched;
}

absl::StatusOr<v1::CacheInfo> Client::DescribeCache(const std::string& handle,
                                                    const FetchOptions& options) {
  absl::StatusOr<v1::CacheInfo> info;
  const absl::Status status =
      CallHolder(options, [&](internal::Replica& replica, absl::Time until) {
        FetchOptions own = options;
        own.timeout = until - absl::Now();
        info =
            internal::FetchCall(replica.channel, replica.transports.get(), pool_.get(), handle, own)
                .Describe();
        return info.status();
      });
  if (!status.ok()) return status;
  return info;
}

absl::StatusOr<absl::Duration> Client::RenewCache(const std::string& handle,
                                                  std::optional<absl::Duration> lease,
                                                  const HeldCallOptions& options) {
  v1::RenewCacheRequest request;
  request.set_handle(handle);
  if (lease.has_value()) {
    request.set_lease_millis(
        static_cast<uint64_t>(std::max<int64_t>(0, absl::ToInt64Milliseconds(*lease))));
  }
  v1::RenewCacheResponse response;
  const absl::Status status =
      CallHolder(options, [&](internal::Replica& replica, absl::Time until) {
        grpc::ClientContext context;
        internal::Prepare(options, until, &context);
        return internal::StatusOfCall(
            v1::HeldCaches::NewStub(replica.channel)->RenewCache(&context, request, &response),
            context);
      });
  if (!status.ok()) return status;
  return absl::Milliseconds(static_cast<int64_t>(response.lease_millis()));
}

absl::Status Client::ReleaseCache(const std::string& handle, const HeldCallOptions& options) {
  v1::ReleaseCacheRequest request;
  request.set_handle(handle);
  return CallHolder(options, [&](internal::Replica& replica, absl::Time until) {
    grpc::ClientContext context;
    internal::Prepare(options, until, &context);
    v1::ReleaseCacheResponse response;
    return internal::StatusOfCall(
        v1::HeldCaches::NewStub(replica.channel)->ReleaseCache(&context, request, &response),
        context);
  });
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

uint64_t FetchResultBytes(const v1::CacheInfo& info) {
  return internal::ResultBytes(OpenOf(info), OpenedOf(info), info.layer_count());
}

}  // namespace structkv::client
