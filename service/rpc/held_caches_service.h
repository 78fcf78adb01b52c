// The service of held caches.
#pragma once

#include "service/rpc/compress_reactor.h"
#include "structkv/v1/held_cache.grpc.pb.h"

namespace structkv::rpc {

// `FetchCache` is a raw method (bytes in and out; see piece_codec.h), the rest ordinary protobuf.
class HeldCachesService final
    : public v1::HeldCaches::WithRawCallbackMethod_FetchCache<
          v1::HeldCaches::WithCallbackMethod_RenewCache<
              v1::HeldCaches::WithCallbackMethod_ReleaseCache<v1::HeldCaches::Service>>> {
 public:
  explicit HeldCachesService(StreamShared shared) : shared_(shared) {}

  grpc::ServerWriteReactor<grpc::ByteBuffer>* FetchCache(grpc::CallbackServerContext* context,
                                                         const grpc::ByteBuffer* request) override;
  grpc::ServerUnaryReactor* RenewCache(grpc::CallbackServerContext* context,
                                       const v1::RenewCacheRequest* request,
                                       v1::RenewCacheResponse* response) override;
  grpc::ServerUnaryReactor* ReleaseCache(grpc::CallbackServerContext* context,
                                         const v1::ReleaseCacheRequest* request,
                                         v1::ReleaseCacheResponse* response) override;

 private:
  const StreamShared shared_;
};

}  // namespace structkv::rpc
