// Calls that end before they have begun: nothing is read of them.
#pragma once

#include "absl/status/status.h"
#include "grpcpp/support/byte_buffer.h"
#include "grpcpp/support/server_callback.h"
#include "service/rpc/status_mapping.h"

namespace structkv::rpc {

// Owned by gRPC's call: frees itself after the last reaction. `Reactor` is one of gRPC's for a call
// of byte buffers that streams.
template <typename Reactor>
class Refusal final : public Reactor {
 public:
  static Reactor* Start(const absl::Status& status) { return new Refusal(status); }

 private:
  explicit Refusal(const absl::Status& status) { this->Finish(ToGrpc(status)); }
  void OnDone() override { delete this; }
};

using RefusedBidi = Refusal<grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>>;
using RefusedWrite = Refusal<grpc::ServerWriteReactor<grpc::ByteBuffer>>;

}  // namespace structkv::rpc
