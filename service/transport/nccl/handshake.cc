#include "service/transport/nccl/handshake.h"

#include <cstring>
#include <fstream>

#include "absl/strings/str_cat.h"
#include "service/transport/nccl/nccl_api.h"

namespace structkv::nccl {
namespace {

absl::Status CheckName(const char* field, const std::string& name) {
  if (!name.empty() && name.size() <= kMaxNameBytes) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(field, " has ", name.size(), " bytes, 1 to ", kMaxNameBytes, " are allowed"));
}

}  // namespace

std::string HostId() {
  std::ifstream file("/proc/sys/kernel/random/boot_id");
  std::string id;
  std::getline(file, id);
  return id;
}

absl::Status CheckPeer(const Identity& own, const Identity& peer) {
  if (peer.protocol_version != own.protocol_version) {
    return absl::FailedPreconditionError(absl::StrCat("protocol_version is ", peer.protocol_version,
                                                      ", ", own.protocol_version, " is needed"));
  }
  if (peer.nccl_version != own.nccl_version) {
    return absl::FailedPreconditionError(
        absl::StrCat("nccl_version is ", VersionText(peer.nccl_version), ", the other end has ",
                     VersionText(own.nccl_version), "; both must have the same NCCL"));
  }
  if (peer.group_bytes != own.group_bytes) {
    return absl::FailedPreconditionError(absl::StrCat("group_bytes is ", peer.group_bytes,
                                                      ", the other end has ", own.group_bytes,
                                                      "; both must cut transfers alike"));
  }
  absl::Status status = CheckName("host_id", peer.host_id);
  status.Update(CheckName("bus_id", peer.bus_id));
  if (!status.ok()) return status;
  if (peer.host_id == own.host_id && peer.bus_id == own.bus_id) {
    return absl::FailedPreconditionError(
        absl::StrCat("both ends are GPU ", own.bus_id,
                     " of the same host, which NCCL refuses; CUDA IPC is for that"));
  }
  return absl::OkStatus();
}

absl::StatusOr<UniqueId> ParseUniqueId(std::string_view bytes) {
  UniqueId id;
  if (bytes.size() != sizeof(id.bytes)) {
    return absl::InvalidArgumentError(
        absl::StrCat("unique_id has ", bytes.size(), " bytes, ", sizeof(id.bytes), " are needed"));
  }
  std::memcpy(id.bytes, bytes.data(), bytes.size());
  return id;
}

}  // namespace structkv::nccl
