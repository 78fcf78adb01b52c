#include "service/transport/nccl/transfer.h"

#include <algorithm>

namespace structkv::nccl {

std::vector<std::vector<Piece>> PlanGroups(absl::Span<const Buffer> buffers, int64_t group_bytes) {
  std::vector<std::vector<Piece>> groups;
  int64_t room = 0;
  for (const Buffer& buffer : buffers) {
    for (int64_t offset = 0; offset < buffer.bytes;) {
      if (room == 0 || groups.back().size() == kMaxGroupPieces) {
        groups.emplace_back();
        room = group_bytes;
      }
      const int64_t bytes = std::min(room, buffer.bytes - offset);
      groups.back().push_back({buffer.data + offset, bytes});
      offset += bytes;
      room -= bytes;
    }
  }
  return groups;
}

}  // namespace structkv::nccl
