// Blocks of a region, so that a worker computes straight into memory that it shares.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"
#include "structkv/bytes.h"
#include "structkv/options.h"
#include "structkv/region.h"

namespace structkv::client {

// Thread-safe. Gives out the first free range that is large enough, and joins what comes back with
// its free neighbours. Blocks of one size never leave a gap that none of them fits; of sizes that
// differ up to n times, live blocks of M bytes in all may need up to about M * (1 + log2 n) bytes
// of the region.
class Arena {
 public:
  // Sizes and alignments are rounded up to it: the service reads tensors in place that begin at a
  // multiple of it.
  static constexpr size_t kAlignment = 64;

  // Takes all of `region`: two arenas of one region give out the same memory.
  explicit Arena(std::shared_ptr<Region> region);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // `size` bytes of unspecified content, which come back when the last copy of the block dies; they
  // may outlive the arena. Empty for 0 bytes.
  //   INVALID_ARGUMENT    `alignment` is no power of two, or more than a page
  //   RESOURCE_EXHAUSTED  no free range is large enough; what is free is named
  absl::StatusOr<Bytes> Allocate(size_t size, size_t alignment = kAlignment);

  const std::shared_ptr<Region>& region() const;
  // Bytes that no block holds, and the largest run of them.
  size_t free_bytes() const;
  size_t largest_free_bytes() const;

 private:
  class Core;
  const std::shared_ptr<Core> core_;
};

// Has results that come in messages put into blocks of `arena`, of memory of the host. One that
// finds no room, or finds memory of a GPU, ends its session as RESOURCE_EXHAUSTED. (In regions, and
// by NCCL, results come to PromptOptions.results.)
ResultAllocator AllocateFrom(std::shared_ptr<Arena> arena);

}  // namespace structkv::client
