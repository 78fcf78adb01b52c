#include "client/cpp/fetch_transfers.h"

#include <algorithm>
#include <utility>

namespace structkv::client::internal {

FetchTransfers::FetchTransfers(std::shared_ptr<NcclPair> pair, std::function<void()> failed)
    : failed_(std::move(failed)), transfers_(std::make_shared<PromptTransfers>(std::move(pair))) {}

void FetchTransfers::Abandon() {
  transfers_->Withdraw();
  transfers_->Close();
}

void FetchTransfers::Add(LayerResult layer, const std::string& key) {
  auto arriving = std::make_shared<Arriving>();
  arriving->arrived = key.empty();
  arriving->layer = std::move(layer);
  std::vector<nccl::Buffer> buffers;
  auto owners = std::make_unique<std::vector<std::shared_ptr<const void>>>();
  for (const Bytes* rows : {&arriving->layer.keys, &arriving->layer.values}) {
    if (rows->empty()) continue;
    buffers.push_back({rows->data(), static_cast<int64_t>(rows->size())});
    owners->push_back(rows->owner());
  }
  {
    absl::MutexLock lock(&state_->mutex);
    state_->arriving.push_back(arriving);
    if (key.empty()) return;
    ++state_->in_use;
  }
  std::shared_ptr<void> hold(owners.release(), [state = state_](auto* held) {
    delete held;
    absl::MutexLock lock(&state->mutex);
    --state->in_use;
  });
  transfers_->Offer(key, nccl::Direction::kReceive, std::move(buffers), nullptr, std::move(hold),
                    [this, arriving](const absl::Status& status) {
                      {
                        absl::MutexLock lock(&state_->mutex);
                        state_->status.Update(status);
                        arriving->arrived = status.ok();
                      }
                      if (!status.ok()) failed_();
                    });
}

std::vector<LayerResult> FetchTransfers::TakeArrived() {
  std::vector<LayerResult> layers;
  absl::MutexLock lock(&state_->mutex);
  while (!state_->arriving.empty() && state_->arriving.front()->arrived) {
    layers.push_back(std::move(state_->arriving.front()->layer));
    state_->arriving.pop_front();
  }
  return layers;
}

absl::Status FetchTransfers::WaitForAll(absl::Time deadline) {
  absl::MutexLock lock(&state_->mutex);
  const auto over = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(state_->mutex) {
    return !state_->status.ok() ||
           std::all_of(state_->arriving.begin(), state_->arriving.end(),
                       [](const auto& arriving) { return arriving->arrived; });
  };
  if (!state_->mutex.AwaitWithDeadline(absl::Condition(&over), deadline)) {
    return absl::DeadlineExceededError("the fetch's transfers were not over at its deadline");
  }
  return state_->status;
}

absl::Status FetchTransfers::status() const {
  absl::MutexLock lock(&state_->mutex);
  return state_->status;
}

bool FetchTransfers::WaitUntilLetGo(absl::Duration limit) const {
  absl::MutexLock lock(&state_->mutex);
  const auto let_go = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(state_->mutex) {
    return state_->in_use == 0;
  };
  return state_->mutex.AwaitWithTimeout(absl::Condition(&let_go), limit);
}

}  // namespace structkv::client::internal
