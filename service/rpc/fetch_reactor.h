// One `FetchCache` stream: finds the cache, and sends what was asked for as fast as it is read.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>

#include "absl/status/status.h"
#include "service/engine/buffer_pool.h"
#include "service/rpc/compress_reactor.h"
#include "service/rpc/fetch_builder.h"
#include "service/rpc/status_mapping.h"
#include "service/rpc/stream_set.h"
#include "service/rpc/write_stream.h"
#include "service/session/memory_budget.h"
#include "structkv/v1/held_cache.pb.h"

namespace structkv::rpc {

class FetchReactor final : public WriteStream, public Stream {
 public:
  // Owned by gRPC's call: frees itself after the last reaction. `place` is the stream's among those
  // of its peer.
  static FetchReactor* Start(const StreamShared* shared, PeerStreams::Place place,
                             grpc::CallbackServerContext* context, const grpc::ByteBuffer& request);

  FetchReactor(const StreamShared* shared, PeerStreams::Place place,
               grpc::CallbackServerContext* context);

  void CheckLimits(int64_t now) override;
  void End(const absl::Status& status) override { EndWith(ToGrpc(status)); }

 private:
  absl::Status Open(const grpc::ByteBuffer& request);
  // Where the keys and values of `slice` go.
  absl::StatusOr<transport::Granted> Negotiate(const v1::FetchCacheRequest& request,
                                               const session::HeldSlice& slice,
                                               const std::string& tenant) const;
  // Memory to arrange heads in.
  absl::Status ReserveCopies(const std::string& tenant, int64_t max_message_bytes,
                             const transport::PromptSizes& sizes);
  // What is told of the ends of transfers.
  std::function<void(const absl::Status&)> OnTransfer();
  absl::StatusOr<WriteStep> Next() override { return builder_->Next(); }
  void OnBroken() override;
  void OnGone() override;
  // Tells the log, and the observer.
  void TellEnd() const;

  const StreamShared* const shared_;
  PeerStreams::Place place_;  // until gRPC's last reaction
  const int64_t begun_;
  session::Reservation reservation_;
  engine::BufferAllowance allowance_;
  std::optional<FetchBuilder> builder_;
  CallLabels labels_;
  bool info_only_ = false;
};

}  // namespace structkv::rpc
