// Calls of the Regions service.
#pragma once

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "client/cpp/registration.h"
#include "grpcpp/client_context.h"
#include "structkv/v1/region.grpc.pb.h"

namespace structkv::client::internal {

inline constexpr absl::Duration kRegionCallLimit = absl::Seconds(10);

inline void Prepare(const RegionServer& server, absl::Time deadline, grpc::ClientContext* context) {
  context->set_deadline(absl::ToChronoTime(deadline));
  if (!server.tenant.empty()) context->AddMetadata("structkv-tenant", server.tenant);
}

inline absl::Status ToStatus(const grpc::Status& status) {
  return {static_cast<absl::StatusCode>(status.error_code()), status.error_message()};
}

// Makes the call that `call` makes, in the name of `server.tenant`.
inline absl::Status CallRegions(
    const RegionServer& server, absl::Time deadline,
    absl::FunctionRef<grpc::Status(v1::Regions::Stub& stub, grpc::ClientContext* context)> call) {
  grpc::ClientContext context;
  Prepare(server, deadline, &context);
  const auto stub = v1::Regions::NewStub(server.channel);
  return ToStatus(call(*stub, &context));
}

}  // namespace structkv::client::internal
