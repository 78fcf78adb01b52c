// Blocks of one region by their offsets; touches none of its bytes.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <utility>

namespace structkv::cuda {

// What a block of `bytes` takes: up to the next eighth of a power of two, and at least 256 bytes,
// so that blocks of about one size fit into each other's gaps.
int64_t ArenaSize(int64_t bytes);

// The most bytes of a block that an arena of `bytes` has room for.
int64_t LargestBlock(int64_t bytes);

// Large blocks lie from the low end on, small ones from the high end on, each in the first gap, so
// that small ones do not cut up the room of the large ones. Thread-safe.
class Arena {
 public:
  static constexpr int64_t kLargeBytes = int64_t{16} << 20;

  // A block that is taken, until it is destroyed. The arena outlives it.
  class Block {
   public:
    Block(Block&& other) noexcept
        : arena_(std::exchange(other.arena_, nullptr)),
          offset_(other.offset_),
          bytes_(other.bytes_) {}
    Block& operator=(Block&& other) noexcept {
      std::swap(arena_, other.arena_);
      std::swap(offset_, other.offset_);
      std::swap(bytes_, other.bytes_);
      return *this;
    }
    ~Block() {
      if (arena_ != nullptr) arena_->GiveBack(offset_, bytes_);
    }

    int64_t offset() const { return offset_; }  // a multiple of 256
    int64_t bytes() const { return bytes_; }    // ArenaSize of what was asked for

   private:
    friend class Arena;
    Block(Arena* arena, int64_t offset, int64_t bytes)
        : arena_(arena), offset_(offset), bytes_(bytes) {}

    Arena* arena_;
    int64_t offset_;
    int64_t bytes_;
  };

  // A region of `bytes`, down to a multiple of 256.
  explicit Arena(int64_t bytes);

  // nullopt where no gap is large enough now.
  std::optional<Block> Take(int64_t bytes);

  int64_t bytes() const { return bytes_; }
  // In all gaps together.
  int64_t free_bytes() const;

 private:
  void GiveBack(int64_t offset, int64_t bytes);

  const int64_t bytes_;
  mutable std::mutex mutex_;
  std::map<int64_t, int64_t> gaps_;  // offset -> bytes; no two touch
  int64_t free_bytes_;
};

}  // namespace structkv::cuda
