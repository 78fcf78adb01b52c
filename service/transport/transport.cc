#include "service/transport/transport.h"

namespace structkv::transport {

std::string_view KindName(Kind kind) {
  switch (kind) {
    case Kind::kInline:
      return "inline";
    case Kind::kSharedMemory:
      return "shared_memory";
    case Kind::kCudaIpc:
      return "cuda_ipc";
    case Kind::kNccl:
      return "nccl";
  }
  return "?";
}

std::optional<RegionRange> ResultPlace::RangeOf(absl::Span<const std::byte> tensor) const {
  if (data == nullptr || tensor.empty()) return std::nullopt;
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const auto at = reinterpret_cast<uintptr_t>(tensor.data());
  if (at < begin || at - begin >= range.size_bytes) return std::nullopt;
  return RegionRange{range.region, range.offset_bytes + (at - begin), tensor.size()};
}

}  // namespace structkv::transport
