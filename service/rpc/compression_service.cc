#include "service/rpc/compression_service.h"

#include "service/rpc/capabilities.h"

namespace structkv::rpc {

grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>* CompressionService::Compress(
    grpc::CallbackServerContext* context) {
  return CompressReactor::Start(&shared_, context);
}

grpc::ServerUnaryReactor* CompressionService::GetCapabilities(
    grpc::CallbackServerContext* context, const v1::GetCapabilitiesRequest* /*request*/,
    v1::GetCapabilitiesResponse* response) {
  *response =
      MakeCapabilities(*shared_.sessions, shared_.limits.max_message_bytes, shared_.region_socket);
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  reactor->Finish(grpc::Status::OK);
  return reactor;
}

}  // namespace structkv::rpc
