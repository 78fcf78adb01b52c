#include "client/cpp/prompt_transfers.h"

#include <random>
#include <utility>

#include "absl/strings/str_cat.h"

namespace structkv::client::internal {
namespace {

std::string NewPrefix() {
  std::random_device random;
  std::string prefix;
  while (prefix.size() < 16) prefix.push_back(static_cast<char>(random()));
  return prefix;
}

}  // namespace

PromptTransfers::PromptTransfers(std::shared_ptr<NcclPair> pair)
    : pair_(std::move(pair)), prefix_(NewPrefix()) {}

std::string PromptTransfers::KeyOf(uint32_t layer) const { return absl::StrCat(prefix_, layer); }

void PromptTransfers::Offer(const std::string& key, nccl::Direction direction,
                            std::vector<nccl::Buffer> buffers, void* after,
                            std::shared_ptr<void> hold, Done done) {
  {
    absl::MutexLock lock(&mutex_);
    if (withdrawn_) return;
    waiting_.insert(key);
  }
  nccl::Transfer transfer;
  transfer.direction = direction;
  transfer.buffers = std::move(buffers);
  transfer.after = after;
  transfer.hold = std::move(hold);
  // On the GPU's thread, where this object must not end.
  transfer.done = [weak = weak_from_this(), calls = pair_->calls(), key,
                   done = std::move(done)](const absl::Status& status) {
    calls->Post([weak, key, done, status] {
      if (const auto self = weak.lock()) self->Finished(key, done, status);
    });
  };
  pair_->Offer(key, std::move(transfer));
  {
    absl::MutexLock lock(&mutex_);
    if (!withdrawn_) return;
  }
  pair_->Withdraw(key);  // Withdraw() may have come before it was offered
}

void PromptTransfers::Finished(const std::string& key, const Done& done,
                               const absl::Status& status) {
  {
    absl::MutexLock lock(&mutex_);
    waiting_.erase(key);
  }
  if (absl::IsUnavailable(status)) pair_->MarkEnded();
  Call([&] { done(status); });
}

void PromptTransfers::Post(std::function<void()> call) {
  pair_->calls()->Post([weak = weak_from_this(), call = std::move(call)] {
    if (const auto self = weak.lock()) self->Call(call);
  });
}

void PromptTransfers::Call(const std::function<void()>& call) {
  absl::MutexLock lock(&call_mutex_);
  if (!closed_) call();
}

void PromptTransfers::Withdraw() {
  std::set<std::string> waiting;
  {
    absl::MutexLock lock(&mutex_);
    withdrawn_ = true;
    waiting = waiting_;
  }
  for (const std::string& key : waiting) pair_->Withdraw(key);
}

void PromptTransfers::Close() {
  absl::MutexLock lock(&call_mutex_);
  closed_ = true;
}

}  // namespace structkv::client::internal
