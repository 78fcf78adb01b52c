// A fetch of a held cache: its attempts, and where its tensors go.
#pragma once

#include <memory>
#include <optional>
#include <string>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "client/cpp/bytes_pool.h"
#include "client/cpp/fetch_assembler.h"
#include "client/cpp/fetch_transfers.h"
#include "client/cpp/transport_choice.h"
#include "grpcpp/channel.h"
#include "grpcpp/client_context.h"
#include "structkv/held_cache.h"
#include "structkv/v1/held_cache.pb.h"

namespace structkv::client::internal {

// What every call of the service of held caches has in common.
void Prepare(const HeldCallOptions& options, absl::Time deadline, grpc::ClientContext* context);

// For one call of one of its functions. All that it is given outlives it.
class FetchCall {
 public:
  FetchCall(std::shared_ptr<grpc::Channel> channel, TransportChooser* transports, BytesPool* pool,
            const std::string& handle, const FetchOptions& options);

  // Client::FetchCache.
  absl::StatusOr<FetchedCache> Fetch();
  // Client::DescribeCache.
  absl::StatusOr<v1::CacheInfo> Describe();

 private:
  // Calls `attempt` until it is OK, or not worth another try. `attempt` says whether it got on.
  absl::Status Retry(absl::FunctionRef<absl::Status(bool* got_on)> attempt);
  // One attempt each.
  absl::Status FetchOnce();
  absl::StatusOr<v1::CacheInfo> DescribeOnce();
  // Reads a stream to its end.
  absl::Status ReadAll();
  absl::Status ReadStream(grpc::ClientContext* context);
  // What came of the transfers of a stream that ended with `status`.
  absl::Status EndTransfers(absl::Status status);
  void HandOn(LayerResult layer);
  void HandOnArrived();
  // Puts into the request what it is to offer beside messages: where there is such, with the room
  // for it.
  absl::Status OfferRoom();
  absl::Status MakeRoom();

  const std::shared_ptr<grpc::Channel> channel_;
  TransportChooser& transports_;
  const FetchOptions& options_;
  const std::string tenant_;
  const absl::Time deadline_;
  v1::FetchCacheRequest request_;
  FetchedCache fetched_;
  uint32_t handed_on_ = 0;  // layers
  FetchAssembler assembler_;
  std::unique_ptr<FetchTransfers> transfers_;  // of a stream that may have some
  std::unique_ptr<FetchTransfers> abandoned_;  // of the one before, which failed
  Offer offer_;                                // of this attempt
  int unknown_ = 0;                            // attempts whose region the server did not know
  Bytes room_;                                 // of `options_.results`; empty: none
  wire::Range range_;
};

}  // namespace structkv::client::internal
