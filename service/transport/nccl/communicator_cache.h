// Which pairs of a GPU have a communicator: at most so many, the least recently used one makes way.
#pragma once

#include <cstdint>
#include <deque>
#include <optional>

#include "absl/container/flat_hash_map.h"
#include "absl/functional/function_ref.h"

namespace structkv::nccl {

// Keeps account alone: the caller connects and closes. A pair has one place at most. Not
// thread-safe.
class CommunicatorCache {
 public:
  using PairId = uint64_t;

  explicit CommunicatorCache(int capacity) : capacity_(capacity) {}

  // Whether the pair has a place, which it may just have been given. Otherwise it waits for one.
  bool Acquire(PairId pair);
  // It was used just now.
  void Touch(PairId pair);
  // The least recently used pair that is idle, where pairs wait in vain: it must be closed. Its
  // place stays taken until Release.
  std::optional<PairId> Evict(absl::FunctionRef<bool(PairId)> idle);
  // The pair failed: its place stays taken, until its abort has returned and Release is called. A
  // pair that waits waits no more.
  void Quarantine(PairId pair);
  // The place is free. Whom it was given to: whoever has waited for longest.
  std::optional<PairId> Release(PairId pair);

  int size() const { return static_cast<int>(places_.size()); }
  int waiting() const { return static_cast<int>(waiting_.size()); }

 private:
  struct Place {
    uint64_t used = 0;     // when, by `now_`
    bool leaving = false;  // evicted or in quarantine
  };

  const int capacity_;
  uint64_t now_ = 0;
  int leaving_ = 0;
  absl::flat_hash_map<PairId, Place> places_;
  std::deque<PairId> waiting_;
};

}  // namespace structkv::nccl
