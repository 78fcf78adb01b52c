#include "client/cpp/retired_blocks.h"

#include <utility>

#include "client/cpp/region_call.h"

namespace structkv::client::internal {

RetiredBlocks& RetiredBlocks::All() {
  static auto* const all = new RetiredBlocks();
  return *all;
}

void RetiredBlocks::Add(Bytes block, RegionServer server, std::string handle) {
  absl::MutexLock lock(&mutex_);
  retired_.push_back({std::move(block), std::move(server), std::move(handle)});
}

void RetiredBlocks::Release(absl::Time deadline) {
  std::vector<Retired> asked;
  {
    absl::MutexLock lock(&mutex_);
    asked.swap(retired_);
  }
  std::vector<Retired> kept;
  for (Retired& retired : asked) {
    v1::GetRegionRequest request;
    request.set_handle(retired.handle);
    v1::GetRegionResponse response;
    const absl::Status status =
        CallRegions(retired.server, std::min(deadline, absl::Now() + kRegionCallLimit),
                    [&](v1::Regions::Stub& stub, grpc::ClientContext* context) {
                      return stub.GetRegion(context, request, &response);
                    });
    // A region that is not known any more is not mapped either.
    const bool unused = status.ok() ? response.use_count() == 0 : absl::IsNotFound(status);
    if (!unused) kept.push_back(std::move(retired));
  }
  absl::MutexLock lock(&mutex_);
  for (Retired& retired : kept) retired_.push_back(std::move(retired));
}

size_t RetiredBlocks::size() const {
  absl::MutexLock lock(&mutex_);
  return retired_.size();
}

}  // namespace structkv::client::internal
