#include "service/transport/transport.h"

#include "absl/strings/str_cat.h"

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

std::string ResultPlace::TransferKey(int64_t layer) const {
  return absl::StrCat(transfer_prefix, layer);
}

ResultSource ResultPlace::SourceOf(int64_t layer, absl::Span<const std::byte> tensor) const {
  if (data == nullptr || tensor.empty()) return {};
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const auto at = reinterpret_cast<uintptr_t>(tensor.data());
  if (at < begin || at - begin >= range.size_bytes) return {};
  if (!transfer_prefix.empty()) return PairTransfer{TransferKey(layer), tensor.size()};
  return RegionRange{range.region, range.offset_bytes + (at - begin), tensor.size()};
}

}  // namespace structkv::transport
