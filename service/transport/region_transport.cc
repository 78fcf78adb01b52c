#include "service/transport/region_transport.h"

#include <algorithm>
#include <utility>

#include "absl/numeric/int128.h"
#include "absl/strings/str_cat.h"

namespace structkv::transport {
namespace {

uint64_t RoundUp(int64_t bytes) {
  return (static_cast<uint64_t>(bytes) + kRangeAlignment - 1) / kRangeAlignment * kRangeAlignment;
}

// Never adds what a client sent: sums may wrap around.
absl::Status CheckRange(const RegionRange& range, const RegionUses& regions) {
  if (range.region >= regions.size()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "range.region is ", range.region, "; the request names ", regions.size(), " regions"));
  }
  const auto size = static_cast<uint64_t>(regions[range.region]->memory().size());
  if (range.size_bytes > 0 && range.size_bytes <= size &&
      range.offset_bytes <= size - range.size_bytes) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(
      absl::StrCat("range has size_bytes ", range.size_bytes, " at offset_bytes ",
                   range.offset_bytes, "; region ", range.region, " has ", size, " bytes"));
}

absl::Status CheckAlignment(const RegionRange& range) {
  if (range.offset_bytes % kRangeAlignment == 0) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("range.offset_bytes is ", range.offset_bytes,
                                                 "; a multiple of ", kRangeAlignment,
                                                 " is allowed"));
}

bool Overlap(const RegionRange& one, const RegionRange& other) {
  return one.region == other.region && one.offset_bytes < other.offset_bytes + other.size_bytes &&
         other.offset_bytes < one.offset_bytes + one.size_bytes;
}

std::string RegionField(const std::string& message, size_t index) {
  return absl::StrCat(message, "regions[", index, "]");
}

absl::Status CheckResults(const TransportRequest& request, const RegionUses& regions,
                          const PromptSizes& sizes) {
  const RegionRange& results = *request.results;
  const auto invalid = [&request](absl::string_view text) {
    return absl::InvalidArgumentError(absl::StrCat(request.message, "result_range: ", text));
  };
  if (sizes.key_bytes == 0) return invalid("the output is a plan, which has no keys and values");
  if (absl::Status lies = CheckRange(results, regions); !lies.ok()) return invalid(lies.message());
  if (absl::Status aligned = CheckAlignment(results); !aligned.ok()) {
    return invalid(aligned.message());
  }
  if (!regions[results.region]->memory().writable()) {
    return invalid(absl::StrCat("region ", results.region, " was not registered as writable"));
  }
  const absl::uint128 needed =
      absl::uint128(ResultStride(sizes)) * static_cast<uint64_t>(sizes.layers);
  if (needed <= results.size_bytes) return absl::OkStatus();
  return invalid(absl::StrCat("size_bytes is ", results.size_bytes, "; ", sizes.layers,
                              " layers of ", ResultStride(sizes), " bytes are needed"));
}

}  // namespace

uint64_t ResultStride(const PromptSizes& sizes) {
  return RoundUp(sizes.key_bytes) + RoundUp(sizes.value_bytes);
}

absl::StatusOr<RegionUses> UseRegions(RegionRegistry& registry, const TransportRequest& request,
                                      const PromptSizes& sizes) {
  if (request.regions.empty()) {
    return absl::FailedPreconditionError(absl::StrCat(request.message, "regions names none"));
  }
  if (request.regions.size() > kMaxPromptRegions) {
    return absl::InvalidArgumentError(absl::StrCat(request.message, "regions has ",
                                                   request.regions.size(), " entries; at most ",
                                                   kMaxPromptRegions, " are allowed"));
  }
  RegionUses regions;
  for (size_t i = 0; i < request.regions.size(); ++i) {
    const std::string& handle = request.regions[i];
    if (std::count(request.regions.begin(), request.regions.end(), handle) > 1) {
      return absl::InvalidArgumentError(
          absl::StrCat(RegionField(request.message, i), " comes twice; each region is named once"));
    }
    absl::StatusOr<std::shared_ptr<const RegionUse>> use = registry.Use(handle, request.tenant);
    if (!use.ok()) {
      return absl::Status(use.status().code(), absl::StrCat(RegionField(request.message, i), ": ",
                                                            use.status().message()));
    }
    regions.push_back(*std::move(use));
  }
  if (request.results.has_value()) {
    absl::Status fits = CheckResults(request, regions, sizes);
    if (!fits.ok()) return fits;
  }
  return regions;
}

absl::StatusOr<engine::Buffer> RegionTransport::At(const RegionRange& range) const {
  if (absl::Status lies = CheckRange(range, regions_); !lies.ok()) return lies;
  const std::shared_ptr<const RegionUse>& use = regions_[range.region];
  // The kernel's own answer to a truncated file is dear; this one is cheap, and comes first.
  if (absl::Status whole = CheckRegion(range.region); !whole.ok()) return whole;
  return engine::Buffer::Lent(use->memory().data() + range.offset_bytes, range.size_bytes, use);
}

absl::StatusOr<engine::Buffer> RegionTransport::ResolveInPlace(const RegionRange& range) const {
  absl::StatusOr<engine::Buffer> buffer = At(range);
  if (!buffer.ok()) return buffer;
  if (absl::Status aligned = CheckAlignment(range); !aligned.ok()) return aligned;
  if (results_.has_value() && Overlap(range, *results_)) {
    return absl::InvalidArgumentError(
        absl::StrCat("range has size_bytes ", range.size_bytes, " at offset_bytes ",
                     range.offset_bytes, ", which overlaps ", message_, "result_range, ",
                     results_->size_bytes, " bytes at ", results_->offset_bytes));
  }
  return buffer;
}

void RegionTransport::GiveRoom(engine::LayerInput* input) const {
  if (!results_.has_value()) return;
  const std::shared_ptr<const RegionUse>& use = regions_[results_->region];
  std::byte* const layer = use->memory().data() + results_->offset_bytes +
                           static_cast<uint64_t>(input->layer) * ResultStride(sizes_);
  const auto room = [&use](std::byte* data, int64_t size) {
    return size == 0 ? engine::Buffer()
                     : engine::Buffer::Lent(data, static_cast<size_t>(size), use);
  };
  input->key_room = room(layer, sizes_.key_bytes);
  input->value_room = room(layer + RoundUp(sizes_.key_bytes), sizes_.value_bytes);
}

ResultPlace RegionTransport::result_place() const {
  if (!results_.has_value()) return {};
  return {*results_, regions_[results_->region]->memory().data() + results_->offset_bytes};
}

absl::Status RegionTransport::Check() const {
  for (size_t i = 0; i < regions_.size(); ++i) {
    if (absl::Status whole = CheckRegion(i); !whole.ok()) return whole;
  }
  return absl::OkStatus();
}

absl::Status RegionTransport::CheckRegion(size_t index) const {
  return OfRegion(index, regions_[index]->memory().Check());
}

absl::Status RegionTransport::OfRegion(size_t index, const absl::Status& status) const {
  if (status.ok()) return status;
  return absl::Status(status.code(),
                      absl::StrCat(RegionField(message_, index), ": ", status.message()));
}

}  // namespace structkv::transport
