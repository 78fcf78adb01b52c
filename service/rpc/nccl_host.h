// What a server has of NCCL: a hub for each of its GPUs, and their control streams.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "kernels/backend.h"
#include "service/rpc/nccl_service.h"
#include "service/transport/nccl/device_api.h"
#include "service/transport/nccl/hub.h"
#include "service/transport/negotiation.h"

namespace structkv::rpc {

struct NcclOptions {
  // Name or path of NCCL; empty: there is no NCCL transport.
  std::string library;
  // Of the memory that is taken of each GPU, set apart for tensors on their way; 0: half of it.
  int64_t memory_bytes = 0;
  // `device` and `on_tick` are the host's own.
  nccl::WorkerOptions worker;
  // The CUDA runtime, or what stands for it; none: that of the build.
  std::optional<nccl::DeviceApi> device_api;
};

// Thread-safe.
class NcclHost {
 public:
  // Loads NCCL and starts a hub for each of the backend's GPUs. Where that fails there are none,
  // and status() says why. `offer_limit`: of transfers that a client does not begin.
  NcclHost(const NcclOptions& options, absl::Duration offer_limit, const Backend& backend,
           std::shared_ptr<Identity> identity, PeerStreams peers);

  const absl::Status& status() const { return status_; }
  NcclService& service() { return service_; }
  // For sessions, which must be gone before this object; or why there is none.
  absl::StatusOr<transport::Grant> Offer() const;
  // Of all hubs together.
  nccl::HubStats stats() const;
  // Ends every new pair.
  void StopAttaching(const absl::Status& why);
  // Waits until clients have what was sent to them, which they may have later than the server is
  // told; at most until `deadline`.
  void WaitUntilSettled(absl::Time deadline) const;
  // Ends all pairs, and every new one; to be called before the gRPC server is shut down.
  void EndAll(const absl::Status& why);
  // That too, and ends the hubs' threads: none of them touches a session any more. Not by two at
  // once.
  void Stop();

 private:
  absl::StatusOr<std::vector<nccl::Hub*>> Hubs() const;

  const Backend& backend_;
  std::vector<std::unique_ptr<nccl::Hub>> hubs_;
  const absl::Status status_;
  NcclService service_;
};

}  // namespace structkv::rpc
