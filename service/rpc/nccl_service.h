// The NCCL transport's control streams as a gRPC service.
#pragma once

#include "absl/status/status.h"
#include "service/transport/nccl/hub.h"
#include "structkv/v1/nccl.grpc.pb.h"

namespace structkv::rpc {

// `Attach` is a raw method: its reactor is StreamIo.
class NcclService final
    : public v1::NcclTransport::WithRawCallbackMethod_Attach<v1::NcclTransport::Service> {
 public:
  // `hub` outlives the gRPC server. Before that server's shutdown Hub::EndAll ends the streams.
  explicit NcclService(nccl::Hub* hub) : hub_(hub) {}
  // On a host without NCCL: every stream fails as UNAVAILABLE with the text of `why`.
  explicit NcclService(const absl::Status& why) : why_(why) {}

  grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>* Attach(
      grpc::CallbackServerContext* context) override;

 private:
  nccl::Hub* const hub_ = nullptr;
  const absl::Status why_;
};

}  // namespace structkv::rpc
