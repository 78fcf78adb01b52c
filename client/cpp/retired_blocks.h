// Memory that a server may still write to.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "client/cpp/registration.h"
#include "structkv/bytes.h"

namespace structkv::client::internal {

// Rooms for results of prompts that failed or were cancelled. Thread-safe.
class RetiredBlocks {
 public:
  // Those of the process: a block outlives the client whose prompt it was. Never destroyed.
  static RetiredBlocks& All();

  // A block in the region that `server` knows as `handle`.
  void Add(Bytes block, RegionServer server, std::string handle);
  // Asks the servers, and lets go of the blocks in regions that no prompt uses any more.
  void Release(absl::Time deadline);
  size_t size() const;

 private:
  struct Retired {
    Bytes block;
    RegionServer server;
    std::string handle;
  };

  mutable absl::Mutex mutex_;
  std::vector<Retired> retired_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace structkv::client::internal
