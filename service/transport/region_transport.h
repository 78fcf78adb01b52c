// What the transports have in common whose tensors lie in regions that the client has registered:
// read, and written, where they lie.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "service/transport/negotiation.h"
#include "service/transport/region_registry.h"

namespace structkv::transport {

// Regions that a prompt may name.
inline constexpr size_t kMaxPromptRegions = 64;

// Bytes from one layer's results to the next one's, where they are written into a region: keys,
// then values, each from a multiple of kRangeAlignment on. None overflows for a valid prompt.
uint64_t ResultStride(const PromptSizes& sizes);

using RegionUses = std::vector<std::shared_ptr<const RegionUse>>;

// The prompt's regions, in use, once it is known that the results fit. FAILED_PRECONDITION where it
// names none, or one of them is broken; NOT_FOUND for a handle that is not registered;
// INVALID_ARGUMENT where the range of results does not fit.
absl::StatusOr<RegionUses> UseRegions(RegionRegistry& registry, const TransportRequest& request,
                                      const PromptSizes& sizes);

class RegionTransport : public Transport {
 public:
  // All from UseRegions().
  RegionTransport(RegionUses regions, const TransportRequest& request, const PromptSizes& sizes)
      : regions_(std::move(regions)),
        results_(request.results),
        sizes_(sizes),
        message_(request.message) {}

  bool in_place() const override { return true; }
  absl::StatusOr<engine::Buffer> Resolve(const RegionRange& range) const override {
    return At(range);
  }
  absl::StatusOr<engine::Buffer> ResolveInPlace(const RegionRange& range) const override;
  bool gives_room() const override { return results_.has_value(); }
  void GiveRoom(engine::LayerInput* input) const override;
  ResultPlace result_place() const override;
  absl::Status Check() const override;

 protected:
  const RegionUses& regions() const { return regions_; }
  // Whose fault `status` is.
  absl::Status OfRegion(size_t index, const absl::Status& status) const;

 private:
  absl::StatusOr<engine::Buffer> At(const RegionRange& range) const;
  absl::Status CheckRegion(size_t index) const;

  const RegionUses regions_;
  const std::optional<RegionRange> results_;
  const PromptSizes sizes_;
  const std::string message_;
};

}  // namespace structkv::transport
