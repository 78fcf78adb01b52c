#include "service/rpc/compression_service.h"

#include <string>
#include <utility>

#include "service/rpc/capabilities.h"
#include "service/rpc/refusal.h"
#include "service/rpc/status_mapping.h"

namespace structkv::rpc {

grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>* CompressionService::Compress(
    grpc::CallbackServerContext* context) {
  absl::StatusOr<PeerStreams::Place> place = shared_.peers.Take(context->peer());
  if (!place.ok()) return RefusedBidi::Start(place.status());
  return CompressReactor::Start(&shared_, *std::move(place), context);
}

grpc::ServerUnaryReactor* CompressionService::GetCapabilities(
    grpc::CallbackServerContext* context, const v1::GetCapabilitiesRequest* /*request*/,
    v1::GetCapabilitiesResponse* response) {
  absl::StatusOr<std::string> tenant = shared_.identity->TenantOf(*context);
  if (tenant.ok()) {
    *response = MakeCapabilities(*shared_.sessions, shared_.limits.Get().max_message_bytes,
                                 shared_.region_socket);
    response->set_tenant(*std::move(tenant));
  }
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  reactor->Finish(ToGrpc(tenant.status()));
  return reactor;
}

grpc::ServerUnaryReactor* CompressionService::GetLoad(grpc::CallbackServerContext* context,
                                                      const v1::GetLoadRequest* /*request*/,
                                                      v1::GetLoadResponse* response) {
  const absl::Status status = shared_.identity->TenantOf(*context).status();
  if (status.ok()) *response = MakeLoad(*shared_.sessions);
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  reactor->Finish(ToGrpc(status));
  return reactor;
}

}  // namespace structkv::rpc
