#include "structkv/arena.h"

#include <unistd.h>

#include <algorithm>
#include <iterator>
#include <map>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"

namespace structkv::client {
namespace {

size_t RoundUp(size_t value, size_t step) { return (value + step - 1) / step * step; }

}  // namespace

class Arena::Core {
 public:
  explicit Core(std::shared_ptr<Region> region) : region_(std::move(region)) {
    free_.emplace(0, region_->size());
    free_bytes_ = region_->size();
  }

  const std::shared_ptr<Region>& region() const { return region_; }

  // Offset of a run of `size` bytes, a multiple of kAlignment.
  absl::StatusOr<size_t> Take(size_t size, size_t alignment) {
    absl::MutexLock lock(&mutex_);
    for (auto it = free_.begin(); it != free_.end(); ++it) {
      const auto [begin, length] = *it;
      const size_t at = RoundUp(base_ + begin, alignment) - base_;
      if (at - begin > length || size > length - (at - begin)) continue;
      const size_t rest = length - (at - begin) - size;
      if (at == begin) {
        free_.erase(it);
      } else {
        it->second = at - begin;
      }
      if (rest > 0) free_.emplace(at + size, rest);
      free_bytes_ -= size;
      return at;
    }
    return absl::ResourceExhaustedError(
        absl::StrCat("the arena has no block of ", size, " bytes: ", free_bytes_, " of ",
                     region_->size(), " are free, at most ", Largest(), " of them together"));
  }

  void Return(size_t begin, size_t size) {
    absl::MutexLock lock(&mutex_);
    free_bytes_ += size;
    auto next = free_.lower_bound(begin);
    if (next != free_.end() && begin + size == next->first) {
      size += next->second;
      next = free_.erase(next);
    }
    if (next != free_.begin()) {
      const auto before = std::prev(next);
      if (before->first + before->second == begin) {
        before->second += size;
        return;
      }
    }
    free_.emplace(begin, size);
  }

  size_t free_bytes() const {
    absl::MutexLock lock(&mutex_);
    return free_bytes_;
  }

  size_t largest_free_bytes() const {
    absl::MutexLock lock(&mutex_);
    return Largest();
  }

 private:
  size_t Largest() const ABSL_SHARED_LOCKS_REQUIRED(mutex_) {
    size_t largest = 0;
    for (const auto& [begin, length] : free_) largest = std::max(largest, length);
    return largest;
  }

  const std::shared_ptr<Region> region_;
  const uintptr_t base_ = reinterpret_cast<uintptr_t>(region_->data());
  mutable absl::Mutex mutex_;
  std::map<size_t, size_t> free_ ABSL_GUARDED_BY(mutex_);  // begin -> length, no two adjacent
  size_t free_bytes_ ABSL_GUARDED_BY(mutex_) = 0;
};

Arena::Arena(std::shared_ptr<Region> region) : core_(std::make_shared<Core>(std::move(region))) {}

Arena::~Arena() = default;

absl::StatusOr<Bytes> Arena::Allocate(size_t size, size_t alignment) {
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  if (alignment == 0 || (alignment & (alignment - 1)) != 0 || alignment > page) {
    return absl::InvalidArgumentError(absl::StrCat("Allocate: the alignment is ", alignment,
                                                   "; it must be a power of two up to ", page));
  }
  if (size == 0) return Bytes();
  // What is too large stays so when it is rounded.
  const size_t rounded = RoundUp(std::min(size, core_->region()->size() + 1), kAlignment);
  const absl::StatusOr<size_t> at = core_->Take(rounded, std::max(alignment, kAlignment));
  if (!at.ok()) return at.status();
  std::byte* data = core_->region()->data() + *at;
  std::shared_ptr<const void> owner(
      static_cast<const void*>(data),
      [core = core_, at = *at, rounded](const void*) { core->Return(at, rounded); });
  return Bytes(data, size, std::move(owner));
}

const std::shared_ptr<Region>& Arena::region() const { return core_->region(); }

size_t Arena::free_bytes() const { return core_->free_bytes(); }

size_t Arena::largest_free_bytes() const { return core_->largest_free_bytes(); }

ResultAllocator AllocateFrom(std::shared_ptr<Arena> arena) {
  return [arena = std::move(arena)](uint32_t, v1::Tensor, size_t size) -> absl::StatusOr<Bytes> {
    if (arena->region()->on_gpu()) {
      return absl::ResourceExhaustedError(
          "AllocateFrom: the arena is memory of a GPU, where nothing of a message can be put; one "
          "of the host's is expected");
    }
    return arena->Allocate(size);
  };
}

}  // namespace structkv::client
