// Memory that a server may still write to.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "client/cpp/registration.h"
#include "structkv/bytes.h"
#include "structkv/region.h"

namespace structkv::client::internal {

// A block in `region`, which `server` knows as `handle`.
struct RetiredBlock {
  Bytes block;
  std::shared_ptr<Region> region;
  RegionServer server;
  std::string handle;
  absl::Time heard = absl::Now();  // when the server was last known to live
};

// Rooms for results of prompts that failed or were cancelled. Thread-safe.
class RetiredBlocks {
 public:
  // Those of the process: a block outlives the client whose prompt it was. Never destroyed.
  static RetiredBlocks& All();

  // A thread asks for it from time to time, as long as there are any.
  void Add(RetiredBlock block);
  // Asks the servers, until `deadline`, and lets go of the blocks in those of `regions`, or of all
  // where that is empty, that no prompt uses any more, or whose server must be gone.
  void Release(absl::Span<const std::shared_ptr<Region>> regions, absl::Time deadline);
  size_t size() const;

 private:
  void Watch();

  mutable absl::Mutex mutex_;
  std::vector<RetiredBlock> retired_ ABSL_GUARDED_BY(mutex_);
  int asked_ ABSL_GUARDED_BY(mutex_) = 0;  // blocks that a Release() has taken out to ask for them
  bool watched_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace structkv::client::internal
