// Whether two ends can be a pair at all.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "service/transport/nccl/nccl_abi.h"

namespace structkv::nccl {

// Of proto/structkv/v1/nccl.proto.
inline constexpr uint32_t kProtocolVersion = 1;
inline constexpr size_t kMaxNameBytes = 128;

// What an end says of itself.
struct Identity {
  uint32_t protocol_version = kProtocolVersion;
  int nccl_version = 0;
  // The same for all processes of a host, another for any other host.
  std::string host_id;
  // The GPU's PCI bus id.
  std::string bus_id;
  // WorkerOptions::group_bytes.
  int64_t group_bytes = 0;
};

// Of this boot of this host: containers of one host have the same.
std::string HostId();

// FAILED_PRECONDITION where protocol, NCCL's version (NCCL itself takes equal ones alone) or
// `group_bytes` differ, or where both are the same GPU; INVALID_ARGUMENT for names that are empty
// or too long.
absl::Status CheckPeer(const Identity& own, const Identity& peer);

// INVALID_ARGUMENT where it is not as long as NCCL's id.
absl::StatusOr<UniqueId> ParseUniqueId(std::string_view bytes);

}  // namespace structkv::nccl
