// The NCCL transport's control streams as a gRPC service.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "service/rpc/identity.h"
#include "service/rpc/peer_streams.h"
#include "service/transport/nccl/hub.h"
#include "structkv/v1/nccl.grpc.pb.h"

namespace structkv::rpc {

// `Attach` is a raw method: its reactor is StreamIo.
class NcclService final
    : public v1::NcclTransport::WithRawCallbackMethod_Attach<v1::NcclTransport::Service> {
 public:
  // `hubs`, one or more, outlive the gRPC server; a stream goes to the one that has the fewest
  // pairs. Before that server's shutdown Hub::EndAll ends the streams. On a host without NCCL, why:
  // every stream fails as UNAVAILABLE with its text.
  NcclService(absl::StatusOr<std::vector<nccl::Hub*>> hubs, std::shared_ptr<Identity> identity,
              PeerStreams peers)
      : hubs_(std::move(hubs)), identity_(std::move(identity)), peers_(std::move(peers)) {}

  grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>* Attach(
      grpc::CallbackServerContext* context) override;

 private:
  const absl::StatusOr<std::vector<nccl::Hub*>> hubs_;
  const std::shared_ptr<Identity> identity_;
  const PeerStreams peers_;
};

}  // namespace structkv::rpc
