#include "client/cpp/retired_blocks.h"

#include <algorithm>
#include <thread>
#include <utility>

#include "client/cpp/region_call.h"

namespace structkv::client::internal {
namespace {

constexpr absl::Duration kWatchInterval = absl::Seconds(1);

}  // namespace

RetiredBlocks& RetiredBlocks::All() {
  static auto* const all = new RetiredBlocks();
  return *all;
}

void RetiredBlocks::Add(RetiredBlock block) {
  {
    absl::MutexLock lock(&mutex_);
    retired_.push_back(std::move(block));
    if (std::exchange(watched_, true)) return;
  }
  std::thread([this] { Watch(); }).detach();
}

void RetiredBlocks::Watch() {
  while (true) {
    absl::SleepFor(kWatchInterval);
    Release(absl::InfiniteFuture());
    absl::MutexLock lock(&mutex_);
    watched_ = !retired_.empty() || asked_ > 0;
    if (!watched_) return;
  }
}

void RetiredBlocks::Release(absl::Time deadline) {
  std::vector<RetiredBlock> asked;
  {
    absl::MutexLock lock(&mutex_);
    asked.swap(retired_);
    asked_ += static_cast<int>(asked.size());
  }
  const int count = static_cast<int>(asked.size());
  std::vector<RetiredBlock> kept;
  for (RetiredBlock& retired : asked) {
    v1::GetRegionRequest request;
    request.set_handle(retired.handle);
    v1::GetRegionResponse response;
    const absl::Status status =
        CallRegions(retired.server, std::min(deadline, absl::Now() + kRegionCallLimit),
                    [&](v1::Regions::Stub& stub, grpc::ClientContext* context) {
                      return stub.GetRegion(context, request, &response);
                    });
    if (status.ok()) retired.heard = absl::Now();
    // A region that is not known any more is not mapped either.
    const bool unused = status.ok() ? response.use_count() == 0 : absl::IsNotFound(status);
    const bool over = absl::Now() - retired.heard > retired.patience;
    if (!unused && !over) kept.push_back(std::move(retired));
  }
  asked.clear();
  absl::MutexLock lock(&mutex_);
  asked_ -= count;
  for (RetiredBlock& retired : kept) retired_.push_back(std::move(retired));
}

size_t RetiredBlocks::size() const {
  absl::MutexLock lock(&mutex_);
  return retired_.size();
}

}  // namespace structkv::client::internal
