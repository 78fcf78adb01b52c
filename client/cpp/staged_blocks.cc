#include "client/cpp/staged_blocks.h"

#include <utility>

namespace structkv::client::internal {

StagedBlocks& StagedBlocks::All() {
  static auto* const all = new StagedBlocks();
  return *all;
}

Bytes StagedBlocks::Note(Bytes block, const Arena* arena, const void* user) {
  {
    absl::MutexLock lock(&mutex_);
    ++uses_[arena].blocks[user];
  }
  std::byte* const data = block.data();
  const size_t size = block.size();
  std::shared_ptr<const void> owner(
      data, [this, arena, user, held = std::move(block)](const void*) mutable {
        held = Bytes();  // before anybody hears of it
        Return(arena, user);
      });
  return {data, size, std::move(owner)};
}

void StagedBlocks::Return(const Arena* arena, const void* user) {
  absl::MutexLock lock(&mutex_);
  Use& use = uses_[arena];
  ++use.returned;
  if (--use.blocks[user] == 0) use.blocks.erase(user);
}

int64_t StagedBlocks::returned(const Arena* arena) const {
  absl::MutexLock lock(&mutex_);
  const auto found = uses_.find(arena);
  return found == uses_.end() ? 0 : found->second.returned;
}

bool StagedBlocks::OthersHave(const Arena* arena, const void* user) const {
  absl::MutexLock lock(&mutex_);
  const auto found = uses_.find(arena);
  return found != uses_.end() && found->second.blocks.size() > found->second.blocks.count(user);
}

bool StagedBlocks::WaitForOthers(const Arena* arena, const void* user, int64_t seen,
                                 absl::Time deadline) {
  absl::MutexLock lock(&mutex_);
  const Use& use = uses_[arena];
  const auto settled = [&] {
    mutex_.AssertReaderHeld();
    const bool others = use.blocks.size() > use.blocks.count(user);
    return use.returned > seen || !others;
  };
  mutex_.AwaitWithDeadline(absl::Condition(&settled), deadline);
  return use.returned > seen;
}

}  // namespace structkv::client::internal
