// Counts the bytes that a prompt has sent, each once.
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <utility>

namespace structkv::client::internal {

// Not thread-safe.
class SentRanges {
 public:
  // Notes bytes [begin, end) of a tensor of a layer; begin < end.
  void Add(uint32_t layer, int tensor, uint64_t begin, uint64_t end);

  // Layers of which anything was sent.
  uint32_t layers() const { return static_cast<uint32_t>(layers_.size()); }
  bool has_layer(uint32_t layer) const { return layers_.count(layer) > 0; }
  // Bytes of one tensor that were sent.
  uint64_t bytes(uint32_t layer, int tensor) const;
  // Bytes sent, each counted once.
  uint64_t bytes() const { return bytes_; }

 private:
  using Ranges = std::map<uint64_t, uint64_t>;  // begin -> end, disjoint and not adjacent
  std::map<std::pair<uint32_t, int>, Ranges> ranges_;
  std::set<uint32_t> layers_;
  uint64_t bytes_ = 0;
};

}  // namespace structkv::client::internal
