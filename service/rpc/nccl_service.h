// The NCCL transport's control streams as a gRPC service.
#pragma once

#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
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
  explicit NcclService(absl::StatusOr<std::vector<nccl::Hub*>> hubs) : hubs_(std::move(hubs)) {}

  grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>* Attach(
      grpc::CallbackServerContext* context) override;

 private:
  const absl::StatusOr<std::vector<nccl::Hub*>> hubs_;
};

}  // namespace structkv::rpc
