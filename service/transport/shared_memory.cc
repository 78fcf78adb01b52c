#include "service/transport/shared_memory.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "service/transport/region_transport.h"

namespace structkv::transport {
namespace {

class SharedMemory final : public RegionTransport {
 public:
  using RegionTransport::RegionTransport;

  Kind kind() const override { return Kind::kSharedMemory; }
};

}  // namespace

absl::StatusOr<std::shared_ptr<Transport>> GrantSharedMemory(RegionRegistry& registry,
                                                             const TransportRequest& request,
                                                             const PromptSizes& sizes) {
  absl::StatusOr<RegionUses> regions = UseRegions(registry, request, sizes);
  if (!regions.ok()) return regions.status();
  for (size_t i = 0; i < regions->size(); ++i) {
    if (!(*regions)[i]->memory().gpu().has_value()) continue;
    return absl::FailedPreconditionError(
        absl::StrCat(request.message, "regions[", i, "] is memory of a GPU, for CUDA IPC"));
  }
  return std::make_shared<SharedMemory>(*std::move(regions), request, sizes);
}

}  // namespace structkv::transport
