// The public API as a gRPC service.
#pragma once

#include "service/rpc/compress_reactor.h"
#include "structkv/v1/compression.grpc.pb.h"

namespace structkv::rpc {

// `Compress` is a raw method (bytes in and out; see piece_codec.h), the rest ordinary protobuf.
class CompressionService final
    : public v1::Compression::WithRawCallbackMethod_Compress<
          v1::Compression::WithCallbackMethod_GetCapabilities<
              v1::Compression::WithCallbackMethod_GetLoad<v1::Compression::Service>>> {
 public:
  explicit CompressionService(StreamShared shared) : shared_(shared) {}

  grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>* Compress(
      grpc::CallbackServerContext* context) override;

  grpc::ServerUnaryReactor* GetCapabilities(grpc::CallbackServerContext* context,
                                            const v1::GetCapabilitiesRequest* request,
                                            v1::GetCapabilitiesResponse* response) override;

  grpc::ServerUnaryReactor* GetLoad(grpc::CallbackServerContext* context,
                                    const v1::GetLoadRequest* request,
                                    v1::GetLoadResponse* response) override;

 private:
  const StreamShared shared_;
};

}  // namespace structkv::rpc
