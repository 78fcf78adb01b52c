// Memory in equal parts, which are handed out and come back.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

namespace structkv::transport {

// Thread-safe. Parts hold the memory.
class Slots : public std::enable_shared_from_this<Slots> {
 public:
  // `count` parts of `bytes` from `offset` on.
  Slots(std::shared_ptr<std::byte> memory, int64_t offset, int64_t count, int64_t bytes)
      : memory_(std::move(memory)) {
    for (int64_t i = 0; i < count; ++i) free_.push_back(memory_.get() + offset + i * bytes);
  }

  // A part, until its last share is gone. Null where all are taken.
  std::shared_ptr<std::byte> Take() {
    const std::lock_guard lock(mutex_);
    if (free_.empty()) return nullptr;
    std::byte* const part = free_.back();
    free_.pop_back();
    return {part, [self = shared_from_this()](std::byte* taken) {
              const std::lock_guard free_lock(self->mutex_);
              self->free_.push_back(taken);
            }};
  }

 private:
  const std::shared_ptr<std::byte> memory_;
  std::mutex mutex_;
  std::vector<std::byte*> free_;
};

}  // namespace structkv::transport
