#include "kernels/cuda/arena.h"

#include <algorithm>
#include <bit>
#include <iterator>

namespace structkv::cuda {
namespace {

constexpr int64_t kGrain = 256;

// What sizes from `bytes` on, up to the next power of two, are multiples of.
int64_t StepAt(int64_t bytes) {
  return std::max(kGrain, static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(bytes))) / 8);
}

}  // namespace

int64_t ArenaSize(int64_t bytes) {
  if (bytes <= kGrain) return kGrain;
  const int64_t step = StepAt(bytes);
  return (bytes + step - 1) / step * step;
}

int64_t LargestBlock(int64_t bytes) { return bytes / StepAt(bytes) * StepAt(bytes); }

Arena::Arena(int64_t bytes) : bytes_(bytes / kGrain * kGrain), free_bytes_(bytes_) {
  if (bytes_ > 0) gaps_.emplace(0, bytes_);
}

std::optional<Arena::Block> Arena::Take(int64_t bytes) {
  const int64_t size = ArenaSize(bytes);
  const std::lock_guard lock(mutex_);
  const auto fits = [size](const auto& gap) { return gap.second >= size; };
  const bool large = size >= kLargeBytes;
  auto gap = gaps_.end();
  if (large) {
    gap = std::find_if(gaps_.begin(), gaps_.end(), fits);
  } else if (const auto last = std::find_if(gaps_.rbegin(), gaps_.rend(), fits);
             last != gaps_.rend()) {
    gap = std::prev(last.base());
  }
  if (gap == gaps_.end()) return std::nullopt;
  const auto [begin, room] = *gap;
  gaps_.erase(gap);
  if (room > size) gaps_.emplace(large ? begin + size : begin, room - size);
  free_bytes_ -= size;
  return Block(this, large ? begin : begin + room - size, size);
}

int64_t Arena::free_bytes() const {
  const std::lock_guard lock(mutex_);
  return free_bytes_;
}

void Arena::GiveBack(int64_t offset, int64_t bytes) {
  const std::lock_guard lock(mutex_);
  free_bytes_ += bytes;
  const auto next = gaps_.lower_bound(offset);
  if (next != gaps_.end() && next->first == offset + bytes) {
    bytes += next->second;
    gaps_.erase(next);
  }
  const auto after = gaps_.lower_bound(offset);
  if (after != gaps_.begin()) {
    const auto before = std::prev(after);
    if (before->first + before->second == offset) {
      before->second += bytes;
      return;
    }
  }
  gaps_.emplace(offset, bytes);
}

}  // namespace structkv::cuda
