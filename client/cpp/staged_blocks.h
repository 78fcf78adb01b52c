// Which blocks of staging arenas hold layers that are on their way, in the whole process: who finds
// an arena full knows from it whether waiting helps.
#pragma once

#include <cstdint>
#include <map>
#include <memory>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "structkv/arena.h"
#include "structkv/bytes.h"

namespace structkv::client::internal {

// Thread-safe.
class StagedBlocks {
 public:
  // Never destroyed: a block outlives the session whose layer it holds.
  static StagedBlocks& All();

  // `block` of `arena`, noted as `user`'s until its last copy dies.
  Bytes Note(Bytes block, const Arena* arena, const void* user);
  // Blocks of `arena` that came back so far; to be asked before an allocation that may fail.
  int64_t returned(const Arena* arena) const;
  // Whether users other than `user` have blocks of `arena`.
  bool OthersHave(const Arena* arena, const void* user) const;
  // Waits until more than `seen` blocks of `arena` came back: true. False where no others have any,
  // and at the deadline.
  bool WaitForOthers(const Arena* arena, const void* user, int64_t seen, absl::Time deadline);

 private:
  struct Use {
    std::map<const void*, int64_t> blocks;  // by user, above 0
    int64_t returned = 0;
  };
  void Return(const Arena* arena, const void* user);

  mutable absl::Mutex mutex_;
  // By arena; of one that is gone and another one at its address the counts go on.
  std::map<const Arena*, Use> uses_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace structkv::client::internal
