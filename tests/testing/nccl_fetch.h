// A fetch of a held cache whose keys and values come by an NCCL pair, that of the fake library: the
// bare protocol.
#pragma once

#include <memory>
#include <vector>

#include "grpcpp/channel.h"
#include "grpcpp/client_context.h"
#include "structkv/v1/held_cache.grpc.pb.h"
#include "tests/testing/held.h"
#include "tests/testing/nccl_prompt.h"

namespace structkv::testkit {

// `request` by the pair of `client`, the best wish.
v1::FetchCacheRequest ByPair(v1::FetchCacheRequest request, const NcclClient& client);

class NcclFetch {
 public:
  // `client` outlives it.
  NcclFetch(const std::shared_ptr<grpc::Channel>& channel, NcclClient* client,
            const v1::FetchCacheRequest& request, const Metadata& metadata = {});
  // Reads one message; null at the end.
  const v1::FetchCacheResponse* ReadOne();
  // Offers room for the rows of the layers that were read and not taken yet; of other lengths where
  // `extra_bytes` is not 0.
  void TakeRows(int64_t extra_bytes = 0);
  void Cancel() { context_.TryCancel(); }
  // Reads and takes to the end; what came by transfers is where data would be.
  Fetched Finish();

 private:
  const v1::FetchCacheRequest request_;
  NcclMoves moves_;
  grpc::ClientContext context_;
  std::unique_ptr<v1::HeldCaches::Stub> stub_;
  std::unique_ptr<grpc::ClientReader<v1::FetchCacheResponse>> reader_;
  std::vector<v1::FetchCacheResponse> responses_;
  size_t taken_ = 0;
  std::vector<v1::TensorPiece> announced_;  // of a layer that is not complete
};

Fetched FetchByPair(const std::shared_ptr<grpc::Channel>& channel, NcclClient* client,
                    const v1::FetchCacheRequest& request, const Metadata& metadata = {});

}  // namespace structkv::testkit
