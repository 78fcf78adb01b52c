// Registers memory of a GPU.
#include <utility>

#include "client/cpp/region_call.h"
#include "client/cpp/registration.h"
#include "client/cpp/registration_lease.h"

namespace structkv::client::internal {
namespace {

// Whether the server may have done what it did not answer to.
bool IsOpenEnded(const absl::Status& status) {
  return absl::IsUnavailable(status) || absl::IsDeadlineExceeded(status) ||
         absl::IsCancelled(status) || absl::IsInternal(status) || absl::IsUnknown(status);
}

}  // namespace

absl::StatusOr<std::unique_ptr<Registration>> RegisterGpu(const RegionServer& server,
                                                          const RegionOptions& options,
                                                          const v1::CudaIpcMemory& exported,
                                                          std::shared_ptr<const void> memory,
                                                          absl::Time deadline) {
  LeasedRegion region = {.server = server,
                         .handle = "",
                         .lease = LeaseOf(options),
                         .memory = std::move(memory),
                         .quarantine = options.quarantine};
  v1::RegisterRegionRequest request;
  request.set_size_bytes(options.size_bytes);
  request.set_writable(options.writable);
  request.set_lease_millis(static_cast<uint64_t>(absl::ToInt64Milliseconds(region.lease)));
  *request.mutable_cuda_ipc() = exported;
  v1::RegisterRegionResponse response;
  absl::Status status =
      CallRegions(server, deadline, [&](v1::Regions::Stub& stub, grpc::ClientContext* context) {
        return stub.RegisterRegion(context, request, &response);
      });
  if (status.ok()) {
    region.handle = response.handle();
    return KeepLease(std::move(region));
  }
  if (IsOpenEnded(status)) Quarantine(std::move(region));
  return status;
}

}  // namespace structkv::client::internal
