#include "client/cpp/sent_ranges.h"

#include <algorithm>
#include <iterator>

namespace structkv::client::internal {

void SentRanges::Add(uint32_t layer, int tensor, uint64_t begin, uint64_t end) {
  layers_.insert(layer);
  Ranges& ranges = ranges_[{layer, tensor}];
  // Every range that overlaps or touches the new one is merged into it.
  auto it = ranges.upper_bound(begin);
  if (it != ranges.begin() && std::prev(it)->second >= begin) --it;
  uint64_t covered = 0;
  while (it != ranges.end() && it->first <= end) {
    covered += it->second - it->first;
    begin = std::min(begin, it->first);
    end = std::max(end, it->second);
    it = ranges.erase(it);
  }
  ranges.emplace(begin, end);
  bytes_ += end - begin - covered;
}

uint64_t SentRanges::bytes(uint32_t layer, int tensor) const {
  uint64_t bytes = 0;
  const auto ranges = ranges_.find({layer, tensor});
  if (ranges == ranges_.end()) return 0;
  for (const auto& [begin, end] : ranges->second) bytes += end - begin;
  return bytes;
}

}  // namespace structkv::client::internal
