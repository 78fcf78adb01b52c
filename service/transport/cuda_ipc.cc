#include "service/transport/cuda_ipc.h"

#include <chrono>
#include <utility>

#include "absl/strings/str_cat.h"
#include "service/transport/region_transport.h"

namespace structkv::transport {
namespace {

// How long a layer waits until its client has written it.
constexpr std::chrono::seconds kEventLimit{5};

class GpuMemory final : public RegionMemory {
 public:
  GpuMemory(std::unique_ptr<ImportedMemory> imported, int64_t bytes, bool writable)
      : imported_(std::move(imported)), bytes_(bytes), writable_(writable) {}

  std::byte* data() const override { return imported_->data(); }
  int64_t size() const override { return bytes_; }
  bool writable() const override { return writable_; }
  std::optional<int> gpu() const override { return imported_->gpu(); }
  absl::Status Await(std::chrono::steady_clock::time_point end) const override {
    return imported_->Await(end);
  }
  // What is imported stays, whatever the exporter does.
  absl::Status Check() const override { return absl::OkStatus(); }

 private:
  const std::unique_ptr<ImportedMemory> imported_;
  const int64_t bytes_;
  const bool writable_;
};

class CudaIpc final : public RegionTransport {
 public:
  using RegionTransport::RegionTransport;

  Kind kind() const override { return Kind::kCudaIpc; }
  bool host_readable() const override { return false; }
  absl::StatusOr<engine::Buffer> Resolve(const RegionRange& /*range*/) const override {
    return absl::InvalidArgumentError(
        "the piece has a `range`, of memory of a GPU; of keys and values alone it is allowed, and "
        "other tensors come as `data`");
  }
  absl::Status Await() const override {
    const auto end = std::chrono::steady_clock::now() + kEventLimit;  // of all together
    for (size_t i = 0; i < regions().size(); ++i) {
      absl::Status status = OfRegion(i, regions()[i]->memory().Await(end));
      if (absl::IsDeadlineExceeded(status)) {
        return absl::DeadlineExceededError(absl::StrCat(status.message(), "; a layer waits ",
                                                        kEventLimit.count(), " s for its regions"));
      }
      if (!status.ok()) return status;
    }
    return absl::OkStatus();
  }
};

}  // namespace

std::unique_ptr<RegionMemory> GpuRegion(std::unique_ptr<ImportedMemory> imported, int64_t bytes,
                                        bool writable) {
  return std::make_unique<GpuMemory>(std::move(imported), bytes, writable);
}

absl::StatusOr<std::shared_ptr<Transport>> GrantCudaIpc(RegionRegistry& registry,
                                                        const TransportRequest& request,
                                                        const PromptSizes& sizes) {
  if (sizes.pulled) {
    return absl::FailedPreconditionError(
        "open.pull: keys and values are read where they lie, so that there is nothing to pull");
  }
  absl::StatusOr<RegionUses> regions = UseRegions(registry, request, sizes);
  if (!regions.ok()) return regions.status();
  const std::optional<int> first = regions->front()->memory().gpu();
  for (size_t i = 0; i < regions->size(); ++i) {
    const std::optional<int> gpu = (*regions)[i]->memory().gpu();
    if (!gpu.has_value()) {
      return absl::FailedPreconditionError(
          absl::StrCat(request.message, "regions[", i, "] is memory of the host"));
    }
    if (gpu == first) continue;
    return absl::FailedPreconditionError(absl::StrCat(
        request.message, "regions[", i, "] lies on GPU ", *gpu, " and ", request.message,
        "regions[0] on GPU ", *first, "; all of a prompt lie on one"));
  }
  return std::make_shared<CudaIpc>(*std::move(regions), request, sizes);
}

}  // namespace structkv::transport
