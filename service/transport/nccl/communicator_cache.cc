#include "service/transport/nccl/communicator_cache.h"

#include <algorithm>

namespace structkv::nccl {

bool CommunicatorCache::Acquire(PairId pair) {
  if (const auto found = places_.find(pair); found != places_.end()) {
    if (!found->second.leaving) return true;
  } else if (size() < capacity_) {
    places_[pair].used = ++now_;
    return true;
  }
  if (std::find(waiting_.begin(), waiting_.end(), pair) == waiting_.end()) {
    waiting_.push_back(pair);
  }
  return false;
}

void CommunicatorCache::Touch(PairId pair) {
  if (const auto found = places_.find(pair); found != places_.end()) found->second.used = ++now_;
}

std::optional<CommunicatorCache::PairId> CommunicatorCache::Evict(
    absl::FunctionRef<bool(PairId)> idle) {
  if (waiting() <= leaving_) return std::nullopt;
  auto oldest = places_.end();
  for (auto place = places_.begin(); place != places_.end(); ++place) {
    if (place->second.leaving || !idle(place->first)) continue;
    if (oldest == places_.end() || place->second.used < oldest->second.used) oldest = place;
  }
  if (oldest == places_.end()) return std::nullopt;
  oldest->second.leaving = true;
  ++leaving_;
  return oldest->first;
}

void CommunicatorCache::Quarantine(PairId pair) {
  waiting_.erase(std::remove(waiting_.begin(), waiting_.end(), pair), waiting_.end());
  const auto found = places_.find(pair);
  if (found == places_.end() || found->second.leaving) return;
  found->second.leaving = true;
  ++leaving_;
}

std::optional<CommunicatorCache::PairId> CommunicatorCache::Release(PairId pair) {
  const auto found = places_.find(pair);
  if (found == places_.end()) return std::nullopt;
  if (found->second.leaving) --leaving_;
  places_.erase(found);
  if (waiting_.empty()) return std::nullopt;
  const PairId next = waiting_.front();
  waiting_.pop_front();
  places_[next].used = ++now_;
  return next;
}

}  // namespace structkv::nccl
