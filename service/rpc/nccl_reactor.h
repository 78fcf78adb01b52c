// One NCCL control stream: bytes between gRPC and the hub.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <utility>

#include "service/rpc/peer_streams.h"
#include "service/rpc/stream_io.h"
#include "service/transport/nccl/hub.h"

namespace structkv::rpc {

// Longest message of a client.
inline constexpr size_t kMaxNcclMessageBytes = size_t{1} << 20;
// What may wait for a client that does not read.
inline constexpr int64_t kMaxNcclUnreadBytes = int64_t{4} << 20;

// Owns itself until gRPC's last reaction. Thread-safe.
class NcclReactor final : public StreamIo {
 public:
  // Attaches the stream for `tenant`. `hub` must be there until gRPC's last reaction.
  // `place` is the stream's among those of its peer.
  static NcclReactor* Start(nccl::Hub* hub, std::string tenant, PeerStreams::Place place,
                            grpc::CallbackServerContext* context);

  NcclReactor(nccl::Hub* hub, PeerStreams::Place place, grpc::CallbackServerContext* context)
      : StreamIo(context), hub_(hub), place_(std::move(place)) {}

 private:
  void OnMessage(const grpc::ByteBuffer& message) override;
  void OnEndOfInput(bool cancelled) override;
  void OnSent(uint32_t prompt, int64_t bytes, bool ends_prompt) override;
  void OnBroken() override;
  void OnGone() override;

  void SendToClient(const nccl::ServiceMessage& message);
  void Fail(const absl::Status& status);

  nccl::Hub* const hub_;
  PeerStreams::Place place_;  // until gRPC's last reaction
  nccl::Hub::PairId pair_ = 0;
  std::atomic<int64_t> unread_bytes_ = 0;
};

}  // namespace structkv::rpc
