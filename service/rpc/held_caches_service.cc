#include "service/rpc/held_caches_service.h"

#include <optional>
#include <string>
#include <utility>

#include "service/rpc/fetch_reactor.h"
#include "service/rpc/refusal.h"
#include "service/rpc/status_mapping.h"

namespace structkv::rpc {
namespace {

grpc::ServerUnaryReactor* Answer(grpc::CallbackServerContext* context, const absl::Status& status) {
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  reactor->Finish(ToGrpc(status));
  return reactor;
}

}  // namespace

grpc::ServerWriteReactor<grpc::ByteBuffer>* HeldCachesService::FetchCache(
    grpc::CallbackServerContext* context, const grpc::ByteBuffer* request) {
  absl::StatusOr<PeerStreams::Place> place = shared_.peers.Take(context->peer());
  if (!place.ok()) return RefusedWrite::Start(place.status());
  return FetchReactor::Start(&shared_, *std::move(place), context, *request);
}

grpc::ServerUnaryReactor* HeldCachesService::RenewCache(grpc::CallbackServerContext* context,
                                                        const v1::RenewCacheRequest* request,
                                                        v1::RenewCacheResponse* response) {
  const absl::StatusOr<std::string> tenant = shared_.identity->TenantOf(*context);
  if (!tenant.ok()) return Answer(context, tenant.status());
  const std::optional<uint64_t> wanted =
      request->has_lease_millis() ? std::optional(request->lease_millis()) : std::nullopt;
  const absl::StatusOr<absl::Duration> lease =
      shared_.sessions->held_caches().Renew(request->handle(), *tenant, wanted);
  if (lease.ok()) {
    response->set_lease_millis(static_cast<uint64_t>(absl::ToInt64Milliseconds(*lease)));
  }
  return Answer(context, lease.status());
}

grpc::ServerUnaryReactor* HeldCachesService::ReleaseCache(grpc::CallbackServerContext* context,
                                                          const v1::ReleaseCacheRequest* request,
                                                          v1::ReleaseCacheResponse* /*response*/) {
  const absl::StatusOr<std::string> tenant = shared_.identity->TenantOf(*context);
  if (!tenant.ok()) return Answer(context, tenant.status());
  return Answer(context, shared_.sessions->held_caches().Release(request->handle(), *tenant));
}

}  // namespace structkv::rpc
